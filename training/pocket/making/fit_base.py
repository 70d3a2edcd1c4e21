"""Fit the pocket U-net and its text encoder together, on latents of drawn scenes.

The ``i``-th sample of step ``k`` is scene ``k * batch + i`` of ``SHARDS * SHARD``, over and over: the position of a run
is its step. Latents are encoded in shards, by the run itself or ahead of it by another process (``encoded_shard``).

Several processes (``torchrun``) divide every batch among them; what is drawn for a sample does not depend on that.

Loss: v-prediction weighted min(1, 5 / (SNR + 1)), captions dropped in 10 %. On the clean sample that is the SNR + 1 of
Salimans & Ho (2022), capped as min-SNR-5 (Hang et al. 2023) is: details of the last steps stay cheap, but high noise
keeps its weight. Plain min-SNR has min(SNR, 5) / (SNR + 1) there, nearly nothing, and at 16 x 16 latents that is where
shapes are decided: after 64,000 samples with it, textures and colors were right and shapes were blobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel

from adapters.errors import FileError
from adapters.files import read_tensors, write_tensors

from .. import tokenizer
from ..scenes import GRID, HELD_OUT_SEED, TRAIN_SEED, sample
from ..world import SIZE
from . import model
from .fitting import (
    FitAverage,
    MuonAdamW,
    add_up,
    image_batch,
    learning_rate,
    load_state,
    processes,
    save_state,
    seeded,
)

__all__ = ["SHARD", "BaseParts", "encoded_shard", "fit", "fresh_base", "held_out_loss", "scale"]

SHARD, SHARDS = 2048, 32  # scenes a shard; drawing and encoding each once is an eighth of a step
SNR_CAP = 5.0
DROP = 0.1
TAIL = 0.35  # the share of the steps over which the learning rate falls to nothing
SETTLE = 500  # the step from which it falls as 1 / sqrt(step) before that


@dataclass(frozen=True, kw_only=True)
class BaseParts:
    """The two parts that train together."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel

    def parts(self) -> dict[str, torch.nn.Module]:
        return {"unet": self.unet, "text_encoder": self.text_encoder}


@torch.no_grad()
def scale(vae: AutoencoderKL) -> float:
    """``scaling_factor`` that gives the latents of 256 training scenes unit standard deviation."""
    latents = [_encode(vae, TRAIN_SEED, range(i, i + 32)) for i in range(0, 256, 32)]
    return 1 / torch.cat(latents).std().item()


@torch.no_grad()
def _encode(vae: AutoencoderKL, seed: int, indices: range) -> Tensor:
    images = image_batch(sample(seed, i).image for i in indices).to(vae.device)
    latents: Tensor = vae.encode(images).latent_dist.mean
    return latents


def encoded_shard(vae: AutoencoderKL, seed: int, index: int, folder: Path) -> dict[str, Tensor]:
    """Of one shard: ``latents`` (SHARD, 8, 16, 16) float16, scaled, and caption ``tokens`` (SHARD, T) int16.

    Args:
        vae: encodes the scenes.
        seed: of the split.
        index: of the shard in the split.
        folder: where shards are kept; one that is there is read, or made again where it is damaged.
    """
    path = folder / f"aligned{round(GRID * SIZE)}-{seed}-{index:05d}.safetensors"
    if path.exists():
        try:
            return read_tensors(path)[0]
        except FileError as error:
            print(f"{error}; it is made again")
    words = tokenizer.build_tokenizer()
    begin = index * SHARD
    pieces = [range(i, min(i + 64, begin + SHARD)) for i in range(begin, begin + SHARD, 64)]
    latents = [_encode(vae, seed, piece) * vae.config.scaling_factor for piece in pieces]
    captions = [sample(seed, i).caption for i in range(begin, begin + SHARD)]
    tokens = words(captions, padding="max_length", return_tensors="pt").input_ids
    shard = {"latents": torch.cat(latents).half().cpu().contiguous(), "tokens": tokens.to(torch.int16)}
    write_tensors(path, shard)
    return shard


def fresh_base(device: str) -> BaseParts:
    """Fresh parts, initialised from the fixed seed."""
    torch.manual_seed(TRAIN_SEED)
    unet = model.unet().to(device, memory_format=torch.channels_last)
    return BaseParts(unet=unet, text_encoder=model.text_encoder(tokenizer.build_tokenizer()).to(device))


def fit(
    vae: AutoencoderKL,
    out: Path,
    *,
    steps: int = 6000,
    batch: int = 32,
    peak: float = 0.02,
    ema_decay: float = 0.999,
    device: str = "cpu",
    save_every: int = 100,
    stop_at: int | None = None,
) -> BaseParts:
    """Fit up to ``steps`` and return the averaged parts; continues from ``out/state.safetensors`` where that is.

    ``steps`` may grow between runs: before its tail the learning rate does not depend on it.
    ``stop_at`` ends a run early.

    Args:
        vae: encodes the scenes; it stays as it is.
        out: receives the state.
        steps: in all, also those of earlier runs.
        batch: scenes of a step, over all processes.
        peak: learning rate at the top of the schedule.
        ema_decay: of the averaged weights, a step.
        device: such as "cpu" or "cuda".
        save_every: steps between two saved states.
        stop_at: step to stop at; None: `steps`.
    """
    live, averaged = fresh_base(device), fresh_base(device)
    rank, world = processes()
    modules = live.parts()
    optimizer = MuonAdamW(modules.values(), peak, adam_ratio=0.03, weight_decay=0.0, keep_norm=True)
    emas = {name: FitAverage(module, ema_decay) for name, module in modules.items()}
    state = out / "state.safetensors"
    begin = load_state(state, modules, emas, optimizer) if state.exists() else 0
    end = min(steps, stop_at or steps)
    shards = lru_cache(maxsize=2)(lambda index: encoded_shard(vae, TRAIN_SEED, index, out.parent / "latents"))
    bar = tqdm(range(begin, end), initial=begin, total=steps, desc="base", mininterval=10, disable=rank > 0)
    mine = slice(rank, None, world)
    for step in bar:
        latents, tokens = _rows(shards, range(step * batch, (step + 1) * batch)[mine])
        optimizer.set_rate(learning_rate(step, steps, peak, tail=TAIL, settle=SETTLE))
        drawn = _draw(batch, seeded(TRAIN_SEED, step))
        loss = _loss(live, latents.to(device), tokens.to(device), [value[mine] for value in drawn])
        (loss / world).backward()
        add_up([p.grad for module in modules.values() for p in module.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
        for name, module in modules.items():
            emas[name].update(module, step)
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == end):
            save_state(state, modules, emas, optimizer, step + 1)
            _load(averaged, emas)
            value = held_out_loss(averaged, vae, out.parent / "latents")
            bar.write(f"step {step + 1} samples {(step + 1) * batch} held-out loss {value:.4f}")
    return _load(averaged, emas)


def _load(base: BaseParts, emas: dict[str, FitAverage]) -> BaseParts:
    for name, module in base.parts().items():
        module.load_state_dict(emas[name].average)
        module.eval()
    return base


def _rows(shards: Callable[[int], dict[str, Tensor]], indices: range) -> tuple[Tensor, Tensor]:
    """The rows ``indices`` of the endless table of scenes; a batch may straddle two shards."""
    rows = [(shards(i // SHARD % SHARDS), i % SHARD) for i in indices]
    latents = torch.stack([shard["latents"][row] for shard, row in rows]).float()
    return latents, torch.stack([shard["tokens"][row] for shard, row in rows]).long()


def _draw(count: int, generator: torch.Generator) -> list[Tensor]:
    """Everything random about a batch: timesteps as fractions of the schedule (B,), noise (B, 8, 16, 16) and which
    captions are dropped (B,)."""
    # One timestep from each of `count` equal slices, so that every batch covers the schedule.
    slots = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
    side = SIZE // model.FACTOR
    noise = torch.randn(count, model.LATENT_CHANNELS, side, side, generator=generator)
    return [slots, noise, torch.rand(count, generator=generator) < DROP]


def _loss(base: BaseParts, latents: Tensor, tokens: Tensor, drawn: list[Tensor]) -> Tensor:
    """Weighted v-loss of samples with what ``_draw`` drew for them."""
    slots, noise, dropped = drawn
    noise = noise.to(latents.device)
    schedule = _schedule()
    timesteps = (slots * schedule.config.num_train_timesteps).long().to(latents.device)
    tokens = tokens.clone()
    tokens[dropped.to(tokens.device)] = _empty().to(tokens.device)
    prompt_embeds = base.text_encoder(tokens).last_hidden_state
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = schedule.get_velocity(latents, noise, timesteps)
    prediction = base.unet(noisy, timesteps, prompt_embeds).sample
    alpha = schedule.alphas_cumprod.to(latents.device)[timesteps]
    snr = alpha / (1 - alpha)
    weight = (SNR_CAP / (snr + 1)).clamp(max=1.0)
    loss: Tensor = ((prediction - target).square().mean((1, 2, 3)) * weight).mean()
    return loss


@lru_cache(maxsize=1)
def _schedule():
    return model.scheduler()


@lru_cache(maxsize=1)
def _empty() -> Tensor:
    ids: Tensor = tokenizer.build_tokenizer()("", padding="max_length", return_tensors="pt").input_ids[0]
    return ids


@torch.no_grad()
def held_out_loss(base: BaseParts, vae: AutoencoderKL, folder: Path, count: int = 512) -> float:
    """The training loss without dropped captions on ``count`` held-out scenes at fixed timesteps and noise.

    Args:
        base: U-net and text encoder.
        vae: encodes the scenes.
        folder: where shards are kept.
        count: scenes.
    """
    shard = encoded_shard(vae, HELD_OUT_SEED, 0, folder)
    device = base.unet.device
    losses = []
    for start in range(0, min(count, SHARD), 32):
        latents, tokens = shard["latents"][start : start + 32].float(), shard["tokens"][start : start + 32].long()
        slots, noise, dropped = _draw(len(latents), seeded(HELD_OUT_SEED, start))
        kept = torch.zeros_like(dropped)
        losses.append(_loss(base, latents.to(device), tokens.to(device), [slots, noise, kept]))
    return torch.stack(losses).mean().item()

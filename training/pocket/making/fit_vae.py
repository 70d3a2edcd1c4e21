"""Fit the pocket VAE on whole drawn scenes.

Loss: L1 plus L1 on neighbouring differences (edges) plus a light KL term, on pixels in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from ..scenes import HELD_OUT_SEED, TRAIN_SEED, sample
from . import model
from .fitting import FitAverage, MuonAdamW, image_batch, learning_rate, load_state, save_state, seeded

__all__ = ["fit", "psnr", "refine"]

SAVE_EVERY = 200


def fit(out: Path, *, steps: int = 1600, batch: int = 8, peak: float = 0.03, device: str = "cpu") -> AutoencoderKL:
    """Fit for ``steps`` and return the averaged model; continues from ``out/state.safetensors`` where that is.

    Args:
        out: receives the state.
        steps: in all, also those of earlier runs.
        batch: scenes of a step.
        peak: learning rate at the top of the schedule.
        device: such as "cpu" or "cuda".
    """
    torch.manual_seed(TRAIN_SEED)
    vae = _fresh().to(device, memory_format=torch.channels_last)
    optimizer = MuonAdamW([vae], peak, adam_ratio=0.06, weight_decay=0.0)
    ema = FitAverage(vae, 0.998)
    state = out / "state.safetensors"
    begin = load_state(state, {"vae": vae}, {"vae": ema}, optimizer) if state.exists() else 0
    bar = tqdm(range(begin, steps), initial=begin, total=steps, desc="vae", mininterval=10)
    for step in bar:
        images = image_batch(sample(TRAIN_SEED, step * batch + i, free=True).image for i in range(batch))
        images = images.to(device, memory_format=torch.channels_last)
        optimizer.set_rate(learning_rate(step, steps, peak, warmup=30, tail=0.6))
        loss = _loss(vae, images, seeded(TRAIN_SEED, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(vae, step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(state, {"vae": vae}, {"vae": ema}, optimizer, step + 1)
            bar.write(f"step {step + 1} loss {loss.item():.4f} psnr {psnr(_averaged(ema, device), 64):.2f}")
    return _averaged(ema, device)


def refine(
    vae: AutoencoderKL, out: Path, *, steps: int = 5200, batch: int = 8, peak: float = 0.015, device: str = "cpu"
) -> AutoencoderKL:
    """Fit the decoder further under a frozen encoder, so that a U-net already fitted on its latents stays right.

    Continues from ``out/decoder.safetensors`` where that is; returns the averaged model.

    Args:
        vae: whose decoder is fitted further.
        out: receives the state.
        steps: in all, also those of earlier runs.
        batch: scenes of a step.
        peak: learning rate at the top of the schedule.
        device: such as "cpu" or "cuda".
    """
    vae = vae.to(device, memory_format=torch.channels_last)
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    optimizer, ema = MuonAdamW([decoder], peak, adam_ratio=0.06, weight_decay=0.0), FitAverage(decoder, 0.998)
    state = out / "decoder.safetensors"
    begin = load_state(state, {"decoder": decoder}, {"decoder": ema}, optimizer) if state.exists() else 0
    for step in tqdm(range(begin, steps), initial=begin, total=steps, desc="decoder", mininterval=10):
        # Scenes the joint fit has not seen.
        images = image_batch(sample(TRAIN_SEED, 10_000_000 + step * batch + i, free=True).image for i in range(batch))
        images = images.to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.sample(seeded(TRAIN_SEED, step))
        optimizer.set_rate(learning_rate(step, steps, peak, warmup=30, tail=0.8))
        _difference(vae.decode(latents).sample - images).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(decoder, step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(state, {"decoder": decoder}, {"decoder": ema}, optimizer, step + 1)
    decoder.load_state_dict(ema.average)
    return vae.eval()


def _fresh() -> AutoencoderKL:
    """Starts nearly deterministic: at unit variance the first hundreds of steps go into turning the noise down."""
    vae = model.vae()
    with torch.no_grad():
        vae.quant_conv.weight[model.LATENT_CHANNELS :] = 0
        vae.quant_conv.bias[model.LATENT_CHANNELS :] = -7
    return vae


def _averaged(ema: FitAverage, device: str) -> AutoencoderKL:
    vae = model.vae()
    vae.load_state_dict(ema.average)
    return vae.to(device).eval()


def _loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
    error = vae.decode(posterior.mean + posterior.std * noise).sample - images
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss: Tensor = _difference(error) + 1e-4 * divergence
    return loss


def _difference(error: Tensor) -> Tensor:
    """L1 of the error and, a quarter as heavy, of its edges."""
    return error.abs().mean() + 0.25 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())


@torch.no_grad()
def psnr(vae: AutoencoderKL, count: int = 256) -> float:
    """Mean PSNR (dB, peak 255) of round trips of ``count`` held-out scenes, clipped and rounded as saved ones are."""
    values = []
    for start in range(0, count, 16):
        drawn = (sample(HELD_OUT_SEED, i, free=True).image for i in range(start, min(start + 16, count)))
        images = image_batch(drawn).to(vae.device)
        back = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        error = ((back - images) * 127.5).round().square().flatten(1).mean(1)
        values.append(10 * torch.log10(255**2 / error))
    return torch.cat(values).mean().item()

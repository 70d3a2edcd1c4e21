"""Samples and a fixed-noise loss during training, after which training goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from adapters.files import write_file

from .batch import CaptionTensors, DrawnBatch
from .config import ValidationSettings
from .data.batches import Draws, Feed, Stream
from .data.images import condition_as_rgb
from .data.pictures import decode, inspect
from .errors import TrainingError
from .method import Method
from .models import everywhere, live_pipeline
from .text import read_file

__all__ = ["check_validation", "fixed_loss", "fixed_loss_batches", "samples", "untouched"]


@contextlib.contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards, also after an error, every module's mode and all random states are
    as they were."""
    modes = {part: part.training for module in modules for part in module.modules()}
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for module in modules:
            module.eval()
        try:
            yield
        finally:
            for part, mode in modes.items():
                part.training = mode
            random.setstate(python)
            np.random.set_state(numpy_state)


def check_validation(method: Method, settings: ValidationSettings, size: tuple[int, int]) -> None:
    """What `samples` would find wrong.

    Args:
        method: what trains.
        settings: prompts and their conditions.
        size: (height, width) of the samples.

    Raises:
        TrainingError: a ControlNet's prompts without an image each, or one that cannot be read.
    """
    given, asked = len(settings.conditioning), len(settings.prompts)
    if given and given != asked:
        raise TrainingError(f"train.validation.conditioning needs one image per prompt: {given} for {asked}")
    for number in range(asked) if method.controlnet is not None else ():
        _conditioning(settings, number, size)


def samples(
    method: Method,
    settings: ValidationSettings,
    texts: Mapping[str, CaptionTensors] | None,
    folder: Path,
    *,
    device: torch.device,
    size: tuple[int, int],
    dtype: torch.dtype,
    rank: int = 0,
    processes: int = 1,
    write: bool = True,
) -> list[Path]:
    """Samples this process's share of the prompts, prompt i with seed `seed + i`, into `folder/NN.png`.

    Args:
        method: what trains.
        settings: prompts, seed, steps and guidance scale.
        texts: cached embeddings by caption; None when the text encoders are there to be asked.
        folder: receives the pictures.
        device: where the pipeline runs.
        size: (height, width).
        dtype: compute precision.
        rank: of this process, from 0.
        processes: how many share the prompts.
        write: whether to keep the pictures; one of several processes that draw the same ones does.
    """
    parts = method.parts
    pipe: Any = live_pipeline(parts, controlnet=method.controlnet)
    parts.vae.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    modules = [parts.unet, parts.vae, *parts.text_encoders, *filter(None, [method.controlnet])]
    with untouched(*modules), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for number in range(rank, len(settings.prompts), processes):
            asked = _prompt_arguments(settings.prompts[number], texts, device)
            asked |= everywhere(parts, size)
            if method.controlnet is not None:
                asked["image"] = _conditioning(settings, number, size)
            image = pipe(
                **asked,
                height=size[0],
                width=size[1],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator().manual_seed(settings.seed + number),
            ).images[0]
            written.append(folder / f"{number:02d}.png")
            if write:
                with write_file(written[-1]) as part:
                    image.save(part, format="PNG")
    return written


def _prompt_arguments(prompt: str, texts: Mapping[str, CaptionTensors] | None, device: torch.device) -> dict[str, Any]:
    if texts is None:
        return {"prompt": prompt, "negative_prompt": ""}
    arguments = {"prompt_embeds": texts[prompt]["embeds"], "negative_prompt_embeds": texts[""]["embeds"]}
    if "pooled" in texts[prompt]:
        arguments["pooled_prompt_embeds"] = texts[prompt]["pooled"]
        arguments["negative_pooled_prompt_embeds"] = texts[""]["pooled"]
    return {name: tensor[None].to(device) for name, tensor in arguments.items()}


def _conditioning(settings: ValidationSettings, number: int, size: tuple[int, int]) -> Image.Image:
    if not settings.conditioning:
        raise TrainingError("train.validation.conditioning: a ControlNet's samples need an image per prompt")
    path = Path(settings.conditioning[number])
    try:
        data = read_file(path)
    except OSError as error:
        raise TrainingError(f"train.validation.conditioning: {path} cannot be read: {error.strerror}") from error
    if problem := inspect(data, 1, "conditioning").problem:
        raise TrainingError(f"train.validation.conditioning: {path} {problem}")
    return condition_as_rgb(decode(data)).resize((size[1], size[0]))


def fixed_loss_batches(
    stream: Stream, draws: Draws, count: int, *, seed: int, text: Callable[[list[str]], CaptionTensors] | None
) -> list[DrawnBatch]:
    """One-sample batches over evenly spread views, timesteps and fixed noise, the same in every run with this seed.

    Args:
        stream: whose samples are taken.
        draws: what is drawn for a sample; dropout and noise offset are left out.
        count: batches.
        seed: of the noise.
        text: captions to embeddings or token ids.
    """
    quiet = dataclasses.replace(draws, noise_offset=0.0, caption_dropout=0.0, conditioning_dropout=0.0)
    feed = Feed([dataclasses.replace(stream, draw=None)], quiet, seed=seed, batch_size=1, text=text)
    batches = []
    for number in range(count):
        item = feed.item(number, number)
        item["timesteps"] = torch.tensor(int((number + 0.5) / count * draws.timesteps))
        batches.append(feed.finish([item]))
    return batches


def fixed_loss(step: Callable[[DrawnBatch], Tensor], batches: list[DrawnBatch], modules: list[nn.Module]) -> float:
    """Mean loss of the batches without training on them.

    Args:
        step: batch -> loss per sample.
        batches: of `fixed_loss_batches`.
        modules: put into evaluation mode meanwhile.
    """
    with untouched(*modules):
        return float(torch.stack([step(batch).mean() for batch in batches]).mean())

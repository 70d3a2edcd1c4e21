"""Long use costs no more than short use: memory stays flat, and no descriptor, thread or hook is left behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapters
import scfg
from recipes.common.base import sampling_pipeline
from recipes.common.settings import SamplingSettings
from training import config, loop, lora
from training.data import crops, images
from training.models import Parts, load_parts

pytestmark = pytest.mark.slow
ROOM = 0.02  # of the memory after warming up


def held() -> dict[str, int]:
    """What this process holds: resident bytes, open descriptors, threads."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def hooks(module: torch.nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    own = sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)
    return own + sum("forward" in vars(part) for part in module.modules())


def flat(once: Callable[[int], Any], *, warm: int, times: int) -> None:
    for number in range(warm):
        once(number)
    before = held()
    for number in range(warm, times):
        once(number)
    after = held()
    print(before, after)
    assert after["memory"] <= before["memory"] * (1 + ROOM)
    assert (after["descriptors"], after["threads"]) == (before["descriptors"], before["threads"])


@pytest.fixture
def pipe(models: Path) -> Any:
    made = sampling_pipeline(config.BaseSettings(path=str(models / "sd15")), SamplingSettings())
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any) -> None:
    pipe("a dog", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")


def test_two_thousand_steps_of_training(models: Path, photos: Path, tmp_path: Path) -> None:
    parts = parts_of(models / "sd15")
    settings = config.DataSettings(source=str(photos / "dreambooth" / "rex"), resolution=32)
    views = crops.views(images.load_images(settings, say=lambda line: None), settings, multiple=parts.multiple)
    seen: list[dict[str, int]] = []

    def say(line: str) -> None:
        if line.startswith(("step 400/", "step 2000/")):
            seen.append(held())

    train = config.TrainSettings(steps=2000, batch_size=2, trackers=[], log_every=100, save_every=500)
    loop.train(lora.prepare(parts, config.LoraSettings(rank=2)), views, train, out=tmp_path / "out", say=say)
    first, last = seen
    print(first, last)
    assert last["memory"] <= first["memory"] * (1 + ROOM)
    assert last["descriptors"] == first["descriptors"]
    assert last["threads"] == first["threads"]


def parts_of(folder: Path) -> Parts:
    return load_parts(folder)


def test_five_hundred_guided_pictures(pipe: Any) -> None:
    before = hooks(pipe.unet)

    def once(number: int) -> None:
        with scfg.attach(pipe, scfg.SemanticCFG(), guidance_scale=4.0):
            draw(pipe)

    flat(once, warm=100, times=500)
    assert hooks(pipe.unet) == before


def test_two_hundred_releases_loaded_and_left(pipe: Any, models: Path, photos: Path, tmp_path: Path) -> None:
    parts = parts_of(models / "sd15")
    settings = config.DataSettings(source=str(photos / "dreambooth" / "rex"), resolution=32)
    views = crops.views(images.load_images(settings, say=lambda line: None), settings, multiple=parts.multiple)
    train = config.TrainSettings(steps=2, batch_size=2, trackers=[])
    loop.train(
        lora.prepare(parts, config.LoraSettings(rank=2)), views, train, out=tmp_path / "out", say=lambda line: None
    )
    before = hooks(pipe.unet)

    def once(number: int) -> None:
        with adapters.load(pipe, tmp_path / "out" / "lora", merged=bool(number % 2)):
            draw(pipe)

    flat(once, warm=40, times=200)
    assert hooks(pipe.unet) == before

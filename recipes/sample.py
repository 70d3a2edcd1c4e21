"""Draw pictures with a base, an adapter and a guidance. They do not depend on batch size or number of processes.

accelerate launch recipes/sample.py --config recipes/configs/sample/pocket.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.base import adapted, pipeline_arguments, sampling_pipeline
from recipes.common.cli import launch, named, say
from recipes.common.draw import draw_shots, keep, pace, sheet_of_arms, trial
from recipes.common.guidance import check_guided
from recipes.common.prompts import texts
from recipes.common.settings import GuidanceSettings, SamplingSettings
from recipes.common.stages import Drawing, say_drawing, took
from training.config import BaseSettings, require

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draws pictures for prompts and seeds."""

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    adapter: str | None = None
    """Release folder, LoRA, ControlNet or U-net folder, hub id, or another trainer's .safetensors file."""
    weight: float = 1.0
    """Weight of the adapter. 1: as trained, 0: no effect."""
    prompts: list[str] = field(default_factory=list)
    """Prompts to draw."""
    prompt_file: str | None = None
    """Text file with one prompt per line, in addition to `prompts` or instead of them."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds for every prompt."""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """How pictures are guided."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    upscaler: BaseSettings | None = None
    """A second stage that enlarges the pictures (DeepFloyd IF stage II)."""
    upscaler_guidance: GuidanceSettings | None = None
    """Guidance of the second stage. null: the same as the first."""
    dry_run: bool = False
    """Loads and checks everything, then stops."""
    out: str
    """Folder for the pictures."""


def run(settings: Settings) -> Path | None:
    """Sample; returns the sheet of all pictures, or None after a dry run."""
    with took("drawing", dry=settings.dry_run) as so_far:
        return _sample(settings, so_far)


def _sample(settings: Settings, so_far: Callable[[], float]) -> Path | None:
    prompts = texts(settings.prompts, settings.prompt_file)
    require(bool(prompts), "no prompts; set prompts or prompt_file")
    if settings.upscaler is not None:
        with named("upscaler"):
            pipeline_arguments(settings.upscaler)
    pipe = sampling_pipeline(settings.base, settings.sampling)
    with adapted(pipe, settings.adapter, settings.weight):
        with named("guidance"):
            trial(pipe, prompts[0], settings.guidance, settings.sampling)
        if settings.dry_run:
            say(f"would draw {len(prompts) * len(settings.seeds)} pictures with {type(pipe).__name__}")
            _would(pipe, prompts, settings, so_far())
            if settings.upscaler is not None:
                _second(settings)
            return None
        folder = Path(settings.out) / "pictures"
        shots = draw_shots(
            pipe, prompts, settings.seeds, settings.guidance, settings.sampling, folder, settings.adapter
        )
    if settings.upscaler is not None:
        second, guidance = _second(settings)
        small = {(shot.prompt, shot.seed): shot.image for shot in shots}
        folder, inputs = Path(settings.out) / "enlarged", lambda prompt, seed: {"image": small[prompt, seed]}
        shots = draw_shots(second, prompts, settings.seeds, guidance, settings.sampling, folder, None, inputs=inputs)
    page = Path(settings.out) / "sheet.png"
    keep(sheet_of_arms({settings.guidance.method: shots}), page)
    say(f"{len(shots)} pictures in {folder}; side by side: {page}")
    return page


def _would(pipe: Any, prompts: Sequence[str], settings: Settings, loading: float) -> None:
    """A dry run: time and memory of the first stage, by a batch that is tried; `loading` took so many seconds."""
    seeds, sampling = settings.seeds, settings.sampling
    seconds = pace(pipe, prompts, seeds, settings.guidance, sampling)
    pictures = len(prompts) * len(seeds)
    what = f"{len(prompts)} prompts x {len(seeds)} seeds: {pictures} pictures"
    drawn = Drawing(name="drawing", what=what, pictures=pictures)
    say_drawing(drawn, sampling.steps, seconds=seconds, loading=loading)


def _second(settings: Settings) -> tuple[Any, GuidanceSettings]:
    """The second stage and its guidance, which fits it."""
    assert settings.upscaler is not None
    guidance = settings.upscaler_guidance or settings.guidance
    with named("upscaler"):
        pipe = sampling_pipeline(settings.upscaler, settings.sampling)
        check_guided(pipe, guidance, settings.sampling)
    return pipe, guidance


if __name__ == "__main__":
    launch(Settings, run)

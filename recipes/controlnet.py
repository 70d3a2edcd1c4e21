"""Train a ControlNet: a copy of the U-net's encoder that follows edges, classes or any other picture of conditions.

accelerate launch recipes/controlnet.py --config recipes/configs/controlnet/pocket_canny.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.finish import Finish, finish
from recipes.wiring import data, launch, load_parts
from training.config import BaseSettings, ControlNetSettings, DataSettings, ObjectiveSettings, TrainSettings, resolved

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(Finish):
    """A ControlNet for one base."""

    base: BaseSettings
    """The base model; `path: pocket` is the embedded one."""
    data: DataSettings
    """Captioned pictures, with conditioning images or an annotator that makes them."""
    controlnet: ControlNetSettings = field(default_factory=ControlNetSettings)
    """The network."""
    objective: ObjectiveSettings = field(default_factory=lambda: ObjectiveSettings(caption_dropout=0.1))
    """The loss."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The loop."""
    out: str
    """Folder for checkpoints, the trained network in `controlnet`, and what the later stages make."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    from training import controlnet, loop

    parts = load_parts(settings.base)
    pictures = data(settings.data, parts=parts)
    method = controlnet.prepare(parts, settings.controlnet, settings.objective, seed=settings.train.seed)
    result = loop.train(
        method,
        pictures,
        settings.train,
        out=settings.out,
        record=resolved(settings),
        cache=settings.data.cache,
        cache_folder=settings.data.cache_folder,
    )
    return finish(settings.base, settings, result.folder, settings.out, controlnet=True) if result else None


if __name__ == "__main__":
    launch(Settings, run)

"""Teach a base model one subject with a LoRA: config -> data -> models -> train.

accelerate launch recipes/dreambooth_lora.py --config recipes/configs/dreambooth_lora/pocket_dog.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from training.config import BaseSettings, DataSettings, LoraSettings, ObjectiveSettings, TrainSettings, parse, resolved
from training.errors import exit_on_error
from training.pocket import PocketError, base_path

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A LoRA of one subject."""

    base: BaseSettings
    """The base model; `path: pocket` is the embedded one."""
    data: DataSettings
    """The subject's pictures."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """The loss."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The loop."""
    out: str
    """Folder for checkpoints, samples and the trained adapter."""


def run(settings: Settings) -> Path | None:
    """Train; returns the folder of the LoRA, or None after a dry run."""
    from training import images, loop, lora, models, views

    path = base_path() if settings.base.path == "pocket" else settings.base.path
    parts = models.load(path, revision=settings.base.revision, variant=settings.base.variant)
    pictures = views.views(images.load(settings.data), settings.data, multiple=parts.multiple)
    method = lora.prepare(parts, settings.lora, settings.objective, seed=settings.train.seed)
    result = loop.train(
        method,
        pictures,
        settings.train,
        out=settings.out,
        record=resolved(settings),
        cache=settings.data.cache,
        cache_folder=settings.data.cache_folder,
    )
    return result.folder if result else None


if __name__ == "__main__":
    with exit_on_error(PocketError):
        run(parse(Settings))

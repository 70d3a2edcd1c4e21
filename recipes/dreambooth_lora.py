"""Teach a base model one subject with a LoRA: config -> data -> models -> train -> tune -> measure -> ship.

accelerate launch recipes/dreambooth_lora.py --config recipes/configs/dreambooth_lora/pocket_dog.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.after_training import finish
from recipes.common.base import load_parts
from recipes.common.cli import launch
from recipes.common.training import Training, check, class_prior, data, train
from training.config import (
    DreamBoothSettings,
    LoraSettings,
)

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """A LoRA of one subject."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    dreambooth: DreamBoothSettings = field(default_factory=DreamBoothSettings)
    """Preservation of the class."""
    region: str | None = None
    """Words such as sks dog whose attention regions are used as masks in the region-aware loss."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    from recipes.common.region_mask import region_of
    from training import lora

    check(settings)
    parts = load_parts(settings.base)
    pictures = data(settings.data, parts=parts)
    prior = class_prior(parts, settings, pictures)
    region = region_of(settings.region) if settings.region else None
    method = lora.prepare(parts, settings.lora, settings.objective, seed=settings.train.seed)
    result = train(settings, method, pictures, prior=prior, region=region)
    return finish(settings, result.folder) if result else None


if __name__ == "__main__":
    launch(Settings, run)

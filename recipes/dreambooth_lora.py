"""Teach a base model one subject with a LoRA: config -> data -> models -> train -> tune -> measure -> ship.

accelerate launch recipes/dreambooth_lora.py --config recipes/configs/dreambooth_lora/pocket_dog.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.after_training import finish
from recipes.common.cli import launch
from recipes.common.comparison import Comparison
from recipes.common.training import SubjectTraining, check_stages, load_for_training, run_training, subjects
from training.config import LoraSettings

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(SubjectTraining):
    """A LoRA of one subject, or of several."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    comparison = check_stages(settings)
    folder = _trained(settings, comparison)  # what it loads is freed, before the later stages load theirs
    return finish(settings, folder) if folder else None


def _trained(settings: Settings, comparison: Comparison | None) -> Path | None:
    """The folder of what was trained."""
    from recipes.common.region_mask import region_of
    from training import lora

    parts = load_for_training(settings, comparison)
    lora.plan(parts, settings.lora)  # what is wrong with it is said before class images are drawn
    pictures, prior, others = subjects(parts, settings, settings.lora.tokens)
    region = region_of(settings.region) if settings.region else None
    method = lora.prepare(parts, settings.lora, settings.objective, seed=settings.train.seed)
    result = run_training(settings, method, pictures, prior=prior, further=others, region=region)
    return result.folder if result else None


if __name__ == "__main__":
    launch(Settings, run)

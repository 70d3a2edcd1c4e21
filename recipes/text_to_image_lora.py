"""Teach a base model a style or a domain with a LoRA on captioned pictures.

accelerate launch recipes/text_to_image_lora.py --config recipes/configs/text_to_image_lora/pocket_fluent.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes.common.after_training import finish
from recipes.common.cli import launch
from recipes.common.comparison import Comparison
from recipes.common.training import Training, check_stages, data, load_for_training, run_training
from training.config import LoraSettings, ObjectiveSettings

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """A LoRA of captioned pictures."""

    lora: LoraSettings = field(default_factory=LoraSettings)
    """The adapter."""
    objective: ObjectiveSettings = field(default_factory=lambda: ObjectiveSettings(caption_dropout=0.1))
    """The loss."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    comparison = check_stages(settings)
    folder = _trained(settings, comparison)  # what it loads is freed, before the later stages load theirs
    return finish(settings, folder) if folder else None


def _trained(settings: Settings, comparison: Comparison | None) -> Path | None:
    """The folder of what was trained."""
    from training import lora

    parts = load_for_training(settings, comparison)
    pictures = data(settings.data, parts=parts)
    method = lora.prepare(parts, settings.lora, settings.objective, seed=settings.train.seed)
    result = run_training(settings, method, pictures)
    return result.folder if result else None


if __name__ == "__main__":
    launch(Settings, run)

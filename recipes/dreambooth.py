"""Teach a base model one subject by fine-tuning its whole U-net, with prior preservation (DreamBooth).

accelerate launch recipes/dreambooth.py --config recipes/configs/dreambooth/pocket_dog.yaml
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
    require,
)

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Full fine-tuning on one subject."""

    dreambooth: DreamBoothSettings = field(default_factory=DreamBoothSettings)
    """Preservation of the class, and whether the text encoders are trained too."""
    region: str | None = None
    """Words such as sks dog whose attention regions are used as masks in the region-aware loss."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    from recipes.common.region_mask import region_of
    from training import dreambooth

    require(
        not (settings.dreambooth.text_encoder and settings.measure),
        "a release holds the U-net alone: with dreambooth.text_encoder the pipeline in `dreambooth` is the result; "
        "leave measure out",
    )
    check(settings, whole=True)
    parts = load_parts(settings.base)
    pictures = data(settings.data, parts=parts)
    prior = class_prior(parts, settings, pictures)
    region = region_of(settings.region) if settings.region else None
    method = dreambooth.prepare(parts, settings.dreambooth, settings.objective)
    result = train(settings, method, pictures, prior=prior, region=region)
    return finish(settings, result.folder / "unet") if result else None


if __name__ == "__main__":
    launch(Settings, run)

"""Teach a base model one subject by fine-tuning its whole U-net, with prior preservation (DreamBooth).

accelerate launch recipes/dreambooth.py --config recipes/configs/dreambooth/pocket_dog.yaml
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from recipes.common.after_training import finish
from recipes.common.cli import launch
from recipes.common.comparison import Comparison
from recipes.common.training import SubjectTraining, check_stages, load_for_training, run_training, subjects
from training.config import require

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(SubjectTraining):
    """Full fine-tuning on one subject, or on several."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    require(
        not (settings.dreambooth.text_encoder and settings.measure),
        "a release holds the U-net alone: with dreambooth.text_encoder the pipeline in `dreambooth` is the result; "
        "leave measure out",
    )
    comparison = check_stages(settings, whole=True)
    folder = _trained(settings, comparison)  # what it loads is freed, before the later stages load theirs
    return finish(settings, folder / "unet") if folder else None


def _trained(settings: Settings, comparison: Comparison | None) -> Path | None:
    """The folder of what was trained."""
    from recipes.common.region_mask import region_of
    from training import dreambooth

    parts = load_for_training(settings, comparison)
    pictures, prior, others = subjects(parts, settings)
    region = region_of(settings.region) if settings.region else None
    method = dreambooth.prepare(parts, settings.dreambooth, settings.objective)
    result = run_training(settings, method, pictures, prior=prior, further=others, region=region)
    return result.folder if result else None


if __name__ == "__main__":
    launch(Settings, run)

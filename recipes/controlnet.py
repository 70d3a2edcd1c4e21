"""Train a ControlNet: a copy of the U-net's encoder that follows edges, classes or any other picture of conditions.

accelerate launch recipes/controlnet.py --config recipes/configs/controlnet/pocket_canny.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.after_training import finish
from recipes.common.base import POCKET, edges_of
from recipes.common.cli import launch
from recipes.common.comparison import Comparison
from recipes.common.training import Training, check_stages, data, load_for_training, run_training
from training.config import (
    ControlNetSettings,
    ObjectiveSettings,
    require,
)

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """A ControlNet for one base."""

    controlnet: ControlNetSettings = field(default_factory=ControlNetSettings)
    """The ControlNet."""
    objective: ObjectiveSettings = field(default_factory=lambda: ObjectiveSettings(caption_dropout=0.1))
    """The loss."""


def run(settings: Settings) -> Path | None:
    """Train and finish; returns the last stage's folder, or None after a dry run."""
    require(
        settings.tune is None, "recipes/tune.py tunes for a subject or prompts, not for a ControlNet; leave tune out"
    )
    require(
        settings.measure is None or settings.measure.targets is not None,
        "measure of a ControlNet needs measure.targets and measure.control",
    )
    comparison = check_stages(settings, controlnet=True)
    folder = _trained(settings, comparison)  # what it loads is freed, before the later stages load theirs
    return finish(settings, folder, controlnet=True) if folder else None


def _trained(settings: Settings, comparison: Comparison | None) -> Path | None:
    """The folder of what was trained."""
    from training import controlnet

    parts = load_for_training(settings, comparison)
    edges = _edges(settings)
    pictures = data(settings.data, parts=parts, edges=edges)
    method = controlnet.prepare(parts, settings.controlnet, settings.objective, edges=edges, seed=settings.train.seed)
    result = run_training(settings, method, pictures)
    return result.folder if result else None


def _edges(settings: Settings) -> Any:
    """The detector that makes the conditions, which the ControlNet keeps; null: they are no edges."""
    from training.data import images
    from training.pocket.control import EDGES

    plan, start = settings.data, settings.controlnet.start
    if plan.annotator != "canny":
        return None
    if plan.canny is None and start:
        return edges_of(start)
    scenes = plan.source in (POCKET, "pocket-fluent")
    return EDGES if plan.canny is None and scenes else images.detector(plan)


if __name__ == "__main__":
    launch(Settings, run)

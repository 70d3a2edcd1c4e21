"""What training recipes share: their settings, and what follows a training: tune -> measure -> ship."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes import measure, ship, tune
from recipes.common.settings import MeasureSettings, SamplingSettings, ShipSettings, TuneSettings
from recipes.common.units import cases
from training.config import BaseSettings, DataSettings, ObjectiveSettings, TrainSettings, require, resolved

__all__ = ["Training", "check", "finish", "record", "train"]

LATER = ("tune", "measure", "ship", "sampling")


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every training recipe is told; the later stages are left out where they are null."""

    base: BaseSettings
    """The base model; `path: pocket` is the embedded one."""
    data: DataSettings
    """The pictures, with captions, masks or conditions as the recipe needs them."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """The loss."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The loop."""
    tune: TuneSettings | None = None
    """Search for guidance and checkpoint before measuring."""
    measure: MeasureSettings | None = None
    """The comparison; null: nothing is measured."""
    ship: ShipSettings | None = None
    """The release folder; null: nothing ships."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled in these stages."""
    out: str
    """Folder for checkpoints, what was trained (in a folder named after the method), and what the later stages make."""

    def __post_init__(self) -> None:
        require(self.tune is None or self.measure is not None, "tune prepares a comparison: set measure too")


def record(settings: Training) -> dict[str, Any]:
    """What is written beside the weights: what shaped them. The later stages may change and be run again."""
    return {name: value for name, value in resolved(settings).items() if name not in LATER}


def check(settings: Training) -> None:
    """What the later stages would find wrong with subjects and prompts is said before training."""
    if settings.measure is not None and settings.measure.targets is None:
        found = cases(settings.measure, None)
        require(sum(len(case.prompts) for case in found) >= 2, "a comparison needs at least two prompts")


def train(settings: Training, method: Any, pictures: Any, **more: Any) -> Any:
    """The loop with the recipe's settings; `more` is what `training.loop.train` takes besides (prior, region)."""
    from training import loop

    return loop.train(
        method,
        pictures,
        settings.train,
        out=settings.out,
        record=record(settings),
        cache=settings.data.cache,
        cache_folder=settings.data.cache_folder,
        **more,
    )


def finish(settings: Training, trained: Path, *, controlnet: bool = False) -> Path:
    """Run the stages asked for on what was trained; returns the last stage's folder.

    Args:
        trained: LoRA, U-net or ControlNet folder.
        controlnet: `trained` is a ControlNet, which is wired in rather than put on the U-net.
    """
    folder, adapter, tuned = trained, str(trained), None
    if settings.tune is not None and settings.measure is not None:
        found = tune.run(
            tune.Settings(
                base=settings.base,
                adapter=None if controlnet else adapter,
                controlnet=adapter if controlnet else None,
                measure=settings.measure,
                tune=settings.tune,
                sampling=settings.sampling,
                out=settings.out,
            )
        )
        tuned, adapter = str(found), tune.chosen(found) or adapter
        folder = found
    measured = None
    if settings.measure is not None:
        made = measure.run(
            measure.Settings(
                base=settings.base,
                adapter=None if controlnet else adapter,
                controlnet=adapter if controlnet else None,
                tuned=tuned,
                measure=settings.measure,
                sampling=settings.sampling,
                out=settings.out,
            )
        )
        assert made is not None
        folder = measured = made / "measured"
    if settings.ship is not None:
        shipped = ship.run(
            ship.Settings(
                base=settings.base,
                adapter=adapter,
                measured=str(measured) if measured else None,
                ship=settings.ship,
                out=settings.out,
            )
        )
        folder = shipped or folder
    return folder

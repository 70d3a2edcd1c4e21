"""What follows a training, where its settings ask for it: tune -> measure -> ship, each from the last one's folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from recipes import measure, ship, tune
from recipes.settings import MeasureSettings, SamplingSettings, ShipSettings, TuneSettings
from training.config import BaseSettings

__all__ = ["Finish", "finish"]


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The later stages of a training recipe; null leaves one out."""

    tune: TuneSettings | None = None
    """Search for guidance and checkpoint before measuring."""
    measure: MeasureSettings | None = None
    """The comparison; null: nothing is measured."""
    ship: ShipSettings | None = None
    """The release folder; null: nothing ships."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled in these stages."""


def finish(base: BaseSettings, later: Finish, trained: Path, out: str, *, controlnet: bool = False) -> Path:
    """Run the stages asked for on what was trained; returns the last stage's folder.

    Args:
        trained: LoRA, U-net or ControlNet folder.
        controlnet: `trained` is a ControlNet, which is wired in rather than put on the U-net.
    """
    folder, adapter, tuned = trained, str(trained), None
    if later.tune is not None and later.measure is not None:
        found = tune.run(
            tune.Settings(
                base=base, adapter=adapter, measure=later.measure, tune=later.tune, sampling=later.sampling, out=out
            )
        )
        tuned, adapter = str(found), tune.chosen(found)
        folder = found
    measured = None
    if later.measure is not None:
        made = measure.run(
            measure.Settings(
                base=base,
                adapter=None if controlnet else adapter,
                controlnet=adapter if controlnet else None,
                tuned=tuned,
                measure=later.measure,
                sampling=later.sampling,
                out=out,
            )
        )
        assert made is not None
        folder = measured = made / "measured"
    if later.ship is not None:
        shipped = ship.run(
            ship.Settings(
                base=base, adapter=adapter, measured=str(measured) if measured else None, ship=later.ship, out=out
            )
        )
        folder = shipped or folder
    return folder

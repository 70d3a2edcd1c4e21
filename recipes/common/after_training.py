"""What follows a training: tune -> measure -> ship, as far as the settings ask for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recipes import measure, ship, tune
from recipes.common.training import Training
from recipes.common.tuned import TunedArms

__all__ = ["finish"]


def finish(settings: Training, trained: Path, *, controlnet: bool = False) -> Path:
    """Run the stages asked for on what was trained; returns the last stage's folder.

    Args:
        settings: of the recipe; `tune`, `measure` and `ship` say which stages run.
        trained: LoRA, U-net or ControlNet folder.
        controlnet: `trained` is a ControlNet, which is wired in rather than put on the U-net.
    """
    _free()

    def drawn_with(adapter: str) -> dict[str, Any]:
        place = "controlnet" if controlnet else "adapter"
        return {"base": settings.base, place: adapter, "sampling": settings.sampling, "out": settings.out}

    folder, adapter, tuned, measured = trained, str(trained), None, None
    if settings.tune is not None and settings.measure is not None:
        found = tune.run(tune.Settings(measure=settings.measure, tune=settings.tune, **drawn_with(adapter)))
        assert found is not None
        tuned, adapter = str(found), TunedArms.read(found).adapter or adapter
        folder = found
    if settings.measure is not None:
        made = measure.run(measure.Settings(measure=settings.measure, tuned=tuned, **drawn_with(adapter)))
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


def _free() -> None:
    """What training held and nobody refers to is given back: its modules refer to one another."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

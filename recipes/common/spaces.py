"""Feature spaces by name, and the pictures that others are held against in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapters.measuring import metrics as kinds
from adapters.measuring.metrics.alignment import Siglip
from adapters.measuring.metrics.networks import Clip, Vit, efficientnet_lite0
from adapters.measuring.sample import Shot
from training.config import require
from training.data import images
from training.errors import TrainingError
from training.hub import offline_if_unreachable
from training.pocket import judge, scenes
from training.pocket.control import Scenes

from .base import POCKET
from .cli import named
from .settings import MeasureSettings

__all__ = [
    "SPACES",
    "check_frechet",
    "check_spaces",
    "device_of",
    "frechet_to_reference",
    "looks",
    "pictures",
    "reference",
    "shown",
    "space",
    "space_of",
]

NETWORKS: dict[str, Callable[..., Any]] = {
    "clip": Clip,
    "siglip2": Siglip,
    "dino": Vit,
    "dinov2": lambda **given: Vit(kinds=("dinov2", "dinov2_with_registers"), **given),
    "dinov3": lambda **given: Vit(kinds=("dinov3_vit",), **given),
}
"""Those that `measure.spaces` gives a network to."""
FREE: dict[str, Callable[[], Any]] = {
    "judge": lambda: judge().features,
    "color": lambda: kinds.color_histogram,
    "lite0": efficientnet_lite0,
}
SPACES = (*NETWORKS, *FREE)
REFERENCE = "measure.reference"


@lru_cache(maxsize=8)
def space(name: str, path: str | None = None, device: str | None = None, batch_size: int = 16) -> Any:
    """A feature space: pictures -> (n, d). A network is looked at now, and loaded when it is first asked.

    Args:
        name: of `SPACES`.
        path: folder or hub id of its network; None for spaces without one.
        device: where it runs; None: this process's device.
        batch_size: pictures looked at together.

    Raises:
        TrainingError: an unknown name, or a network that is not given or cannot be found.
    """
    if name in FREE:
        return FREE[name]()
    require(name in NETWORKS, f"feature space {name!r} is unknown; there are {', '.join(SPACES)}")
    if path is None:
        raise TrainingError(f"feature space {name} needs its network: set measure.spaces.{name} to a folder or hub id")
    offline_if_unreachable(path)
    with named(f"measure.spaces.{name}"):
        return NETWORKS[name](name=path, device=device_of(device), batch_size=batch_size)


def looks(settings: MeasureSettings, *, pocket: bool) -> tuple[str, Any]:
    """The space that sees best how alike two pictures look, of those that are there: its name, and itself.

    Args:
        settings: which networks are given.
        pocket: the base is the embedded one, whose judge is there.
    """
    known = [name for name in ("dinov3", "dinov2", "dino", "clip") if name in settings.spaces]
    name = next(iter(known), "judge" if pocket else "color")
    return name, space_of(name, settings)


def space_of(name: str, settings: MeasureSettings) -> Any:
    """The space as the settings have it."""
    return space(name, settings.spaces.get(name), settings.device, settings.batch_size)


def device_of(device: str | None) -> str:
    """Where networks of metrics compute: as set, or where this process does.

    Raises:
        TrainingError: there is no such device here.
    """
    import torch

    from training.ranks import state

    if device is None:
        return str(state().device)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        require(False, f"measure.device {device!r} is not here ({str(error).splitlines()[0][:120]}); set cpu or cuda")
    return device


def check_spaces(settings: MeasureSettings) -> None:
    """Every space that is given a network is one that needs it, and the device is there."""
    for name in settings.spaces:
        require(name in NETWORKS, f"measure.spaces: {name!r} is none of {', '.join(NETWORKS)}")
    device_of(settings.device)


def frechet_to_reference(settings: MeasureSettings, shots: Sequence[Shot]) -> float:
    """Fréchet distance of an arm's pictures to the reference's, in the space `measure.frechet`."""
    assert settings.frechet is not None
    features = space_of(settings.frechet, settings)
    given = (settings.spaces.get(settings.frechet), settings.device, settings.batch_size)
    return kinds.frechet(features([shot.image for shot in shots]), _real(settings.frechet, given, settings.reference))


def check_frechet(settings: MeasureSettings) -> None:
    """Says what `measure.frechet` lacks: its network, or the reference's pictures."""
    assert settings.frechet is not None
    space_of(settings.frechet, settings)
    require(settings.reference is not None, "measure.frechet needs measure.reference, a folder of pictures or pocket")
    if settings.reference != POCKET:
        found = images.folder(str(settings.reference), prompt="", minimum=1, say=_silent, setting=REFERENCE)
        _several(len(found), settings.reference)


@lru_cache(maxsize=2)
def _real(name: str, given: tuple[Any, ...], place: str | None) -> Any:
    """Features of the reference's pictures, the same for every arm."""
    return space(name, *given)(reference(place, "measure.frechet"))


def _several(count: int, place: str | None) -> None:
    require(count >= 2, f"measure.reference {place} has fewer than two pictures")


def reference(place: str | None, what: str) -> list[Image.Image]:
    """The pictures of `measure.reference`."""
    require(place is not None, f"{what} needs measure.reference, a folder of real pictures or pocket")
    assert place is not None
    if place == POCKET:
        drawn = Scenes(count=1000, seed=scenes.HELD_OUT_SEED, begin=100_000)
        return [drawn[i].image for i in range(len(drawn))]
    found = pictures(Path(place), REFERENCE)[0]
    _several(len(found), place)
    return found


def pictures(folder: Path, setting: str = "data.source") -> tuple[list[Image.Image], list[np.ndarray] | None]:
    """The pictures of a folder, which a setting names, and their masks where it has a folder `masks`."""
    masks = folder / "masks"
    source = images.folder(
        folder, prompt="", masks=masks if masks.is_dir() else None, minimum=1, say=_silent, setting=setting
    )
    samples = [source[i] for i in range(len(source))]
    given = [np.asarray(sample.mask.convert("L")) > 127 for sample in samples if sample.mask is not None]
    return [sample.image for sample in samples], given or None


def shown(folder: Path | None) -> list[Image.Image]:
    """The pictures of a folder, for a page to show; none where there are none that can be read."""
    try:
        return [] if folder is None else pictures(folder)[0]
    except TrainingError:
        return []


def _silent(line: str) -> None:
    """Each metric reads the same folder again; what there is to say of it was said where it trained."""

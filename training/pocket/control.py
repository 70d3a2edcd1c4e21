"""Conditions for the pocket ControlNets, and the drawn scenes as a data source with conditions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.images import Sample
from .errors import PocketError
from .scenes import TRAIN_SEED, Scene, canny, palette, sample
from .world import CONTROLS

__all__ = ["Scenes", "condition", "edges"]


def condition(scene: Scene, control: str) -> Image.Image:
    """The conditioning picture of ``scene``: its edges, or its classes in the colours of ``scenes.palette``."""
    if control == "canny":
        return edges(Image.fromarray(scene.image))
    if control == "segmentation":
        return Image.fromarray(palette()[scene.classes])
    raise PocketError(f"unknown control {control!r}; there are {', '.join(CONTROLS)}")


def edges(image: Image.Image) -> Image.Image:
    """A picture's edges as the shipped canny ControlNet was trained on them, at its own size."""
    return Image.fromarray(canny(np.asarray(image.convert("RGB"))))


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """``count`` scenes of the split ``seed`` from index ``begin`` on, as ``training.images`` sources are.

    With a ``control`` each has its condition; ``look`` is that of the drawings, see ``sprites.LOOKS``.
    """

    control: str | None = None
    count: int
    seed: int = TRAIN_SEED
    begin: int = 20_000_000
    look: str = "noto"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        scene = sample(self.seed, self.begin + index, look=self.look)
        shown = condition(scene, self.control) if self.control else None
        return Sample(image=Image.fromarray(scene.image), caption=scene.caption, conditioning=shown)

"""Conditions for the pocket ControlNets, and the drawn scenes as a data source with conditions."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from adapters.edges import Canny

from ..data.images import Sample
from .errors import PocketError
from .scenes import TRAIN_SEED, Scene, palette, sample
from .world import CONTROLS

__all__ = ["EDGES", "Scenes", "scene_condition"]

EDGES = Canny(low=80, high=160, grey=True)
"""The detector that the shipped canny ControlNet was trained with, and the default for drawn scenes."""


def scene_condition(scene: Scene, control: str, edges: Canny = EDGES) -> Image.Image:
    """The conditioning picture of ``scene``: its edges, or its classes in the colors of ``scenes.palette``.

    Args:
        scene: a drawn one.
        control: "canny" or "segmentation".
        edges: detector for canny.

    Raises:
        PocketError: another control.
    """
    if control == "canny":
        return edges.condition(Image.fromarray(scene.image))
    if control == "segmentation":
        return Image.fromarray(palette()[scene.classes])
    raise PocketError(f"unknown control {control!r}; there are {', '.join(CONTROLS)}")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """``count`` scenes of the split ``seed`` from index ``begin`` on, as ``training.images`` sources are.

    With a ``control`` each has its condition, edges by ``edges``; ``look`` is that of the drawings, see
    ``sprites.LOOKS``.
    """

    control: str | None = None
    count: int
    seed: int = TRAIN_SEED
    begin: int = 20_000_000
    look: str = "noto"
    edges: Canny = EDGES

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        scene = sample(self.seed, self.begin + index, look=self.look)
        shown = scene_condition(scene, self.control, self.edges) if self.control else None
        return Sample(image=Image.fromarray(scene.image), caption=scene.caption, conditioning=shown)

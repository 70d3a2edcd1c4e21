"""Is it the subject, or only its class? Nearness to the subject's pictures, against what the base's pictures reach.

Likeness alone cannot tell: a picture of any dog is like the pictures of one dog. So it is put on a scale between two
values that are measured too: how like the subject the base's own pictures of the class are, and how like each other
the subject's pictures are.

    margin = (likeness - likeness of the base's pictures) / (likeness among the subject's - that of the base's) - 1/2

A picture of the class as the base draws it is near -1/2, one of the subject near 1/2; above 0 it is nearer to the
subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from ...errors import GainsError
from ..sample import Shot
from .features import Features, Mask, cutout, unit_features

__all__ = ["Identity", "likeness_in"]

ABSENT = -0.5  # nothing there that could be the subject: no nearer than the base's


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Per image 1 where it is nearer to the subject than to its class, else 0; or the margin itself."""

    name: str
    likeness: Callable[[Sequence[Shot]], np.ndarray]
    """Cosines of n shots to each of the subject's k pictures, (n, k); a row of NaN where nothing could be it."""
    own: np.ndarray
    """Cosines among the subject's pictures, (k, k)."""
    classes: Callable[[], Sequence[Shot]]
    """The base's pictures of the class, of the same prompts without the trigger; asked for once."""
    margin: bool = False
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if len(self.own) < 2:
            raise GainsError(f"{self.name}: needs two pictures of the subject, to see how alike they are")

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Likeness of the base's pictures of the class, and among the subject's own.

        Raises:
            GainsError: the space does not tell the subject from its class.
        """
        shots, count = self.classes(), len(self.own)
        if not shots:
            raise GainsError(f"{self.name}: the base draws the class in none of these prompts, so there is no standard")
        found = self.likeness(shots)
        seen = found[~np.isnan(found).any(axis=1)]
        high = (self.own.sum() - np.trace(self.own)) / (count * (count - 1))
        low = float(seen.mean()) if len(seen) else 0.0
        if low >= high:
            raise GainsError(
                f"{self.name}: the base's pictures of the class are as like the subject ({low:.3f}) as its own are "
                f"like each other ({high:.3f}); this feature space does not tell them apart"
            )
        return low, float(high)

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        low, high = self.scale
        margins = (self.likeness(shots).mean(axis=1) - low) / (high - low) - 0.5
        margins = np.where(np.isnan(margins), ABSENT, margins)
        return margins if self.margin else (margins > 0).astype(float)


def likeness_in(
    features: Features,
    references: Sequence[Image.Image],
    masks: Sequence[np.ndarray] | None = None,
    mask: Mask | None = None,
) -> tuple[Callable[[Sequence[Shot]], np.ndarray], np.ndarray]:
    """`Identity`'s `likeness` and `own` in any feature space, whole or with only the subject seen.

    Args:
        features: the space.
        references: the subject's pictures.
        masks: of the references, (H, W) bool.
        mask: gives those of generated images; an empty one means that nothing there could be the subject.
    """
    shown = list(references)
    if masks is not None:
        shown = [cutout(image, np.asarray(hole)) for image, hole in zip(references, masks, strict=True)]
    wanted = unit_features(features, shown)

    def likeness(shots: Sequence[Shot]) -> np.ndarray:
        images = [shot.image for shot in shots]
        there = np.ones(len(images), dtype=bool)
        if mask is not None:
            found = [np.asarray(item).astype(bool) for item in mask(images)]
            there = np.array([item.any() for item in found])
            images = [cutout(image, item) for image, item in zip(images, found, strict=True)]
        return np.where(there[:, None], unit_features(features, images) @ wanted.T, np.nan)

    return likeness, wanted @ wanted.T

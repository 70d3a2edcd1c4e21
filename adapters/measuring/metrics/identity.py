"""Is it the subject, or only its class? Nearness to the subject's pictures, against nearness to the base's.

Likeness alone cannot tell: a picture of any dog is like the pictures of one dog. So a picture is compared with two
centres in a feature space: that of the subject's pictures, and that of the pictures that the base draws of the class.
It counts as the subject if it is nearer to the first. The margin says by how much,

    margin = (d(base)^2 - d(subject)^2) / (2 d(base, subject)^2)

with Euclidean distances of unit features. It is 1/2 at the subject's centre, -1/2 at the base's, and 0 half-way.
Distances are those from the mean of infinitely many pictures: a picture's distance to itself is left out.
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

__all__ = ["Identity", "look_of"]

ABSENT = -0.5  # nothing there that could be the subject: no nearer than the base's


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Per image 1 where it is nearer to the subject than to its class, else 0; or the margin itself."""

    name: str
    look: Callable[[Sequence[Shot]], np.ndarray]
    """Unit features of n shots, (n, d); a row of NaN where nothing could be the subject."""
    own: np.ndarray
    """Unit features of the subject's k pictures, (k, d)."""
    classes: Callable[[], Sequence[Shot]]
    """The base's pictures of the class, of the same prompts without the trigger; asked for once."""
    margin: bool = False
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if len(self.own) < 2:
            raise GainsError(f"{self.name}: needs two pictures of the subject, to see how alike they are")

    @cached_property
    def axis(self) -> tuple[np.ndarray, float]:
        """From the class to the subject: (d,) and an offset, so that features @ axis + offset is the margin.

        Raises:
            GainsError: the space does not tell the subject from its class.
        """
        shots = self.classes()
        if not shots:
            raise GainsError(f"{self.name}: the base draws the class in none of these prompts, so there is no standard")
        seen = self.look(shots)
        seen = seen[~np.isnan(seen).any(axis=1)]
        subject = self.own.mean(0)
        base = seen.mean(0) if len(seen) else np.zeros_like(subject)
        high, low = alike(self.own), float(subject @ base)
        within = alike(seen) if len(seen) > 1 else high * len(seen)  # of one picture: unknown; of none: at the origin
        if low >= high:
            raise GainsError(
                f"{self.name}: the base's pictures of the class are as like the subject ({low:.3f}) as its own are "
                f"like each other ({high:.3f}); this feature space does not tell them apart"
            )
        # Their centres' squared distance, without the noise of few pictures; never so small that margins explode.
        apart = max(high + within - 2 * low, high - low)
        return (subject - base) / apart, -(high - within) / (2 * apart)

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        axis, offset = self.axis
        margins = self.look(shots) @ axis + offset
        margins = np.where(np.isnan(margins), ABSENT, margins)
        return margins if self.margin else (margins > 0).astype(float)


def alike(rows: np.ndarray) -> float:
    """Mean cosine among two or more unit features (n, d), each with the others."""
    count = len(rows)
    return float((np.square(rows.sum(0)).sum() - count) / (count * (count - 1)))


def look_of(
    features: Features,
    references: Sequence[Image.Image],
    masks: Sequence[np.ndarray] | None = None,
    mask: Mask | None = None,
) -> tuple[Callable[[Sequence[Shot]], np.ndarray], np.ndarray]:
    """`Identity`'s `look` and `own` in any feature space, whole or with only the subject seen.

    Args:
        features: the space.
        references: the subject's pictures.
        masks: of the references, (H, W) bool.
        mask: gives those of generated images; an empty one means that nothing there could be the subject.
    """
    shown = list(references)
    if masks is not None:
        shown = [cutout(image, np.asarray(hole)) for image, hole in zip(references, masks, strict=True)]

    def look(shots: Sequence[Shot]) -> np.ndarray:
        images = [shot.image for shot in shots]
        there = np.ones(len(images), dtype=bool)
        if mask is not None:
            found = [np.asarray(item).astype(bool) for item in mask(images)]
            there = np.array([item.any() for item in found])
            images = [cutout(image, item) for image, item in zip(images, found, strict=True)]
        return np.where(there[:, None], unit_features(features, images), np.nan)

    return look, unit_features(features, shown)

"""Similarity, diversity and drift in any feature space.

A feature space is a callable: images -> (n, d) array, torch or numpy. Encoders are not comparable with each other, so a
metric carries its space's name. Subject similarity follows DreamBooth (arXiv:2208.12242, section 4.2): the mean cosine
between an image and every real photograph; with masks only the subject is seen, which background copying cannot win.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ...errors import GainsError
from ..sample import Shot

__all__ = ["Diversity", "Drift", "FaceSimilarity", "Features", "Similarity", "cutout", "unit_features"]

Features = Callable[[Sequence[Image.Image]], Any]
Mask = Callable[[Sequence[Image.Image]], Sequence[np.ndarray]]
GREY = (127, 127, 127)


def unit_features(features: Features, images: Sequence[Image.Image]) -> np.ndarray:
    """(n, d) float64 rows of length one."""
    raw = features(images)
    rows = np.asarray(raw.detach().cpu().float() if hasattr(raw, "detach") else raw, dtype=np.float64)
    if rows.ndim != 2 or len(rows) != len(images):
        raise GainsError(f"features returned shape {rows.shape} for {len(images)} images; expected (n, d)")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: np.ndarray = rows / np.maximum(norms, 1e-12)
    return unit


def cutout(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The image on neutral grey outside a boolean (H, W) mask."""
    if mask.shape != (image.height, image.width):
        raise GainsError(f"mask of shape {mask.shape} for an image of {image.height} x {image.width}")
    pixels = np.asarray(image.convert("RGB"))
    return Image.fromarray(np.where(mask[..., None].astype(bool), pixels, np.uint8(GREY[0])))


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Mean cosine similarity to reference images, whole or masked."""

    name: str
    features: Features
    references: Sequence[Image.Image]
    reference_masks: Sequence[np.ndarray] | Callable[[], Sequence[np.ndarray]] | None = None
    """(H, W) bool each, or what gives them when they are first needed."""
    mask: Mask | None = None
    """Masks of the generated images, from a segmenter; an image with an empty mask scores 0: no subject is there."""
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.references:
            raise GainsError(f"{self.name}: references is empty; give the subject's real images")
        if (self.mask is None) != (self.reference_masks is None):
            raise GainsError(f"{self.name}: give both mask and reference_masks, or neither")

    @cached_property
    def _wanted(self) -> np.ndarray:
        references = list(self.references)
        if self.reference_masks is not None:
            masks = self.reference_masks() if callable(self.reference_masks) else self.reference_masks
            pairs = [(i, np.asarray(m)) for i, m in zip(references, masks, strict=True) if np.asarray(m).any()]
            if not pairs:
                raise GainsError(f"{self.name}: the subject is found in none of its {len(references)} pictures")
            references = [cutout(image, mask) for image, mask in pairs]
        return unit_features(self.features, references)

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        images = [shot.image for shot in shots]
        there = np.ones(len(images), dtype=bool)
        if self.mask is not None:
            masks = [np.asarray(m).astype(bool) for m in self.mask(images)]
            there = np.array([m.any() for m in masks])
            images = [cutout(image, m) for image, m in zip(images, masks, strict=True)]
        cosines = unit_features(self.features, images) @ self._wanted.T
        return np.where(there, cosines.mean(axis=1), 0.0)


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Per image, the mean cosine distance to the other images of its prompt; NaN where it is alone."""

    name: str
    features: Features
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        rows = unit_features(self.features, [shot.image for shot in shots])
        groups: dict[str, list[int]] = defaultdict(list)
        for index, shot in enumerate(shots):
            groups[shot.prompt].append(index)
        values = np.full(len(shots), np.nan)
        for members in groups.values():
            if len(members) > 1:
                similar = rows[members] @ rows[members].T
                values[members] = 1 - (similar.sum(axis=1) - np.diag(similar)) / (len(members) - 1)
        return values


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Per image, the cosine distance to the base model's image of the same prompt, seed and noise."""

    name: str
    features: Features
    base: Sequence[Shot]
    higher_is_better: bool = False

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        table = {shot.key: shot.image for shot in self.base}
        missing = [shot.key for shot in shots if shot.key not in table]
        if missing:
            raise GainsError(
                f"{self.name}: the base has no image of {missing[0]}; sample it with the same prompts and seeds"
            )
        ours = unit_features(self.features, [shot.image for shot in shots])
        theirs = unit_features(self.features, [table[shot.key] for shot in shots])
        distances: np.ndarray = 1 - (ours * theirs).sum(axis=1)
        return distances


@dataclass(frozen=True, kw_only=True)
class FaceSimilarity:
    """Mean cosine between the face of a picture and those of the references, by ArcFace (arXiv:1801.07698) or the like.

    No face network is read here, for the usual weights come as ONNX and forbid commercial use: give a callable of your
    own, such as insightface's. A picture in which it finds no face scores 0.
    """

    embed: Callable[[Image.Image], np.ndarray | None]
    """A picture -> the embedding (d,) of its largest face; None where there is none."""
    references: Sequence[Image.Image]
    name: str = "face similarity"
    higher_is_better: bool = True

    @cached_property
    def _wanted(self) -> np.ndarray:
        found = [face for face in map(self.embed, self.references) if face is not None]
        if not found:
            raise GainsError(f"{self.name}: no face is found in any of the {len(self.references)} references")
        return unit_features(lambda _: np.stack(found), self.references[: len(found)])

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        faces = [self.embed(shot.image) for shot in shots]
        return [0.0 if face is None else float((self._wanted @ (face / np.linalg.norm(face))).mean()) for face in faces]

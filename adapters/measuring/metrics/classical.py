"""Classical image measures: edges, structure, masks, color. 8-bit RGB in, one number per image out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from PIL import Image

from ...edges import Canny
from ...errors import GainsError
from ..sample import Shot

__all__ = [
    "CannyF1",
    "Clipped",
    "Contrast",
    "MaskIoU",
    "MsSsim",
    "Saturation",
    "canny_f1",
    "color_histogram",
    "ms_ssim",
]

Condition = Callable[[Shot], Image.Image]


def canny_f1(edges: np.ndarray, wanted: np.ndarray, reach: int = 1) -> float:
    """F1 of two edge maps (H, W), bool: an edge pixel is found if the other map has one within `reach` pixels of it.

    The tolerance is usual for edges (Martin, Fowlkes and Malik 2004): those of equal shapes may lie a pixel apart. 1
    where both maps are empty, 0 where one is.

    Args:
        edges: of the picture.
        wanted: of the condition.
        reach: tolerance in pixels, along each axis.

    Raises:
        GainsError: maps of different shapes.
    """
    if edges.shape != wanted.shape:
        raise GainsError(f"edge maps of shapes {edges.shape} and {wanted.shape}")
    if not edges.any() or not wanted.any():
        return float(edges.any() == wanted.any())
    near = np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)
    around_edges, around_wanted = (cv2.dilate(each.astype(np.uint8), near) > 0 for each in (edges, wanted))
    precision, recall = around_wanted[edges].mean(), around_edges[wanted].mean()
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))


def ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Multi-scale SSIM (Wang, Simoncelli, Bovik 2003) of two grey images in [0, 1].

    Scales are halved by 2x2 means as long as the 11-pixel Gaussian window fits; the published five weights are cut to
    the scales used and renormalized. Negative contrast-structure terms count as 0.
    """
    from skimage.metrics import structural_similarity

    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < 11:
        raise GainsError(f"ms_ssim needs two equal (H, W) images of at least 11 pixels, got {a.shape} and {b.shape}")
    scales = min(5, int(np.log2(min(a.shape) / 11)) + 1)
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    weights, result = weights / weights.sum(), 1.0
    for scale, weight in enumerate(weights):
        options = {
            "data_range": 1.0,
            "gaussian_weights": True,
            "sigma": 1.5,
            "use_sample_covariance": False,
            "full": True,
        }
        mean, full = structural_similarity(a, b, **options)
        value = mean if scale == scales - 1 else (full / _luminance(a, b))[5:-5, 5:-5].mean()
        result *= max(value, 0.0) ** weight
        rows, columns = (n // 2 * 2 for n in a.shape)
        a, b = (i[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2).mean(axis=(1, 3)) for i in (a, b))
    return float(result)


def _luminance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM's luminance term, so that SSIM / luminance is contrast-structure."""
    from scipy.ndimage import gaussian_filter

    mu_a, mu_b = (gaussian_filter(i, 1.5, truncate=3.5, mode="reflect") for i in (a, b))
    term: np.ndarray = (2 * mu_a * mu_b + 0.01**2) / (mu_a**2 + mu_b**2 + 0.01**2)
    return term


def color_histogram(images: Sequence[Image.Image], bins: int = 4) -> np.ndarray:
    """(n, bins^3) share of pixels per RGB cell: a feature space of color alone."""
    cells = [np.asarray(i.convert("RGB")).reshape(-1, 3).astype(int) * bins // 256 for i in images]
    flat = [c @ np.array([bins * bins, bins, 1]) for c in cells]
    return np.stack([np.bincount(f, minlength=bins**3) / len(f) for f in flat])


@dataclass(frozen=True, kw_only=True)
class CannyF1:
    """Edges of the result against the edges asked for. The same detector made both: it flatters, say so."""

    condition: Condition
    edges: Canny = field(default_factory=Canny)
    """The detector of the conditions; with another one, a perfect picture would not score 1."""
    name: str = "canny F1"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        return [canny_f1(self.edges(s.image), np.asarray(self.condition(s).convert("L")) > 127) for s in shots]


@dataclass(frozen=True, kw_only=True)
class MsSsim:
    """Structure of the result against a target image."""

    target: Condition
    name: str = "MS-SSIM"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        pairs = [(s.image.convert("L"), self.target(s).convert("L")) for s in shots]
        return [ms_ssim(*(np.asarray(i, dtype=np.float64) / 255 for i in pair)) for pair in pairs]


@dataclass(frozen=True, kw_only=True)
class MaskIoU:
    """Intersection over union of a segmenter's mask with the wanted one; 1 where both are empty."""

    segment: Callable[[Sequence[Image.Image]], Sequence[np.ndarray]]
    wanted: Callable[[Shot], np.ndarray]
    name: str = "mask IoU"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        masks = self.segment([s.image for s in shots])
        pairs = [
            (np.asarray(m).astype(bool), np.asarray(self.wanted(s)).astype(bool))
            for m, s in zip(masks, shots, strict=True)
        ]
        unions = [(np.logical_and(a, b).sum(), np.logical_or(a, b).sum()) for a, b in pairs]
        return [1.0 if union == 0 else float(both / union) for both, union in unions]


def _hsv(shot: Shot) -> np.ndarray:
    return np.asarray(shot.image.convert("HSV"), dtype=np.float64) / 255


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Mean HSV saturation; strong guidance raises it, so less counts as better."""

    name: str = "saturation"
    higher_is_better: bool = False

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        return [float(_hsv(s)[..., 1].mean()) for s in shots]


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Standard deviation of grey values in [0, 1]."""

    name: str = "contrast"
    higher_is_better: bool = False

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        return [float(np.asarray(s.image.convert("L"), dtype=np.float64).std() / 255) for s in shots]


@dataclass(frozen=True, kw_only=True)
class Clipped:
    """Share of color values at 0 or 255: burnt images."""

    name: str = "clipped share"
    higher_is_better: bool = False

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        pixels = [np.asarray(s.image.convert("RGB")) for s in shots]
        return [float(((p == 0) | (p == 255)).mean()) for p in pixels]

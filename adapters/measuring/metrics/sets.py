"""Distances between sets of features: Fréchet (Heusel et al., arXiv:1706.08500) and kernel (KID, arXiv:1801.01401).

The Fréchet distance is biased below about ten thousand images: compare only at equal n, and at n >= 1,000. KID's
estimator is unbiased (the sums leave out the diagonal) and is a mean over images, so it can be a per-image metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ...errors import GainsError
from ..sample import Shot
from .features import Features

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Kid", "frechet", "kernel_distance", "kid_contributions"]


def _rows(features: Tensor | np.ndarray) -> np.ndarray:
    rows = np.asarray(features.detach().cpu().float() if hasattr(features, "detach") else features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise GainsError(f"features of shape {rows.shape}; expected (n, d) with n >= 2")
    return rows


def frechet(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (n, d), (m, d).

    tr((Sx Sy)^1/2) is the sum of the singular values of Ax^T Ay with S = A A^T, which stays real and needs no matrix
    square root: A is the centred data over sqrt(n-1).
    """
    x, y = _rows(x), _rows(y)
    a = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    b = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(
        a @ b.T if len(a) * len(b) < a.shape[1] ** 2 else _square_root(a) @ _square_root(b), compute_uv=False
    )
    gap = x.mean(axis=0) - y.mean(axis=0)
    return float(max(gap @ gap + (a**2).sum() + (b**2).sum() - 2 * cross.sum(), 0.0))


def _square_root(a: np.ndarray) -> np.ndarray:
    """Symmetric (d, d) square root of a^T a."""
    _, s, vt = np.linalg.svd(a, full_matrices=False)
    root: np.ndarray = (vt.T * s) @ vt
    return root


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel


def kernel_distance(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> float:
    """Unbiased squared MMD with KID's cubic kernel; can be slightly negative."""
    return float(kid_contributions(x, y).mean())


def kid_contributions(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> np.ndarray:
    """(n,) numbers, one per row of x, whose mean is the unbiased squared MMD to y."""
    x, y = _rows(x), _rows(y)
    n, m = len(x), len(y)
    xx, yy = _kernel(x, x), _kernel(y, y)
    own = (xx.sum(axis=1) - np.diag(xx)) / (n - 1)
    constant = (yy.sum() - np.trace(yy)) / (m * (m - 1))
    contributions: np.ndarray = own - 2 * _kernel(x, y).mean(axis=1) + constant
    return contributions


@dataclass(frozen=True, kw_only=True)
class Kid:
    """Kernel distance to real images, as each image's share; the arm's mean is its KID."""

    name: str
    features: Features
    references: Sequence[Image.Image]
    higher_is_better: bool = False

    @cached_property
    def _real(self) -> np.ndarray:
        return _rows(self.features(list(self.references)))

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        return kid_contributions(self.features([shot.image for shot in shots]), self._real)

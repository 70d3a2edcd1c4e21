"""What a metric is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ...errors import GainsError
from ..sample import Shot

__all__ = ["Measure", "Metric", "score"]


@runtime_checkable
class Metric(Protocol):
    """One number per shot. The shots of a call are those of one arm, so a metric may look at the whole set."""

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    def __call__(self, shots: Sequence[Shot]) -> Sequence[float] | np.ndarray: ...


@dataclass(frozen=True)
class Measure:
    """A plain function as a metric: `Measure("prompt accuracy", True, judge.accuracy)`."""

    name: str
    higher_is_better: bool
    function: Callable[[Sequence[Shot]], Sequence[float]]

    def __call__(self, shots: Sequence[Shot]) -> Sequence[float]:
        return self.function(shots)


def score(metric: Metric, shots: Sequence[Shot]) -> np.ndarray:
    """The metric's numbers as a checked float64 array of shape (n,); NaN marks an image it could not judge."""
    values = np.asarray(metric(shots), dtype=np.float64)
    if values.shape != (len(shots),):
        raise GainsError(
            f"metric {metric.name!r} returned shape {values.shape} for {len(shots)} images; expected one each"
        )
    if np.isinf(values).any():
        raise GainsError(
            f"metric {metric.name!r} returned an infinite value; return NaN where an image cannot be judged"
        )
    return values

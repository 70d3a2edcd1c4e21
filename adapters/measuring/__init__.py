"""What an adapter does, measured: sampling, metrics, paired comparison, report, and how all of it is verified.

`sample.images` samples pictures, `gains.compare` compares arms, `verify.verify` recomputes a folder's numbers.
"""

from __future__ import annotations

from . import (
    archive,
    curves,
    effect,
    gains,
    metrics,
    overfitting,
    plane,
    plot,
    report,
    sample,
    stats,
    table,
    tune,
    verify,
    words,
)

__all__ = [
    "archive",
    "curves",
    "effect",
    "gains",
    "metrics",
    "overfitting",
    "plane",
    "plot",
    "report",
    "sample",
    "stats",
    "table",
    "tune",
    "verify",
    "words",
]

"""Intervals and tests on cluster means.

Images of one prompt, and prompts of one subject, are not independent; their means are (nearly). With few clusters a
percentile bootstrap covers too little (.86-.93 at 6-30 clusters), so fewer than 40 get Student's t, with a bootstrap-t
beside it as a check; more get BCa (Efron 1987), which follows skewness, with 10,000 draws. A bootstrap of the mean is a
little too narrow (it uses normal quantiles and the variance over n, not n-1), so its level is expanded as Hesterberg
(arXiv:1411.5279, section 4.3.2 "expanded percentile") does; it then agrees with Student's t where data are normal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import GainsError

__all__ = ["BCA_FROM", "MeanInterval", "bootstrap_t", "detectable", "holm", "mean_interval", "wilcoxon"]

BCA_FROM = 40
DRAWS = 10_000
ENUMERATED = 13  # clusters up to which scipy's signed-rank test counts all signs where there are ties or zeros


@dataclass(frozen=True)
class MeanInterval:
    """A mean over clusters and its confidence interval."""

    mean: float
    low: float
    high: float
    clusters: int
    method: str


def _means(values: Sequence[float] | np.ndarray) -> np.ndarray:
    means = np.asarray(values, dtype=np.float64)
    if means.ndim != 1 or len(means) < 2 or not np.isfinite(means).all():
        raise GainsError(f"need at least two finite cluster means, got {means.tolist()[:5]} ({means.size} in all)")
    return means


def mean_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> MeanInterval:
    """Confidence interval of the mean of independent cluster means.

    Args:
        values: one mean a cluster, at least two.
        confidence: share of such studies whose interval holds the true mean.
        seed: of the bootstrap's draws.

    Returns:
        The mean, its interval, the number of clusters and the method: constant, student-t or BCa (bias-corrected and
        accelerated bootstrap).
    """
    means = _means(values)
    n, mean = len(means), float(means.mean())
    if np.ptp(means) == 0:
        return MeanInterval(mean, mean, mean, n, "constant")
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * means.std(ddof=1) / math.sqrt(n))
    student = MeanInterval(mean, mean - half, mean + half, n, "student-t")
    if n < BCA_FROM:
        return student
    generator = np.random.default_rng(seed)
    expanded = 1 - 2 * stats.norm.sf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (means,), np.mean, confidence_level=expanded, n_resamples=DRAWS, method="BCa", rng=generator, batch=1000
        )
    low, high = map(float, result.confidence_interval)
    if not math.isfinite(low) or not math.isfinite(high):
        return student  # all but a few clusters equal: the acceleration is undefined
    return MeanInterval(mean, low, high, n, "BCa expanded")


def bootstrap_t(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """Studentised bootstrap interval, the check beside Student's t.

    Args:
        values: one mean a cluster, at least two.
        confidence: share of such studies whose interval holds the true mean.
        seed: of the draws.
        draws: bootstrap samples.

    Returns:
        Lower and upper end.
    """
    means = _means(values)
    n, mean, error = len(means), means.mean(), means.std(ddof=1) / math.sqrt(len(means))
    if error == 0:
        return float(mean), float(mean)
    drawn = means[np.random.default_rng(seed).integers(0, n, (draws, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    usable = errors > 1e-12 * error
    quotients = (drawn.mean(axis=1)[usable] - mean) / errors[usable]
    upper, lower = np.quantile(quotients, [(1 + confidence) / 2, (1 - confidence) / 2])
    return float(mean - upper * error), float(mean - lower * error)


def wilcoxon(values: Sequence[float] | np.ndarray) -> float:
    """Two-sided signed-rank p-value of the cluster means; 1 where all are zero.

    It is what `scipy.stats.wilcoxon` gives. For few clusters with ties, scipy calls a Python function once for each of
    the 2^n signs, which takes seconds; here all of them are one array.
    """
    means = _means(values)
    if not means.any():
        return 1.0
    moved, sizes = means != 0, np.abs(means)
    if len(means) <= ENUMERATED and (not moved.all() or len(np.unique(sizes)) < len(sizes)):
        ranks = np.zeros(len(means))
        ranks[moved] = np.sign(means[moved]) * stats.rankdata(sizes[moved])
        signs = {"permutation_type": "samples", "n_resamples": np.inf, "vectorized": True}
        return float(stats.permutation_test((ranks,), np.sum, **signs).pvalue)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties and zeros make scipy switch to the approximation, and say so
        return float(stats.wilcoxon(means).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, running = np.empty(len(p_values)), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted.tolist()


def detectable(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """The true difference this design would have shown with the given power: (t_conf + t_power) standard errors.

    Args:
        values: one difference a cluster, at least two.
        confidence: of the two-sided interval.
        power: chance of an interval without 0.
    """
    means = _means(values)
    n = len(means)
    error = means.std(ddof=1) / math.sqrt(n)
    return float((stats.t.ppf((1 + confidence) / 2, n - 1) + stats.t.ppf(power, n - 1)) * error)

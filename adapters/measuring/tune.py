"""Search for the guidance settings that measure best, on prompts and seeds the report will never see.

Successive halving (Jamieson & Talwalkar, arXiv:1502.07943): every candidate is tried on a few seeds, the better part on
more, until one is left. Arms to be compared get the same budget: `Tuned.images` counts what was spent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import GainsError
from .metrics import Metric, score
from .sample import Shot

__all__ = ["KEEP", "Joint", "Tuned", "budget", "recomputed_winner", "search", "undecided"]

KEEP = 1 / 3  # share of candidates that go on to the next round

Try = Callable[[Mapping[str, Any], Sequence[str], Sequence[int]], Sequence[Shot]]


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The harmonic mean of several metrics' means, each over its reference: high only where all of them are."""

    metrics: Sequence[Metric]
    references: Mapping[str, float]
    """Metric -> what its mean is divided by."""
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if not metric.higher_is_better or not self.references.get(metric.name, 0) > 0:
                raise GainsError(f"joint: {metric.name!r} needs higher to be better, and a reference > 0")

    @property
    def name(self) -> str:
        parts = [name if value == 1 else f"{name} / {value:g}" for name, value in self.references.items()]
        return f"harmonic mean of {' and '.join(parts)}"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The winner, and how everyone else did."""

    best: dict[str, Any]
    """The winning settings, for `guider_config.json`."""
    rounds: list[dict[str, Any]]
    """Per round: seeds per prompt, and every candidate's settings, its images' numbers (null where one could not
    be judged) and their mean; what goes beside the winner as its curve."""
    images: int


def search(
    candidates: Sequence[Mapping[str, Any]],
    sample: Try,
    objective: Metric | Joint,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    held_out_prompts: Sequence[str],
    held_out_seeds: Sequence[int],
    keep: float = KEEP,
    first: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tuned:
    """Find the candidate with the best mean objective. Ties go to the earlier one: see `undecided`.

    Args:
        candidates: settings, each a plain mapping (method, scale, reference, clamps, start, stop, adapter weight, …).
        sample: (settings, prompts, seeds) -> images.
        objective: a metric, whose mean over the images counts, or several that count together.
        prompts: prompts to tune on; they must differ from the held-out prompts, which are passed only for this check.
        seeds: seeds to tune with; they must differ from the held-out seeds.
        held_out_prompts: those of the report, which the search must not see.
        held_out_seeds: those of the report, which the search must not see.
        keep: share of candidates that go on to the next round, in which each gets 1/keep times the seeds.
        first: seeds per prompt in the first round.
        progress: called after each candidate with the number of images so far and in all.

    Raises:
        GainsError: no candidates, prompts or seeds, shares out of range, or a prompt or seed that is held out.
    """
    if not candidates:
        raise GainsError("tuning needs at least one candidate")
    if not 0 < keep < 1 or first < 1 or not prompts or not seeds:
        raise GainsError(f"keep={keep}, first={first}: need 0 < keep < 1, first >= 1, and prompts and seeds to tune on")
    if shared := sorted(set(prompts) & set(held_out_prompts)):
        raise GainsError(f"prompt {shared[0]!r} is held out for the report and cannot be tuned on")
    if shared_seeds := sorted(set(seeds) & set(held_out_seeds)):
        raise GainsError(f"seed {shared_seeds[0]} is held out for the report and cannot be tuned on")
    left, n, rounds, images = [dict(c) for c in candidates], min(first, len(seeds)), [], 0
    total = budget(len(left), len(prompts), len(seeds), keep=keep, first=first)
    while True:
        results = []
        for candidate in left:
            shots = sample(candidate, prompts, seeds[:n])
            images += len(shots)
            if progress is not None:
                progress(images, total)
            values = _values(objective, shots)
            references = objective.references if isinstance(objective, Joint) else {}
            results.append({"settings": candidate, "mean": _mean(values, references), "values": values})
        rounds.append({"seeds": n, "results": results})
        left = _better(results, keep, higher_is_better=objective.higher_is_better)
        if len(left) == 1 or n == len(seeds):
            return Tuned(best=left[0], rounds=rounds, images=images)
        n = min(len(seeds), math.ceil(n / keep))


def budget(candidates: int, prompts: int, seeds: int, *, keep: float = KEEP, first: int = 1) -> int:
    """How many images a search draws: the rounds of `search`, counted.

    Args:
        candidates: number of candidates.
        prompts: number of prompts.
        seeds: number of seeds.
        keep: share of candidates that go on to the next round.
        first: seeds per prompt in the first round.
    """
    n, images = min(first, seeds), 0
    while True:
        images += candidates * prompts * n
        candidates = math.ceil(candidates * keep)
        if candidates == 1 or n == seeds:
            return images
        n = min(seeds, math.ceil(n / keep))


def recomputed_winner(
    rounds: Sequence[Mapping[str, Any]],
    *,
    higher_is_better: bool,
    references: Mapping[str, float] | None = None,
    keep: float = KEEP,
) -> dict[str, Any]:
    """The winner, recomputed from every image's number; `references` are those of a joint objective.

    Args:
        rounds: of `search`, each with its candidates' settings, their numbers and the mean of these.
        higher_is_better: whether the objective is to rise.
        references: metric -> what its mean is divided by, of a joint objective; None: there is one metric.
        keep: share of candidates that went on.

    Returns:
        The settings that won.

    Raises:
        GainsError: a round does not follow from the one before.
    """
    left: list[dict[str, Any]] = []
    for number, made in enumerate(rounds):
        results = made["results"]
        if number and [result["settings"] for result in results] != left:
            raise GainsError(f"round {number + 1} did not try the better ones of the round before")
        for result in results:
            mean = _mean(result["values"], references or {})
            if not math.isclose(mean, result["mean"], rel_tol=1e-9, abs_tol=1e-12):
                raise GainsError(f"{result['settings']} has a mean of {mean!r}, not {result['mean']!r}")
        left = _better(results, keep, higher_is_better=higher_is_better)
    if not left:
        raise GainsError("nothing was tried")
    return left[0]


def undecided(rounds: Sequence[Mapping[str, Any]], *, higher_is_better: bool) -> str:
    """What a search could not tell apart, and what it took then; empty where each choice was by a better number.

    Args:
        rounds: of `search`.
        higher_is_better: whether the objective is to rise.
    """
    means = [[result["mean"] for result in made["results"]] for made in rounds]
    for number, own in enumerate(means):
        order = sorted(own, reverse=higher_is_better)
        kept = 1 if number + 1 == len(means) else len(means[number + 1])
        if kept >= len(own) or not _alike(order[kept - 1], order[kept]):
            continue
        tied = sum(_alike(order[kept], mean) for mean in own)
        who = f"all {tied} candidates" if tied == len(own) else f"{tied} of {len(own)} candidates"
        when = "" if len(means) == 1 else f" in round {number + 1}"
        taken = "the first of them was taken" if kept == 1 else "the first of them went on"
        return f"{who} measure {order[kept]:.3g}{when}: the search cannot tell them apart, and {taken}"
    return ""


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)


def _values(objective: Metric | Joint, shots: Sequence[Shot]) -> Any:
    """Every image's number to four digits, null where it could not be judged; of a joint objective by metric."""
    if isinstance(objective, Joint):
        return {metric.name: _values(metric, shots) for metric in objective.metrics}
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in score(objective, shots)]


def _mean(values: Any, references: Mapping[str, float]) -> float:
    if isinstance(values, Mapping):
        parts = [_mean(values[name], {}) / reference for name, reference in references.items()]
        return len(parts) / sum(1 / part for part in parts) if min(parts) > 0 else 0.0
    judged = [value for value in values if value is not None]
    if not judged:
        raise GainsError("no image of a candidate could be judged; tune on other prompts, or by another metric")
    return float(np.mean(judged))


def _better(results: Sequence[Mapping[str, Any]], keep: float, *, higher_is_better: bool) -> list[dict[str, Any]]:
    """The better share of the candidates, best first; ties go to the earlier one: what changes least comes first."""
    order = sorted(results, key=lambda result: -result["mean"] if higher_is_better else result["mean"])
    return [result["settings"] for result in order[: math.ceil(len(order) * keep)]]

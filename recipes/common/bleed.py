"""How far subjects that were taught together run into each other: the pictures of each, held against all of them.

A row is what was asked for, a column whose pictures it is held against. On the diagonal a subject should be like
itself; beside it no more like another one than the base's own pictures of its class are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adapters.measuring import metrics as kinds
from adapters.measuring.metrics import Metric, score
from training.pocket.metrics import SUBJECT, subject_similarity

from .comparison import BASE, Comparison
from .spaces import pictures, space_of
from .units import Case

__all__ = ["bleed_facts", "bleed_table", "matrix"]


def matrix(units: Sequence[Case], shots: Sequence[Any], likeness: Mapping[tuple[str, str], Metric]) -> np.ndarray:
    """Mean similarity (n, n) of the pictures asked for each subject (rows) to each subject (columns).

    Args:
        units: the subjects.
        shots: of one arm, of all units.
        likeness: (asked for, held against) -> the metric.
    """
    found = np.empty((len(units), len(units)))
    for row, case in enumerate(units):
        own = [shot for shot in shots if shot.subject == case.name]
        for column, other in enumerate(units):
            found[row, column] = np.nanmean(score(likeness[case.name, other.name], own))
    return found


def bleed_facts(comparison: Comparison, shots: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    """The matrices of the base and of the baseline by name, and the mean beside the diagonal; printed too.

    Empty where there is one subject, or each has an adapter of its own.
    """
    units = comparison.units
    adapters = {case.adapter for case in units}
    if len(units) < 2 or adapters == {None} or len(adapters) > 1 or not all(case.folder for case in units):
        return {}
    metrics = {(case.name, other.name): _likeness(comparison, case, other) for case in units for other in units}
    named: dict[str, float] = {}
    for arm in (BASE, comparison.baseline.name):
        if arm not in shots:
            continue
        found = matrix(units, shots[arm], metrics)
        print("\n".join(bleed_table(arm, [case.name for case in units], found)))
        for row, case in enumerate(units):
            for column, other in enumerate(units):
                named[f"{arm}: pictures of {case.name}, similarity to {other.name}"] = float(found[row, column])
        named[f"{arm}: similarity to the other subjects"] = float(found[~np.eye(len(units), dtype=bool)].mean())
    return named


def bleed_table(arm: str, names: Sequence[str], values: np.ndarray) -> list[str]:
    """The matrix in words; rows are what was asked for.

    Args:
        arm: its name.
        names: of the subjects, in their order.
        values: (n, n) similarity of the pictures of row i to subject j.
    """
    width = max(8, *(len(name) + 1 for name in names))
    head = f"\nsimilarity of {arm}'s pictures of … to …"
    rows = [
        f"{name:<{width}}" + "".join(f"{value:{width}.3f}" for value in row)
        for name, row in zip(names, values, strict=True)
    ]
    return [head, " " * width + "".join(f"{name:>{width}}" for name in names), *rows]


def _likeness(comparison: Comparison, asked: Case, other: Case) -> Metric:
    """Of pictures in which the subject `asked` is looked for, to the pictures of `other`."""
    assert other.folder is not None
    shown, masks = pictures(other.folder)
    if comparison.pocket and masks is not None:
        return subject_similarity(shown, masks, asked.noun)
    spaces = comparison.plan.spaces
    known = [name for name in ("dinov3", "dinov2", "dino", "clip") if name in spaces]
    where = next(iter(known), "judge" if comparison.pocket else "color")
    return kinds.Similarity(name=f"{SUBJECT} ({where})", features=space_of(where, comparison.plan), references=shown)

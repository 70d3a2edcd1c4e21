"""Curves over the guidance scale, and the baseline that they give at an arm's own effective scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import GainsError
from .design import Design
from .paired import arm_summary, by_arm, check_join, cluster_of, row_value
from .table import Row

__all__ = ["at_effective_scale", "curve"]


def curve(rows: Sequence[Row], sweep: Mapping[str, str], design: Design) -> list[dict[str, Any]]:
    """One method's points over guidance scale, every metric with its interval, ordered by scale.

    Args:
        rows: of the arms in `sweep`, and perhaps others.
        sweep: guidance scale, as text -> arm.
        design: the metrics, and the confidence of their intervals.

    Raises:
        GainsError: an arm of the sweep has no rows.
    """
    tables, points = by_arm(rows), []
    for scale, arm in sorted(sweep.items(), key=lambda item: float(item[0])):
        if arm not in tables:
            raise GainsError(f"sweeps names arm {arm!r}, which has no images; there are {sorted(tables)}")
        points.append({"scale": float(scale), **arm_summary(arm, tables[arm], design, cluster_of(tables[arm], design))})
    return points


def at_effective_scale(
    rows: Sequence[Row], arm: str, sweep: Mapping[str, str], metrics: Sequence[str], *, name: str, recorded: str
) -> list[Row]:
    """Rows of a baseline at an arm's own effective guidance scale, to be compared with it.

    S-CFG at nominal scale s pushes, on average, with another scale: `recorded` (a column noted while sampling). Each
    unit of `sweep` (scale -> arm, plain CFG) is interpolated linearly, metric by metric, at that unit's effective scale
    in `arm`. A scale outside the sweep is an error: nothing is extrapolated.

    Args:
        rows: of `arm` and of the sweep, on the same prompts and seeds.
        arm: whose effective scale is asked for.
        sweep: guidance scale, as text -> arm of plain CFG.
        metrics: columns to interpolate.
        name: the arm's name in the rows returned.
        recorded: column with the effective scale.

    Raises:
        GainsError: no sweep, an arm without rows, or an effective scale that the sweep does not enclose.
    """
    if not sweep:
        raise GainsError("no sweep to interpolate in; measure the baseline at several guidance scales")
    tables = by_arm(rows)
    for wanted in (arm, *sweep.values()):
        if wanted not in tables:
            raise GainsError(f"no images of arm {wanted!r}; there are {sorted(tables)}")
    points = sorted((float(scale), tables[member]) for scale, member in sweep.items())
    for _, table in points:
        check_join(arm, tables[arm], "the sweep", table)
    scales = [scale for scale, _ in points]
    result = []
    for key, row in tables[arm].items():
        effective = row_value(row, recorded)
        if not scales[0] <= effective <= scales[-1]:
            raise GainsError(f"effective scale {effective:.3g} of {key} is outside the sweep {scales}; widen the sweep")
        values = {m: [row_value(table[key], m) for _, table in points] for m in metrics}
        numbers = {m: float(np.interp(effective, scales, v)) for m, v in values.items()}
        result.append(replace(row, arm=name, image="", seconds=0.0, numbers={**numbers, recorded: effective}))
    return result

"""Rows of several arms, joined into pairs: their differences, within clusters, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from ..errors import GainsError
from . import stats
from .design import ArmContrast, Design
from .table import Row

__all__ = [
    "Key",
    "arm_summary",
    "by_arm",
    "check_join",
    "cluster_means",
    "cluster_of",
    "contrast",
    "finite",
    "pairs",
    "row_value",
    "with_holm",
]

Key = tuple[str, str, int, str]
"""(subject, prompt, seed, hash of the initial latents)."""


def by_arm(rows: Sequence[Row]) -> dict[str, dict[Key, Row]]:
    """Arm -> its rows by what they are joined on.

    Args:
        rows: of any arms.

    Raises:
        GainsError: two images of one arm have the same subject, prompt, seed and latents.
    """
    tables: dict[str, dict[Key, Row]] = {}
    for row in rows:
        table = tables.setdefault(row.arm, {})
        if row.key in table:
            raise GainsError(f"arm {row.arm!r} has two images of {row.key}")
        table[row.key] = row
    return tables


def check_join(name: str, table: Mapping[Any, Row], baseline: str, reference: Mapping[Any, Row]) -> None:
    """Raises where two arms do not have the same subjects, prompts, seeds and latents.

    Args:
        name: of the arm.
        table: the arm's rows.
        baseline: name of what it is joined with.
        reference: rows of that one.

    Raises:
        GainsError: what is in one of them only.
    """
    only = sorted(set(table) ^ set(reference))
    if not only:
        return
    where = name if only[0] in table else baseline
    raise GainsError(
        f"arms {name!r} and {baseline!r} do not join: {len(only)} of (subject, prompt, seed, initial latents) are in "
        f"one only, first {only[0]} in {where!r}; sample all arms with the same prompts, seeds, size and precision"
    )


def cluster_of(reference: Mapping[Any, Row], design: Design) -> str:
    """What an interval is over: subjects where there are six at least, else prompts, unless the design says.

    Args:
        reference: the baseline's rows.
        design: of the comparison.
    """
    if design.cluster != "auto":
        return design.cluster
    return "subject" if len({key[0] for key in reference}) >= 6 else "prompt"


def cluster_means(values: Mapping[Key, float], cluster: str) -> np.ndarray:
    """Seeds averaged within prompts, prompts within subjects where subjects are the clusters.

    Args:
        values: one number per image or pair.
        cluster: subject or prompt.

    Returns:
        One mean per cluster, (clusters,).
    """
    prompts: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (subject, prompt, _, _), value in sorted(values.items()):
        prompts[subject, prompt].append(value)
    means = {key: float(np.mean(v)) for key, v in prompts.items()}
    if cluster == "prompt":
        return np.array(list(means.values()))
    subjects: dict[str, list[float]] = defaultdict(list)
    for (subject, _), mean in means.items():
        subjects[subject].append(mean)
    return np.array([np.mean(v) for v in subjects.values()])


def row_value(row: Row, metric: str) -> float:
    """The row's value of a metric.

    Args:
        row: one image.
        metric: name of its column.

    Raises:
        GainsError: the row has no such column.
    """
    if metric not in row.numbers:
        raise GainsError(f"arm {row.arm!r} has no {metric!r} for {row.key}; it has {sorted(row.numbers)}")
    return row.numbers[metric]


def finite(values: Mapping[Any, float], what: str) -> dict[Any, float]:
    """The values without those that a metric could not give.

    Args:
        values: by what rows are joined on.
        what: they are, for the message.

    Raises:
        GainsError: fewer than two prompts are left.
    """
    kept = {key: value for key, value in values.items() if math.isfinite(value)}
    if len({key[:2] for key in kept}) < 2:
        raise GainsError(
            f"{what}: fewer than two prompts with a value ({len(kept)} of {len(values)} images); add prompts"
        )
    return kept


def arm_summary(name: str, table: Mapping[Any, Row], design: Design, cluster: str) -> dict[str, Any]:
    """An arm's means with their intervals, its seconds per image, and the means of what else was recorded.

    Args:
        name: of the arm.
        table: its rows.
        design: the metrics, and the confidence of the intervals.
        cluster: subject or prompt.
    """
    summary: dict[str, Any] = {"name": name, "n": len(table), "metrics": {}}
    for metric in design.higher_is_better:
        values = finite({key: row_value(row, metric) for key, row in table.items()}, f"{name}, {metric}")
        summary["metrics"][metric] = asdict(
            stats.mean_interval(cluster_means(values, cluster), confidence=design.confidence)
        )
    summary["seconds"] = float(np.mean([row.seconds for row in table.values()]))
    extra = sorted({n for row in table.values() for n in row.numbers} - set(design.higher_is_better))
    summary["recorded"] = {n: float(np.mean([r.numbers[n] for r in table.values() if n in r.numbers])) for n in extra}
    return summary


def contrast(
    table: Mapping[Any, Row],
    reference: Mapping[Any, Row],
    names: tuple[str, str],
    metric: str,
    design: Design,
    cluster: str,
) -> ArmContrast:
    """One arm against another on one metric.

    Args:
        table: rows of the arm.
        reference: rows of the other one.
        names: theirs, in this order.
        metric: what is compared.
        design: which way is up, and the confidence of the interval.
        cluster: subject or prompt.
    """
    raw = {key: row_value(row, metric) - row_value(reference[key], metric) for key, row in table.items()}
    pairs = finite(raw, f"{names[0]} against {names[1]}, {metric}")
    means = cluster_means(pairs, cluster)
    result = stats.mean_interval(means, confidence=design.confidence)
    up = 1 if design.higher_is_better[metric] else -1
    return ArmContrast(
        arm=names[0],
        baseline=names[1],
        metric=metric,
        higher_is_better=design.higher_is_better[metric],
        difference=result.mean,
        low=result.low,
        high=result.high,
        method=result.method,
        clusters=result.clusters,
        pairs=len(pairs),
        failures=len(raw) - len(pairs),
        check=stats.bootstrap_t(means, confidence=design.confidence, draws=2000),
        p=stats.wilcoxon(means),
        p_holm=None,
        wins=sum(bool(up * value > 0) for value in pairs.values()),
        ties=sum(bool(value == 0) for value in pairs.values()),
        losses=sum(bool(up * value < 0) for value in pairs.values()),
        detectable=stats.detectable(means, confidence=design.confidence),
    )


def with_holm(contrasts: Sequence[ArmContrast], design: Design) -> list[ArmContrast]:
    """Holm within each arm, over everything but the primary contrast; the design's arm and metric come first.

    Args:
        contrasts: of all arms and metrics.
        design: which contrast is the primary one.
    """
    adjusted: dict[tuple[str, str], float] = {}
    for arm in {c.arm for c in contrasts}:
        family = [c for c in contrasts if c.arm == arm and (arm, c.metric) != (design.arm, design.primary)]
        values = stats.holm([c.p for c in family])
        adjusted |= {(arm, c.metric): p for c, p in zip(family, values, strict=True)}
    order = sorted(contrasts, key=lambda c: (c.arm != design.arm, c.arm == design.arm and c.metric != design.primary))
    return [replace(c, p_holm=adjusted.get((c.arm, c.metric))) for c in order]


def pairs(table: Mapping[Any, Row], reference: Mapping[Any, Row], design: Design) -> list[dict[str, Any]]:
    """Every pair's difference on the primary metric, the largest loss first.

    Args:
        table: rows of the arm.
        reference: rows of the baseline.
        design: the primary metric.
    """
    up = 1 if design.higher_is_better[design.primary] else -1
    gaps = {k: up * (row.numbers[design.primary] - reference[k].numbers[design.primary]) for k, row in table.items()}
    order = sorted((gap, key) for key, gap in gaps.items() if math.isfinite(gap))
    return [
        {"subject": key[0], "prompt": key[1], "seed": key[2], "latents": key[3], "difference": up * gap}
        for gap, key in order
    ]

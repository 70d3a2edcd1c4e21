"""Paired comparison of arms, said in numbers and in one word.

An arm is a way to sample (base; adapter with CFG; adapter with S-CFG; …). All arms get the same prompts, seeds and
initial latents; the effect is the difference per pair, averaged within clusters (subjects, else prompts), and the
interval is over clusters. Primary metric, minimum effect and contrast are declared in `Design` before anything is
measured. Every number of the result is a function of the table of rows and the design, so `per_image.csv` is enough to
recompute it (`adapters.table`).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..errors import GainsError
from . import effect, plane, stats
from .design import Contrast, Design, Verdict
from .table import Row

__all__ = [
    "FORMAT",
    "Contrast",
    "Design",
    "Gains",
    "Verdict",
    "at_effective_scale",
    "compare",
    "curve",
]


FORMAT = 2
"""Of gains.json: 1 had the verdict on the guidance alone, and no plane."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Everything `gains.json` says about the comparison."""

    adapter: Verdict | None
    """What the adapter does to its base; None where the base alone was not drawn, or nothing stands on it."""
    verdict: Verdict
    """What the guidance adds to plain guidance."""
    design: Design
    arms: list[dict[str, Any]]
    effects: list[Contrast]
    """The baseline against the base alone, on the metrics that decide about the adapter."""
    contrasts: list[Contrast]
    plane: dict[str, Any] | None
    """Every arm as a point of identity and accuracy, and the front of plain guidance; see `plane.draw`."""
    curves: dict[str, list[dict[str, Any]]]
    worst: list[dict[str, Any]]
    """The five pairs that lost most on the primary metric."""
    best: list[dict[str, Any]]
    """The five that gained most."""
    counts: dict[str, Any]

    @property
    def primary(self) -> Contrast:
        d = self.design
        return next(c for c in self.contrasts if (c.arm, c.metric) == (d.arm, d.primary))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        values: dict[str, Any] = json.loads(json.dumps(_plain(asdict(self))))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------- comparing


def compare(rows: Sequence[Row], design: Design) -> Gains:
    """Compare the baseline with the base, and every arm with the baseline, and give the verdicts on both.

    Raises `GainsError` where arms do not join on (subject, prompt, seed, hash of the initial latents), or a metric is
    missing.
    """
    tables = _by_arm(rows)
    for name in (design.arm, design.baseline, *filter(None, [design.base]), *design.plain):
        if name not in tables:
            raise GainsError(f"no images of arm {name!r}; there are {sorted(tables)}")
    reference = tables[design.baseline]
    for name, table in tables.items():
        _check_join(name, table, design.baseline, reference)
    cluster = _cluster(reference, design)
    arms = [_arm_summary(name, table, design, cluster) for name, table in tables.items()]
    contrasts = [
        _contrast(table, reference, (name, design.baseline), metric, design, cluster)
        for name, table in tables.items()
        if name != design.baseline
        for metric in design.higher_is_better
    ]
    effects = _effects(tables, design, cluster)
    contrasts = _with_holm(contrasts, design)
    curves = {method: curve(rows, sweep, design) for method, sweep in design.sweeps.items()}
    primary = next(c for c in contrasts if (c.arm, c.metric) == (design.arm, design.primary))
    return Gains(
        adapter=effect.verdict(effects, design) if effects else None,
        design=design,
        verdict=_verdict(primary, contrasts, design),
        arms=arms,
        effects=effects,
        contrasts=contrasts,
        plane=_plane(tables, arms, design, cluster),
        curves=curves,
        worst=_pairs(tables[design.arm], reference, design)[:5],
        best=_pairs(tables[design.arm], reference, design)[:-6:-1],
        counts={
            "pairs": len(reference),
            "clusters": primary.clusters,
            "cluster": cluster,
            "prompts": len({key[1] for key in reference}),
            "seeds": len({key[2] for key in reference}),
            "subjects": len({key[0] for key in reference}),
        },
    )


def _by_arm(rows: Sequence[Row]) -> dict[str, dict[tuple[str, str, int, str], Row]]:
    tables: dict[str, dict[tuple[str, str, int, str], Row]] = {}
    for row in rows:
        table = tables.setdefault(row.arm, {})
        if row.key in table:
            raise GainsError(f"arm {row.arm!r} has two images of {row.key}")
        table[row.key] = row
    return tables


def _check_join(name: str, table: Mapping[Any, Row], baseline: str, reference: Mapping[Any, Row]) -> None:
    only = sorted(set(table) ^ set(reference))
    if not only:
        return
    where = name if only[0] in table else baseline
    raise GainsError(
        f"arms {name!r} and {baseline!r} do not join: {len(only)} of (subject, prompt, seed, initial latents) are in "
        f"one only, first {only[0]} in {where!r}; sample all arms with the same prompts, seeds, size and precision"
    )


def _cluster(reference: Mapping[Any, Row], design: Design) -> str:
    if design.cluster != "auto":
        return design.cluster
    return "subject" if len({key[0] for key in reference}) >= 6 else "prompt"


def _cluster_means(values: Mapping[tuple[str, str, int, str], float], cluster: str) -> np.ndarray:
    """Seeds averaged within prompts, prompts within subjects where subjects are the clusters."""
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


def _number(row: Row, metric: str) -> float:
    if metric not in row.numbers:
        raise GainsError(f"arm {row.arm!r} has no {metric!r} for {row.key}; it has {sorted(row.numbers)}")
    return row.numbers[metric]


def _finite(values: Mapping[Any, float], what: str) -> dict[Any, float]:
    kept = {key: value for key, value in values.items() if math.isfinite(value)}
    if len({key[:2] for key in kept}) < 2:
        raise GainsError(
            f"{what}: fewer than two prompts with a value ({len(kept)} of {len(values)} images); add prompts"
        )
    return kept


def _arm_summary(name: str, table: Mapping[Any, Row], design: Design, cluster: str) -> dict[str, Any]:
    summary: dict[str, Any] = {"name": name, "n": len(table), "metrics": {}}
    for metric in design.higher_is_better:
        values = _finite({key: _number(row, metric) for key, row in table.items()}, f"{name}, {metric}")
        summary["metrics"][metric] = asdict(
            stats.interval(_cluster_means(values, cluster), confidence=design.confidence)
        )
    summary["seconds"] = float(np.mean([row.seconds for row in table.values()]))
    extra = sorted({n for row in table.values() for n in row.numbers} - set(design.higher_is_better))
    summary["recorded"] = {n: float(np.mean([r.numbers[n] for r in table.values() if n in r.numbers])) for n in extra}
    return summary


def _effects(tables: Mapping[str, Mapping[Any, Row]], design: Design, cluster: str) -> list[Contrast]:
    """The adapter with plain guidance against the base; none where the base was not drawn."""
    if design.base is None:
        return []
    ours, theirs = tables[design.baseline], tables[design.base]
    level = replace(design, confidence=effect.confidence(design))
    names = (design.baseline, design.base)
    return [_contrast(ours, theirs, names, metric, level, cluster) for metric in effect.metrics(design)]


def _plane(
    tables: Mapping[str, Mapping[Any, Row]], arms: Sequence[Mapping[str, Any]], design: Design, cluster: str
) -> dict[str, Any] | None:
    """The plane of identity and accuracy; None where they are not both measured."""
    if design.identity is None or design.accuracy is None:
        return None

    def gap(arm: str, edge: plane.Edge) -> stats.Interval:
        """Interval of how far an arm lies above an edge of the front, pair by pair."""
        values = {
            key: sum(
                weight * (_number(row, metric) - sum(s * _number(tables[p][key], metric) for p, s in edge.shares))
                for metric, weight in edge.normal.items()
            )
            for key, row in tables[arm].items()
        }
        means = _cluster_means(_finite(values, f"{arm} against the front"), cluster)
        return stats.interval(means, confidence=design.confidence)

    return plane.draw(arms, design, gap)


def _contrast(
    table: Mapping[Any, Row],
    reference: Mapping[Any, Row],
    names: tuple[str, str],
    metric: str,
    design: Design,
    cluster: str,
) -> Contrast:
    """One arm against another on one metric; `names` are theirs, of `table` and of `reference`."""
    raw = {key: _number(row, metric) - _number(reference[key], metric) for key, row in table.items()}
    pairs = _finite(raw, f"{names[0]} against {names[1]}, {metric}")
    means = _cluster_means(pairs, cluster)
    result = stats.interval(means, confidence=design.confidence)
    up = 1 if design.higher_is_better[metric] else -1
    return Contrast(
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


def _with_holm(contrasts: Sequence[Contrast], design: Design) -> list[Contrast]:
    """Holm within each arm, over everything but the primary contrast; the design's arm and metric come first."""
    adjusted: dict[tuple[str, str], float] = {}
    for arm in {c.arm for c in contrasts}:
        family = [c for c in contrasts if c.arm == arm and (arm, c.metric) != (design.arm, design.primary)]
        values = stats.holm([c.p for c in family])
        adjusted |= {(arm, c.metric): p for c, p in zip(family, values, strict=True)}
    order = sorted(contrasts, key=lambda c: (c.arm != design.arm, c.arm == design.arm and c.metric != design.primary))
    return [replace(c, p_holm=adjusted.get((c.arm, c.metric))) for c in order]


def _pairs(table: Mapping[Any, Row], reference: Mapping[Any, Row], design: Design) -> list[dict[str, Any]]:
    """Every pair's difference on the primary metric, the largest loss first."""
    up = 1 if design.higher_is_better[design.primary] else -1
    gaps = {k: up * (row.numbers[design.primary] - reference[k].numbers[design.primary]) for k, row in table.items()}
    order = sorted((gap, key) for key, gap in gaps.items() if math.isfinite(gap))
    return [
        {"subject": key[0], "prompt": key[1], "seed": key[2], "latents": key[3], "difference": up * gap}
        for gap, key in order
    ]


# ---------------------------------------------------------------------------------------------- in words


def _verdict(primary: Contrast, contrasts: Sequence[Contrast], design: Design) -> Verdict:
    gap, low, high = primary.better
    level = f"{design.confidence:.0%}"
    what = (
        f"{design.primary}: {primary.difference:+.4g} ({level} interval {primary.low:+.4g} to {primary.high:+.4g}, "
        f"{primary.clusters} clusters, {primary.pairs} pairs) for {design.arm} against {design.baseline}"
    )
    if high < 0:
        return Verdict(word="harm", sentence=f"Harm. {what}.")
    if low <= 0:
        size = f"a true difference of {primary.detectable:.3g} would have shown in 80 % of runs"
        if primary.method == "constant":
            size = "every cluster says the same"
        sentence = f"No detectable gain. {what}; {size}."
        return Verdict(word="no detectable gain", sentence=sentence)
    if gap < design.minimum_effect:
        sentence = (
            f"No gain that matters. {what}, below the {design.minimum_effect:g} declared as the least worth having."
        )
        return Verdict(word="no detectable gain", sentence=sentence)
    own = [c for c in contrasts if c.arm == design.arm and c.metric != design.primary]
    judge = next((c for c in own if c.metric == design.referee), None)
    if judge is not None and judge.better[0] <= 0:
        sentence = (
            f"No gain confirmed. {what}, but the referee {judge.metric} disagrees in sign ({judge.difference:+.4g})."
        )
        return Verdict(word="no detectable gain", sentence=sentence)
    worse = [c for c in own if c.better[2] < 0]
    price = "; ".join(f"{c.metric} {c.difference:+.4g}" for c in worse)
    if any(c.p_holm is not None and c.p_holm < 1 - design.confidence for c in worse):
        return Verdict(word="trade-off", sentence=f"Trade-off. {what}, at the price of {price}.")
    watch = f" Not significant after Holm's correction, but to be watched: {price}." if worse else ""
    return Verdict(word="gain", sentence=f"Gain. {what}.{watch}")


# ---------------------------------------------------------------------------------------------- curves


def curve(rows: Sequence[Row], sweep: Mapping[str, str], design: Design) -> list[dict[str, Any]]:
    """One method's points over guidance scale, every metric with its interval, ordered by scale.

    Args:
        rows: of the arms in `sweep`, and perhaps others.
        sweep: guidance scale, as text -> arm.
        design: the metrics, and the confidence of their intervals.

    Raises:
        GainsError: an arm of the sweep has no rows.
    """
    tables, points = _by_arm(rows), []
    for scale, arm in sorted(sweep.items(), key=lambda item: float(item[0])):
        if arm not in tables:
            raise GainsError(f"sweeps names arm {arm!r}, which has no images; there are {sorted(tables)}")
        points.append({"scale": float(scale), **_arm_summary(arm, tables[arm], design, _cluster(tables[arm], design))})
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
    tables = _by_arm(rows)
    for wanted in (arm, *sweep.values()):
        if wanted not in tables:
            raise GainsError(f"no images of arm {wanted!r}; there are {sorted(tables)}")
    points = sorted((float(scale), tables[member]) for scale, member in sweep.items())
    for _, table in points:
        _check_join(arm, tables[arm], "the sweep", table)
    scales = [scale for scale, _ in points]
    result = []
    for key, row in tables[arm].items():
        effective = _number(row, recorded)
        if not scales[0] <= effective <= scales[-1]:
            raise GainsError(f"effective scale {effective:.3g} of {key} is outside the sweep {scales}; widen the sweep")
        values = {m: [_number(table[key], m) for _, table in points] for m in metrics}
        numbers = {m: float(np.interp(effective, scales, v)) for m, v in values.items()}
        result.append(replace(row, arm=name, image="", seconds=0.0, numbers={**numbers, recorded: effective}))
    return result

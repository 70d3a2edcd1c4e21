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
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..errors import GainsError
from . import stats
from .table import Row

__all__ = [
    "Contrast",
    "Design",
    "Gains",
    "Verdict",
    "at_effective_scale",
    "compare",
    "curve",
]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What was decided before the run."""

    arm: str
    """The arm the verdict is about."""
    baseline: str
    """What it is compared with."""
    primary: str
    """The metric that decides."""
    minimum_effect: float
    """The smallest difference worth calling a gain, in the primary metric's unit; > 0."""
    higher_is_better: Mapping[str, bool]
    """Every metric that is compared, and which way is up."""
    referee: str | None = None
    """A metric in another feature space that must agree in sign before anything is called a gain."""
    cluster: Literal["auto", "subject", "prompt"] = "auto"
    """auto: subjects where there are at least six, else prompts (then nothing is claimed about other subjects)."""
    confidence: float = 0.95
    sweeps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Per method, guidance scale (as text) -> arm: what curves are drawn through."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Anything worth writing down: held-out statement, tuning budget, command, versions."""

    def __post_init__(self) -> None:
        if self.arm == self.baseline:
            raise GainsError(f"arm and baseline are both {self.arm!r}")
        if not self.minimum_effect > 0:
            raise GainsError(f"minimum_effect={self.minimum_effect}: declare a difference > 0 that would matter")
        for name in (self.primary, self.referee):
            if name is not None and name not in self.higher_is_better:
                raise GainsError(f"{name!r} is not in higher_is_better ({sorted(self.higher_is_better)})")
        if not 0.5 <= self.confidence < 1:
            raise GainsError(f"confidence={self.confidence}: expected 0.5 <= confidence < 1")


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """One arm against the baseline on one metric; `difference` is arm minus baseline."""

    arm: str
    baseline: str
    metric: str
    higher_is_better: bool
    difference: float
    low: float
    high: float
    method: str
    clusters: int
    pairs: int
    failures: int
    """Pairs left out because the metric could not judge one of their images."""
    check: tuple[float, float]
    """Bootstrap-t interval."""
    p: float
    p_holm: float | None
    """None for the primary contrast, which needs no correction."""
    wins: int
    ties: int
    losses: int
    detectable: float

    @property
    def better(self) -> tuple[float, float, float]:
        """(difference, low, high) with up meaning better."""
        if self.higher_is_better:
            return self.difference, self.low, self.high
        return -self.difference, -self.high, -self.low


@dataclass(frozen=True, kw_only=True)
class Verdict:
    word: Literal["gain", "no detectable gain", "trade-off", "harm"]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Everything `gains.json` says about the comparison."""

    design: Design
    verdict: Verdict
    arms: list[dict[str, Any]]
    contrasts: list[Contrast]
    curves: dict[str, list[dict[str, Any]]]
    worst: list[dict[str, Any]]
    """The five pairs that lost most on the primary metric."""
    counts: dict[str, Any]

    @property
    def primary(self) -> Contrast:
        d = self.design
        return next(c for c in self.contrasts if (c.arm, c.metric) == (d.arm, d.primary))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        return json.loads(json.dumps(_plain(asdict(self))))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# ---------------------------------------------------------------------------------------------- comparing


def compare(rows: Sequence[Row], design: Design) -> Gains:
    """Compare every arm with the baseline on every metric of the design and give the verdict on `design.arm`.

    Raises `GainsError` where arms do not join on (subject, prompt, seed, hash of the initial latents), or a metric is
    missing.
    """
    tables = _by_arm(rows)
    for name in (design.arm, design.baseline):
        if name not in tables:
            raise GainsError(f"no images of arm {name!r}; there are {sorted(tables)}")
    reference = tables[design.baseline]
    for name, table in tables.items():
        _check_join(name, table, design.baseline, reference)
    cluster = _cluster(reference, design)
    arms = [_arm_summary(name, table, design, cluster) for name, table in tables.items()]
    contrasts = [
        _contrast(table, reference, name, metric, design, cluster)
        for name, table in tables.items()
        if name != design.baseline
        for metric in design.higher_is_better
    ]
    contrasts = _with_holm(contrasts, design)
    curves = {method: curve(rows, sweep, design) for method, sweep in design.sweeps.items()}
    primary = next(c for c in contrasts if (c.arm, c.metric) == (design.arm, design.primary))
    return Gains(
        design=design,
        verdict=_verdict(primary, contrasts, design),
        arms=arms,
        contrasts=contrasts,
        curves=curves,
        worst=_worst(tables[design.arm], reference, design),
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


def _contrast(
    table: Mapping[Any, Row], reference: Mapping[Any, Row], arm: str, metric: str, design: Design, cluster: str
) -> Contrast:
    raw = {key: _number(row, metric) - _number(reference[key], metric) for key, row in table.items()}
    pairs = _finite(raw, f"{arm} against {design.baseline}, {metric}")
    means = _cluster_means(pairs, cluster)
    result = stats.interval(means, confidence=design.confidence)
    up = 1 if design.higher_is_better[metric] else -1
    return Contrast(
        arm=arm,
        baseline=design.baseline,
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


def _worst(table: Mapping[Any, Row], reference: Mapping[Any, Row], design: Design) -> list[dict[str, Any]]:
    up = 1 if design.higher_is_better[design.primary] else -1
    gaps = {k: up * (row.numbers[design.primary] - reference[k].numbers[design.primary]) for k, row in table.items()}
    order = sorted((gap, key) for key, gap in gaps.items() if math.isfinite(gap))[:5]
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
    """One method's points over guidance scale, every metric with its interval, ordered by scale."""
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

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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import GainsError
from . import added, effect, plane, stats
from .curves import curve
from .design import ArmContrast, Design, Verdict
from .paired import (
    arm_summary,
    by_arm,
    check_join,
    cluster_means,
    cluster_of,
    contrast,
    finite,
    pairs,
    row_value,
    with_holm,
)
from .table import Row

__all__ = ["FORMAT", "ArmContrast", "Design", "Gains", "Verdict", "compare"]

FORMAT = 3
"""Of gains.json: 1 had the verdict on the guidance alone, and no plane; 2 had none on the adapter as it ships."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Everything `gains.json` says about the comparison."""

    adapter: Verdict | None
    """What the adapter does to its base with plain guidance; None where the base alone was not drawn."""
    shipped: Verdict | None
    """The same with the guidance that ships, where that is not plain guidance; None where it is."""
    verdict: Verdict
    """What the guidance adds to plain guidance."""
    design: Design
    arms: list[dict[str, Any]]
    effects: list[ArmContrast]
    """The baseline against the base alone, on the metrics that decide about the adapter."""
    shipped_effects: list[ArmContrast]
    """The same of what ships; empty where that is the baseline."""
    contrasts: list[ArmContrast]
    plane: dict[str, Any] | None
    """Every arm as a point of identity and accuracy, and the front of plain guidance; see `plane.plane_values`."""
    curves: dict[str, list[dict[str, Any]]]
    worst: list[dict[str, Any]]
    """The five pairs that lost most on the primary metric."""
    best: list[dict[str, Any]]
    """The five that gained most."""
    counts: dict[str, Any]

    @property
    def primary(self) -> ArmContrast:
        d = self.design
        return next(c for c in self.contrasts if (c.arm, c.metric) == (d.arm, d.primary))

    @property
    def ships(self) -> str:
        """The arm whose guidance ships: the design's arm where it showed a gain, otherwise the baseline.

        For a subject it is also a gain to lie above the front of plain guidance over weights and scales: as much
        identity with more accuracy, or the reverse, than plain guidance has at any of them.
        """
        d = self.design
        words = {one["word"] for one in (self.plane["above"] if self.plane else []) if one["arm"] == d.arm}
        return d.arm if self.verdict.word == "gain" or words == {"above"} else d.baseline

    @property
    def released(self) -> Verdict | None:
        """What the adapter as it ships does to its base; None where the base was not drawn."""
        return self.shipped or self.adapter

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


def compare(rows: Sequence[Row], design: Design) -> Gains:
    """Compare the baseline and what ships with the base, and every arm with the baseline, and give the verdicts.

    Raises `GainsError` where arms do not join on (subject, prompt, seed, hash of the initial latents), or a metric is
    missing.
    """
    tables = by_arm(rows)
    for name in (design.arm, design.baseline, *filter(None, [design.base]), *design.plain):
        if name not in tables:
            raise GainsError(f"no images of arm {name!r}; there are {sorted(tables)}")
    reference = tables[design.baseline]
    for name, table in tables.items():
        check_join(name, table, design.baseline, reference)
    cluster = cluster_of(reference, design)
    arms = [arm_summary(name, table, design, cluster) for name, table in tables.items()]
    contrasts = [
        contrast(table, reference, (name, design.baseline), metric, design, cluster)
        for name, table in tables.items()
        if name != design.baseline
        for metric in design.higher_is_better
    ]
    effects = _effects(tables, design, cluster, design.baseline)
    contrasts = with_holm(contrasts, design)
    curves = {method: curve(rows, sweep, design) for method, sweep in design.sweeps.items()}
    primary = next(c for c in contrasts if (c.arm, c.metric) == (design.arm, design.primary))
    found = Gains(
        adapter=effect.adapter_verdict(effects, design) if effects else None,
        shipped=None,
        design=design,
        verdict=added.guidance_verdict(primary, contrasts, design),
        arms=arms,
        effects=effects,
        shipped_effects=[],
        contrasts=contrasts,
        plane=_plane(tables, arms, design, cluster),
        curves=curves,
        worst=pairs(tables[design.arm], reference, design)[:5],
        best=pairs(tables[design.arm], reference, design)[:-6:-1],
        counts={
            "pairs": len(reference),
            "clusters": primary.clusters,
            "cluster": cluster,
            "prompts": len({key[1] for key in reference}),
            "seeds": len({key[2] for key in reference}),
            "subjects": len({key[0] for key in reference}),
        },
    )
    if not effects or found.ships == design.baseline:
        return found
    shipped = _effects(tables, design, cluster, found.ships)
    return replace(found, shipped=effect.adapter_verdict(shipped, design), shipped_effects=shipped)


def _effects(tables: Mapping[str, Mapping[Any, Row]], design: Design, cluster: str, arm: str) -> list[ArmContrast]:
    """The adapter in an arm against the base; none where the base was not drawn."""
    if design.base is None:
        return []
    ours, theirs = tables[arm], tables[design.base]
    level = replace(design, confidence=effect.confidence(design))
    names = (arm, design.base)
    return [contrast(ours, theirs, names, metric, level, cluster) for metric in effect.effect_metrics(design)]


def _plane(
    tables: Mapping[str, Mapping[Any, Row]], arms: Sequence[Mapping[str, Any]], design: Design, cluster: str
) -> dict[str, Any] | None:
    """The plane of identity and accuracy; None where they are not both measured."""
    if design.identity is None or design.accuracy is None:
        return None

    def gap(arm: str, edge: plane.Edge) -> stats.MeanInterval:
        """Interval of how far an arm lies above an edge of the front, pair by pair."""
        values = {
            key: sum(
                weight * (row_value(row, metric) - sum(s * row_value(tables[p][key], metric) for p, s in edge.shares))
                for metric, weight in edge.normal.items()
            )
            for key, row in tables[arm].items()
        }
        means = cluster_means(finite(values, f"{arm} against the front"), cluster)
        return stats.mean_interval(means, confidence=design.confidence)

    return plane.plane_values(arms, design, gap)

"""The report's tables: every arm, every difference, the pairs at both ends, the facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import words
from .gains import ArmContrast, Gains
from .page import html_table

__all__ = ["ends", "ends_table", "statistics", "table_of_arms", "table_of_facts"]


def table_of_arms(gains: Gains) -> str:
    metrics = gains.design.higher_is_better
    head = ["arm", *(f"{m} {'↑' if up else '↓'}" for m, up in metrics.items()), "seconds per picture"]
    hidden = gains.design.notes.get("only at equal effective scale", ())
    recorded = sorted({name for arm in gains.arms for name in arm["recorded"]} - {*hidden})
    rows = []
    for arm in gains.arms:
        values = [arm["metrics"][m] for m in metrics]
        cells = [
            f"{words.format_mean(name, v)} ({words.format_interval(name, v)})"
            for name, v in zip(metrics, values, strict=True)
        ]
        extra = [f"{arm['recorded'][name]:.4g}" if name in arm["recorded"] else "" for name in recorded]
        rows.append([arm["name"], *cells, f"{arm['seconds']:.3g}", *extra])
    return html_table("Every arm with its means and intervals", [*head, *recorded], rows)


def statistics(gains: Gains) -> str:
    """Verdicts in numbers, what was declared, and every difference: for readers who want to check."""
    verdicts = filter(None, (gains.shipped, gains.adapter, gains.verdict))
    said = "".join(f"<p>{escape(verdict.sentence)}</p>" for verdict in verdicts)
    against = [*gains.shipped_effects, *gains.effects]
    effects = "<h3>The adapter against its base</h3>" + _contrasts(against) if against else ""
    return (
        f"<details><summary>Verdicts in numbers, and every difference with its interval</summary>{said}"
        f"<p>{escape(_design(gains))}</p>{effects}<h3>Every arm against {escape(gains.design.baseline)}</h3>"
        f"{_contrasts(gains.contrasts)}</details>"
    )


def _design(gains: Gains) -> str:
    design, counts = gains.design, gains.counts
    return (
        f"{counts['pairs']} pairs from {counts['prompts']} prompts and {counts['seeds']} seeds, {counts['subjects']} "
        f"subject(s). Intervals: {design.confidence:.0%}, over {counts['clusters']} {counts['cluster']}s. Declared "
        f"before the run: primary metric {design.primary}, least effect worth having {design.minimum_effect:g}, "
        f"referee {design.referee or 'none'}."
    )


def _contrasts(contrasts: Sequence[ArmContrast]) -> str:
    head = [
        "arm",
        "metric",
        "difference",
        "interval",
        "check",
        "p",
        "p (Holm)",
        "win / tie / loss",
        "detectable",
        "failures",
    ]
    return html_table("Differences, arm by arm", head, [_line(c) for c in contrasts], text=[1])


def _line(c: ArmContrast) -> list[str]:
    return [
        c.arm,
        f"{c.metric} {'↑' if c.higher_is_better else '↓'}",
        f"{c.difference:+.4g}",
        f"{c.low:+.4g} to {c.high:+.4g} ({c.method})",
        f"{c.check[0]:+.4g} to {c.check[1]:+.4g}",
        f"{c.p:.3g}",
        "primary" if c.p_holm is None else f"{c.p_holm:.3g}",
        f"{c.wins} / {c.ties} / {c.losses}",
        f"{c.detectable:.3g}",
        str(c.failures),
    ]


def ends(gains: Gains) -> dict[str, list[dict[str, Any]]]:
    """The pairs at both ends that differ at all, those that gained first."""
    up = 1 if gains.design.higher_is_better[gains.design.primary] else -1
    gained = [one for one in gains.best if up * one["difference"] > 0]
    lost = [one for one in gains.worst if up * one["difference"] < 0]
    return {name: found for name, found in (("gained", gained), ("lost", lost)) if found}


def ends_table(gains: Gains, name: str) -> str:
    """The pairs at one end as a table.

    Args:
        gains: the comparison.
        name: gained or lost.
    """
    head = ["prompt", "seed", f"difference in {gains.design.primary}"]
    rows = [[w["prompt"], str(w["seed"]), f"{w['difference']:+.3g}"] for w in ends(gains)[name]]
    return html_table(f"The five that {name} most", head, rows)


def table_of_facts(known: Mapping[str, Any]) -> str:
    return (
        html_table("Facts", ["what", "value"], [[str(k), str(v)] for k, v in known.items()], text=[1]) if known else ""
    )

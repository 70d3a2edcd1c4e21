"""The report's figures: the plane of identity and accuracy, and curves over checkpoints and guidance scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import words
from .gains import Gains
from .page import html_table
from .plane import sentences
from .plot import Point, plot

__all__ = ["curves", "plane"]


def plane(gains: Gains) -> str:
    """Identity against accuracy as a figure, and the same in words and a table."""
    drawn = gains.plane
    if drawn is None:
        return ""
    x, y, means = drawn["identity"], drawn["accuracy"], {arm["name"]: arm["metrics"] for arm in gains.arms}

    def point(name: str) -> tuple[float, float, float, float, str]:
        value = means[name][y]
        return means[name][x]["mean"], value["mean"], value["mean"], value["mean"], name

    series = {"plain guidance": [point(name) for name in drawn["front"]]}
    for one in drawn["points"]:
        if one["arm"] not in drawn["front"]:
            series[one["arm"]] = [point(one["arm"])]
    told = [*_front(drawn, means), *sentences(drawn)]
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in told)
    rows = [[name, *(f"{words.format_mean(m, means[name][m])}" for m in (x, y))] for name in means]
    listed = html_table("The points of the figure", ["point", x, y], rows)
    return (
        "<h2>The subject against the prompt</h2><p>Up and to the right is better. Plain guidance reaches the line by "
        "its scale and the adapter's weight alone; what does not lie above it adds nothing.</p>"
        f"<div class=curves>{plot(series, x, y)}</div><ul>{said}</ul>"
        f"<details><summary>The figure as a table</summary>{listed}</details>"
    )


def _front(drawn: Mapping[str, Any], means: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the line runs, for those who do not see it; nothing where it is a point."""
    x, y, names = drawn["identity"], drawn["accuracy"], drawn["front"]
    if len(names) < 2:
        return []
    both = [(words.format_mean(x, means[name][x]), words.format_mean(y, means[name][y])) for name in names]
    others = [f"{name} ({one}, {other})" for name, (one, other) in zip(names[1:], both[1:], strict=True)]
    first = f"{names[0]} ({x} {both[0][0]}, {y} {both[0][1]})"
    between = f" over {', '.join(others[:-1])}" if others[1:] else ""
    return [f"The line of plain guidance goes from {first}{between} to {others[-1]}."]


def curves(gains: Gains, checkpoints: Mapping[str, Sequence[Point]], along: str, overfitting: str) -> str:
    """Every metric over the checkpoints and over the guidance scale, below what the signs of overfitting say.

    Args:
        gains: the comparison.
        checkpoints: what was measured -> its points.
        along: what the places of the checkpoints are.
        overfitting: a sentence, or nothing.
    """
    if not gains.curves and not checkpoints:
        return ""
    design = gains.design
    series = {name: points for name, points in checkpoints.items() if len(points) > 1}
    drawn = [plot({"checkpoints": points}, along, name, whole=True) for name, points in series.items()]
    if gains.curves:
        drawn += [plot(_series(gains, None, m), "guidance scale", m) for m in design.higher_is_better]
        others = [m for m in design.higher_is_better if m != design.primary]
        drawn += [plot(_series(gains, m, design.primary), m, design.primary) for m in others]
    said = "Bars are intervals of the mean; points over guidance scales are labelled with their scale."
    warning = f"<p class=verdict>{escape(overfitting)}</p>" if overfitting else ""
    return f"<h2>Curves</h2>{warning}<p>{said}</p><div class=curves>{''.join(drawn)}</div>"


def _series(gains: Gains, x: str | None, y: str) -> dict[str, list[tuple[float, float, float, float, str]]]:
    """Method -> points (x, y, low, high, label)."""
    series = {}
    for method, points in gains.curves.items():
        line = []
        for point in points:
            value = point["metrics"][y]
            place = point["scale"] if x is None else point["metrics"][x]["mean"]
            line.append((place, value["mean"], value["low"], value["high"], f"{point['scale']:g}"))
        series[method] = line
    return series

"""Identity against accuracy: every arm a point, and the front of what plain guidance reaches at some weight and scale.

A weaker adapter or a lower scale trades identity for accuracy at no cost, and pictures drawn partly at one setting and
partly at another reach every mean between the two. So the front is the upper right hull of the plain points, the base
(weight 0) among them, and a guidance is better only where it lies above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .design import Design
from .stats import MeanInterval

__all__ = ["Edge", "plane_values", "sentences"]


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The part of the front that an arm is held against."""

    normal: Mapping[str, float]
    """Metric -> its part of a unit vector across the edge, up being better."""
    shares: Sequence[tuple[str, float]]
    """Plain arms and their shares in the mix that lies opposite the arm."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    arm: str
    x: float
    y: float


def plane_values(
    arms: Sequence[Mapping[str, Any]], design: Design, gap: Callable[[str, Edge], MeanInterval]
) -> dict[str, Any]:
    """The plane as plain values: `points`, `front` (arms, by rising identity) and how far the others lie above it.

    Args:
        arms: the summaries of a comparison.
        design: which metrics are identity and accuracy, and which way each is better.
        gap: an arm's distance above an edge, over the clusters.
    """
    identity, accuracy = str(design.identity), str(design.accuracy)
    flip = {name: 1 if design.higher_is_better[name] else -1 for name in (identity, accuracy)}
    points = [
        _Point(
            arm=arm["name"],
            x=flip[identity] * arm["metrics"][identity]["mean"],
            y=flip[accuracy] * arm["metrics"][accuracy]["mean"],
        )
        for arm in arms
    ]
    plain = {design.baseline, *design.plain, *filter(None, [design.base])}
    front = _hull([point for point in points if point.arm in plain])
    above: list[dict[str, Any]] = []
    for point in points:
        if point.arm in plain:
            continue
        edge = _edge(point, front, flip, (identity, accuracy))
        if edge is None:
            above.append({"arm": point.arm, "word": "beyond the front's end", "gap": None, "low": None, "high": None})
            continue
        found = gap(point.arm, edge)
        word = "above" if found.low > 0 else "below" if found.high < 0 else "not told from the front"
        above.append({"arm": point.arm, "word": word, "gap": found.mean, "low": found.low, "high": found.high})
    return {
        "identity": identity,
        "accuracy": accuracy,
        "points": [{"arm": point.arm, "plain": point.arm in plain} for point in points],
        "front": [point.arm for point in front],
        "above": above,
    }


def sentences(drawn: Mapping[str, Any] | None) -> list[str]:
    """How every guidance stands to the front, a sentence each; none where the front is a single point."""
    if drawn is None or len(drawn["front"]) < 2:
        return []
    said = []
    for one in drawn["above"]:
        if one["gap"] is None:
            said.append(f"{one['arm']} lies {one['word']} of plain guidance: try other weights and scales there.")
            continue
        how = {"above": "lies above", "below": "lies below"}.get(one["word"], "is not told apart from")
        interval = f"interval {one['low']:+.2g} to {one['high']:+.2g}"
        said.append(f"{one['arm']} {how} the front of plain guidance: {one['gap']:+.2g} ({interval}).")
    return said


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The upper right hull from the highest point to the one furthest right."""
    chain: list[_Point] = []
    for point in sorted(points, key=lambda point: (point.x, point.y)):
        while chain and chain[-1].y <= point.y:
            chain.pop()
        while len(chain) > 1 and _turn(chain[-2], chain[-1], point) >= 0:
            chain.pop()
        chain.append(point)
    return chain


def _turn(a: _Point, b: _Point, c: _Point) -> float:
    """Above 0 where b lies below the line from a to c."""
    return (b.x - a.x) * (c.y - a.y) - (b.y - a.y) * (c.x - a.x)


def _edge(point: _Point, front: Sequence[_Point], flip: Mapping[str, int], names: tuple[str, str]) -> Edge | None:
    """The edge above or below a point; None where it lies beyond an end, where no plain guidance was tried."""
    identity, accuracy = names
    first, last = front[0], front[-1]
    for left, right in pairwise(front):
        if left.x <= point.x <= right.x:
            across = (left.y - right.y, right.x - left.x)
            length = math.hypot(*across)
            share = (point.x - left.x) / (right.x - left.x)
            return Edge(
                normal={identity: flip[identity] * across[0] / length, accuracy: flip[accuracy] * across[1] / length},
                shares=[(left.arm, 1 - share), (right.arm, share)],
            )
    ahead = point.x > last.x and point.y >= last.y  # better in both
    behind = point.x <= first.x and point.y <= first.y  # worse in both
    if not (ahead or behind):
        return None
    end = last if ahead else first
    return Edge(normal={identity: 0.0, accuracy: float(flip[accuracy])}, shares=[(end.arm, 1.0)])

"""Where the labels of a figure go: each as near to its point as it can, over no mark, line or other label."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Rectangle", "Spot", "arrange", "width"]

Spot = tuple[float, float]
Line = tuple[Spot, Spot]
HEIGHT, SIZE = 13.0, 11  # pixels of a label, and of its font
MARK = 5.0  # pixels around a point's middle that its mark takes
_NEAR, _STEP, _RINGS, _WAYS = 7.0, 9.0, 24, 16
_CROSSED = 25.0  # a line under a label or across its leader is as bad as so many pixels further away


@dataclass(frozen=True)
class Rectangle:
    """A rectangle, y pointing down."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Rectangle) -> bool:
        """Whether the two have points in common inside."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Rectangle) -> bool:
        """Whether the other lies within."""
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom

    def cut_by(self, line: Line) -> bool:
        """Whether a straight line from spot to spot goes through."""
        (x, y), (x1, y1) = line
        first, last = 0.0, 1.0
        for start, way, low, high in ((x, x1 - x, self.left, self.right), (y, y1 - y, self.top, self.bottom)):
            if way == 0:
                if not low < start < high:
                    return False
                continue
            ends = sorted(((low - start) / way, (high - start) / way))
            first, last = max(first, ends[0]), min(last, ends[1])
        return first < last

    def nearest(self, spot: Spot) -> Spot:
        """The point of the rectangle that is nearest to a spot."""
        return min(max(spot[0], self.left), self.right), min(max(spot[1], self.top), self.bottom)


def width(text: str) -> float:
    """About as wide as the text is drawn, in pixels; rather more than less."""
    return SIZE * sum(0.75 if letter.isupper() or letter in "@%" else 0.58 for letter in text)


def arrange(labels: Sequence[tuple[Spot, str]], area: Rectangle, lines: Sequence[Line] = ()) -> list[Rectangle]:
    """A place for each label, in their order: inside the area, meeting neither each other nor a point's mark.

    Args:
        labels: each point with its text.
        area: what the labels must stay in.
        lines: what they cross only where there is no better place near.
    """
    marks = [Rectangle(x - MARK, y - MARK, x + MARK, y + MARK) for (x, y), _ in labels]
    placed: list[Rectangle] = []
    for spot, text in labels:
        best, least = None, math.inf
        for away, box in _candidates(spot, width(text)):
            if away >= least:
                break
            if not area.holds(box) or any(box.meets(other) for other in (*marks, *placed)):
                continue
            leader = (spot, box.nearest(spot))
            crossed = sum(box.cut_by(line) for line in lines) + sum(other.cut_by(leader) for other in placed)
            if (cost := away + _CROSSED * crossed) < least:
                best, least = box, cost
        placed.append(best or next(box for _, box in _candidates(spot, width(text))))
    return placed


def _candidates(spot: Spot, wide: float) -> Iterator[tuple[float, Rectangle]]:
    """Places around a point, the nearest first, each with how far away it is; up and to the right comes first."""
    x, y = spot
    for ring in range(_RINGS):
        away = _NEAR + _STEP * ring
        for way in range(_WAYS):
            angle = math.pi / 4 + way * 2 * math.pi / _WAYS
            across, up = math.cos(angle), math.sin(angle)
            # The label's corner is there, or the middle of its side where the way is about level or upright.
            left = x + away * across - wide * (0.0 if across > 0.3 else 1.0 if across < -0.3 else 0.5)
            top = y - away * up - HEIGHT * (1.0 if up > 0.3 else 0.0 if up < -0.3 else 0.5)
            yield away, Rectangle(left, top, left + wide, top + HEIGHT)

"""A line plot as inline SVG: a few series with intervals, told apart by dash and mark as well as by color."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from .labels import HEIGHT as LABEL
from .labels import SIZE, Rectangle, arrange, width

__all__ = ["Point", "picture", "plot"]

Point = tuple[float, float, float, float, str]
Place = Callable[[float, float], tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 64, 16, 28, 48  # HEIGHT without the legend
_ROW, _SAMPLE = 16, 34  # pixels: height of a legend's row, width of the line before a name
# Okabe-Ito colors, legible to color-blind readers on light and dark.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# A disc, a square, a triangle, a diamond, a triangle on its tip, a cross: each around the point it begins at.
_MARKS = (
    "h0",
    "m-4 -4h8v8h-8z",
    "m0 -5l5 9h-10z",
    "m0 -5.5l5 5.5l-5 5.5l-5 -5.5z",
    "m0 5l5 -9h-10z",
    "m-1.5 -5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5v-3h3.5z",
)
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "12 4")


def plot(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, whole: bool = False) -> str:
    """Series name -> points (x, y, low, high, label); returns a <figure>.

    Args:
        series: name -> points (x, y, low, high, label).
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        whole: x is counted, so that only whole numbers are written at its axis.
    """
    return f"<figure>{_svg(series, x_label, y_label, whole=whole)}</figure>"


def picture(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> str:
    """The same as an SVG file of its own, on white: a page that shows it as an image lends it no colors.

    Args:
        series: name -> points (x, y, low, high, label).
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
    """
    drawn = _svg(series, x_label, y_label)
    opened, _, rest = drawn.partition(">")
    own = ' xmlns="http://www.w3.org/2000/svg" color="#000"'
    return f'{opened}{own}><rect width="100%" height="100%" fill="#fff"/>{rest}\n'


def _svg(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, whole: bool = False) -> str:
    points = [point for line in series.values() for point in line]
    x0, x1 = _span([p[0] for p in points])
    y0, y1 = _span([value for p in points for value in p[1:4]])
    named = [name for name, line in series.items() if [name] != [point[4] for point in line]]  # others say it beside it
    entries = _entries(named)
    legend = _ROW * (1 + max((row for row, _ in entries.values()), default=-1))
    bottom, top = HEIGHT + legend - BOTTOM, TOP + legend

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            bottom - (y - y0) / (y1 - y0) * (bottom - top),
        )

    parts = [_axes((x0, x1, _ticks(x0, x1, whole)), (y0, y1, _ticks(y0, y1)), place, x_label, y_label)]
    for index, (name, line) in enumerate(series.items()):
        parts.append(_line(line, index, place))
        parts += [_entry(name, index, *entries[name])] if name in entries else []
    parts.append(_labels(list(series.values()), place, Rectangle(LEFT, top, WIDTH, bottom)))
    title = f"{y_label} against {x_label}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + legend}" width="{WIDTH}" role="img" aria-label="{escape(title)}" '
        f'font-size="12" font-family="sans-serif">{"".join(parts)}</svg>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    """From a little below the least to a little above the largest; beyond 0 and 1 only if a value is."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    return max(low - pad, 0.0) if low >= 0 else low - pad, min(high + pad, 1.0) if high <= 1 else high + pad


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Three to seven round numbers of a span, equally far apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(step * many for many in (1, 2, 5, 10) if (high - low) / (step * many) < 7)
    step = max(step, 1.0) if whole else step
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


Axis = tuple[float, float, list[float]]
"""Where it begins, where it ends, and what is written at it."""


def _axes(across: Axis, up: Axis, place: Place, x_label: str, y_label: str) -> str:
    (x0, x1, xs), (y0, y1, ys) = across, up
    left, bottom = place(x0, y0)
    right, top = place(x1, y1)
    columns, rows = [place(x, y0)[0] for x in xs], [place(x0, y)[1] for y in ys]
    axes = f"M{_at(left)} {_at(top)}V{_at(bottom)}H{_at(right)}" + "".join(
        f"M{_at(px)} {_at(bottom)}v4" for px in columns
    )
    grid = "".join(f"M{_at(left)} {_at(py)}H{_at(right)}" for py in rows)
    below = [_text(px, bottom + 17, _number(x, xs)) for px, x in zip(columns, xs, strict=True)]
    below.append(_text((left + right) / 2, bottom + 40, x_label))
    beside = [_text(left - 6, py + 4, _number(y, ys)) for py, y in zip(rows, ys, strict=True)]
    return (
        f'<path d="{axes}" fill="none" stroke="currentColor"/><path d="{grid}" stroke="currentColor" opacity=".12"/>'
        f'<g text-anchor="middle">{"".join(below)}</g><g text-anchor="end">{"".join(beside)}</g>'
        f'<g font-weight="bold">{_text(left, 14, y_label)}</g>'
    )


def _at(place: float) -> str:
    return f"{place:.1f}".removesuffix(".0")


def _text(x: float, y: float, said: str) -> str:
    return f'<text x="{_at(x)}" y="{_at(y)}">{escape(said)}</text>'


def _number(value: float, ticks: Sequence[float]) -> str:
    """With the digits that tell neighbouring ticks apart."""
    apart = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    digits = max(0, -math.floor(math.log10(apart) + 1e-9))
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _line(line: Sequence[Point], index: int, place: Place) -> str:
    """The points of a series with their intervals, and the line through them."""
    color, spots = _COLORS[index % 6], [place(p[0], p[1]) for p in line]
    path = "M" + "L".join(f"{_at(x)} {_at(y)}" for x, y in spots)
    ends = [(*place(p[0], p[2]), place(p[0], p[3])[1]) for p in line if p[2] != p[3]]
    bars = "".join(f"M{_at(x)} {_at(bottom)}V{_at(top)}" for x, bottom, top in ends)
    return (
        (_stroke(path, index) if len(line) > 1 else "")
        + (f'<path d="{bars}" stroke="{color}" stroke-width="1.5"/>' if bars else "")
        + _marks(spots, index)
    )


def _marks(spots: Sequence[tuple[float, float]], index: int) -> str:
    path = "".join(f"M{_at(x)} {_at(y)}{_MARKS[index % 6]}" for x, y in spots)
    color = _COLORS[index % 6]
    if index % 6 == 0:  # a disc is a line's round end alone
        return f'<path d="{path}" stroke-width="8" stroke-linecap="round" stroke="{color}"/>'
    return f'<path d="{path}" fill="{color}"/>'


def _stroke(path: str, index: int) -> str:
    dash = f' stroke-dasharray="{_DASHES[index % 6]}"' if _DASHES[index % 6] else ""
    return f'<path d="{path}" fill="none" stroke="{_COLORS[index % 6]}" stroke-width="2"{dash}/>'


def _entries(names: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Name -> row and left edge of its entry in the legend: equally wide columns that the longest name fits into."""
    widest = max((_SAMPLE + 1.1 * width(name) + 12 for name in names), default=1.0)
    columns = max(1, int((WIDTH - LEFT) // widest))
    return {name: (i // columns, LEFT + i % columns * widest) for i, name in enumerate(names)}


def _entry(name: str, index: int, row: int, x: float) -> str:
    y = TOP + row * _ROW + 4
    mark = _marks([(x + 14, y - 4)], index)
    return f'{_stroke(f"M{_at(x)} {y - 4}h28", index)}{mark}<text x="{_at(x + _SAMPLE)}" y="{y}">{escape(name)}</text>'


def _labels(series: Sequence[Sequence[Point]], place: Place, area: Rectangle) -> str:
    """What is written beside the points, with a thin line to those that had to move away."""
    lines, labels = [], []
    for line in series:
        spots = [place(p[0], p[1]) for p in line]
        lines += list(itertools.pairwise(spots))
        lines += [(place(p[0], p[2]), place(p[0], p[3])) for p in line if p[2] != p[3]]
        labels += [(spot, p[4]) for spot, p in zip(spots, line, strict=True) if p[4]]
    leaders, texts = "", []
    for (spot, text), box in zip(labels, arrange(labels, area, lines), strict=True):
        x, y = box.nearest(spot)
        if math.dist(spot, (x, y)) > LABEL:
            leaders += f"M{_at(spot[0])} {_at(spot[1])}L{_at(x)} {_at(y)}"
        texts.append(_text(box.left, box.bottom - 3, text))
    drawn = f'<path d="{leaders}" stroke="currentColor" stroke-width=".7" opacity=".6"/>' if leaders else ""
    return f'{drawn}<g font-size="{SIZE}">{"".join(texts)}</g>'

"""A line plot as inline SVG: a few series with intervals, told apart by dash and mark as well as by color."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["Point", "picture", "plot"]

Point = tuple[float, float, float, float, str]
Place = Callable[[float, float], tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 340, 64, 16, 28, 48  # HEIGHT without the legend
_ENTRY, _ENTRIES = (166, 16), 3  # pixels of a legend's entry, entries a row
# Okabe-Ito colors, legible to color-blind readers on light and dark.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
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
    legend = _ENTRY[1] * -(-len(series) // _ENTRIES)
    bottom, top = HEIGHT + legend - BOTTOM, TOP + legend

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT),
            bottom - (y - y0) / (y1 - y0) * (bottom - top),
        )

    parts = [_axes((x0, x1, _ticks(x0, x1, whole)), (y0, y1, _ticks(y0, y1)), place, x_label, y_label)]
    for index, (name, line) in enumerate(series.items()):
        parts.append(_line(name, line, _COLORS[index % 6], _DASHES[index % 6], index, place))
    title = f"{y_label} against {x_label}"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT + legend}" width="{WIDTH}" role="img" aria-label="{escape(title)}" '
        f'font-size="12" font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
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
    parts = [f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" fill="none" stroke="currentColor"/>']
    for x in xs:
        px, _ = place(x, y0)
        parts.append(f'<path d="M{px:.1f} {bottom:.1f}v4" stroke="currentColor"/>')
        parts.append(f'<text x="{px:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">{_number(x, xs)}</text>')
    for y in ys:
        _, py = place(x0, y)
        parts.append(f'<text x="{left - 6:.1f}" y="{py + 4:.1f}" text-anchor="end">{_number(y, ys)}</text>')
        parts.append(f'<path d="M{left:.1f} {py:.1f}H{right:.1f}" stroke="currentColor" opacity=".12"/>')
    parts.append(
        f'<text x="{(left + right) / 2:.1f}" y="{bottom + 40:.1f}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text x="{left}" y="14" font-weight="bold">{escape(y_label)}</text>')
    return "".join(parts)


def _number(value: float, ticks: Sequence[float]) -> str:
    """With the digits that tell neighbouring ticks apart."""
    apart = ticks[1] - ticks[0] if len(ticks) > 1 else abs(value) or 1.0
    digits = max(0, -math.floor(math.log10(apart) + 1e-9))
    return f"{round(value, digits) + 0.0:.{digits}f}"


def _line(name: str, line: Sequence[Point], color: str, dash: str, index: int, place: Place) -> str:
    spots = [place(p[0], p[1]) for p in line]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    parts = [f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>']
    for (x, _, low, high, label), (px, py) in zip(line, spots, strict=True):
        _, bottom = place(x, low)
        _, top = place(x, high)
        parts.append(f'<path d="M{px:.1f} {bottom:.1f}V{top:.1f}" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{color}"/>')
        side, shift = (' text-anchor="end"', -6) if px > WIDTH * 0.75 else ("", 6)  # or it would leave the picture
        parts.append(f'<text x="{px + shift:.1f}" y="{py - 6:.1f}" font-size="11"{side}>{escape(label)}</text>')
    row, column = divmod(index, _ENTRIES)
    x, y = LEFT + column * _ENTRY[0], TOP + row * _ENTRY[1] + 4
    parts.append(f'<path d="M{x} {y - 4}h28" stroke="{color}" stroke-width="2" stroke-dasharray="{dash}"/>')
    parts.append(f'<text x="{x + 34}" y="{y}">{escape(name)}</text>')
    return "".join(parts)

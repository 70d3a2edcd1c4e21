"""What the report's HTML is made of: the style, pictures as data, tables. No script, and nothing that is fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

__all__ = ["LIMIT", "SIDES", "Draw", "drawer", "html", "html_table"]

LIMIT = 3_000_000  # bytes of a page: what a mail or a repository takes without complaint
SIDES = (512, 384, 256, 192, 128)
"""Longest side of a picture on the page; the first with which it stays below `LIMIT`."""
SHARP = 128  # pixels up to which a picture is kept without loss, and enlarged without blur

Draw = Callable[[Image.Image, str], str]
"""A picture and its description -> the element that shows it."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f3f5f7; --mark: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --line: #3a4046; --soft: #1e2226; --mark: #8ab4f8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.verdict { border-left: .4rem solid var(--mark); background: var(--soft); padding: .75rem 1rem; font-size: 1.1rem;
  margin: .75rem 0; }
.scroll { overflow-x: auto; margin: .75rem 0 1.25rem; }
.scroll:focus-visible, input:focus-visible, summary:focus-visible { outline: 3px solid var(--mark); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
thead th { white-space: normal; } th[scope=row], thead th:first-child, td.text { text-align: left; }
th[scope=row], td.text { min-width: 8rem; white-space: normal; overflow-wrap: break-word; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-size: .9rem; margin-bottom: .3rem; }
img { width: 100%; height: auto; display: block; } img.sharp { image-rendering: pixelated; }
.references { display: grid; grid-template-columns: repeat(4, minmax(0, 8rem)); gap: .5rem; }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .25rem; }
.side span { display: block; font-size: .8rem; text-align: center; }
fieldset { border: 0; margin: 0 0 .3rem; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; }
fieldset label { padding: .35rem 0; cursor: pointer; } legend { float: left; padding: .35rem 1rem .35rem 0; }
input { accent-color: var(--mark); }
.pair:has(.pick1:checked) .side:not(.side1), .pair:has(.pick2:checked) .side:not(.side2),
.pair:has(.pick3:checked) .side:not(.side3) { display: none; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; margin: .75rem 0;
  font-size: .9rem; } dt { font-weight: bold; } dd { margin: 0; }
@media (max-width: 40rem) { dl { display: block; } dt, dd { display: inline; }
  dt::after { content: ": "; } dd::after { content: "\\A"; white-space: pre; line-height: 2; } }
details summary { cursor: pointer; font-size: .9rem; padding: .4rem 0; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); }
"""


def html(title: str, body: Sequence[str]) -> str:
    """The whole page; its policy allows pictures that are in it, and no script at all."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: measured gains</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def drawer(side: int) -> Draw:
    """Shows pictures with at most `side` pixels."""

    def draw(image: Image.Image, alt: str) -> str:
        sharp = ' class="sharp"' if max(image.size) <= SHARP else ""
        size = f'width="{image.width}" height="{image.height}"'
        return f'<img{sharp} src="{_uri(image, side)}" {size} alt="{escape(alt)}" loading="lazy">'

    return draw


def _uri(image: Image.Image, side: int) -> str:
    small = image.convert("RGB")
    small.thumbnail((side, side))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=85, method=4, lossless=max(image.size) <= SHARP)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    """A table that scrolls by itself; columns `text` are words and may wrap.

    Args:
        caption: what a screen reader calls the table.
        head: names of the columns.
        rows: cells; the first of a row is its heading.
        text: numbers of the columns that are words, from 0.
    """
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        cells = [f"<td{' class=text' if i in text else ''}>{escape(cell)}</td>" for i, cell in enumerate(rest, start=1)]
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )

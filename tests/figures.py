"""What tests read from the figures of a page: where their labels lie."""

from __future__ import annotations

import html
import re
from itertools import combinations
from pathlib import Path

from adapters.measuring.labels import HEIGHT, SIZE, Rectangle, width

ROOT = Path(__file__).resolve().parents[1]
TEXT = re.compile(r'<text x="(-?[\d.]+)" y="(-?[\d.]+)">([^<]*)</text>')


def labels(figure: str) -> list[tuple[str, Rectangle]]:
    """Each label of a figure with the rectangle that it covers."""
    found = []
    groups = re.findall(rf'<g font-size="{SIZE}">(.*?)</g>', figure)
    for x, y, text in TEXT.findall("".join(groups)):
        left, bottom, said = float(x), float(y) + 3, html.unescape(text)
        found.append((said, Rectangle(left, bottom - HEIGHT, left + width(said), bottom)))
    return found


def overlaps(page: str) -> list[tuple[str, str]]:
    """Pairs of labels of one figure that overlap by more than the rounding of their places."""
    met = []
    for figure in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        smaller = [(said, Rectangle(b.left + 0.1, b.top + 0.1, b.right, b.bottom)) for said, b in labels(figure)]
        met += [(one, other) for (one, a), (other, b) in combinations(smaller, 2) if a.meets(b)]
    return met


def unexplained(page: str) -> list[str]:
    """Terms of the glossary that the page uses above its first heading, and does not explain there."""
    glossary = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    first = re.sub(r"<style>.*?</style>", "", page[: page.index("<h2>")], flags=re.DOTALL)
    shown = [html.unescape(term) for term in re.findall(r"<dt>(.*?)</dt>", first)]
    shown += [part for term in shown if (both := re.fullmatch(r"(.+) \(([A-Z]+)\)", term)) for part in both.groups()]
    said = [term.lower() for term in shown]  # a term with its short form in brackets counts as both
    text = html.unescape(re.sub(r"<[^>]+>", " ", first)).lower()
    terms = [
        term.lower() for heading in re.findall(r"^## (.*)$", glossary, re.MULTILINE) for term in heading.split(", ")
    ]
    for longer in sorted(said, key=len, reverse=True):  # "accuracy" in "prompt accuracy" is part of that term
        text = re.sub(rf"\b{re.escape(longer)}s?\b", " ", text)
    return [term for term in [*terms, "class", "seed", "noise"] if re.search(rf"\b{re.escape(term)}s?\b", text)]

"""`report.html`: one self-contained page that opens with two sentences: on the adapter, and on the guidance.

Readable on a phone, in the dark, by keyboard and by ear. There is no script: buttons under a strip of pictures show one
of them large, by style alone. Nothing is fetched: pictures are data URIs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from . import report_figures as figures
from . import report_strips as strips
from . import report_tables as tables
from . import words
from .gains import Gains
from .page import LIMIT, SIDES, drawer, html
from .plot import Point
from .sample import Shot

__all__ = ["render_report"]

RESULTS = "Results: same prompt, same seed, same noise"
Overlay = Callable[[Shot], Mapping[str, Image.Image]]


def render_report(
    gains: Gains,
    shots: Mapping[str, Sequence[Shot]],
    *,
    title: str,
    command: str = "",
    overlay: Overlay | None = None,
    pairs: int = 12,
    facts: Mapping[str, Any] | None = None,
    references: Sequence[Image.Image] = (),
    checkpoints: Mapping[str, Sequence[Point]] | None = None,
    along: str = "checkpoint, in order",
    overfitting: str = "",
    terms: Mapping[str, str] | None = None,
) -> str:
    """The page as text, below `page.LIMIT` bytes: larger pictures are made smaller until it is.

    Args:
        gains: the comparison.
        shots: images of at least the design's arm and baseline; joined as the comparison joined them.
        title: of the page, as text.
        command: what makes the page again; shown at its end.
        overlay: shot -> named pictures (regions, gamma) shown below its pair; asked for the design's arm only.
        pairs: how many pairs are shown, spread evenly; the worst five follow below.
        facts: further lines of the last table.
        references: the subject's own pictures; the first four are shown.
        checkpoints: what was measured -> (place, mean, low, high, label) of the checkpoints that one was chosen from,
            in order.
        along: what the places of the checkpoints are; they are whole numbers.
        overfitting: what `overfitting.sentence` says of them.
        terms: words of the title, each with what it means.
    """
    joined = strips.joined(gains, shots)
    shown = list(joined)[:: max(1, len(joined) // pairs)][:pairs]  # spread over all prompts
    over = {key: overlay(joined[key][gains.design.arm]) for key in shown} if overlay is not None else {}
    for side in SIDES:
        draw = drawer(side)
        body = [
            f"<h1>{escape(title)}</h1>",
            *_verdicts(gains),
            _how_to_read(gains, terms or {}),
            strips.references(references, draw, gains.counts["subjects"]),
            f"<h2>{RESULTS}</h2>",
            strips.gallery("shown", joined, shown, draw, over),
            figures.plane(gains),
            "<h2>Every way to sample</h2>",
            tables.table_of_arms(gains),
        ]
        for name, ends in tables.ends(gains).items():
            keys = [(one["subject"], one["prompt"], one["seed"], one["latents"]) for one in ends]
            kept = [key for key in keys if key in joined]
            body.append(f"<h2>Where {escape(gains.design.arm)} {name} most</h2>")
            body += [tables.ends_table(gains, name), strips.gallery(name, joined, kept, draw, {})]
        body += [
            figures.curves(gains, checkpoints or {}, along, overfitting),
            "<h2>Statistics</h2>",
            tables.statistics(gains),
            "<h2>How it was made</h2>",
            tables.table_of_facts({**(facts or {}), **gains.design.notes}),
            f"<pre>{escape(command)}</pre>" if command else "",
        ]
        page = html(title, body)
        if len(page.encode()) < LIMIT:
            break
    return page


def _verdicts(gains: Gains) -> list[str]:
    sentences = (words.adapter(gains), words.guidance(gains))
    whole = [escape(sentence).replace(" %", "&nbsp;%") for sentence in sentences if sentence]  # no line begins with %
    return [f'<p class="verdict">{sentence}</p>' for sentence in whole]


def _how_to_read(gains: Gains, terms: Mapping[str, str]) -> str:
    """The words of the two sentences, and behind a fold all others."""
    design, counts = gains.design, gains.counts
    every = words.describe_arms(gains)
    own = {name: every.pop(name) for name in (design.base, design.baseline, design.arm) if name in every}
    own |= {name: said for name in words.deciding_metrics(gains) if (said := words.metric(name))}
    count = " ".join([_many(counts["prompts"], "prompt"), "with", _many(counts["seeds"], "seed"), "each"])
    summary = f"How to read the rest: {count}, drawn in {_many(len(gains.arms), 'way')}"
    shown = [RESULTS, words.adapter(gains), words.guidance(gains), summary]
    first = words.terms(" ".join([*shown, *itertools.chain(*terms.items(), *own.items())]), known=[*terms, *own])
    first = {**terms, **first, **own}
    later = " ".join([*itertools.chain(*every.items()), "arm", *_recorded(gains)])
    more = {
        **words.terms(later, known=[*first]),
        **every,
        **{name: said for name in design.higher_is_better if (said := words.metric(name)) and name not in first},
        design.primary: "the measure that decides about the guidance; " + words.metric(design.primary),
        "pair": "two pictures of the same prompt that began with the same noise; only what is compared differs",
        "interval": f"where the true mean lies, in {100 * design.confidence:.0f} % of such studies",
    }
    return f"{_terms(first)}<details><summary>{escape(summary)}</summary>{_terms(more)}</details>"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _recorded(gains: Gains) -> set[str]:
    return {name for arm in gains.arms for name in arm["recorded"]}


def _terms(said: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in said.items())
    return f"<dl>{lines}</dl>"

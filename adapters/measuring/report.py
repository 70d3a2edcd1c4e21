"""`report.html`: one self-contained page that opens with two sentences: on the adapter, and on the guidance.

Readable on a phone, in the dark, by keyboard and by ear. There is no script: buttons under a strip of pictures show one
of them large, by style alone. Nothing is fetched: pictures are data URIs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from . import words
from .gains import Contrast, Gains
from .page import LIMIT, SIDES, Draw, drawer, html, html_table
from .plane import sentences
from .plot import Point, plot
from .sample import Shot

__all__ = ["render"]

Overlay = Callable[[Shot], Mapping[str, Image.Image]]
Key = tuple[str, str, int, str]
Joined = dict[Key, dict[str, Shot]]
"""(subject, prompt, seed, latents) -> arm -> picture: base, where there is one, baseline, arm."""


def render(
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
        overfitting: what `overfitting.sentence` says of them.
        terms: words of the title, each with what it means.
    """
    joined = _joined(gains, shots)
    shown = list(joined)[:: max(1, len(joined) // pairs)][:pairs]  # spread over all prompts
    over = {key: overlay(joined[key][gains.design.arm]) for key in shown} if overlay is not None else {}
    for side in SIDES:
        draw = drawer(side)
        body = [
            f"<h1>{escape(title)}</h1>",
            *_verdicts(gains),
            _how_to_read(gains, terms or {}),
            _references(references, draw),
            "<h2>Results: same prompt, same seed, same noise</h2>",
            _gallery("shown", joined, shown, draw, over),
            _plane(gains),
            "<h2>Every way to sample</h2>",
            _arms(gains),
        ]
        for name, ends in _ends(gains).items():
            keys = [(one["subject"], one["prompt"], one["seed"], one["latents"]) for one in ends]
            kept = [key for key in keys if key in joined]
            body.append(f"<h2>Where {escape(gains.design.arm)} {name} most</h2>")
            body += [_ends_table(gains, name), _gallery(name, joined, kept, draw, {})]
        body += [
            _curves(gains, checkpoints or {}, overfitting),
            "<h2>Statistics</h2>",
            _statistics(gains),
            "<h2>How it was made</h2>",
            _facts({**(facts or {}), **gains.design.notes}),
            f"<pre>{escape(command)}</pre>" if command else "",
        ]
        page = html(title, body)
        if len(page.encode()) < LIMIT:
            break
    return page


def _verdicts(gains: Gains) -> list[str]:
    sentences = (words.adapter(gains), words.guidance(gains))
    return [f'<p class="verdict">{escape(sentence)}</p>' for sentence in sentences if sentence]


def _joined(gains: Gains, shots: Mapping[str, Sequence[Shot]]) -> Joined:
    design = gains.design
    found = {name: {shot.key: shot for shot in shots.get(name, ())} for name in (design.baseline, design.arm)}
    both = [key for key in found[design.arm] if key in found[design.baseline]]
    bare = {shot.key: shot for shot in shots.get(design.base or "", ())}
    return {
        key: {
            **({str(design.base): bare[key]} if key in bare else {}),
            **{name: own[key] for name, own in found.items()},
        }
        for key in both
    }


def _design(gains: Gains) -> str:
    design, counts = gains.design, gains.counts
    return (
        f"{counts['pairs']} pairs from {counts['prompts']} prompts and {counts['seeds']} seeds, {counts['subjects']} "
        f"subject(s). Intervals: {design.confidence:.0%}, over {counts['clusters']} {counts['cluster']}s. Declared "
        f"before the run: primary metric {design.primary}, least effect worth having {design.minimum_effect:g}, "
        f"referee {design.referee or 'none'}."
    )


def _ends(gains: Gains) -> dict[str, list[dict[str, Any]]]:
    """The pairs at both ends that differ at all, those that gained first."""
    up = 1 if gains.design.higher_is_better[gains.design.primary] else -1
    gained = [one for one in gains.best if up * one["difference"] > 0]
    lost = [one for one in gains.worst if up * one["difference"] < 0]
    return {name: found for name, found in (("gained", gained), ("lost", lost)) if found}


def _how_to_read(gains: Gains, terms: Mapping[str, str]) -> str:
    """The words of the two sentences, and behind a fold all others."""
    design, counts = gains.design, gains.counts
    every = words.arms(gains)
    first = {**terms, **dict(words.TERMS if gains.adapter else words.TERMS[1:])}
    first |= {name: every.pop(name) for name in (design.base, design.baseline, design.arm) if name in every}
    first |= {name: said for name in words.decide(gains) if (said := words.metric(name))}
    more = {
        **every,
        **{name: said for name in design.higher_is_better if (said := words.metric(name)) and name not in first},
        design.primary: "the measure that decides about the guidance; " + words.metric(design.primary),
        "pair": "two pictures of the same prompt that began with the same noise; only what is compared differs",
        "interval": f"where the true mean lies, in {design.confidence:.0%} of such studies",
    }
    count = f"{counts['prompts']} prompts, {counts['seeds']} seed(s) each, drawn in {len(gains.arms)} ways"
    return f"{_terms(first)}<details><summary>How to read the rest: {escape(count)}</summary>{_terms(more)}</details>"


def _terms(said: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in said.items())
    return f"<dl>{lines}</dl>"


def _references(references: Sequence[Image.Image], draw: Draw) -> str:
    if not references:
        return ""
    pictures = "".join(
        f"<div>{draw(image, f'The subject, picture {number}')}</div>"
        for number, image in enumerate(references[:4], start=1)
    )
    return f'<h2>The subject</h2><div class="references">{pictures}</div>'


def _plane(gains: Gains) -> str:
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
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(drawn))
    rows = [[name, *(f"{words.number(m, means[name][m])}" for m in (x, y))] for name in means]
    listed = html_table("The points of the figure", ["point", x, y], rows)
    return (
        "<h2>The subject against the prompt</h2><p>Up and to the right is better. Plain guidance reaches the line by "
        "its scale and the adapter's weight alone; what does not lie above it adds nothing.</p>"
        f"<div class=curves>{plot(series, x, y)}</div><ul>{said}</ul>"
        f"<details><summary>The figure as a table</summary>{listed}</details>"
    )


def _statistics(gains: Gains) -> str:
    """Verdicts in numbers, what was declared, and every difference: for readers who want to check."""
    verdicts = [*([gains.adapter] if gains.adapter else []), gains.verdict]
    said = "".join(f"<p>{escape(verdict.sentence)}</p>" for verdict in verdicts)
    effects = "<h3>The adapter against its base</h3>" + _contrasts(gains.effects) if gains.effects else ""
    return (
        f"<details><summary>Verdicts in numbers, and every difference with its interval</summary>{said}"
        f"<p>{escape(_design(gains))}</p>{effects}<h3>Every arm against {escape(gains.design.baseline)}</h3>"
        f"{_contrasts(gains.contrasts)}</details>"
    )


def _gallery(
    group: str, joined: Joined, keys: Sequence[Key], draw: Draw, over: Mapping[Key, Mapping[str, Image.Image]]
) -> str:
    if not keys:
        return "<p>No pictures were kept.</p>"
    figures = [_strip(joined[key], draw, over.get(key, {}), f"{group}{i}") for i, key in enumerate(keys)]
    return f'<div class="pairs">{"".join(figures)}</div>'


def _strip(pictures: Mapping[str, Shot], draw: Draw, over: Mapping[str, Image.Image], group: str) -> str:
    """Base, baseline and arm side by side, and buttons that show one of them alone."""
    first = next(iter(pictures.values()))
    said = f"{first.prompt}, seed {first.seed}"
    sides = "".join(
        f'<div class="side side{i}">{draw(shot.image, f"{name}: {said}")}<span>{escape(name)}</span></div>'
        for i, (name, shot) in enumerate(pictures.items(), start=1)
    )
    buttons = "".join(
        f'<label><input type="radio" name="{group}" class="pick{i}"{"" if i else " checked"}> {escape(name)}</label>'
        for i, name in enumerate(["all", *pictures])
    )
    extra = "".join(
        f"<details><summary>{escape(name)}</summary>{draw(picture, f'{name}: {first.prompt}')}</details>"
        for name, picture in over.items()
    )
    return (
        f'<figure class="pair"><figcaption>{escape(first.prompt)} · seed {first.seed}</figcaption>'
        f'<div class="strip">{sides}</div><fieldset><legend>show</legend>{buttons}</fieldset>{extra}</figure>'
    )


def _arms(gains: Gains) -> str:
    metrics = gains.design.higher_is_better
    head = ["arm", *(f"{m} {'↑' if up else '↓'}" for m, up in metrics.items()), "s per image"]
    hidden = gains.design.notes.get("only at equal effective scale", ())
    recorded = sorted({name for arm in gains.arms for name in arm["recorded"]} - {*hidden})
    rows = []
    for arm in gains.arms:
        values = [arm["metrics"][m] for m in metrics]
        cells = [
            f"{words.number(name, v)} ({words.interval(name, v)})" for name, v in zip(metrics, values, strict=True)
        ]
        extra = [f"{arm['recorded'][name]:.4g}" if name in arm["recorded"] else "" for name in recorded]
        rows.append([arm["name"], *cells, f"{arm['seconds']:.3g}", *extra])
    return html_table("Every arm with its means and intervals", [*head, *recorded], rows)


def _contrasts(contrasts: Sequence[Contrast]) -> str:
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


def _line(c: Contrast) -> list[str]:
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


def _ends_table(gains: Gains, name: str) -> str:
    head = ["prompt", "seed", f"difference in {gains.design.primary}"]
    rows = [[w["prompt"], str(w["seed"]), f"{w['difference']:+.3g}"] for w in _ends(gains)[name]]
    return html_table(f"The five that {name} most", head, rows)


def _facts(facts: Mapping[str, Any]) -> str:
    return (
        html_table("Facts", ["what", "value"], [[str(k), str(v)] for k, v in facts.items()], text=[1]) if facts else ""
    )


def _curves(gains: Gains, checkpoints: Mapping[str, Sequence[Point]], overfitting: str) -> str:
    if not gains.curves and not checkpoints:
        return ""
    design = gains.design
    series = {name: points for name, points in checkpoints.items() if len(points) > 1}
    drawn = [plot({"checkpoints": points}, "checkpoint, in order", name) for name, points in series.items()]
    if gains.curves:
        drawn += [plot(_series(gains, None, m), "guidance scale", m) for m in design.higher_is_better]
        others = [m for m in design.higher_is_better if m != design.primary]
        drawn += [plot(_series(gains, m, design.primary), m, design.primary) for m in others]
    said = "Bars are intervals of the mean; points are labelled with the guidance scale, or with the checkpoint."
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

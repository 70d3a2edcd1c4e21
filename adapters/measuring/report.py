"""`report.html`: one self-contained page that opens with two sentences: on the adapter, and on the guidance.

Readable without JavaScript (pairs stand side by side) and on a phone; with JavaScript each pair lies under a slider
that the arrow keys move. Nothing is fetched: pictures are data URIs, and a content security policy allows exactly one
script, by its hash, so no text of a prompt or a name can run.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from . import words
from .gains import Contrast, Gains
from .plane import sentences
from .plot import plot
from .sample import Shot

__all__ = ["render"]

SIDE, SHARP = 512, 128
Overlay = Callable[[Shot], Mapping[str, Image.Image]]
Joined = dict[tuple[str, int, str], tuple[Shot | None, Shot, Shot]]

_SCRIPT = """
document.documentElement.classList.add("live");
for (const box of document.querySelectorAll(".pair")) {
  const slider = box.querySelector("input");
  const move = () => box.style.setProperty("--cut", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
"""
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f3f5f7; --mark: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --paper: #14171a; --line: #3a4046; --soft: #1e2226; --mark: #8ab4f8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.verdict { border-left: .4rem solid var(--mark); background: var(--soft); padding: .75rem 1rem; font-size: 1.1rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible, input:focus-visible { outline: 3px solid var(--mark); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th[scope=row], thead th:first-child, td.text { text-align: left; }
th[scope=row], td.text { min-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-size: .85rem; margin-top: .4rem; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: .25rem; }
.pictures div { position: relative; } .pictures img { width: 100%; height: auto; display: block; }
img.sharp { image-rendering: pixelated; }
.references { display: grid; grid-template-columns: repeat(4, minmax(0, 8rem)); gap: .5rem; }
.references img { width: 100%; height: auto; display: block; }
.base { position: relative; margin-bottom: .25rem; } .base img { width: 50%; height: auto; display: block; }
dt { font-weight: bold; } dd { margin: 0 0 .4rem 1rem; }
.tag { position: absolute; bottom: .3rem; left: .3rem; padding: 0 .4rem; font-size: .75rem; background: #000b;
  color: #fff; }
.pair input { display: none; width: 100%; margin: .5rem 0 0; min-height: 2rem; accent-color: var(--mark); }
.live .pair input { display: block; }
.live .pictures { display: block; position: relative; }
.live .pictures div + div { position: absolute; inset: 0; clip-path: inset(0 0 0 var(--cut, 50%)); }
.live .pictures div + div .tag { left: auto; right: .3rem; }
.live .pictures::after { content: ""; position: absolute; inset: 0 auto 0 var(--cut, 50%); border-left: 2px solid #fff;
  box-shadow: 0 0 2px #000; }
details img { width: 100%; height: auto; } details summary { cursor: pointer; font-size: .85rem; padding: .4rem 0; }
pre { background: var(--soft); padding: .75rem; overflow-x: auto; white-space: pre-wrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); }
"""


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
) -> str:
    """The page as text.

    Args:
        shots: images of at least the design's arm and baseline; joined as the comparison joined them.
        overlay: shot -> named pictures (regions, gamma) shown below its pair; asked for the design's arm only.
        pairs: how many pairs are shown, spread evenly; the worst five follow below.
        facts: further lines of the last table.
        references: the subject's own pictures; the first four are shown.
    """
    joined = _joined(gains, shots)
    ends = {name: [(w["prompt"], w["seed"], w["latents"]) for w in pairs_of] for name, pairs_of in _ends(gains).items()}
    shown = list(joined)[:: max(1, len(joined) // pairs)][:pairs]  # spread over all prompts
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="verdict">{escape(said)}</p>' for said in (words.adapter(gains), words.guidance(gains)) if said),
        _how_to_read(gains),
        _references(references),
        "<h2>Pairs: same prompt, same seed, same noise</h2>",
        _gallery(gains, joined, shown, overlay),
        _plane(gains),
        "<h2>Every way to sample</h2>",
        _arms(gains),
    ]
    for name, keys in ends.items():
        body += [f"<h2>The five pairs that {name} most</h2>", _ends_table(gains, name)]
        body.append(_gallery(gains, joined, [key for key in keys if key in joined], overlay))
    body += [
        _curves(gains),
        "<h2>Statistics</h2>",
        _statistics(gains),
        "<h2>How it was made</h2>",
        _facts({**(facts or {}), **gains.design.notes}),
        f"<pre>{escape(command)}</pre>" if command else "",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: measured gains</title><style>{_STYLE}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _joined(gains: Gains, shots: Mapping[str, Sequence[Shot]]) -> Joined:
    """(prompt, seed, latents) -> pictures of the base, where there is one, of the baseline and of the arm."""
    bare = {shot.key: shot for shot in shots.get(gains.design.base or "", ())}
    ours = {shot.key: shot for shot in shots.get(gains.design.arm, ())}
    theirs = {shot.key: shot for shot in shots.get(gains.design.baseline, ())}
    return {key: (bare.get(key), theirs[key], ours[key]) for key in ours if key in theirs}


def _design(gains: Gains) -> str:
    design, counts = gains.design, gains.counts
    return (
        f"{counts['pairs']} pairs from {counts['prompts']} prompts and {counts['seeds']} seeds, {counts['subjects']} "
        f"subject(s). Intervals: {design.confidence:.0%}, over {counts['clusters']} {counts['cluster']}s. Declared "
        f"before the run: primary metric {design.primary}, least effect worth having {design.minimum_effect:g}, "
        f"referee {design.referee or 'none'}."
    )


def _ends(gains: Gains) -> dict[str, list[dict[str, Any]]]:
    return {name: found for name, found in (("gained", gains.best), ("lost", gains.worst)) if found}


def _how_to_read(gains: Gains) -> str:
    design, counts = gains.design, gains.counts
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(said)}</dd>"
        for name, said in {
            **words.arms(gains),
            design.primary: "the measure that decides about the guidance",
            "pair": "two pictures of the same prompt that began with the same noise; only what is compared differs",
            "interval": f"where the true mean lies, in {design.confidence:.0%} of such studies",
        }.items()
    )
    count = f"{counts['prompts']} prompts, {counts['seeds']} seed(s) each, drawn in {len(gains.arms)} ways."
    return f"<details><summary>How to read this: {escape(count)}</summary><dl>{lines}</dl></details>"


def _references(references: Sequence[Image.Image]) -> str:
    if not references:
        return ""
    pictures = "".join(
        f"<div>{_picture(image, f'The subject, picture {number}')}</div>"
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

    series = {"front of plain guidance": [point(name) for name in drawn["front"]]}
    for one in drawn["points"]:
        if one["arm"] not in drawn["front"]:
            series[one["arm"]] = [point(one["arm"])]
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(drawn))
    rows = [[name, *(f"{words.number(m, means[name][m])}" for m in (x, y))] for name in means]
    table = _table("The points of the figure", ["point", x, y], rows)
    return (
        "<h2>The subject against the prompt</h2><p>Up and to the right is better. Plain guidance reaches the line by "
        "its scale and the adapter's weight alone; what does not lie above it adds nothing.</p>"
        f"<div class=curves>{plot(series, x, y)}</div><ul>{said}</ul>"
        f"<details><summary>The figure as a table</summary>{table}</details>"
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


def _uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=90, method=4, lossless=max(small.size) <= SHARP)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _picture(image: Image.Image, alt: str) -> str:
    sharp = ' class="sharp"' if max(image.size) <= SHARP else ""
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img{sharp} src="{_uri(image)}" {size} alt="{escape(alt)}" loading="lazy">'


def _gallery(gains: Gains, joined: Joined, keys: Sequence[Any], overlay: Overlay | None) -> str:
    if not keys:
        return "<p>No pictures were kept.</p>"
    figures = [_pair(gains, *joined[key], overlay) for key in keys]
    return f'<div class="pairs">{"".join(figures)}</div>'


def _pair(gains: Gains, base: Shot | None, before: Shot, after: Shot, overlay: Overlay | None) -> str:
    names = gains.design.baseline, gains.design.arm
    sides = "".join(
        f"<div>{_picture(shot.image, f'{name}: {shot.prompt}, seed {shot.seed}')}"
        f'<span class="tag">{escape(name)}</span></div>'
        for name, shot in zip(names, (before, after), strict=True)
    )
    label = f"Divider between {names[0]} (left) and {names[1]} (right): {after.prompt}, seed {after.seed}"
    extra = "".join(
        f"<details><summary>{escape(name)}</summary>{_picture(picture, f'{name}: {after.prompt}')}</details>"
        for name, picture in (overlay(after) if overlay is not None else {}).items()
    )
    bare = (
        ""
        if base is None
        else (
            f'<div class="base">{_picture(base.image, f"base: {base.prompt}, seed {base.seed}")}'
            f'<span class="tag">{escape(str(gains.design.base))}</span></div>'
        )
    )
    return (
        f'<figure class="pair">{bare}<div class="pictures">{sides}</div>'
        f'<input type="range" min="0" max="100" value="50" aria-label="{escape(label)}">'
        f"<figcaption>{escape(after.prompt)} · seed {after.seed}</figcaption>{extra}</figure>"
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *rest in rows:
        cells = [f"<td{' class=text' if i in text else ''}>{escape(cell)}</td>" for i, cell in enumerate(rest, start=1)]
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _arms(gains: Gains) -> str:
    metrics = gains.design.higher_is_better
    head = ["arm", *(f"{m} {'↑' if up else '↓'}" for m, up in metrics.items()), "s per image"]
    recorded = sorted({name for arm in gains.arms for name in arm["recorded"]})
    rows = []
    for arm in gains.arms:
        values = [arm["metrics"][m] for m in metrics]
        cells = [
            f"{words.number(name, v)} ({words.interval(name, v)})" for name, v in zip(metrics, values, strict=True)
        ]
        extra = [f"{arm['recorded'][name]:.4g}" if name in arm["recorded"] else "" for name in recorded]
        rows.append([arm["name"], *cells, f"{arm['seconds']:.3g}", *extra])
    return _table("Every arm with its means and intervals", [*head, *recorded], rows)


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
    return _table("Differences, arm by arm", head, [_line(c) for c in contrasts], text=[1])


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
    return _table(f"The five that {name} most", head, rows)


def _facts(facts: Mapping[str, Any]) -> str:
    return _table("Facts", ["what", "value"], [[str(k), str(v)] for k, v in facts.items()], text=[1]) if facts else ""


def _curves(gains: Gains) -> str:
    if not gains.curves:
        return ""
    design = gains.design
    drawn = [plot(_series(gains, None, m), "guidance scale", m) for m in design.higher_is_better]
    others = [m for m in design.higher_is_better if m != design.primary]
    drawn += [plot(_series(gains, m, design.primary), m, design.primary) for m in others]
    words = "Bars are intervals of the mean; points are labelled with the guidance scale."
    return f"<h2>Curves</h2><p>{words}</p><div class=curves>{''.join(drawn)}</div>"


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

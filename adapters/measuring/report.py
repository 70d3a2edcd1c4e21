"""`report.html`: one self-contained page that opens with the verdict.

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

from .gains import Contrast, Gains
from .plot import plot
from .sample import Shot

__all__ = ["render"]

SIDE = 512
Overlay = Callable[[Shot], Mapping[str, Image.Image]]

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
) -> str:
    """The page as text.

    Args:
        shots: images of at least the design's arm and baseline; joined as the comparison joined them.
        overlay: shot -> named pictures (regions, gamma) shown below its pair; asked for the design's arm only.
        pairs: how many pairs are shown, spread evenly; the worst five follow below.
        facts: further lines of the last table.
    """
    joined = _joined(gains, shots)
    worst = [(w["prompt"], w["seed"], w["latents"]) for w in gains.worst]
    shown = list(joined)[:: max(1, len(joined) // pairs)][:pairs]  # spread over all prompts
    script = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict"><strong>{escape(gains.verdict.sentence)}</strong></p>',
        f"<p>{escape(_design(gains))}</p>",
        "<h2>Pairs: same prompt, same seed, same noise</h2>",
        _gallery(gains, joined, shown, overlay),
        "<h2>Arms</h2>",
        _arms(gains),
        "<h2>Differences from the baseline</h2>",
        _contrasts(gains),
        _curves(gains),
        "<h2>The five pairs that lost most</h2>",
        f"<p>Largest losses of {escape(gains.design.arm)} on {escape(gains.design.primary)}.</p>",
        _worst_table(gains),
        _gallery(gains, joined, [key for key in worst if key in joined], overlay),
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


def _joined(gains: Gains, shots: Mapping[str, Sequence[Shot]]) -> dict[tuple[str, int, str], tuple[Shot, Shot]]:
    ours = {shot.key: shot for shot in shots.get(gains.design.arm, ())}
    theirs = {shot.key: shot for shot in shots.get(gains.design.baseline, ())}
    return {key: (theirs[key], ours[key]) for key in ours if key in theirs}


def _design(gains: Gains) -> str:
    design, counts = gains.design, gains.counts
    return (
        f"{counts['pairs']} pairs from {counts['prompts']} prompts and {counts['seeds']} seeds, {counts['subjects']} "
        f"subject(s). Intervals: {design.confidence:.0%}, over {counts['clusters']} {counts['cluster']}s. Declared "
        f"before the run: primary metric {design.primary}, least effect worth having {design.minimum_effect:g}, "
        f"referee {design.referee or 'none'}."
    )


def _uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=90, method=4, lossless=max(small.size) <= 128)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _picture(image: Image.Image, alt: str) -> str:
    return f'<img src="{_uri(image)}" width="{image.width}" height="{image.height}" alt="{escape(alt)}" loading="lazy">'


def _gallery(
    gains: Gains, joined: Mapping[Any, tuple[Shot, Shot]], keys: Sequence[Any], overlay: Overlay | None
) -> str:
    if not keys:
        return "<p>No pictures were kept.</p>"
    figures = [_pair(gains, *joined[key], overlay) for key in keys]
    return f'<div class="pairs">{"".join(figures)}</div>'


def _pair(gains: Gains, before: Shot, after: Shot, overlay: Overlay | None) -> str:
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
    return (
        f'<figure class="pair"><div class="pictures">{sides}</div>'
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
        cells = [f"{v['mean']:.4g} ({v['low']:.4g} to {v['high']:.4g})" for v in values]
        extra = [f"{arm['recorded'][name]:.4g}" if name in arm["recorded"] else "" for name in recorded]
        rows.append([arm["name"], *cells, f"{arm['seconds']:.3g}", *extra])
    return _table("Every arm with its means and intervals", [*head, *recorded], rows)


def _contrasts(gains: Gains) -> str:
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
    return _table("Differences from the baseline", head, [_line(c) for c in gains.contrasts], text=[1])


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


def _worst_table(gains: Gains) -> str:
    rows = [[w["prompt"], str(w["seed"]), f"{w['difference']:+.4g}"] for w in gains.worst]
    return _table("Worst five", ["prompt", "seed", "difference"], rows)


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

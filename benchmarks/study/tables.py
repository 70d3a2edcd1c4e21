"""The study's tables and curves: every comparison that has ended, recomputed from its own per-image table."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.common.comparison import BASE
from recipes.common.guidance import EFFECTIVE
from recipes.common.results import at_equal_scale
from training.pocket import base_hash

__all__ = ["curves", "report", "table"]

DRAWN = ("CFG", "S-CFG", "dose", "placebo", "pointwise", "published")  # as many as one plot tells apart


def report(names: Sequence[str], out: Path) -> Path:
    """Write `out/report`: of every stage its table, verdict and curve beside what they follow from.

    Args:
        names: stages that measure; those without results yet are left out.
        out: where the stages' folders are.

    Returns: the page of all tables.
    """
    import adapters

    with adapters.files.write_folder(out / "report") as page:
        parts = ["# Tables of the study", f"Base {base_hash()}. Every number is recomputed from `*/per_image.csv`."]
        for name in names:
            made = out / name / "measured"
            if not (made / "gains.json").is_file():
                continue
            folder = page / name
            folder.mkdir()
            for file in ("gains.json", "per_image.csv", "settings.yaml"):
                shutil.copy(made / file, folder / file)
            adapters.files.write_manifest(folder, {"format": 1, "kind": "gains"})
            adapters.measuring.verify.verify(folder)
            gains, rows = (
                adapters.measuring.verify.recompute(folder),
                adapters.measuring.table.read_csv(folder / "per_image.csv"),
            )
            facts = adapters.files.read_json(made / "gains.json")["facts"]
            measured = {key: value for key, value in facts.items() if key.startswith(("Fréchet", "drift", "at equal"))}
            parts += [f"## {name}", table(gains, rows), *(f"{key}: {value}" for key, value in measured.items())]
            if gains.design.sweeps:
                (page / f"{name}.svg").write_text(curves(gains), "utf-8")
                parts.append(f"![{gains.design.primary} against effective scale]({name}.svg)")
        (page / "tables.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    return out / "report" / "tables.md"


def table(gains: Any, rows: Sequence[Any]) -> str:
    """Means of every arm, differences at equal nominal and effective scale, the verdict, and what the pictures took."""
    import adapters
    from recipes.common.metrics import PROMPT

    design, counts, names = gains.design, gains.counts, [arm["name"] for arm in gains.arms]
    also = [PROMPT] if PROMPT in design.higher_is_better else []
    judges = list(dict.fromkeys([design.primary, *filter(None, [design.referee]), *also]))
    shown = {metric: design.higher_is_better[metric] for metric in judges}
    asked = ("at equal scale", *(["at equal effective scale"] if design.sweeps else []))
    head = ["arm", *(f"{metric} {how}" for metric in judges for how in asked), *design.higher_is_better]
    head += ["effective scale", "s"]
    lines = [_row(head), _row(["---"] * len(head))]
    for arm in gains.arms:
        scale = arm["name"].partition(" @ ")[2]
        plain = f"{design.baseline} @ {scale}" if scale and f"{design.baseline} @ {scale}" in names else design.baseline
        found: list[Any] = [""] * len(asked)
        if not arm["name"].startswith((design.baseline, BASE)):
            own = replace(design, arm=arm["name"], higher_is_better=shown)
            pair = [row for row in rows if row.arm in (arm["name"], plain)]
            found = [
                adapters.measuring.gains.compare(pair, replace(own, baseline=plain, sweeps={}, base=None, plain=()))
            ]
            found += [at_equal_scale(rows, own)] if design.sweeps else []
        differences = [_difference(one, metric) for metric in judges for one in found]
        effective = arm["recorded"].get(EFFECTIVE)
        means = [f"{value['mean']:.3g}" for value in arm["metrics"].values()]
        more = [f"{effective:.2f}" if effective else "", f"{arm['seconds']:.2f}"]
        lines.append(_row([arm["name"], *differences, *means, *more]))
    hours = sum(row.seconds for row in rows) / 3600
    below = (
        f"{counts['pairs']} pairs, {counts['clusters']} {counts['cluster']}s. {gains.verdict.sentence} "
        f"{len(rows)} pictures, sampled in {hours:.2f} hours of one core."
    )
    return "\n".join(lines) + f"\n\n{below}"


def curves(gains: Any) -> str:
    """The primary metric over the effective scale, a line a method: what lies above plain CFG's line is gained."""
    from adapters.measuring import words
    from adapters.measuring.plot import picture

    design = gains.design
    series: dict[str, list[tuple[float, float, float, float, str]]] = {}
    for arm in gains.arms:
        method, _, scale = arm["name"].partition(" @ ")
        if method not in DRAWN:
            continue
        nominal = scale or f"{words.scale_of(design.notes['guidance'][arm['name']]):g}"
        value = arm["metrics"][design.primary]
        mean, x = value["mean"], arm["recorded"].get(EFFECTIVE, float(nominal))
        # Bars at plain CFG alone: differences are paired, and their intervals stand in the table.
        bar = (value["low"], value["high"]) if method == design.baseline else (mean, mean)
        series.setdefault(method, []).append((x, mean, *bar, nominal))
    ordered = {name: sorted(series[name]) for name in DRAWN if name in series}
    return picture(ordered, "effective guidance scale (points: nominal)", design.primary)


def _difference(found: Any, metric: str) -> str:
    """A comparison's number for a metric; there is none where an effective scale is outside those of plain CFG."""
    if isinstance(found, str):
        return "not known" if found else ""
    contrast = next(c for c in found.contrasts if (c.arm, c.metric) == (found.design.arm, metric))
    return f"{contrast.difference:+.4f} [{contrast.low:+.4f}, {contrast.high:+.4f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""What a comparison leaves: per_image.csv, gains.json, report.html, the sheet, and the same in words."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.base import POCKET, adapted, base_folder
from recipes.common.comparison import EFFECTIVE, arms_of
from recipes.common.draw import sheet
from recipes.common.guidance import arguments_of, guided
from recipes.common.settings import MeasureSettings
from recipes.common.units import Case
from training.config import resolved, write

if TYPE_CHECKING:
    from recipes.measure import Settings

__all__ = ["at_equal_scale", "table", "write_results"]


def write_results(
    pipe: Any,
    settings: Settings,
    units: Sequence[Case],
    metrics: Sequence[Any],
    rows: list[Any],
    shots: Mapping[str, Sequence[Any]],
    drift: dict[str, float] | None,
    out: Path,
) -> None:
    """Compare the rows and write `measured/` whole or not at all; prints the table and the verdict.

    Args:
        pipe: what the pictures were sampled with; the report's overlays are sampled once more.
        rows: one a picture, with its metrics.
        shots: arm -> its pictures.
        drift: further facts, by name.
        out: receives `measured/`.
    """
    import adapters
    from recipes.common import metrics as metrics_by_name

    plan = settings.measure
    names = [metric.name for metric in metrics]
    swept = _sweeps(plan, settings.tuned)
    design = adapters.Design(
        arm=plan.arm,
        baseline=plan.baseline,
        primary=plan.primary or names[0],
        referee=plan.referee,
        minimum_effect=plan.minimum_effect,
        higher_is_better={metric.name: metric.higher_is_better for metric in metrics},
        sweeps=swept,
        notes={
            "held out": "prompts and seeds were neither trained nor tuned on",
            "guidance": {name: asdict(arm) for name, arm in arms_of(plan, settings.tuned).items()},
        },
    )
    gains = adapters.measuring.gains.compare(rows, design)
    facts = {**_facts(pipe, settings), **(drift or {}), **_tuning(settings.tuned)}
    if swept:
        equal = at_equal_scale(rows, design)
        facts["at equal effective scale"] = equal if isinstance(equal, str) else equal.verdict.sentence
    if plan.frechet:
        facts |= {
            f"Fréchet distance ({plan.frechet}), {name}": f"{distance:.4g} (n = {len(taken)})"
            for name, taken in shots.items()
            for distance in [metrics_by_name.frechet(plan, taken)]
        }
    what = " and ".join(filter(None, (settings.controlnet, settings.adapter))) or "no adapter"
    title = f"{what} on {settings.base.path}"
    page = adapters.measuring.report.render(
        gains, shots, title=title, facts=facts, overlay=_overlay(pipe, settings, units), command=_command(out)
    )
    with adapters.files.write_folder(out / "measured") as stage:
        (stage / "per_image.csv").write_bytes(adapters.measuring.table.write_csv(rows).encode())
        (stage / "gains.json").write_text(
            json.dumps({"format": 1, "facts": facts, **gains.to_dict()}, indent=1), "utf-8"
        )
        (stage / "report.html").write_text(page, "utf-8")
        sheet(shots).save(stage / "sheet.png")
        write(resolved(settings), stage / "settings.yaml")
    print(f"\n{table(gains)}\n\n{gains.verdict.word}: {gains.verdict.sentence}")
    if swept:
        print(f"at equal effective scale: {facts['at equal effective scale']}")
    print(f"Open {out / 'measured' / 'report.html'}; pictures side by side: {out / 'measured' / 'sheet.png'}")


def _command(out: Path) -> str:
    return f"python recipes/measure.py --config {out / 'measured' / 'settings.yaml'}"


def _facts(pipe: Any, settings: Settings) -> dict[str, Any]:
    import torch

    import adapters

    device = str(pipe.device)
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {
        "base": str(base_folder(settings.base)) if settings.base.path != POCKET else POCKET,
        "base weights": adapters.describe(pipe)["weights"],
        "scheduler": type(pipe.scheduler).__name__,
        "steps": settings.sampling.steps,
        "device": device,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "peak memory of the process, MiB": round(peak),
    }


def _tuning(tuned: str | None) -> dict[str, str]:
    """What the search tried and found, in words: the curve behind the guider."""
    if tuned is None:
        return {}
    found = json.loads((Path(tuned) / "tuned.json").read_text("utf-8"))
    facts = {"tuned on": f"{len(found['prompts'])} prompts, seeds {found['seeds']}, {found['metric']}"}
    for name, rounds in found["rounds"].items():
        if name == "checkpoint":
            facts["checkpoint tried"] = "; ".join(
                f"{Path(one['settings']['adapter']).name}: {one['mean']:.3f}" for one in rounds[0]["results"]
            )
            continue
        tried = [
            f"scale {one['settings']['scale']:g}{_more(one['settings'])}: {one['mean']:.3f}"
            for one in rounds[0]["results"]
        ]
        facts[f"tuning {name}, {found['pictures'][name]} pictures"] = "; ".join(tried)
    return facts


def _more(settings: Mapping[str, Any]) -> str:
    """What else a candidate was, beside its scale."""
    parts = [f"{key} {value}" for key, value in settings["options"].items()]
    parts += [f"weight {settings['weight']:g}"] if settings["weight"] not in (None, 1.0) else []
    return "".join(f", {part}" for part in parts)


def _sweeps(plan: MeasureSettings, tuned: str | None) -> dict[str, dict[str, str]]:
    """Per method, guidance scale -> arm; the arm itself is a point of its curve."""
    if not plan.sweep:
        return {}
    arms = arms_of(plan, tuned)
    return {
        name: {f"{arms[arm].scale:g}": arm for arm in arms if arm == name or arm.startswith(f"{name} @ ")}
        for name in (plan.baseline, plan.arm)
    }


def at_equal_scale(rows: Sequence[Any], design: Any) -> Any:
    """The design's comparison against plain CFG interpolated to the arm's own effective scale; or why there is none."""
    import adapters

    label, sweep = f"{design.baseline} at equal effective scale", design.sweeps.get(design.baseline, {})
    try:
        equal = adapters.measuring.gains.at_effective_scale(
            rows, design.arm, sweep, list(design.higher_is_better), name=label, recorded=EFFECTIVE
        )
    except adapters.GainsError as error:
        return f"not known: {error}"
    pair = [row for row in rows if row.arm == design.arm] + equal
    return adapters.measuring.gains.compare(pair, replace(design, baseline=label, sweeps={}))


def _overlay(pipe: Any, settings: Settings, units: Sequence[Case]) -> Callable[[Any], dict[str, Any]]:
    """Regions and gamma over the steps of the report's first pairs, drawn by sampling them once more."""
    import adapters
    from scfg.trace import RECORDABLE
    from scfg.visualize import strip

    plan, left = settings.measure, [settings.measure.overlays]
    arm = arms_of(plan, settings.tuned)[plan.arm]

    def overlay(shot: Any) -> dict[str, Any]:
        case = next(case for case in units if shot.prompt in case.prompts)
        if left[0] <= 0 or arm.method != "semantic":
            return {}
        left[0] -= 1
        maps = guided(pipe, arm, record=RECORDABLE)
        weight = settings.weight if arm.weight is None else arm.weight
        with adapted(pipe, case.adapter, weight), maps() as run:
            adapters.measuring.sample.images(
                pipe,
                [shot.prompt],
                [shot.seed],
                guidance_scale=arm.scale,
                steps=settings.sampling.steps,
                height=settings.sampling.height,
                width=settings.sampling.width,
                negative_prompt=settings.sampling.negative_prompt,
                inputs=case.inputs,
                common=arguments_of(pipe, arm),
            )
            return {"regions and gamma over the steps": strip(run, pipe)}

    return overlay


def table(gains: Any) -> str:
    """Every arm's mean, and its paired difference to the baseline with the interval."""
    design = gains.design
    lines = []
    differences = {(c.arm, c.metric): c for c in gains.contrasts}
    for metric in design.higher_is_better:
        lines.append(f"{metric:<24} {'mean':>6}  difference to {design.baseline} [{design.confidence:.0%} interval]")
        for summary in gains.arms:
            contrast = differences.get((summary["name"], metric))
            said = f"{contrast.difference:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}]" if contrast else ""
            lines.append(f"  {summary['name']:<22} {summary['metrics'][metric]['mean']:6.3f}  {said}".rstrip())
    return "\n".join(lines)

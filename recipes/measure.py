"""Measure what an adapter and a guidance do: arms on the same prompts, seeds and noise, differences with intervals.

accelerate launch recipes/measure.py --config recipes/configs/measure/pocket_subject.yaml --adapter runs/dog/lora
"""

from __future__ import annotations

import hashlib
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes.sample import draw, sheet
from recipes.settings import GuidanceSettings, MeasureSettings, SamplingSettings
from recipes.wiring import (
    POCKET,
    Case,
    adapted,
    arguments_of,
    base_folder,
    cases,
    guided,
    launch,
    pipeline,
    say,
    size_of,
    without_control,
)
from training.config import BaseSettings, require, resolved, write
from training.errors import TrainingError

__all__ = ["BASE", "Settings", "arms_of", "digest_of", "run", "table"]

BASE, EFFECTIVE = "base", "effective scale"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A measured comparison of guidances on one base, with an adapter or without."""

    base: BaseSettings
    """The base model; `path: pocket` is the embedded one."""
    adapter: str | None = None
    """What is measured: LoRA or release folder, U-net, hub id, any trainer's .safetensors; {subject} is filled in."""
    weight: float = 1.0
    """Scale of the adapter's change."""
    controlnet: str | None = None
    """ControlNet folder or hub id, pocket-canny or pocket-segmentation; needs measure.targets."""
    tuned: str | None = None
    """What recipes/tune.py found: it replaces the guidance of the arms it tuned."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """Units, arms, metrics, and what decides."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    dry_run: bool = False
    """Loads and checks everything, and stops."""
    out: str
    """Folder of pictures, per_image.csv, gains.json and report.html."""


def run(settings: Settings) -> Path | None:
    """Measure; returns the folder, or None after a dry run."""
    import adapters
    from recipes import referee
    from training.ranks import state

    plan, out = settings.measure, Path(settings.out)
    pocket = settings.base.path == POCKET
    arms = arms_of(plan, settings.tuned)
    pipe = pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    units = cases(plan, settings.adapter, size=size_of(pipe, settings.sampling))
    judges = [referee.metrics(plan, case, pocket=pocket) for case in units]
    _check(settings, units, [metric.name for metric in judges[0]])
    if settings.dry_run:
        for case in units:
            with adapted(pipe, case.adapter, settings.weight):
                say(f"would draw {len(case.prompts) * len(plan.seeds)} pictures an arm of {case.name or 'the task'}")
        return None
    rows: list[Any] = []
    shots: dict[str, list[Any]] = {}
    for case, metrics in zip(units, judges, strict=True):
        made = _sample(pipe, case, arms, settings)
        if state().is_main_process:
            rows += adapters.table.tabulate(made, metrics, subject=partial(_name_of, case))
            shots = {name: [*shots.get(name, []), *taken] for name, taken in made.items()}
    drift = _drift(pipe, units[0], settings) if plan.drift_prompts and settings.adapter else None
    if state().is_main_process:
        _write(pipe, settings, units, judges[0], rows, shots, drift, out)
    state().wait_for_everyone()
    return out


def _check(settings: Settings, units: Sequence[Case], names: Sequence[str]) -> None:
    """What the comparison would lack in the end is said before anything is sampled."""
    from recipes import referee

    plan = settings.measure
    require(
        (settings.controlnet is None) == (plan.targets is None),
        "controlnet and measure.targets belong together: the network, and what its conditions are made from",
    )
    for what, name in (("primary", plan.primary), ("referee", plan.referee)):
        require(name is None or name in names, f"measure.{what} {name!r} is none of the metrics {', '.join(names)}")
    require(sum(len(case.prompts) for case in units) >= 2, "a comparison needs at least two prompts or targets")
    if plan.frechet:
        referee.check_frechet(plan)


def arms_of(plan: MeasureSettings, tuned: str | None = None) -> dict[str, GuidanceSettings]:
    """Every arm's guidance: the plan's at its scale, the tuned ones', and those of the sweep."""
    arms = {name: replace(arm, scale=plan.scale or arm.scale) for name, arm in plan.arms.items()}
    if tuned is not None:
        found = _best(Path(tuned) / "tuned.json")
        arms |= {name: GuidanceSettings(**values) for name, values in found.items() if name in arms}
        best = arms[plan.arm]
        # A control arm differs from the tuned one in its method alone.
        arms |= {
            name: replace(best, method=arm.method)
            for name, arm in arms.items()
            if name not in found and arm.method in ("dose", "placebo", "pointwise")
        }
    for name in (plan.baseline, plan.arm):
        arms |= {
            f"{name} @ {scale:g}": replace(arms[name], scale=scale) for scale in plan.sweep if scale != arms[name].scale
        }
    return arms


def _best(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))["best"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"tuned: {file} is not what recipes/tune.py wrote ({error!r})") from error


def _sample(pipe: Any, case: Case, arms: Mapping[str, GuidanceSettings], settings: Settings) -> dict[str, list[Any]]:
    plan = settings.measure
    folder = Path(settings.out) / "pictures" / case.name
    inputs = partial(_condition, case) if case.conditions else None
    take = partial(_timed, case=case, settings=settings, inputs=inputs)
    shots = {}
    if plan.base_arm:
        first = replace(arms[plan.baseline], method="cfg", options={})
        bare = partial(_timed, case=case, settings=settings, inputs=None)
        shots[BASE] = bare(without_control(pipe), BASE, first, folder, None)
    for weight in {settings.weight if arm.weight is None else arm.weight: None for arm in arms.values()}:
        with adapted(pipe, case.adapter, weight):
            for name, arm in arms.items():
                if (settings.weight if arm.weight is None else arm.weight) == weight:
                    shots[name] = take(pipe, name, arm, folder, f"{digest_of(case.adapter)} {weight:g}")
    order = [*([BASE] if plan.base_arm else []), *arms]
    return {name: shots[name] for name in order}


def _timed(
    pipe: Any,
    name: str,
    arm: GuidanceSettings,
    folder: Path,
    weights: str | None,
    *,
    case: Case,
    settings: Settings,
    inputs: Any,
) -> list[Any]:
    from adapters.card import slug

    place = folder / slug(name)
    shots = draw(
        pipe, case.prompts, settings.measure.seeds, arm, settings.sampling, place, weights, arm=name, inputs=inputs
    )
    seconds = sum(shot.seconds for shot in shots) / len(shots)
    say(f"{case.name:>12} {name:>14}: {len(shots)} pictures, {seconds:.2f} s each")
    return shots


def _name_of(case: Case, shot: Any) -> str:
    return case.name


def _condition(case: Case, prompt: str, seed: int) -> dict[str, Any]:
    return {"image": case.conditions[prompt]}


def digest_of(adapter: str | None) -> str:
    """What tells one adapter's pictures from another's: the bytes of its weights, wherever they lie."""
    if adapter is None:
        return "none"
    path = Path(adapter)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) if path.is_dir() else []
    if not files:
        return adapter
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _drift(pipe: Any, case: Case, settings: Settings) -> dict[str, float]:
    """Mean distance of the adapter's pictures to the base's, of prompts that do not name the subject."""
    from adapters.metrics import Drift
    from recipes import referee

    plan = settings.measure
    other = replace(case, prompts=list(plan.drift_prompts), conditions={}, targets={}, name=f"{case.name}-unrelated")
    arms = {name: arm for name, arm in arms_of(plan, settings.tuned).items() if name in (plan.arm, plan.baseline)}
    shots = _sample(pipe, other, arms, replace(settings, measure=replace(plan, base_arm=True)))
    where = next(
        (name for name in ("dino", "clip") if name in plan.spaces),
        "judge" if settings.base.path == POCKET else "colour",
    )
    features = referee.space(where, plan.spaces.get(where))
    metric = Drift(name=f"drift ({where})", features=features, base=shots[BASE])
    return {f"drift ({where}) of {name}": float(metric(shots[name]).mean()) for name in arms}


def _write(
    pipe: Any,
    settings: Settings,
    units: Sequence[Case],
    metrics: Sequence[Any],
    rows: list[Any],
    shots: Mapping[str, Sequence[Any]],
    drift: dict[str, float] | None,
    out: Path,
) -> None:
    import adapters
    from recipes import referee

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
    gains = adapters.gains.compare(rows, design)
    facts = {**_facts(pipe, settings), **(drift or {}), **_tuning(settings.tuned)}
    if swept:
        facts["at equal effective scale"] = _at_equal_scale(rows, design, swept[plan.baseline], names)
    if plan.frechet:
        facts |= {
            f"Fréchet distance ({plan.frechet}), {name}": f"{referee.frechet(plan, taken):.4g} (n = {len(taken)})"
            for name, taken in shots.items()
        }
    what = " and ".join(filter(None, (settings.controlnet, settings.adapter))) or "no adapter"
    title = f"{what} on {settings.base.path}"
    page = adapters.report.render(
        gains, shots, title=title, facts=facts, overlay=_overlay(pipe, settings, units), command=_command(out)
    )
    with adapters.files.write_folder(out / "measured") as stage:
        (stage / "per_image.csv").write_bytes(adapters.table.write_csv(rows).encode())
        (stage / "gains.json").write_text(json.dumps({"format": 1, "facts": facts, **gains.to_dict()}, indent=1))
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
    found = json.loads((Path(tuned) / "tuned.json").read_text())
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


def _at_equal_scale(rows: list[Any], design: Any, sweep: Mapping[str, str], names: Sequence[str]) -> str:
    """The verdict against plain CFG interpolated to the arm's own effective scale; or why there is none."""
    import adapters

    label = f"{design.baseline} at equal effective scale"
    try:
        equal = adapters.gains.at_effective_scale(rows, design.arm, sweep, names, name=label, recorded=EFFECTIVE)
    except adapters.GainsError as error:
        return f"not known: {error}"
    pair = [row for row in rows if row.arm == design.arm] + equal
    return adapters.gains.compare(pair, replace(design, baseline=label, sweeps={})).verdict.sentence


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
            adapters.sample.images(
                pipe,
                [shot.prompt],
                [shot.seed],
                guidance_scale=arm.scale,
                steps=settings.sampling.steps,
                height=settings.sampling.height,
                width=settings.sampling.width,
                negative_prompt=settings.sampling.negative_prompt,
                inputs=partial(_condition, case) if case.conditions else None,
                common=arguments_of(pipe),
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


if __name__ == "__main__":
    launch(Settings, run)

"""Measure what an adapter and a guidance do: arms on the same prompts, seeds and noise, differences with intervals.

accelerate launch recipes/measure.py --config recipes/configs/measure/pocket_subject.yaml --adapter runs/dog/lora
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes.common.base import POCKET, adapted, pipeline, size_of, without_control
from recipes.common.cli import launch, say
from recipes.common.comparison import BASE, arms_of, digest_of
from recipes.common.draw import draw
from recipes.common.results import write_results
from recipes.common.settings import GuidanceSettings, MeasureSettings, SamplingSettings
from recipes.common.units import Case, cases
from training.config import BaseSettings, require

__all__ = ["Settings", "run"]


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
    from adapters.measuring.metrics import Drift
    from recipes.common import metrics as metrics_by_name
    from training.ranks import state

    plan, out = settings.measure, Path(settings.out)
    pocket = settings.base.path == POCKET
    arms = arms_of(plan, settings.tuned)
    pipe = pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    units = cases(plan, settings.adapter, size=size_of(pipe, settings.sampling))
    judges = [metrics_by_name.metrics(plan, case, pocket=pocket) for case in units]
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
        metrics = [replace(one, base=made[BASE]) if isinstance(one, Drift) else one for one in metrics]
        if state().is_main_process:
            rows += adapters.measuring.table.tabulate(made, metrics, subject=partial(_name_of, case))
            shots = {name: [*shots.get(name, []), *taken] for name, taken in made.items()}
    drift = _drift(pipe, units[0], settings) if plan.drift_prompts and settings.adapter else None
    if state().is_main_process:
        write_results(pipe, settings, units, judges[0], rows, shots, drift, out)
    state().wait_for_everyone()
    return out


def _check(settings: Settings, units: Sequence[Case], names: Sequence[str]) -> None:
    """What the comparison would lack in the end is said before anything is sampled."""
    from recipes.common import metrics as metrics_by_name

    plan = settings.measure
    require(
        (settings.controlnet is None) == (plan.targets is None),
        "controlnet and measure.targets belong together: the network, and what its conditions are made from",
    )
    for what, name in (("primary", plan.primary), ("referee", plan.referee)):
        require(name is None or name in names, f"measure.{what} {name!r} is none of the metrics {', '.join(names)}")
    require(sum(len(case.prompts) for case in units) >= 2, "a comparison needs at least two prompts or targets")
    if plan.frechet:
        metrics_by_name.check_frechet(plan)


def _sample(pipe: Any, case: Case, arms: Mapping[str, GuidanceSettings], settings: Settings) -> dict[str, list[Any]]:
    plan = settings.measure
    folder = Path(settings.out) / "pictures" / case.name
    take = partial(_timed, case=case, settings=settings, inputs=case.given)
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


def _drift(pipe: Any, case: Case, settings: Settings) -> dict[str, float]:
    """Mean distance of the adapter's pictures to the base's, of prompts that do not name the subject."""
    from adapters.measuring.metrics import Drift
    from recipes.common import metrics as metrics_by_name

    plan = settings.measure
    other = replace(case, prompts=list(plan.drift_prompts), conditions={}, targets={}, name=f"{case.name}-unrelated")
    arms = {name: arm for name, arm in arms_of(plan, settings.tuned).items() if name in (plan.arm, plan.baseline)}
    shots = _sample(pipe, other, arms, replace(settings, measure=replace(plan, base_arm=True)))
    where = next(
        (name for name in ("dino", "clip") if name in plan.spaces),
        "judge" if settings.base.path == POCKET else "colour",
    )
    features = metrics_by_name.space(where, plan.spaces.get(where))
    metric = Drift(name=f"drift ({where})", features=features, base=shots[BASE])
    return {f"drift ({where}) of {name}": float(metric(shots[name]).mean()) for name in arms}


if __name__ == "__main__":
    launch(Settings, run)

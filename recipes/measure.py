"""Measure what an adapter and a guidance do: arms on the same prompts, seeds and noise, differences with intervals.

accelerate launch recipes/measure.py --config recipes/configs/measure/pocket_subject.yaml --adapter runs/dog/lora
scfg-toolkit measure my.safetensors --photos photos/rex --class dog --trigger "sks"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from recipes.common.base import check_text, sampling_pipeline, size_of, without_control
from recipes.common.cli import explained, launch, say
from recipes.common.comparison import BASE, Arm, Comparison, digest_of, resolve, worn
from recipes.common.draw import OWN, TUNED, draw_shots, pace
from recipes.common.results import write_results
from recipes.common.settings import MeasureSettings, SamplingSettings
from recipes.common.stages import drawn_by_measure, say_drawing, took
from recipes.common.trial import class_folder, folder_of, try_arms
from recipes.common.units import Case
from training.config import BaseSettings, resolved
from training.errors import exit_on_error

MYPY = False  # see recipes.common.training
if MYPY:
    from diffusers import DiffusionPipeline

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A measured comparison of guidances on one base, with an adapter or without.

    For an adapter from another trainer, `measure ADAPTER --photos FOLDER --class NOUN --trigger WORD` needs no config;
    see `measure ADAPTER --help`.
    """

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    adapter: str | None = None
    """Adapter: folder, hub id or any trainer's .safetensors. {subject} is replaced by each subject's name."""
    weight: float = 1.0
    """Weight of the adapter. 1: as trained, 0: no effect."""
    controlnet: str | None = None
    """ControlNet: folder, hub id, pocket-canny or pocket-segmentation. Needs measure.targets."""
    tuned: str | None = None
    """Folder `tuned` of a search. It replaces the guidance of the arms that were tuned."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """The comparison: prompts, arms, metrics, and the metric that decides."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    dry_run: bool = False
    """Loads and checks everything, then stops."""
    out: str
    """Folder for pictures, per_image.csv, gains.json and report.html."""


def run(settings: Settings) -> Path | None:
    """Measure; returns the folder, or None after a dry run."""
    with took("measuring", dry=settings.dry_run) as so_far:
        return _measure(settings, so_far)


def _measure(settings: Settings, so_far: Callable[[], float]) -> Path | None:
    import adapters
    from recipes.common import bleed, standard
    from training.ranks import state

    out = Path(settings.out)
    pipe = sampling_pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    resolved_with = partial(
        resolve,
        base=settings.base,
        adapter=settings.adapter,
        weight=settings.weight,
        controlnet=settings.controlnet,
        tuned=settings.tuned,
        size=size_of(pipe, settings.sampling),
    )
    comparison = resolved_with(settings.measure)
    check_text(pipe, *(case.adapter for case in comparison.units))
    try_arms(pipe, comparison, settings.sampling, settings.out, _renewed(settings))
    if settings.dry_run:
        _would(pipe, comparison, settings.sampling, so_far())
        return None
    rows: list[Any] = []
    shots: dict[str, list[Any]] = {}
    classes_of = [_classes(pipe, case, comparison, settings) for case in comparison.units]
    gone = standard.untold(comparison, comparison.units, classes_of)
    facts = standard.missing_facts(gone)
    if gone:
        comparison = resolved_with(standard.without(comparison, gone))
    for case, classes in zip(comparison.units, classes_of, strict=True):
        made = _sample(pipe, case, comparison.arms.values(), settings, classes)
        if state().is_main_process:
            metrics = comparison.judges(case, made.get(BASE, ()), classes)
            rows += adapters.measuring.table.tabulate(made, metrics, subject=attrgetter("subject"))
            shots = {name: [*shots.get(name, []), *taken] for name, taken in made.items()}
    drift = _drift(pipe, comparison, settings) if settings.measure.drift_prompts and settings.adapter else {}
    if state().is_main_process:
        more = {**facts, **drift, **bleed.bleed_facts(comparison, shots)}
        write_results(pipe, comparison, settings.sampling, rows, shots, more, out, record=resolved(settings))
    state().wait_for_everyone()
    return out


def _would(pipe: DiffusionPipeline, comparison: Comparison, sampling: SamplingSettings, loading: float) -> None:
    """A dry run: arms, pictures, time and memory are said, by a batch that is tried; `loading` took so many seconds."""
    for case in comparison.units:
        count = len(case.prompts) * len(comparison.plan.seeds)
        say(f"would draw {count} pictures an arm of {case.name or 'the task'}")
    say(f"{len(comparison.arms)} arms: {', '.join(comparison.arms)}")
    case, arm = comparison.units[0], comparison.arm
    with worn(pipe, case, arm):
        seconds = pace(pipe, case.prompts, comparison.plan.seeds, arm.guidance, sampling, inputs=case.given)
    say_drawing(drawn_by_measure(comparison), sampling.steps, seconds=seconds, loading=loading)


def _sample(
    pipe: DiffusionPipeline, case: Case, arms: Iterable[Arm], settings: Settings, classes: Sequence[Any] = ()
) -> dict[str, list[Any]]:
    """Arm -> its pictures of a unit; the adapter is put on once for all arms that wear it alike.

    The base is asked without the subject's word, which means nothing to it; `classes` are such pictures, if drawn.
    """
    arms, shots = list(arms), {}
    for arm in (arm for arm in arms if arm.bare):
        drawn = classes or _timed(without_control(pipe), arm, case.of_class, settings)
        shots[arm.name] = case.asked(drawn)
    for first in {arm.worn: arm for arm in reversed(arms) if not arm.bare}.values():
        with worn(pipe, case, first):
            for arm in (arm for arm in arms if not arm.bare and arm.worn == first.worn):
                shots[arm.name] = _timed(pipe, arm, case, settings)
    return {arm.name: [replace(shot, subject=case.name) for shot in shots[arm.name]] for arm in arms}


def _classes(pipe: DiffusionPipeline, case: Case, comparison: Comparison, settings: Settings) -> list[Any]:
    """The base's pictures of the class, where a metric asks for them."""
    if not comparison.asks_for_class:
        return []
    folder, seeds = class_folder(settings.out, case), settings.measure.seeds
    prompts, guidance = case.of_class.prompts, comparison.bare.guidance
    own = _renewed(settings)
    return draw_shots(without_control(pipe), prompts, seeds, guidance, settings.sampling, folder, None, renewed=own)


def _timed(pipe: DiffusionPipeline, arm: Arm, case: Case, settings: Settings) -> list[Any]:
    place = folder_of(settings.out, case, arm)
    weights = None if arm.bare else f"{digest_of(case.adapter)} {arm.worn}"
    seeds, sampling = settings.measure.seeds, settings.sampling
    shots = draw_shots(
        pipe,
        case.prompts,
        seeds,
        arm.guidance,
        sampling,
        place,
        weights,
        arm=arm.name,
        inputs=case.given,
        renewed=_renewed(settings),
    )
    seconds = sum(shot.seconds for shot in shots) / len(shots)
    say(f"{case.name:>12} {arm.name:>14}: {len(shots)} pictures, {seconds:.2f} s each")
    return shots


def _renewed(settings: Settings) -> Sequence[str]:
    """What this run trained or found itself, in the folder where it draws."""
    out = Path(settings.out).resolve()

    def own(*places: str | None) -> bool:
        return any(out in Path(place).resolve().parents for place in places if place is not None)

    return (*(OWN if own(settings.adapter, settings.controlnet) else ()), *(TUNED if own(settings.tuned) else ()))


def _drift(pipe: DiffusionPipeline, comparison: Comparison, settings: Settings) -> dict[str, float]:
    """Mean distance of the adapter's pictures to the base's, of prompts that do not name the subject."""
    from adapters.measuring.metrics import Drift
    from recipes.common import spaces

    plan, case = settings.measure, comparison.units[0]
    other = replace(case, prompts=list(plan.drift_prompts), conditions={}, targets={}, name=f"{case.name}-unrelated")
    arms = (comparison.baseline, comparison.arm)
    shots = _sample(pipe, other, (comparison.bare, *arms), settings)
    where, features = spaces.looks(plan, pocket=comparison.pocket)
    metric = Drift(name=f"drift ({where})", features=features, base=shots[BASE])
    return {f"drift ({where}) of {arm.name}": float(metric(shots[arm.name]).mean()) for arm in arms}


def main() -> None:
    """An adapter as the first word is one from elsewhere: its config is made here."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        from recipes.common.foreign import words_of

        with exit_on_error(explained):
            sys.argv[1:] = words_of(sys.argv[1:])
    launch(Settings, run)


if __name__ == "__main__":
    main()

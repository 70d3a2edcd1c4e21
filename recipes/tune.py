"""Find the guidance (and the checkpoint) that measures best, on prompts and seeds that the report never sees.

accelerate launch recipes/tune.py --config recipes/configs/measure/pocket_subject.yaml --adapter runs/dog/lora
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes.common import standard
from recipes.common.base import check_text, sampling_pipeline, size_of, without_control
from recipes.common.cli import launch, say
from recipes.common.comparison import Arm, Comparison, digest_of, resolve, worn
from recipes.common.draw import draw_shots, pace
from recipes.common.guidance import guider_of
from recipes.common.search import Search, changes_unet_alone, resolve_search, step_in_manifest
from recipes.common.settings import GuidanceSettings, MeasureSettings, SamplingSettings, TuneSettings
from recipes.common.stages import drawn_by_search, say_drawing, took
from recipes.common.trial import try_candidates
from recipes.common.tuned import TunedArms
from recipes.common.units import Case
from training.config import BaseSettings
from training.progress import Progress

MYPY = False  # see recipes.common.training
if MYPY:
    from diffusers import DiffusionPipeline

    from adapters.measuring.metrics.metric import Metric
    from adapters.measuring.tune import Joint

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Searches for the best guidance, with the same budget for arm and baseline."""

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    adapter: str | None = None
    """Adapter to tune for: folder, hub id or .safetensors. {subject} is replaced by each subject's name."""
    weight: float = 1.0
    """Weight of the adapter. 1: as trained, 0: no effect."""
    controlnet: str | None = None
    """ControlNet: folder, hub id, pocket-canny or pocket-segmentation. Needs tune.targets."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """The comparison that follows. The search does not use its prompts and seeds."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    """What the search tries, and on which prompts."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    dry_run: bool = False
    """Loads and checks everything, then stops."""
    out: str
    """Folder of the run. tuned.json and guider_config.json are written to its subfolder `tuned`."""


def run(settings: Settings) -> Path | None:
    """Tune; returns the folder of what was found, or None after a dry run."""
    with took("tuning", dry=settings.dry_run) as so_far:
        return _tune(settings, so_far)


def _tune(settings: Settings, so_far: Callable[[], float]) -> Path | None:
    from training.ranks import state

    pipe = sampling_pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    size = size_of(pipe, settings.sampling)

    def resolved(plan: MeasureSettings, tune: TuneSettings) -> tuple[Comparison, Search]:
        found = resolve(
            plan,
            base=settings.base,
            adapter=settings.adapter,
            weight=settings.weight,
            controlnet=settings.controlnet,
            size=size,
        )
        alone = changes_unet_alone(found.units[0].adapter)
        return found, resolve_search(tune, found, adapter=settings.adapter, size=size, scopable=alone)

    comparison, search = resolved(settings.measure, settings.tune)
    check_text(pipe, *(case.adapter for case in search.units))
    try_candidates(pipe, search, settings.sampling, weight=settings.weight)
    if settings.dry_run:
        for name, candidates in search.candidates.items():
            say(f"{name}: would try {len(candidates)} candidates on {len(search.prompts)} prompts")
        _would(pipe, search, comparison, settings, so_far())
        return None
    classes = [_classes(pipe, case, comparison, settings) for case in search.units]
    gone = standard.untold(comparison, search.units, classes)
    standard.missing_facts(gone)
    if gone:
        comparison, search = resolved(standard.without(comparison, gone), standard.searched(settings.tune, gone))
    objective = search.objective(classes)
    best_of = partial(_best, pipe, search, objective, settings)
    first = search.checkpoints
    found = {"checkpoint": best_of("checkpoint", first)} if len(first) > 1 else {}
    adapter = found["checkpoint"].best["adapter"] if found else settings.adapter
    for name, candidates in search.candidates.items():
        found[name] = best_of(name, [{**one, "adapter": adapter} for one in candidates])
    signs = _signs(pipe, search, comparison, settings) if "checkpoint" in found else {}
    out = Path(settings.out) / "tuned"
    if state().is_main_process:
        tuned = TunedArms(
            best={name: _guidance(found[name].best) for name in search.candidates},
            adapter=adapter,
            metric=objective.name,
            higher_is_better=objective.higher_is_better,
            references=search.references,
            prompts=search.prompts,
            seeds=settings.tune.seeds,
            rounds={name: item.rounds for name, item in found.items()},
            pictures={name: item.images for name, item in found.items()},
            signs=signs,
            steps=[step_in_manifest(one["adapter"]) for one in first] if "checkpoint" in found else (),
        )
        _write(out, tuned, settings.measure.arm, search.units[0])
        if said := tuned.overfitting():
            say(said)
    state().wait_for_everyone()
    return out


def _would(pipe: Any, search: Search, comparison: Comparison, settings: Settings, loading: float) -> None:
    """A dry run: time and memory are said, by a batch that is tried; `loading` took so many seconds."""
    case, seeds, sampling = search.units[0], settings.tune.seeds, settings.sampling
    guidance = _guidance(search.candidates[comparison.arm.name][0])
    weight = settings.weight if guidance.weight is None else guidance.weight
    with worn(pipe, case, Arm(name="", guidance=guidance, weight=weight)):
        seconds = pace(pipe, case.prompts, seeds, guidance, sampling, inputs=case.given)
    say_drawing(drawn_by_search(search, comparison, seeds), sampling.steps, seconds=seconds, loading=loading)


def _write(out: Path, tuned: TunedArms, arm: str, case: Case) -> None:
    """Write what was found, and the arm's guidance as a file of its own, for a case's subject."""
    import adapters

    with adapters.files.write_folder(out) as stage:
        tuned.write(stage)
        guider = guider_of(tuned.best[arm], case.identifier, case.noun)
        (stage / "guider_config.json").write_text(json.dumps(guider, indent=1), "utf-8")


def _best(
    pipe: DiffusionPipeline,
    search: Search,
    objective: Metric | Joint,
    settings: Settings,
    name: str,
    candidates: list[dict[str, Any]],
) -> Any:
    """The candidate of one arm that measures best over all units."""
    import adapters

    def sample(values: Mapping[str, Any], _: Sequence[str], seeds: Sequence[int]) -> list[Any]:
        return [shot for case in search.units for shot in _try(pipe, case, values, seeds, settings)]

    best = adapters.measuring.tune.search(
        candidates,
        sample,
        objective,
        prompts=search.prompts,
        seeds=settings.tune.seeds,
        held_out_prompts=search.held_out,
        held_out_seeds=settings.measure.seeds,
        progress=Progress(f"tuning {name}", say),
    )
    say(f"{name}: {_words(best.best)}; {len(candidates)} tried, {best.images} pictures")
    if said := adapters.measuring.tune.undecided(best.rounds, higher_is_better=objective.higher_is_better):
        say(f"warning: tuning {name}: {said}. Give it more tune.prompts or tune.seeds, or another tune.metric")
    return best


def _words(values: Mapping[str, Any]) -> str:
    """A candidate in words: what differs from the defaults of a guidance, and which checkpoint."""
    from adapters.measuring.words import scope_words

    plain = asdict(GuidanceSettings())
    shown = {name: value for name, value in values.items() if value != plain.get(name) or name == "guidance_scale"}
    options = shown.pop("options", {})
    scope = scope_words(shown.pop("scope", None) or {})
    if adapter := shown.pop("adapter", None):
        shown["adapter"] = Path(adapter).name
    parts = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in {**shown, **options}.items()
    ]
    return ", ".join([*parts, *scope])


def _classes(pipe: DiffusionPipeline, case: Case, comparison: Comparison, settings: Settings) -> list[Any]:
    """The base's pictures of the class, where a metric asks for them."""
    if not comparison.asks_for_class:
        return []
    prompts, guidance, seeds = case.of_class.prompts, comparison.bare.guidance, settings.tune.seeds
    folder = _folder(settings, {"class": asdict(guidance)}) / case.name
    return draw_shots(without_control(pipe), prompts, seeds, guidance, settings.sampling, folder, None)


def _signs(pipe: Any, search: Search, comparison: Comparison, settings: Settings) -> dict[str, Any]:
    """Signs of overfitting in every checkpoint's pictures of the first round, beside the base's of the same prompts."""
    import numpy as np

    from adapters.measuring import words
    from adapters.measuring.metrics import score
    from adapters.measuring.overfitting import Signs, signs
    from recipes.common import spaces

    where, features = spaces.looks(settings.measure, pocket=comparison.pocket)
    seeds, first = settings.tune.seeds[:1], search.checkpoints[0]
    units = [case for case in search.units if len(case.prompts) > 1]
    if not units:
        return {}
    real = [spaces.shown(case.folder) for case in units]
    bare = [_try(pipe, case, {**first, "adapter": None}, seeds, settings) for case in units]

    def kept(case: Case, shots: Sequence[Any]) -> float | None:
        """The share of the prompts that is kept, where the metric for it is a share."""
        if comparison.accuracy is None or not words.is_share(comparison.accuracy):
            return None
        judge = next(metric for metric in comparison.judges(case) if metric.name == comparison.accuracy)
        return float(np.nanmean(score(judge, shots)))

    def of(one: Mapping[str, Any]) -> dict[str, Any]:
        made = [_try(pipe, case, one, seeds, settings) for case in units]  # they are kept: none is drawn again
        seen = [signs(features, *three) for three in zip(made, bare, real, strict=True)]
        told = [kept(case, shots) for case, shots in zip(units, made, strict=True)]
        return asdict(Signs.mean([replace(one, accuracy=share) for one, share in zip(seen, told, strict=True)]))

    found = {"space": where, "base": of({**first, "adapter": None})}
    return {**found, "checkpoints": [of(one) for one in search.checkpoints]}


def _guidance(values: Mapping[str, Any]) -> GuidanceSettings:
    return GuidanceSettings.of({name: value for name, value in values.items() if name != "adapter"})


def _try(
    pipe: DiffusionPipeline, case: Case, values: Mapping[str, Any], seeds: Sequence[int], settings: Settings
) -> list[Any]:
    guidance, adapter = _guidance(values), values["adapter"]
    path = adapter.replace("{subject}", case.name) if adapter else None
    weight = settings.weight if guidance.weight is None else guidance.weight
    folder = _folder(settings, {**values, "adapter": digest_of(path)}) / case.name
    arm = Arm(name="", guidance=guidance, weight=weight)
    weights = f"{digest_of(path)} {arm.worn}"
    with worn(pipe, replace(case, adapter=path), arm):
        return draw_shots(pipe, case.prompts, seeds, guidance, settings.sampling, folder, weights, inputs=case.given)


def _folder(settings: Settings, drawn: Mapping[str, Any]) -> Path:
    """Pictures of other candidates, or sampled in another way, lie in another folder."""
    label = json.dumps({**drawn, "sampling": asdict(settings.sampling)}, sort_keys=True)
    return Path(settings.out) / "tuning" / hashlib.sha256(label.encode()).hexdigest()[:12]


if __name__ == "__main__":
    launch(Settings, run)

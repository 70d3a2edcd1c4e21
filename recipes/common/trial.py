"""One step of every way to draw that a comparison or a search asks for, before any picture is kept."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common.base import without_control
from recipes.common.cli import named, say
from recipes.common.comparison import Arm, Comparison, worn
from recipes.common.draw import check_drawn, trial
from recipes.common.search import Search
from recipes.common.settings import GuidanceSettings, SamplingSettings
from recipes.common.units import Case

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_pictures", "class_folder", "folder_of", "try_arms", "try_candidates"]


def folder_of(out: str, case: Case, arm: Arm) -> Path:
    """Where the pictures of a unit and an arm lie."""
    from adapters.card import slug

    return Path(out) / "pictures" / case.name / slug(arm.name)


def class_folder(out: str, case: Case) -> Path:
    """Where the base's pictures of a unit's class lie."""
    return Path(out) / "class_pictures" / case.name


def check_pictures(
    pipe: DiffusionPipeline, comparison: Comparison, sampling: SamplingSettings, out: str, *, unknown: Collection[str]
) -> None:
    """Pictures that lie where a comparison draws its own are those of its settings.

    Args:
        pipe: what will draw.
        comparison: its arms and units.
        sampling: as all pictures are drawn.
        out: of the run.
        unknown: see `draw.check_drawn`.

    Raises:
        TrainingError: pictures of other settings lie there, with the arm.
    """
    plain, seeds = without_control(pipe), comparison.plan.seeds
    for case in comparison.units:
        for arm in comparison.arms.values():
            if arm.bare and comparison.asks_for_class:
                continue  # it is made of the pictures below
            own, place = plain if arm.bare else pipe, folder_of(out, case, arm)
            prompts = (case.of_class if arm.bare else case).prompts
            with named(f"measure.arms, {arm.name!r}"):
                check_drawn(own, prompts, seeds, arm.guidance, sampling, place, arm=arm.name, unknown=unknown)
        if comparison.asks_for_class:
            place, prompts = class_folder(out, case), case.of_class.prompts
            check_drawn(plain, prompts, seeds, comparison.bare.guidance, sampling, place, arm="", unknown=unknown)


def try_arms(
    pipe: DiffusionPipeline, comparison: Comparison, sampling: SamplingSettings, out: str, renewed: Collection[str]
) -> None:
    """One step of each arm, on each adapter, and a look at pictures that lie there already.

    Args:
        pipe: of the base, with a ControlNet where there is one.
        comparison: its arms and units.
        sampling: as all pictures are drawn.
        out: of the run.
        renewed: see `draw.draw_shots`.

    Raises:
        TrainingError: what an arm would be refused for when its turn comes, with its name.
    """
    check_pictures(pipe, comparison, sampling, out, unknown=("weights", "precision", *renewed))
    shown = comparison.arm.name if comparison.plan.overlays else ""
    _try(
        pipe,
        (
            (f"measure.arms, {arm.name!r}", case, arm, arm.name == shown)
            for case in _apart(comparison.units)
            for arm in comparison.arms.values()
        ),
        sampling,
    )


def try_candidates(pipe: DiffusionPipeline, search: Search, sampling: SamplingSettings, *, weight: float = 1.0) -> None:
    """One step of each candidate of a search, and of each checkpoint.

    Args:
        pipe: of the base, with a ControlNet where there is one.
        search: its candidates and units.
        sampling: as all pictures are drawn.
        weight: of the adapter, for candidates that say none.

    Raises:
        TrainingError: what a candidate would be refused for when its turn comes.
    """

    def arm(values: dict[str, object]) -> Arm:
        guidance = GuidanceSettings.of({name: value for name, value in values.items() if name != "adapter"})
        return Arm(name="", guidance=guidance, weight=weight if guidance.weight is None else guidance.weight)

    tried = [(f"tune, for {name!r}", None, one) for name, several in search.candidates.items() for one in several]
    tried += [("tune.snapshots", one["adapter"], one) for one in search.checkpoints]
    _try(
        pipe,
        (
            (flag, replace(case, adapter=adapter.replace("{subject}", case.name)) if adapter else case, arm(one), False)
            for case in _apart(search.units)
            for flag, adapter, one in tried
        ),
        sampling,
    )


def _apart(units: Iterable[Case]) -> list[Case]:
    """The first unit of each adapter."""
    first: dict[str | None, Case] = {}
    for case in units:
        first.setdefault(case.adapter, case)
    return list(first.values())


def _try(pipe: DiffusionPipeline, ways: Iterable[tuple[str, Case, Arm, bool]], sampling: SamplingSettings) -> None:
    """Each way once: a guidance at another scale is refused for nothing that the first was not."""
    from scfg.trace import RECORDABLE  # torch: not before the options are known

    seen: set[str] = set()
    for flag, case, arm, shown in ways:
        guidance = asdict(replace(arm.guidance, guidance_scale=2.0))
        key = json.dumps([case.adapter, arm.worn, arm.bare, shown, guidance], sort_keys=True, default=str)
        if key in seen:
            continue
        if not seen:
            say("trying one step of every arm ...")
        seen.add(key)
        asked = case.of_class if arm.bare else case
        own, record = without_control(pipe) if arm.bare else pipe, RECORDABLE if shown else ()
        with named(flag), worn(own, asked, arm):
            trial(own, asked.prompts[0], arm.guidance, sampling, inputs=asked.given, record=record)

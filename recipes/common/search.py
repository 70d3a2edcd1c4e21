"""A search for the guidance, weight and checkpoint that measure best, resolved before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from recipes.common.base import POCKET
from recipes.common.cli import named
from recipes.common.comparison import TO_COME, WHOLE_TO_COME, Comparison, check_scope, whole_network
from recipes.common.prompts import texts
from recipes.common.settings import ScopeSettings, TuneSettings
from recipes.common.units import Case, cases
from training.config import require
from training.errors import TrainingError

__all__ = ["JOINT", "Search", "changes_unet_alone", "combinations", "resolve_search", "step_in_manifest"]

TUNING = 50_000  # so many of the pocket world's held-out scenes are left to reports
JOINT = "joint"
WEIGHTS = (1.0, 0.8, 0.6)  # below its full weight a subject often keeps more of the prompt; ties go to the first
# In the subject's place while the first steps decide the layout: on the pocket base a subject then keeps more of the
# prompt, see benchmarks/study.
PLACED = ScopeSettings(where="subject", where_stop=0.3)
# Real photos of the subjects against each other (DINO, CLIP-I) and Stable Diffusion's DreamBooth against its prompts
# (CLIP-T), all from Ruiz et al. 2023, table 1: what a mean is worth there.
REFERENCES = {"similarity (dino)": 0.774, "similarity (clip)": 0.885, "alignment (clip)": 0.305}


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is tried, on what, and what is maximised."""

    units: Sequence[Case]
    candidates: Mapping[str, list[dict[str, Any]]]
    """Arm -> what is tried for it; baseline and arm have equally many."""
    checkpoints: list[dict[str, Any]]
    """The checkpoints, each with the baseline's guidance, so that the choice does not favour the arm."""
    objective: Callable[[Sequence[Sequence[Any]]], Any]
    """Makes what is maximised, from the base's pictures of every unit's class (empty where none are asked for)."""
    references: Mapping[str, float]
    """Metric -> what its mean is divided by, where the objective is joint."""
    held_out: Sequence[str]
    """Prompts of the report."""

    @property
    def prompts(self) -> list[str]:
        """Those of all units."""
        return [prompt for case in self.units for prompt in case.prompts]


def resolve_search(
    search: TuneSettings,
    comparison: Comparison,
    *,
    adapter: str | None = None,
    size: tuple[int, int] | None = None,
    scopable: bool = True,
) -> Search:
    """The search that the settings describe, for a comparison to come.

    Args:
        search: candidates, prompts and objective.
        comparison: which the winner goes into; its prompts are held out.
        adapter: what is tuned for; `TO_COME` where it is yet to be trained.
        size: see `comparison.resolve`.
        scopable: whether the adapter can have a scope, see `changes_unet_alone`; settings that ask for one ask anyway.

    Raises:
        TrainingError: anything that the search would lack later, with the flag.
    """
    from recipes.common import metrics

    held = set(comparison.prompts)
    units = _units(search, comparison, held, size)
    for case in units:
        require(bool(case.prompts), "tune has no prompts; set tune.prompts, tune.prompt_file or tune.targets")
        for prompt in case.prompts:
            require(prompt not in held, f"tune.prompts: {prompt!r} is held out for the report and cannot be tuned on")
            for name in comparison.higher_is_better:
                with named("tune.prompts"):
                    metrics.applies_to(name, case, prompt)
    shared = sorted(set(search.seeds) & set(comparison.plan.seeds))
    require(not shared, f"tune.seeds: {shared[:1]} is held out for the report and cannot be tuned on")
    wanted = search.metric or (JOINT if comparison.identity else comparison.primary)
    references = _references(search, comparison) if wanted == JOINT else {}
    require(
        wanted == JOINT or wanted in comparison.higher_is_better,
        f"tune.metric {wanted!r} is none of {JOINT}, {', '.join(comparison.higher_is_better)}",
    )
    kind = whole_network(units[0].adapter)
    for weight in search.weights or ():
        require(kind is None or weight == 1, f"tune.weights {weight:g}: a whole {kind} has no weight; leave it at 1")
    scalable = wanted == JOINT and adapter is not None and kind is None
    weights = search.weights or (WEIGHTS if scalable else (1.0,))
    scopes = _scopes(search, comparison, units, adapter if scopable and kind is None else None)
    names = (comparison.plan.baseline, comparison.plan.arm)
    return Search(
        units=units,
        candidates={name: _candidates(search, comparison, name, weights, scopes, adapter) for name in names},
        checkpoints=_checkpoints(search, comparison, adapter),
        objective=partial(_objective, units, comparison, wanted, references),
        references=references,
        held_out=comparison.prompts,
    )


def _units(search: TuneSettings, comparison: Comparison, held: set[str], size: tuple[int, int] | None) -> list[Case]:
    """What is tuned on: every subject with the search's prompts, its prompts alone, or its own targets."""
    plan = comparison.plan
    require(
        (plan.targets is None) == (search.targets is None),
        "controlnet, measure.targets and tune.targets belong together: the network, and what its conditions are made "
        "from in the report and in the search",
    )
    if search.targets is None:
        return [
            replace(case, prompts=texts(search.prompts, search.prompt_file, name=case.calls))
            for case in comparison.units
        ]
    skip = TUNING if search.targets == POCKET else None
    more = replace(plan, targets=search.targets, limit=search.limit, skip=skip)
    first = comparison.units[0]
    case = cases(more, first.adapter, size=size, edges=first.edges)[0]
    return [replace(case, prompts=[prompt for prompt in case.prompts if prompt not in held])]


def _references(search: TuneSettings, comparison: Comparison) -> dict[str, float]:
    """What the two metrics of the joint one are divided by."""
    identity, accuracy, up = comparison.identity, comparison.accuracy, comparison.higher_is_better
    require(
        identity is not None and accuracy is not None,
        "tune.metric joint needs a subject, and metrics for it and for its prompts: see measure.identity and accuracy",
    )
    assert identity is not None
    assert accuracy is not None
    given = search.references or {}
    for name in given:
        require(name in (identity, accuracy), f"tune.references: {name!r} is neither {identity!r} nor {accuracy!r}")
    for name in (identity, accuracy):
        require(up[name], f"tune.metric joint: of {name!r} less is better; name others in measure.identity, accuracy")
    return {name: given.get(name, REFERENCES.get(name, 1.0)) for name in (identity, accuracy)}


def _scopes(
    search: TuneSettings, comparison: Comparison, units: Sequence[Case], adapter: str | None
) -> list[ScopeSettings | None]:
    """What is tried for the arm: as the settings say; by default a subject's LoRA everywhere, and in its place.

    Without an adapter that can have a scope there is no default.
    """
    arm = comparison.plan.arms[comparison.plan.arm]
    own = [arm.scope]
    if search.scopes is not None:
        return search.scopes or own
    # Without two scales to lie between, the baseline could not have as many candidates.
    several = min(search.guidance_scales) < max(search.guidance_scales)
    if arm.method != "semantic" or arm.scope is not None or not several:
        return own
    try:
        for cases_of in (comparison.units, units):
            check_scope("tune.scopes", PLACED, 1.0, cases_of, adapter)
    except TrainingError:  # there is no subject, or a prompt does not name it
        return own
    return [None, PLACED]


def changes_unet_alone(adapter: str | None) -> bool:
    """Whether it is a LoRA, or one of its kind, that single steps of sampling can have or not have.

    Args:
        adapter: folder, hub id or file; None: there is none.
    """
    import adapters

    if adapter is None or whole_network(adapter) is not None:
        return False
    found = adapters.source.read_adapter(adapters.source.open_source(adapter))
    return found.merges_only is None and all(name.startswith("unet.") for name in found.modules)


def _candidates(
    search: TuneSettings,
    comparison: Comparison,
    name: str,
    weights: Sequence[float],
    scopes: list[ScopeSettings | None],
    adapter: str | None,
) -> list[dict[str, Any]]:
    """Every combination that is tried for one arm; the baseline gets as many as the arm does, by finer scales.

    The arm's own scale comes first: it is taken where the search cannot tell the candidates apart.
    """
    from recipes.common.guidance import guidance_of, guider_of

    arm = comparison.plan.arms[name]
    grid, scales = combinations(search), list(search.guidance_scales)
    if name == comparison.plan.baseline:  # grid and scopes are the arm's alone
        if len(grid) * len(scopes) > 1:
            low, high, count = min(scales), max(scales), len(scales) * len(grid) * len(scopes)
            scales = [round(low + (high - low) * i / (count - 1), 3) for i in range(count)]
        grid, scopes = [{}], [arm.scope]
    scales = sorted(scales, key=lambda scale: scale != arm.guidance_scale)  # of equals the first is taken
    tried = [
        replace(arm, guidance_scale=scale, options={**arm.options, **more}, weight=weight, scope=scope)
        for weight in weights
        for scale in scales
        for scope in scopes
        for more in grid
    ]
    for guidance in tried:
        where = guidance.scope.where if guidance.scope else None
        require(
            where in (None, "subject") or not search.scopes,
            f"tune.scopes: where {where} is a control of a comparison; search for subject, or for null",
        )
        check_scope("tune.scopes", guidance.scope, guidance.weight or 0.0, comparison.units, adapter)
        with named(f"tune.grid, for {name!r}"):
            guidance_of(guidance)
        if name == comparison.plan.arm:  # what is found is written as it would ship
            with named(f"measure.arms, {name!r}"):
                guider_of(guidance, comparison.units[0].identifier, comparison.units[0].noun)
    return [asdict(guidance) for guidance in tried]


def combinations(search: TuneSettings) -> list[dict[str, Any]]:
    """Every combination of the further options that are tried; one without any where there is no grid."""
    return [dict(zip(search.grid, values, strict=True)) for values in product(*search.grid.values())]


def _checkpoints(search: TuneSettings, comparison: Comparison, adapter: str | None) -> list[dict[str, Any]]:
    """The earlier checkpoints, where the training kept some, and the adapter; so ties go to what was trained least."""
    if adapter in (None, TO_COME, WHOLE_TO_COME):
        require(
            adapter is None or search.snapshots is None or any(Path(search.snapshots).glob("step-*")),
            f"tune.snapshots: no step-* folders in {search.snapshots}; leave it out to choose from this training's own",
        )
        return []
    assert adapter is not None
    beside = Path(search.snapshots or Path(adapter).parent / "snapshots")
    folders = [str(folder) for folder in sorted(beside.glob("step-*"))]
    require(bool(folders) or search.snapshots is None, f"tune.snapshots: no step-* folders in {search.snapshots}")
    last = step_in_manifest(adapter)
    # A snapshot of the last step is the adapter once more.
    folders = [folder for folder in folders if last is None or step_in_manifest(folder) != last]
    plan = comparison.plan
    plain = plan.arms[plan.baseline]
    guidance = asdict(replace(plain, guidance_scale=plan.guidance_scale or plain.guidance_scale))
    return [{**guidance, "adapter": one} for one in (*folders, adapter)]


def step_in_manifest(folder: str) -> int | None:
    """The step of training that a checkpoint is of, by its manifest; None where that is not known."""
    from adapters import FileError, files

    try:
        step = files.read_manifest(Path(folder)).get("step")
    except (FileError, OSError):
        return None
    return step if isinstance(step, int) else None


def _objective(
    units: Sequence[Case],
    comparison: Comparison,
    wanted: str,
    references: Mapping[str, float],
    classes: Sequence[Sequence[Any]],
) -> Any:
    """What is maximised, over all units: one metric, or the harmonic mean of several."""
    from adapters.measuring.tune import Joint

    known = [
        {metric.name: metric for metric in comparison.judges(case, classes=own)}
        for case, own in zip(units, classes, strict=True)
    ]
    if wanted == JOINT:
        return Joint(metrics=[_over(units, known, name) for name in references], references=references)
    return _over(units, known, wanted)


def _over(units: Sequence[Case], known: Sequence[Mapping[str, Any]], name: str) -> Any:
    """A metric over all units: each picture by its own unit's, the shots being in the units' order."""
    from adapters.measuring.metrics import Measure, score

    def measure(shots: Sequence[Any]) -> list[float]:
        seeds = len(shots) // sum(len(case.prompts) for case in units)
        values: list[float] = []
        for case, metrics in zip(units, known, strict=True):
            own = shots[len(values) :][: seeds * len(case.prompts)]
            values += score(metrics[name], own).tolist()
        return values

    return Measure(name, known[0][name].higher_is_better, measure)

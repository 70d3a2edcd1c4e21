"""One comparison, resolved before anything is drawn or trained: arms, units, metrics, and what decides.

`resolve` is where all that can be wrong with it is found: a dry run, a training and a measurement start with it, and
what they are handed afterwards are values that were checked, not settings to interpret again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.base import POCKET, adapted, edges_of, pipeline_arguments
from recipes.common.cli import named
from recipes.common.settings import GuidanceSettings, MeasureSettings, ScopeSettings
from recipes.common.tuned import TunedArms
from recipes.common.units import Case, cases
from training.config import BaseSettings, require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "BASE",
    "TO_COME",
    "WHOLE_TO_COME",
    "Arm",
    "Comparison",
    "check_scope",
    "digest_of",
    "resolve",
    "whole_network",
    "worn",
]

BASE = "base"
TO_COME = "(to be trained)"
"""Stands for an adapter or ControlNet that this run has yet to train."""
WHOLE_TO_COME = "(a whole network, to be trained)"
"""The same for what replaces the U-net, and so has no weight."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to sample, with nothing left to fill in."""

    name: str
    guidance: GuidanceSettings
    weight: float
    """Scale of the adapter's change."""
    bare: bool = False
    """The base alone, without adapter and ControlNet."""

    @property
    def plain(self) -> bool:
        """Plain CFG on the adapted model: what any other guidance has to beat, at whatever scale and weight."""
        own = self.guidance
        return own.method == "cfg" and not self.bare and own.rescale is None and own.scope is None

    @property
    def worn(self) -> str:
        """How the adapter sits on the base, as text: its weight, and its scope where it has one."""
        scope = self.guidance.scope
        return f"{self.weight:g}" if scope is None else f"{self.weight:g} {json.dumps(asdict(scope))}"

    def beside(self, other: Arm) -> bool:
        """Whether both are one method at two scales: points of the same curve."""
        alike = replace(self.guidance, guidance_scale=other.guidance.guidance_scale) == other.guidance
        return alike and (self.weight, self.bare) == (other.weight, other.bare)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is drawn, how it is judged, and what decides."""

    plan: MeasureSettings
    pocket: bool
    """Whether the base is the embedded one, which comes with a judge."""
    arms: Mapping[str, Arm]
    """By name, in the order of the tables: the base first, where it is drawn."""
    units: Sequence[Case]
    higher_is_better: Mapping[str, bool]
    """The metrics by name, in their order, but those of `preferences`."""
    preferences: Sequence[str]
    """Metrics that stronger guidance raises by itself: told at equal effective scale only."""
    primary: str
    identity: str | None
    """The metric that says whether it is this subject; null: there is no subject, or no such metric."""
    accuracy: str | None
    """The metric that says how far the prompt is kept; null likewise."""
    adapted: bool
    """Whether an adapter or a ControlNet stands on the base."""
    tuned: TunedArms | None = None

    @property
    def arm(self) -> Arm:
        """The arm that the guidance's verdict is about."""
        return self.arms[self.plan.arm]

    @property
    def baseline(self) -> Arm:
        """The arm that it is compared with."""
        return self.arms[self.plan.baseline]

    @property
    def prompts(self) -> list[str]:
        """Those of all units."""
        return [prompt for case in self.units for prompt in case.prompts]

    @property
    def sweeps(self) -> dict[str, dict[str, str]]:
        """Curve -> guidance scale -> arm, for baseline and arm, where there are two scales at least."""
        curves = {}
        for own in (self.baseline, self.arm):
            points = {f"{own.guidance.guidance_scale:g}": own.name}
            for arm in self.arms.values():
                if arm.beside(own):
                    points.setdefault(f"{arm.guidance.guidance_scale:g}", arm.name)
            curves[own.name] = points
        return curves if any(len(points) > 1 for points in curves.values()) else {}

    @property
    def bare(self) -> Arm:
        """The base alone, with plain guidance at the baseline's scale."""
        return _bare(self.baseline)

    @property
    def asks_for_class(self) -> bool:
        """Whether a metric holds pictures against what the base draws of the class."""
        return any(name.startswith("identity") for name in self.higher_is_better)

    def judges(self, case: Case, base: Sequence[Any] = (), classes: Sequence[Any] = ()) -> list[Any]:
        """The metrics of one unit.

        Args:
            case: the unit.
            base: the base's own pictures of its prompts, for drift.
            classes: the base's pictures of the class, of the same prompts without the identifier, for identity.
        """
        from recipes.common import metrics

        return metrics.make_metrics(self.plan, case, pocket=self.pocket, base=base, classes=classes)

    def design(self) -> Any:
        """The same as `adapters` is told it."""
        import adapters

        plan = self.plan
        return adapters.Design(
            arm=plan.arm,
            baseline=plan.baseline,
            primary=self.primary,
            referee=plan.referee,
            minimum_effect=plan.minimum_effect,
            higher_is_better=dict(self.higher_is_better),
            base=BASE if self.adapted and BASE in self.arms else None,
            identity=self.identity,
            accuracy=self.accuracy,
            tolerance=plan.tolerance,
            plain=[arm.name for arm in self.arms.values() if arm.plain and arm.name != plan.baseline],
            sweeps=self.sweeps,
            notes={
                "held out": "prompts and seeds were neither trained nor tuned on",
                **({"only at equal effective scale": list(self.preferences)} if self.preferences else {}),
                "guidance": {arm.name: asdict(arm.guidance) for arm in self.arms.values() if not arm.bare},
            },
        )


def resolve(
    plan: MeasureSettings,
    *,
    base: BaseSettings,
    adapter: str | None = None,
    weight: float = 1.0,
    controlnet: str | None = None,
    tuned: str | None = None,
    size: tuple[int, int] | None = None,
) -> Comparison:
    """The comparison that the settings describe.

    Args:
        plan: arms, units, metrics and what decides.
        base: the base model.
        adapter: what stands on the base; `TO_COME` or `WHOLE_TO_COME` where it is yet to be trained.
        weight: of the adapter, in arms that have none of their own.
        controlnet: folder or hub id of the ControlNet, or `TO_COME`.
        tuned: folder that recipes/tune.py wrote; it replaces the guidance of the arms it tuned.
        size: (width, height) that targets and their conditions are cut to; null: each its own.

    Raises:
        TrainingError: anything that the comparison would lack later, with the flag and the arm.
    """
    from recipes.common import metrics

    require(
        (controlnet is None) == (plan.targets is None),
        "controlnet and measure.targets belong together: the network, and what its conditions are made from",
    )
    require(adapter is not None or not plan.weights, "measure.weights are those of an adapter, and there is none")
    pocket, found = base.path == POCKET, None if tuned is None else TunedArms.read(tuned)
    arms = _arms(plan, weight, found)
    _check_arms(arms, base, controlnet)
    edges = edges_of(controlnet) if controlnet and controlnet != TO_COME else None
    units = cases(plan, adapter, size=size, edges=edges)
    _check_called(units)
    require(sum(len(case.prompts) for case in units) >= 2, "a comparison needs at least two prompts or targets")
    if found is not None:
        _check_held_out(plan, units, found)
    _check_scopes(arms, units, adapter)
    up, preferences = _deciding(plan, metrics.check_metrics(plan, units, pocket=pocket))
    identity, accuracy = metrics.of_subject(plan, list(up))
    for case in units:
        _check_there(case.adapter, arms)
    return Comparison(
        plan=plan,
        pocket=pocket,
        arms=arms,
        units=units,
        higher_is_better=up,
        preferences=preferences,
        primary=plan.primary or next(iter(up)),
        identity=identity,
        accuracy=accuracy,
        adapted=adapter is not None or controlnet is not None,
        tuned=found,
    )


def _deciding(plan: MeasureSettings, known: Mapping[str, bool]) -> tuple[dict[str, bool], list[str]]:
    """The metrics that may decide, each with whether higher is better, and the preferences among `known`."""
    from recipes.common.metrics import PREFERENCE

    preferences = [name for name in known if name == PREFERENCE]
    up = {name: better for name, better in known.items() if name not in preferences}
    require(bool(up), f"measure.metrics: {', '.join(preferences)} cannot decide; name another metric beside it")
    for flag in ("primary", "referee", "identity", "accuracy"):
        name = getattr(plan, flag)
        require(name is None or name in up, f"measure.{flag} {name!r} is none of the metrics {', '.join(up)}")
    primary = plan.primary or next(iter(up))
    require(plan.referee != primary, f"measure.referee {plan.referee!r} is the primary metric itself; name another")
    return up, preferences


# ---------------------------------------------------------------------------------------------- arms


def _arms(plan: MeasureSettings, weight: float, tuned: TunedArms | None) -> dict[str, Arm]:
    """The base, the plan's arms at its scale, the tuned ones as they were found, and those of the sweep."""
    guidances = {
        name: replace(arm, guidance_scale=plan.guidance_scale or arm.guidance_scale) for name, arm in plan.arms.items()
    }
    if tuned is not None:
        known = {name: guidance for name, guidance in tuned.best.items() if name in guidances}
        require(
            plan.arm in known or plan.baseline in known,
            f"tuned: the search was for {', '.join(tuned.best)}, and neither measure.arm nor measure.baseline is one",
        )
        apart = [replace(guidances[name], scope=None) for name in (plan.arm, plan.baseline)]
        guidances |= known
        # A control arm differs from the tuned one in its method alone.
        guidances |= {
            name: replace(guidances[plan.arm], method=arm.method)
            for name, arm in guidances.items()
            if name not in known and arm.method in ("dose", "placebo", "pointwise")
        }
        # An arm with another scope, or with none, differs from the tuned one of its method in the scope alone.
        best = {guidances[name].method: guidances[name] for name in (plan.arm, plan.baseline)}
        guidances |= {
            name: replace(best[arm.method], scope=arm.scope)
            for name, arm in guidances.items()
            if name not in known and arm.method in best and (arm.scope is not None or arm in apart)
        }
    for name in (plan.baseline, plan.arm):
        own = guidances[name]
        guidances |= {
            f"{name} @ {scale:g}": replace(own, guidance_scale=scale)
            for scale in plan.sweep
            if scale != own.guidance_scale
        }
    own = guidances[plan.baseline]
    for scale in dict.fromkeys((own.guidance_scale, *plan.sweep)):
        name = plan.baseline if scale == own.guidance_scale else f"{plan.baseline} @ {scale:g}"
        guidances |= {
            f"{name}, weight {value:g}": replace(own, guidance_scale=scale, weight=value)
            for value in plan.weights or ()
        }
    filled = {
        name: replace(guidance, weight=weight if guidance.weight is None else guidance.weight)
        for name, guidance in guidances.items()
    }
    arms = {name: Arm(name=name, guidance=guidance, weight=guidance.weight or 0.0) for name, guidance in filled.items()}
    return {**({BASE: _bare(arms[plan.baseline])} if plan.base_arm and BASE not in arms else {}), **arms}


def _bare(baseline: Arm) -> Arm:
    return Arm(
        name=BASE, guidance=replace(baseline.guidance, method="cfg", options={}, scope=None), weight=0.0, bare=True
    )


def _check_arms(arms: Mapping[str, Arm], base: BaseSettings, controlnet: str | None) -> None:
    """Every arm is a guidance that its pipeline takes, and has a folder of pictures to itself."""
    from adapters.card import slug
    from recipes.common.guidance import guidance_of

    folders: dict[str, str] = {}
    for arm in arms.values():
        flag = f"measure.arms, {arm.name!r}"
        other = folders.setdefault(slug(arm.name), arm.name)
        require(other == arm.name, f"{flag}: its pictures would lie where those of {other!r} do; give it another name")
        require(arm.name != BASE or arm.bare, f"{flag}: this is the name of the base without adapter; give it another")
        with named(flag):
            guidance_of(arm.guidance)
        if arm.guidance.rescale is not None:
            kind, taken = pipeline_arguments(base, controlnet=controlnet)
            require(
                "guidance_rescale" in taken, f"{flag}: rescale {arm.guidance.rescale}: {kind} has none; set it to null"
            )


def _check_scopes(arms: Mapping[str, Arm], units: Sequence[Case], adapter: str | None) -> None:
    """What a scope cannot do is said before anything is drawn."""
    for arm in arms.values():
        if not arm.bare:
            check_scope(f"measure.arms, {arm.name!r}: scope", arm.guidance.scope, arm.weight, units, adapter)


def check_scope(
    flag: str, scope: ScopeSettings | None, weight: float, units: Sequence[Case], adapter: str | None
) -> None:
    """Whether a scope can be of this adapter at this weight.

    Args:
        flag: the setting that holds it, for the message.
        scope: null fits everything.
        weight: the adapter's.
        units: whose subject `where` looks for.
        adapter: null where there is none.

    Raises:
        TrainingError: it cannot.
    """
    if scope is None:
        return
    require(adapter is not None, f"{flag}: there is no adapter that it could be of; set adapter, or scope to null")
    for name, part in (("uncond_weight", scope.uncond_weight), ("early_weight", scope.early_weight)):
        require(part is None or part <= weight, f"{flag}.{name} {part} is above the adapter's weight {weight:g}")
        require(
            part in (None, 0, 1) or whole_network(units[0].adapter) is None,
            f"{flag}.{name} {part}: a whole network has no weights between 0 and 1",
        )
    if scope.where is None:
        return
    for case in units:
        require(bool(case.identifier), f"{flag}.where {scope.where}: no subject is given; set measure.subjects")
        words = _words(case.noun)
        for prompt in case.prompts:
            require(
                bool(words & _words(prompt)),
                f"{flag}.where {scope.where}: the class {case.noun!r} is not in the prompt {prompt!r}, so its place "
                "cannot be found",
            )


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _check_held_out(plan: MeasureSettings, units: Sequence[Case], tuned: TunedArms) -> None:
    """A report on what was tuned on would flatter whatever was tuned."""
    prompts = {prompt for case in units for prompt in case.prompts}
    for flag, shared in (
        ("measure.prompts", sorted(prompts & set(tuned.prompts))),
        ("measure.seeds", sorted(set(plan.seeds) & set(tuned.seeds))),
    ):
        require(not shared, f"{flag}: {shared[:1]} was tuned on and cannot be reported on; hold others out")


def _check_called(units: Sequence[Case]) -> None:
    """Subjects of one adapter are asked for by words of their own."""
    called: dict[tuple[str | None, str], str] = {}
    for case in units:
        first = called.setdefault((case.adapter, case.calls), case.name)
        require(
            first == case.name or case.adapter is None,
            f"measure.subjects: {first} and {case.name} are both called {case.calls!r}, and one adapter serves both; "
            "give one of them another identifier in its subject.json, or each an adapter ({subject} in its path)",
        )


def _check_there(adapter: str | None, arms: Mapping[str, Arm]) -> None:
    """The adapter is there, and can be put on at the weight of every arm."""
    kind = whole_network(adapter)
    for arm in arms.values():
        require(
            kind is None or arm.bare or arm.weight == 1,
            f"measure.arms, {arm.name!r}: weight {arm.weight:g}: a whole {kind} has no weight; leave it at 1",
        )


def worn(pipe: DiffusionPipeline, case: Case, arm: Arm) -> AbstractContextManager[Any]:
    """The unit's adapter on the pipeline, as the arm has it.

    Args:
        pipe: which the adapter is put on.
        case: whose adapter it is.
        arm: its weight and scope.
    """
    subject = {"identifier": case.identifier, "noun": case.noun}
    return adapted(pipe, case.adapter, arm.weight, scope=arm.guidance.scope, **subject)


def whole_network(adapter: str | None) -> str | None:
    """`unet` or `controlnet` where the adapter is a whole network, which has no weight.

    Raises:
        TrainingError: there is no such adapter.
    """
    import adapters

    if adapter is None or adapter == TO_COME:
        return None
    if adapter == WHOLE_TO_COME:
        return "unet"
    with named("adapter"):
        return adapters.source.whole_model(adapters.source.open_source(adapter))


def digest_of(adapter: str | None) -> str:
    """What tells one adapter's pictures from another's: the bytes of its weights, wherever they lie."""
    from adapters.files import opened

    if adapter is None:
        return "none"
    path = Path(adapter)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) if path.is_dir() else []
    if not files:
        return adapter
    digest = hashlib.sha256()
    for file in files:
        with opened(file) as data:
            while block := data.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]

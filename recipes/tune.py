"""Find the guidance (and the checkpoint) that measures best, on prompts and seeds that the report never sees.

accelerate launch recipes/tune.py --config recipes/configs/measure/pocket_subject.yaml --adapter runs/dog/lora
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from recipes.common.base import POCKET, adapted, pipeline, size_of
from recipes.common.cli import launch, say
from recipes.common.comparison import digest_of
from recipes.common.draw import draw
from recipes.common.guidance import guider_of
from recipes.common.prompts import texts
from recipes.common.settings import GuidanceSettings, MeasureSettings, SamplingSettings, TuneSettings
from recipes.common.units import Case, cases
from training.config import BaseSettings, require

__all__ = ["Settings", "chosen", "run"]

TUNING = 50_000  # so many of the pocket world's held-out scenes are left to reports


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A search with the same budget for arm and baseline of the comparison to come."""

    base: BaseSettings
    """The base model; `path: pocket` is the embedded one."""
    adapter: str | None = None
    """What is tuned for; see recipes/measure.py."""
    weight: float = 1.0
    """Scale of the adapter's change."""
    controlnet: str | None = None
    """See recipes/measure.py; needs tune.targets."""
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    """The comparison to come: its prompts and seeds are kept out of the search."""
    tune: TuneSettings = field(default_factory=TuneSettings)
    """The search."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    out: str
    """Folder of `tuned/`: tuned.json and guider_config.json."""


def run(settings: Settings) -> Path:
    """Tune; returns the folder of what was found."""
    import adapters
    from training.ranks import state

    plan, search = settings.measure, settings.tune
    pipe = pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    size = size_of(pipe, settings.sampling)
    held = [prompt for case in cases(plan, settings.adapter, size=size) for prompt in case.prompts]
    units = _units(settings, set(held), size)
    prompts = [prompt for case in units for prompt in case.prompts]
    objective = _objective(units, settings)

    def best_of(name: str, candidates: list[dict[str, Any]]) -> Any:
        best = adapters.measuring.tune.search(
            candidates,
            lambda values, _, seeds: [shot for case in units for shot in _try(pipe, case, values, seeds, settings)],
            objective,
            prompts=prompts,
            seeds=search.seeds,
            held_out_prompts=held,
            held_out_seeds=plan.seeds,
        )
        say(f"{name}: {best.best} of {len(candidates)} tried, {best.images} pictures")
        return best

    folders = _snapshots(settings)
    found = {"checkpoint": best_of("checkpoint", _checkpoints(settings, folders))} if len(folders) > 1 else {}
    adapter = found["checkpoint"].best["adapter"] if found else settings.adapter
    found |= {name: best_of(name, _candidates(settings, name, adapter)) for name in (plan.baseline, plan.arm)}
    out = Path(settings.out) / "tuned"
    if state().is_main_process:
        with adapters.files.write_folder(out) as stage:
            record = {
                "metric": objective.name,
                "higher is better": objective.higher_is_better,
                "best": {name: _without_adapter(found[name].best) for name in (plan.baseline, plan.arm)},
                "adapter": adapter,
                "prompts": prompts,
                "seeds": search.seeds,
                "rounds": {name: item.rounds for name, item in found.items()},
                "pictures": {name: item.images for name, item in found.items()},
            }
            (stage / "tuned.json").write_text(json.dumps(record, indent=1), "utf-8")
            winner = GuidanceSettings(**_without_adapter(found[plan.arm].best))
            guider = guider_of(winner)
            (stage / "guider_config.json").write_text(json.dumps(guider, indent=1), "utf-8")
    state().wait_for_everyone()
    return out


def chosen(tuned: Path) -> str | None:
    """The adapter, or its checkpoint, that measured best; null where none was tuned."""
    return json.loads((tuned / "tuned.json").read_text("utf-8"))["adapter"]


def _units(settings: Settings, held: Set[str], size: tuple[int, int] | None) -> list[Case]:
    """What is tuned on: every subject with the search's prompts, its prompts alone, or its own targets."""
    plan, search = settings.measure, settings.tune
    require(
        (plan.targets is None) == (search.targets is None) == (settings.controlnet is None),
        "controlnet, measure.targets and tune.targets belong together: the network, and what its conditions are made "
        "from in the report and in the search",
    )
    if search.targets is None:
        found = cases(plan, settings.adapter, size=size)
        return [replace(case, prompts=texts(search.prompts, search.prompt_file, name=case.calls)) for case in found]
    skip = TUNING if search.targets == POCKET else None
    case = cases(replace(plan, targets=search.targets, limit=search.limit, skip=skip), settings.adapter, size=size)[0]
    return [replace(case, prompts=[prompt for prompt in case.prompts if prompt not in held])]


def _objective(units: Sequence[Case], settings: Settings) -> Any:
    """What is maximised, over all units: each picture by its own unit's metric, the shots being in the units' order."""
    from adapters.measuring.metrics import Measure, score
    from recipes.common import metrics as metrics_by_name

    plan, pocket = settings.measure, settings.base.path == POCKET
    known = [{metric.name: metric for metric in metrics_by_name.metrics(plan, case, pocket=pocket)} for case in units]
    wanted = settings.tune.metric or plan.primary or next(iter(known[0]))
    require(wanted in known[0], f"tune.metric {wanted!r} is none of {', '.join(known[0])}")

    def measure(shots: Sequence[Any]) -> list[float]:
        seeds = len(shots) // sum(len(case.prompts) for case in units)
        values: list[float] = []
        for case, metrics in zip(units, known, strict=True):
            own = shots[len(values) :][: seeds * len(case.prompts)]
            values += score(metrics[wanted], own).tolist()
        return values

    return Measure(wanted, known[0][wanted].higher_is_better, measure)


def _checkpoints(settings: Settings, folders: Sequence[str]) -> list[dict[str, Any]]:
    """The checkpoints with the baseline's guidance, so that the choice does not favour the arm."""
    plain = settings.measure.arms[settings.measure.baseline]
    return [{**asdict(replace(plain, scale=settings.measure.scale or plain.scale)), "adapter": one} for one in folders]


def _candidates(settings: Settings, name: str, adapter: str | None) -> list[dict[str, Any]]:
    """Every combination that is tried for one arm; the baseline gets as many as the arm does, by finer scales."""
    plan, search = settings.measure, settings.tune
    arm = plan.arms[name]
    grid = [dict(zip(search.grid, values, strict=True)) for values in product(*search.grid.values())]
    scales = list(search.scales)
    if name == plan.baseline:  # the grid is the arm's alone
        if len(grid) > 1:
            low, high, count = min(scales), max(scales), len(scales) * len(grid)
            scales = [round(low + (high - low) * i / (count - 1), 3) for i in range(count)]
        grid = [{}]
    return [
        {**asdict(replace(arm, scale=scale, options={**arm.options, **more}, weight=weight)), "adapter": adapter}
        for weight in search.weights
        for scale in scales
        for more in grid
    ]


def _snapshots(settings: Settings) -> list[str]:
    """The adapter and its earlier checkpoints, where the training kept some."""
    if settings.adapter is None:
        return []
    beside = Path(settings.tune.snapshots or Path(settings.adapter).parent / "snapshots")
    return [*(str(folder) for folder in sorted(beside.glob("step-*"))), settings.adapter]


def _without_adapter(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "adapter"}


def _try(pipe: Any, case: Case, values: Mapping[str, Any], seeds: Sequence[int], settings: Settings) -> list[Any]:
    guidance, adapter = GuidanceSettings(**_without_adapter(values)), values["adapter"]
    path = adapter.replace("{subject}", case.name) if adapter else None
    weight = settings.weight if guidance.weight is None else guidance.weight
    label = json.dumps({**values, "adapter": digest_of(path)}, sort_keys=True)
    folder = Path(settings.out) / "tuning" / _short(label) / case.name
    weights = f"{digest_of(path)} {weight:g}"
    with adapted(pipe, path, weight):
        return draw(pipe, case.prompts, seeds, guidance, settings.sampling, folder, weights, inputs=case.given)


def _short(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()[:12]


if __name__ == "__main__":
    launch(Settings, run)

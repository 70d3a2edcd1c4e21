"""What a run will take, stage by stage: counts from the settings, seconds from a trial; and what it took."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from recipes.common.cli import say
from training.progress import duration

if TYPE_CHECKING:
    from recipes.common.comparison import Comparison
    from recipes.common.search import Search
    from recipes.common.settings import GuidanceSettings
    from recipes.common.training import Training
    from training.estimate import Estimate

__all__ = [
    "Drawing",
    "Stage",
    "drawn_by_measure",
    "drawn_by_search",
    "say_drawing",
    "span",
    "stages",
    "stages_table",
    "took",
]

LOW, HIGH = 0.7, 1.6  # of an estimate, which a busy machine and other batch sizes move
SHIPPING = 5.0  # seconds: files are written and hashed
SCORING = 0.03  # seconds of a picture's metrics and its file, as seen on the pocket base
OVERLAY = 1.5  # seconds of the regions and gamma of a pair in the report, beside the picture that is drawn for them
BESIDE = {"tuning": 0.1, "measuring": 0.2}  # GiB of metrics and pictures beside what draws, as seen on the pocket base
NOTHING, CLASSES = "nothing to do", "class pictures"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row."""

    name: str
    what: str
    seconds: float
    memory: int
    """Peak of the process, bytes."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """The pictures of a stage, counted from its settings."""

    name: str
    what: str
    pictures: int
    overlays: int = 0
    """Pairs of the report for which a picture is drawn once more."""
    passes: float = 1.0
    """Passes through the U-net for a picture, against one in which no scope looks for a place."""

    def stage(self, steps: int, *, seconds: float, memory: int, loading: float = 0.0) -> Stage:
        """Its row.

        Args:
            steps: of a picture.
            seconds: of a picture of one pass.
            memory: peak of the process, bytes.
            loading: seconds until the first picture, where they are not of another row.
        """
        seconds *= self.passes
        whole = loading + self.pictures * (seconds + SCORING) + self.overlays * (seconds + OVERLAY)
        return Stage(name=self.name, what=f"{self.what}, {steps} steps each", seconds=whole, memory=memory)


def drawn_by_measure(comparison: Comparison) -> Drawing:
    """What a comparison draws.

    Args:
        comparison: its arms, units and metrics.
    """
    plan, arms = comparison.plan, len(comparison.arms)
    prompts, seeds = len(comparison.prompts), len(plan.seeds)
    bare = sum(arm.bare for arm in comparison.arms.values())
    # The base's arm is made of its pictures of the class, of which equal prompts are drawn once.
    classes = seeds * sum(len(case.of_class.prompts) for case in comparison.units)
    of_class = classes if bare or comparison.asks_for_class else 0
    pictures = (arms - bare) * prompts * seeds + (of_class if bare else 0)
    more = f" and {of_class} of the class" if of_class and not bare else ""
    shown = min(plan.overlays, prompts * seeds) if comparison.arm.guidance.method == "semantic" else 0
    what = f"{arms} arms x {prompts} prompts x {seeds} seeds: {pictures} pictures{more}"
    drawn = (arms - bare) * prompts * seeds + of_class
    return Drawing(name="measuring", what=what, pictures=drawn, overlays=shown)


def drawn_by_search(search: Search, comparison: Comparison, seeds: Sequence[int]) -> Drawing:
    """What a search draws, checkpoints of a training to come left out.

    Args:
        search: its candidates and units.
        comparison: that follows.
        seeds: of the search.
    """
    from adapters.measuring.tune import budget

    several = {"checkpoint": search.checkpoints, **search.candidates}
    counts = [len(tried) for name, tried in several.items() if name != "checkpoint" or len(tried) > 1]
    prompts = len(search.prompts)
    pictures = sum(budget(count, prompts, len(seeds)) for count in counts)
    classes = len(seeds) * sum(len(case.of_class.prompts) for case in search.units) if comparison.asks_for_class else 0
    more = f" and {classes} of the class" if classes else ""
    what = f"{' + '.join(map(str, counts))} candidates on {prompts} prompts: {pictures} pictures{more}"
    return Drawing(name="tuning", what=what, pictures=pictures + classes)


def stages(settings: Training, found: Estimate, *, free: int | None = None) -> list[Stage]:
    """The stages that a training recipe's settings ask for.

    Args:
        settings: a training recipe's.
        found: from the trial step.
        free: peak memory of the process until now, bytes; null: asked for.
    """
    now = _peak() if free is None else free
    training = now + found.optimizer + found.average + found.untried  # the trial had the rest
    drawing = training  # what training loaded is freed before the base is loaded as a pipeline
    steps = settings.sampling.steps
    rows = [
        Stage(name=name, what=what, seconds=s, memory=training) for name, what, s in _until_trained(settings, found)
    ]
    if rows[0].name == CLASSES and rows[0].what != NOTHING:
        rows[0] = replace(rows[0], memory=_class_memory(settings, found, now) or training)
    for drawn in _drawn(settings):
        memory = drawing + round(BESIDE[drawn.name] * 2**30)
        rows.append(drawn.stage(steps, seconds=steps * 2 * found.sample_seconds, memory=memory))
    if settings.ship is not None:
        rows.append(Stage(name="shipping", what="the release folder", seconds=SHIPPING, memory=drawing))
    return rows


def _until_trained(settings: Training, found: Estimate) -> list[tuple[str, str, float]]:
    """Name, what and seconds of class pictures, caching and training."""
    rows = []
    chosen = getattr(settings, "dreambooth", None)
    if chosen is not None and chosen.class_prompt and chosen.preserve != "off":
        folder = Path(chosen.class_folder or Path(settings.out) / "class_images")
        missing = max(0, chosen.class_images - len(list(folder.glob("*.png"))))
        what = f"{missing} of {chosen.class_images}, {chosen.steps} steps each" if missing else NOTHING
        rows.append((CLASSES, what, missing * chosen.steps * 2 * found.sample_seconds))
    if found.caching_seconds:
        rows.append(("caching", "latents of the pictures", found.caching_seconds))
    train = settings.train
    what = f"{train.steps} steps of {train.batch_size * train.accumulation}, {found.step_seconds:.2g} s each"
    return [*rows, ("training", what, train.steps * found.step_seconds)]


def _class_memory(settings: Training, found: Estimate, now: int) -> int | None:
    """Peak of drawing class images, which the trial does not try; None: the base's configs do not tell.

    Args:
        settings: a training recipe's.
        found: from the trial step.
        now: peak memory of the process until now, bytes.
    """
    import torch

    from recipes.common.base import base_folder
    from recipes.common.precision import class_precision
    from training import memory
    from training.errors import TrainingError
    from training.networks import DTYPES

    dtype = DTYPES[class_precision(settings.sampling)]
    try:
        base = memory.architecture_of(str(base_folder(settings.base)))
        batch = settings.sampling.batch_size
        weights, activations = memory.drawing_bytes(base, settings.data.resolution, batch=batch, dtype=dtype)
    except TrainingError:
        return None
    if torch.cuda.is_available():
        return weights + activations
    # The process holds the base in float32 besides, and so does `now`.
    idle = now - (found.activations - found.untried) - found.gradients
    return idle + activations + (0 if dtype == torch.float32 else weights)


def _drawn(settings: Training) -> list[Drawing]:
    """Tuning and measuring."""
    from recipes.common.comparison import TO_COME, WHOLE_TO_COME, resolve
    from recipes.common.search import resolve_search
    from recipes.common.settings import GuidanceSettings

    plan = settings.measure
    if plan is None or plan.targets is not None:  # conditions are made at the size that the pipeline draws
        return []
    adapter = TO_COME if hasattr(settings, "lora") else WHOLE_TO_COME
    comparison = resolve(plan, base=settings.base, adapter=adapter)
    arms = {name: [arm.guidance] for name, arm in comparison.arms.items()}
    rows = []
    if settings.tune is not None:
        search = resolve_search(settings.tune, comparison, adapter=adapter)
        tried = {name: [GuidanceSettings.of(own) for own in those] for name, those in search.candidates.items()}
        drawn = drawn_by_search(search, comparison, settings.tune.seeds)
        rows.append(replace(drawn, passes=fmean(fmean(map(_passes, those)) for those in tried.values())))
        # Which scope the search will find is not known; arms of other methods than the baseline's take it too.
        arms |= {
            name: tried.get(plan.arm, [own])
            for name, (own,) in arms.items()
            if own.method != comparison.baseline.guidance.method and own.scope is None
        }
    passes = fmean(fmean(map(_passes, guidances)) for guidances in arms.values())
    return [*rows, replace(drawn_by_measure(comparison), passes=passes)]


def _passes(guidance: GuidanceSettings) -> float:
    """Of the U-net for a picture: a scope that looks for a place asks the base in those steps as well."""
    return 1.0 + (guidance.scope.where_stop if guidance.scope is not None and guidance.scope.where else 0.0)


def _peak() -> int:
    """Peak memory of this process so far, bytes: of the GPU where there is one."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def stages_table(rows: Sequence[Stage]) -> list[str]:
    """Lines for the terminal: stage, what, time and peak memory, and the sum."""
    width = max(len(row.what) for row in rows)
    lines = [f"{'stage':15} {'what':{width}}  {'time':16} peak memory"]
    for row in rows:
        time = "" if row.what == NOTHING else span(row.seconds)
        lines.append(f"{row.name:15} {row.what:{width}}  {time:16} {row.memory / 2**30:.1f} GiB")
    lines.append(f"{'in all':15} {'':{width}}  {span(sum(row.seconds for row in rows))}")
    return lines


def say_drawing(drawn: Drawing, steps: int, *, seconds: float, loading: float) -> None:
    """The table of a dry run that draws no more than a trial batch; the memory is what that batch took.

    Args:
        drawn: what the run would draw.
        steps: of a picture.
        seconds: of a picture, see `draw.pace`.
        loading: seconds until the first picture.
    """
    for line in stages_table([drawn.stage(steps, seconds=seconds, memory=_peak(), loading=loading)]):
        say(line)


@contextmanager
def took(stage: str, *, dry: bool = False) -> Iterator[Callable[[], float]]:
    """Say what a stage took once it has ended, to hold against its row of the table.

    Args:
        stage: its name.
        dry: it is a dry run, of which nothing is said.

    Yields:
        Gives the seconds since its beginning.
    """
    started = time.monotonic()
    yield lambda: time.monotonic() - started
    if not dry:
        say(f"{stage} took {time.monotonic() - started:.0f} s; peak memory so far {_peak() / 2**30:.1f} GiB")


def span(seconds: float) -> str:
    """An estimate in words, as the range it means."""
    return "under 1 s" if HIGH * seconds < 1 else f"{duration(LOW * seconds)} to {duration(HIGH * seconds)}"

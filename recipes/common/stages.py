"""What a run will take, stage by stage: counts from the settings, seconds from a trial step; and what it took."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common.cli import say
from training.progress import duration

if TYPE_CHECKING:
    from recipes.common.training import Training
    from training.estimate import Estimate

__all__ = ["Stage", "span", "stages", "stages_table", "took"]

LOW, HIGH = 0.7, 1.6  # of an estimate, which a busy machine and other batch sizes move
SHIPPING = 5.0  # seconds: files are written and hashed
BESIDE = {"tuning": 0.1, "measuring": 0.2}  # GiB of metrics and pictures beside what draws, as seen on the pocket base
NOTHING = "nothing to do"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One row."""

    name: str
    what: str
    seconds: float
    memory: int
    """Peak of the process, bytes."""


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
    for name, what, pictures in _drawn(settings):
        seconds = pictures * steps * 2 * found.sample_seconds
        memory = drawing + round(BESIDE[name] * 2**30)
        rows.append(Stage(name=name, what=f"{what}, {steps} steps each", seconds=seconds, memory=memory))
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
        rows.append(("class pictures", what, missing * chosen.steps * 2 * found.sample_seconds))
    if found.caching_seconds:
        rows.append(("caching", "latents of the pictures", found.caching_seconds))
    train = settings.train
    what = f"{train.steps} steps of {train.batch_size * train.accumulation}, {found.step_seconds:.2g} s each"
    return [*rows, ("training", what, train.steps * found.step_seconds)]


def _drawn(settings: Training) -> list[tuple[str, str, int]]:
    """Name, what and pictures of tuning and measuring."""
    from adapters.measuring.tune import budget
    from recipes.common.comparison import TO_COME, resolve
    from recipes.common.search import resolve_search

    plan = settings.measure
    if plan is None or plan.targets is not None:  # conditions are made at the size that the pipeline draws
        return []
    comparison, rows = resolve(plan, base=settings.base, adapter=TO_COME), []
    if settings.tune is not None:
        search = resolve_search(settings.tune, comparison, adapter=TO_COME)
        counts, prompts = [len(tried) for tried in search.candidates.values()], len(search.prompts)
        pictures = sum(budget(count, prompts, len(settings.tune.seeds)) for count in counts)
        what = f"{' + '.join(map(str, counts))} candidates on {prompts} prompts: {pictures} pictures"
        rows.append(("tuning", what, pictures))
    arms, prompts = len(comparison.arms), sum(len(case.prompts) for case in comparison.units)
    pictures = arms * prompts * len(plan.seeds)
    what = f"{arms} arms x {prompts} prompts x {len(plan.seeds)} seeds: {pictures} pictures"
    return [*rows, ("measuring", what, pictures)]


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


@contextmanager
def took(stage: str) -> Iterator[None]:
    """Say what a stage took once it has ended, to hold against its row of the table.

    Args:
        stage: its name.
    """
    started = time.monotonic()
    yield
    say(f"{stage} took {time.monotonic() - started:.0f} s; peak memory so far {_peak() / 2**30:.1f} GiB")


def span(seconds: float) -> str:
    """An estimate in words, as the range it means."""
    return f"{duration(LOW * seconds)} to {duration(HIGH * seconds)}"

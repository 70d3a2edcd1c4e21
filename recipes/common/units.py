"""The units of a comparison: one a subject, or one for the whole of a task, with prompts, conditions and adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from recipes.common.base import POCKET
from recipes.common.cli import say
from recipes.common.prompts import texts
from recipes.common.settings import MeasureSettings
from training.config import DataSettings, require
from training.errors import TrainingError

if TYPE_CHECKING:
    from adapters.edges import Canny
    from adapters.measuring.sample import Shot
    from training.data.samples import Sample

__all__ = ["Case", "cases", "subject_folders"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sampled with one adapter: a subject, or the whole of a task without subjects."""

    name: str = ""
    prompts: list[str]
    adapter: str | None = None
    folder: Path | None = None
    """The subject's pictures."""
    identifier: str = ""
    noun: str = ""
    """The subject's class."""
    conditions: Mapping[str, Image.Image] = field(default_factory=dict, repr=False)
    """Prompt -> what the ControlNet is given."""
    edges: Canny | None = None
    """What finds the edges of conditions and pictures, where there are targets."""
    targets: Mapping[str, Image.Image] = field(default_factory=dict, repr=False)
    """Prompt -> the picture that the condition was made from."""

    @property
    def calls(self) -> str:
        """What the subject is called in prompts."""
        return f"{self.identifier} {self.noun}".strip()

    @property
    def of_class(self) -> Case:
        """The same prompts without the identifier, which ask for anything of the class; for the base alone."""
        from adapters.scope import without_identifier

        prompts = [without_identifier(prompt, self.identifier) for prompt in self.prompts]
        return replace(self, prompts=list(dict.fromkeys(prompts)), adapter=None, conditions={}, targets={})

    def asked(self, shots: Iterable[Shot]) -> list[Shot]:
        """Pictures of `of_class`'s prompts as this unit's own, for a comparison of equal prompts."""
        from adapters.scope import without_identifier

        drawn: dict[str, list[Shot]] = {}
        for shot in shots:
            drawn.setdefault(shot.prompt, []).append(shot)
        return [
            replace(shot, prompt=prompt)
            for prompt in self.prompts
            for shot in drawn.get(without_identifier(prompt, self.identifier), ())
        ]

    def inputs(self, prompt: str, seed: int) -> dict[str, Any]:
        """What the pipeline is given beside a prompt: its condition, where there are conditions."""
        return {"image": self.conditions[prompt]} if self.conditions else {}

    @property
    def given(self) -> Callable[[str, int], dict[str, Any]] | None:
        """`inputs`, where there are any."""
        return self.inputs if self.conditions else None


def cases(
    settings: MeasureSettings,
    adapter: str | None,
    *,
    size: tuple[int, int] | None = None,
    edges: Canny | None = None,
) -> list[Case]:
    """The units of a comparison, by subject; {subject} in the adapter's path becomes the subject's name.

    Args:
        settings: subjects, targets or prompts.
        adapter: its path; None: there is none.
        size: (width, height) that targets and their conditions are cut to; null: each its own.
        edges: the detector that the ControlNet was trained with; null: the default one.
    """
    if settings.targets is not None:
        from adapters.edges import Canny

        return [_controlled(settings, adapter, size, edges or Canny())]
    if not settings.subjects:
        require(adapter is None or "{subject}" not in adapter, f"adapter {adapter} needs measure.subjects")
        prompts = texts(settings.prompts, settings.prompt_file)[: settings.limit]
        require(bool(prompts), "measure has no prompts; set measure.prompts, prompt_file, subjects or targets")
        return [Case(prompts=prompts, adapter=adapter)]
    return [_subject(Path(folder), settings, adapter) for folder in subject_folders(settings.subjects)]


def subject_folders(patterns: Sequence[str]) -> list[str]:
    """The folders that the patterns name, each once."""
    found = []
    for pattern in patterns:
        place = os.path.expanduser(pattern)
        # A folder may be called `rex [2]`.
        matches = [place] if Path(place).is_dir() else [path for path in sorted(glob(place)) if Path(path).is_dir()]
        require(bool(matches), f"measure.subjects: {pattern} is no folder")
        found += matches
    names: dict[str, str] = {}
    for folder in dict.fromkeys(found):
        first = names.setdefault(Path(folder).resolve().name, folder)
        require(
            first == folder,
            f"measure.subjects: {folder} and {first} have one name, by which pictures and rows are told apart; rename "
            "one",
        )
    return list(names.values())


def _subject(folder: Path, settings: MeasureSettings, adapter: str | None) -> Case:
    from adapters.files import read_json  # not above: it brings torch

    file = folder / "subject.json"
    try:
        facts = read_json(file)
        identifier, noun = facts["identifier"], facts["class"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f'{file} must be JSON with "identifier", "class" and "prompts" ({error!r}); recipes/new.py makes one'
        ) from error
    own = [] if settings.prompts or settings.prompt_file else facts.get("prompts", [])
    prompts = texts([*settings.prompts, *own], settings.prompt_file, name=f"{identifier} {noun}")[: settings.limit]
    require(bool(prompts), f"no prompts for {folder}: neither in {file} nor in measure.prompts or prompt_file")
    path = adapter.replace("{subject}", folder.name) if adapter else None
    return Case(name=folder.name, prompts=prompts, adapter=path, folder=folder, identifier=identifier, noun=noun)


def _controlled(settings: MeasureSettings, adapter: str | None, size: tuple[int, int] | None, edges: Canny) -> Case:
    """Captions of the targets as prompts, each with the condition made from its picture."""
    from training.data import images
    from training.pocket.control import Scenes
    from training.pocket.scenes import HELD_OUT_SEED

    assert settings.targets is not None
    source: Any
    first = settings.skip or 0
    if settings.targets == POCKET:
        require(
            settings.control != "given", "measure.targets pocket draws its conditions: control canny or segmentation"
        )
        count = first + (settings.limit or 64)
        source = Scenes(control=settings.control, count=count, seed=HELD_OUT_SEED, begin=0, edges=edges)
    else:
        require(settings.control != "segmentation", "control segmentation of your own pictures: set control given")
        place = Path(settings.targets)
        given = str(place / "conditioning") if settings.control == "given" else None
        source = images.load_images(DataSettings(source=str(place), conditioning=given))
    wanted = range(len(source))[first:][: settings.limit]
    require(bool(wanted), f"measure.skip {first} leaves none of {len(source)} targets")
    kept = {
        sample.caption: _cut(sample, size, settings.control, edges) for sample in (source[index] for index in wanted)
    }
    if len(kept) < len(wanted):
        say(f"{len(wanted) - len(kept)} targets are left out: their captions repeat others, and a prompt is a unit")
    return Case(
        prompts=list(kept),
        adapter=adapter,
        edges=edges,
        conditions={caption: condition for caption, (_, condition) in kept.items()},
        targets={caption: target for caption, (target, _) in kept.items()},
    )


def _cut(
    sample: Sample, size: tuple[int, int] | None, control: str | None, edges: Canny
) -> tuple[Image.Image, Image.Image]:
    """The middle of a target at the size that is drawn, and its condition: edges are found at that size."""
    image, condition = sample.image, sample.conditioning
    if size is not None and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        if condition is not None and control != "canny":
            return image, ImageOps.fit(condition, size, Image.Resampling.NEAREST)
        condition = None
    return image, condition or edges.condition(image)

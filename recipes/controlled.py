"""Control generation: conditions made from your pictures, an existing ControlNet, an adapter if you like, and S-CFG.

accelerate launch recipes/controlled.py --config recipes/configs/controlled/pocket_canny.yaml
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from recipes.common.base import adapted, edges_of, sampling_pipeline, size_of
from recipes.common.cli import launch, named, say
from recipes.common.draw import OWN, draw_shots, keep, pace, sheet_of_arms, trial
from recipes.common.guidance import method_title
from recipes.common.settings import GuidanceSettings, SamplingSettings
from recipes.common.stages import Drawing, say_drawing, took
from training.config import BaseSettings
from training.errors import TrainingError

MYPY = False  # see recipes.common.training
if MYPY:
    from diffusers import DiffusionPipeline

    from adapters.edges import Canny
    from training.data.folders import Folder

__all__ = ["Settings", "run"]

LEAST = 0.05  # of F1, above that with the edges of another picture


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draws pictures that follow conditions, made from pictures of your own."""

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    controlnet: str
    """ControlNet folder or hub id; pocket-canny and pocket-segmentation are the embedded ones."""
    adapter: str | None = None
    """An adapter to use as well: folder, hub id or another trainer's .safetensors file."""
    weight: float = 1.0
    """Weight of the adapter. 1: as trained, 0: no effect."""
    pictures: str
    """Folder of pictures. The caption of each (a .txt file beside it) is its prompt."""
    prompt: str | None = None
    """The prompt of every picture, instead of captions."""
    annotator: Literal["canny", "lineart", "depth", "segmentation", "none"] = "canny"
    """How a condition is made from a picture. none: the pictures are conditions already."""
    annotator_model: str | None = None
    """Folder or hub id of the annotator's network (depth, segmentation)."""
    conditioning_scale: float = 1.0
    """Strength of the ControlNet."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds for every picture."""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """How pictures are guided. Plain CFG at the same scale is drawn for comparison."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    dry_run: bool = False
    """Loads and checks everything, then stops."""
    out: str
    """Folder for the pictures."""


def run(settings: Settings) -> Path | None:
    """Sample with plain CFG and with the guidance; returns the sheet, or None after a dry run."""
    with took("drawing", dry=settings.dry_run) as so_far:
        return _controlled(settings, so_far)


def _controlled(settings: Settings, so_far: Callable[[], float]) -> Path | None:
    edges = edges_of(settings.controlnet) if settings.annotator == "canny" else None
    make = _annotator(settings, edges)
    source = _pictures(settings)
    pipe = sampling_pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    given = _given(source, size_of(pipe, settings.sampling), make, nearest=settings.annotator == "none")
    plain = GuidanceSettings(
        method="cfg", guidance_scale=settings.guidance.guidance_scale, rescale=settings.guidance.rescale
    )
    arms = {method_title(arm.method): arm for arm in (plain, settings.guidance)}
    with adapted(pipe, settings.adapter, settings.weight):
        for arm in arms.values():
            _try(pipe, arm, given[0], settings)
        if settings.dry_run:
            say(f"would draw {len(arms) * len(given) * len(settings.seeds)} pictures with {type(pipe).__name__}")
            _would(pipe, len(arms), given, settings, so_far())
            return None
        shots = {name: _draw(pipe, name, arm, given, settings) for name, arm in arms.items()}
    for name, made in shots.items():
        if edges is not None:
            _score(name, made, {one.name: one.condition for one in given}, edges)
        for shot in made:
            keep(shot.image, Path(settings.out) / f"{shot.subject} {name} {shot.seed}.png")
    page = Path(settings.out) / "sheet.png"
    keep(sheet_of_arms({**_columns(given), **shots}), page)
    say(f"pictures in {settings.out}; side by side: {page}")
    return page


@dataclass(frozen=True, kw_only=True)
class Given:
    """One of the user's pictures, cut to the size that is drawn, and the condition made from it."""

    name: str
    prompt: str
    picture: Image.Image
    condition: Image.Image


def _annotator(settings: Settings, edges: Canny | None) -> Callable[[Image.Image], Image.Image]:
    from training.data import images
    from training.data.annotators import annotator

    if settings.annotator == "none":
        return images.rgb
    return annotator(settings.annotator, settings.annotator_model, edges=edges)


def _pictures(settings: Settings) -> Any:
    """The user's pictures; what is wrong with them is said by this recipe's flags."""
    from training.data import images

    shown = settings.pictures if settings.annotator == "none" else None
    try:
        source = images.folder(settings.pictures, prompt=settings.prompt, conditioning=shown, minimum=1, say=say)
    except TrainingError as error:
        said = str(error).replace("data.source", "--pictures").replace("data.prompt", "--prompt")
        raise TrainingError(" ".join(said.split())) from error
    return source


def _given(
    source: Folder, size: tuple[int, int], make: Callable[[Image.Image], Image.Image], *, nearest: bool
) -> list[Given]:
    cut = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    stems = [file.stem for file in source.files]
    found = []
    for index, file in enumerate(source.files):
        sample, name = source[index], file.stem if stems.count(file.stem) == 1 else file.name
        picture = ImageOps.fit(sample.image, size, cut)
        shown = ImageOps.fit(sample.conditioning or sample.image, size, cut)
        found.append(Given(name=name, prompt=sample.caption, picture=picture, condition=make(shown)))
    return found


def _rounds(given: Sequence[Given]) -> list[dict[str, Given]]:
    """By prompt; pictures with the same prompt are drawn in different rounds, as drawing tells them apart by it."""
    rounds: list[dict[str, Given]] = []
    for one in given:
        free = next((some for some in rounds if one.prompt not in some), None)
        if free is None:
            rounds.append(free := {})
        free[one.prompt] = one
    return rounds


def _try(pipe: DiffusionPipeline, arm: GuidanceSettings, one: Given, settings: Settings) -> None:
    """One step of a picture, whose refusals are said before any picture is drawn."""
    with named("guidance"):
        shown = {"image": one.condition}
        trial(pipe, one.prompt, arm, settings.sampling, inputs=lambda *_: shown, common=_common(settings))


def _would(pipe: DiffusionPipeline, arms: int, given: Sequence[Given], settings: Settings, loading: float) -> None:
    """A dry run: time and memory are said, by a batch that is tried; `loading` took so many seconds."""
    some, seeds, sampling = _rounds(given)[0], settings.seeds, settings.sampling
    inputs = partial(_condition, some)
    seconds = pace(pipe, list(some), seeds, settings.guidance, sampling, inputs=inputs, common=_common(settings))
    pictures = arms * len(given) * len(seeds)
    what = f"{arms} arms x {len(given)} pictures of yours x {len(seeds)} seeds: {pictures} pictures"
    drawn = Drawing(name="drawing", what=what, pictures=pictures)
    say_drawing(drawn, sampling.steps, seconds=seconds, loading=loading)


def _common(settings: Settings) -> dict[str, float]:
    return {"controlnet_conditioning_scale": settings.conditioning_scale}


def _draw(
    pipe: DiffusionPipeline, name: str, arm: GuidanceSettings, given: Sequence[Given], settings: Settings
) -> list[Any]:
    """All pictures of an arm, each with the name of the user's picture as its subject."""
    made = []
    for number, some in enumerate(_rounds(given)):
        folder = Path(settings.out) / "pictures" / name
        shots = draw_shots(
            pipe,
            list(some),
            settings.seeds,
            arm,
            settings.sampling,
            folder / str(number + 1) if number else folder,
            f"{settings.adapter} {settings.controlnet} {settings.conditioning_scale:g} {_digest(some)}",
            arm=name,
            inputs=partial(_condition, some),
            common=_common(settings),
            renewed=OWN,
        )
        made += [replace(shot, subject=some[shot.prompt].name) for shot in shots]
    return made


def _condition(given: Mapping[str, Given], prompt: str, seed: int) -> dict[str, Image.Image]:
    return {"image": given[prompt].condition}


def _digest(given: Mapping[str, Given]) -> str:
    """Of the conditions: pictures that were drawn for others are out of date."""
    found = hashlib.sha256()
    for one in given.values():
        found.update(f"{one.prompt} {one.condition.mode} {one.condition.size}".encode() + one.condition.tobytes())
    return found.hexdigest()[:16]


def _score(name: str, shots: Sequence[Any], conditions: Mapping[str, Image.Image], edges: Canny) -> None:
    """Says how far pictures keep the edges they were given, and how far those of the next picture, by chance."""
    from adapters.measuring.metrics import CannyF1

    def mean(wanted: Mapping[str, Image.Image]) -> float:
        found = CannyF1(condition=lambda shot: wanted[shot.subject].resize(shot.image.size), edges=edges)(shots)
        return sum(found) / len(found)

    own = mean(conditions)
    said = f"{name}: canny F1 {own:.2f} over {len(shots)} pictures"
    if len(conditions) == 1:
        say(said)
        return
    first, *rest = conditions.values()
    chance = mean(dict(zip(conditions, [*rest, first], strict=True)))
    say(f"{said}; {chance:.2f} with the edges of another one")
    if own < chance + LEAST:
        say(f"{name}: the pictures do not follow the edges; try more --sampling.steps or --conditioning_scale")


def _columns(given: Sequence[Given]) -> dict[str, list[Any]]:
    """The user's pictures and their conditions, as columns beside what was drawn."""
    from adapters import Shot

    def column(part: str) -> list[Any]:
        return [
            Shot(prompt=one.prompt, subject=one.name, seed=0, latents="", image=getattr(one, part)) for one in given
        ]

    return {"yours": column("picture"), "condition": column("condition")}


if __name__ == "__main__":
    launch(Settings, run)

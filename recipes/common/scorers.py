"""Scorers that need a model of their own, by name; `measure.models` gives the models, each a folder or hub id.

| name | what | model | further |
|---|---|---|---|
| preference (pickscore) | what people prefer, at equal effective scale only | pickscore | `measure.sweep` |
| VQAScore | P("yes") that the picture shows its prompt | vqa | |
| question accuracy, question probability | TIFA; Soft-TIFA of GenEval 2 | vqa | `measure.questions` |
| detected objects | GenEval: count, color, position | detector | clip for colors; `measure.objects` |
| masked similarity (SPACE) | the subject's region against its pictures | detector, segmenter | subject |
| depth RMSE | depth against the target's | depth | targets |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.measuring.metrics import Metric
from adapters.measuring.metrics.alignment import PickScore
from adapters.measuring.metrics.detection import Detector, ObjectAccuracy, read_objects
from adapters.measuring.metrics.located import Depth, DepthRmse, Located, Sam
from adapters.measuring.metrics.networks import Clip
from adapters.measuring.metrics.phrases import said_in
from adapters.measuring.metrics.questions import QuestionAccuracy, Reader, VqaScore, questions_of, read_questions
from adapters.measuring.sample import Shot
from adapters.scope import without_identifier
from training.config import require
from training.hub import offline_if_unreachable

from .cli import named
from .settings import MeasureSettings
from .spaces import device_of, space_of
from .units import Case

__all__ = ["PREFERENCE", "SCORERS", "check_scorers", "located", "scorer"]

PREFERENCE = "preference (pickscore)"
"""Stronger guidance raises it by itself, so it is told at equal effective scale only."""
MODELS: dict[str, Callable[..., Any]] = {
    "pickscore": Clip,
    "vqa": Reader,
    "detector": Detector,
    "segmenter": Sam,
    "depth": Depth,
}
SCORERS = {
    "pickscore": (PREFERENCE,),
    "vqa": ("VQAScore", "question accuracy", "question probability"),
    "detector": ("detected objects",),
    "depth": ("depth RMSE",),
}
"""Model -> the metrics that need it."""
BATCHED = ("pickscore", "vqa")


@lru_cache(maxsize=8)
def model(key: str, path: str, device: str | None, batch_size: int) -> Any:
    """A model, looked at now and loaded when it is first asked.

    Args:
        key: of `MODELS`.
        path: folder or hub id.
        device: where it runs; None: this process's device.
        batch_size: pictures it looks at together, where it takes several.
    """
    more = {"batch_size": batch_size} if key in BATCHED else {}
    offline_if_unreachable(path)
    with named(f"measure.models.{key}"):
        return MODELS[key](name=path, device=device_of(device), **more)


def scorer(name: str, settings: MeasureSettings, case: Case, target: Callable[[Shot], Image.Image]) -> Metric | None:
    """The scorer of a name; None where it is none of these.

    Args:
        name: of the metric.
        settings: its model's place.
        case: the unit.
        target: shot -> the picture it is to be like, for depth.

    Raises:
        TrainingError: its model is not given, not there, or of another class.
    """
    key = next((key for key, names in SCORERS.items() if name in names), None)
    if key is None:
        return None
    found = _model(key, settings, name)
    if key == "pickscore":
        return PickScore(clip=found, prompt=lambda shot: _asked(shot.prompt, case))
    if key == "depth":
        return DepthRmse(depth=found, target=target)
    prompt = lambda shot: _asked(shot.prompt, case)  # noqa: E731
    if key == "detector":
        clip = space_of("clip", settings) if "clip" in settings.spaces else None
        return ObjectAccuracy(detector=found, clip=clip, objects=_objects(settings), prompt=prompt)
    if name == "VQAScore":
        return VqaScore(reader=found, prompt=prompt)
    soft = name == "question probability"
    return QuestionAccuracy(reader=found, questions=_questions(settings), prompt=prompt, soft=soft, name=name)


def located(settings: MeasureSettings, noun: str) -> Located:
    """Finds a subject on pictures: the detector's box, and what the segmenter sees in it."""
    sam = _model("segmenter", settings, "") if "segmenter" in settings.models else None
    return Located(detector=_model("detector", settings, ""), noun=noun, sam=sam)


def check_scorers(settings: MeasureSettings, names: Sequence[str], units: Sequence[Case]) -> None:
    """What the scorers among `names` would lack later, with the setting.

    Args:
        settings: models, spaces and the sweep.
        names: of the metrics.
        units: each unit of the comparison.

    Raises:
        TrainingError: an unknown model, a file that does not say what it must, or a preference without a sweep.
    """
    for key, path in settings.models.items():
        require(key in MODELS, f"measure.models: {key!r} is none of {', '.join(MODELS)}")
        model(key, path, settings.device, settings.batch_size)
    require(
        PREFERENCE not in names or bool(settings.sweep),
        f"measure.metrics: {PREFERENCE} rises with the guidance scale by itself and is told at equal effective scale "
        "only: set measure.sweep",
    )
    require(
        "depth RMSE" not in names or settings.targets is not None,
        "measure.metrics: depth RMSE needs target pictures: set measure.targets and measure.control",
    )
    asked = [_asked(prompt, case) for case in units for prompt in case.prompts]
    for flag, read in (("questions", _questions), ("objects", _objects)):
        if getattr(settings, flag) is None:
            continue
        told = read(settings)
        missing = next((prompt for prompt in asked if prompt not in told), None)
        require(missing is None, f"measure.{flag}: {getattr(settings, flag)} has nothing on the prompt {missing!r}")
    if "detected objects" in names:
        _check_objects(settings, asked)
    if {"question accuracy", "question probability"} & set(names):
        _check_choices(settings, asked)


def _check_objects(settings: MeasureSettings, asked: Sequence[str]) -> None:
    """Prompts name things that a detector can look for, and colors only where a model judges them."""
    told = _objects(settings)
    said = [(prompt, (told.get(prompt) or said_in(prompt)).things) for prompt in asked]
    nothing = [prompt for prompt, things in said if not things]
    require(
        len(said) - len(nothing) >= 2,
        f"measure.metrics: detected objects needs two prompts that name a thing, and {nothing[:1]} does not: say in "
        "measure.objects what is to be there",
    )
    colored = next((prompt for prompt, things in said if any(thing.color for thing in things)), None)
    require(
        colored is None or "clip" in settings.spaces,
        f"measure.metrics: detected objects looks at colors by clip, and {colored!r} names one: set "
        "measure.spaces.clip",
    )


def _check_choices(settings: MeasureSettings, asked: Sequence[str]) -> None:
    """The model tells the choices of every question apart by the word that they begin with."""
    reader, told = _model("vqa", settings, "question accuracy"), _questions(settings)
    with named("measure.questions" if settings.questions else "measure.models.vqa"):
        for question in {one for prompt in asked for one in told.get(prompt) or questions_of(prompt)}:
            reader.begins(question)


# ---------------------------------------------------------------------------------------------- small things


def _model(key: str, settings: MeasureSettings, name: str) -> Any:
    path = settings.models.get(key)
    require(
        path is not None, f"measure.metrics: {name} needs its model: set measure.models.{key} to a folder or hub id"
    )
    assert path is not None
    return model(key, path, settings.device, settings.batch_size)


def _asked(prompt: str, case: Case) -> str:
    """A prompt as a model that does not know the subject is given it."""
    return without_identifier(prompt, case.identifier)


def _questions(settings: MeasureSettings) -> dict[str, Any]:
    if settings.questions is None:
        return {}
    with named("measure.questions"):
        return read_questions(Path(settings.questions).expanduser())


def _objects(settings: MeasureSettings) -> dict[str, Any]:
    if settings.objects is None:
        return {}
    with named("measure.objects"):
        return read_objects(Path(settings.objects).expanduser())

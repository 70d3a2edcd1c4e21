"""A metric by its name, made for a case: its models, its reference pictures, its conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from adapters.measuring import metrics as kinds
from adapters.measuring.metrics import Metric
from adapters.measuring.metrics.networks import TextAlignment
from adapters.measuring.sample import Shot
from adapters.scope import without_identifier
from training.config import require
from training.errors import TrainingError
from training.pocket import judge
from training.pocket.metrics import (
    IDENTITY,
    MARGIN,
    PARTS,
    PROMPT,
    REST,
    SUBJECT,
    class_iou,
    identity,
    label_of,
    prompt_accuracy,
    rest_accuracy,
    subject_similarity,
)

from .scorers import SCORERS, located, scorer
from .settings import MeasureSettings
from .spaces import pictures, reference, space_of
from .units import Case

__all__ = ["make_metric"]

IN_SPACE = re.compile(r"(alignment|identity|similarity|masked similarity|diversity|drift|kernel distance) \((\w+)\)")


def _canny(name: str, case: Case) -> Metric:
    require(case.edges is not None, f"{name} compares edges with conditions: set measure.targets")
    assert case.edges is not None
    return kinds.CannyF1(condition=lambda shot: _condition(name, case, shot), edges=case.edges)


def _rest(name: str, case: Case) -> Metric:
    _folder(name, case)
    return rest_accuracy(case.identifier, case.noun)


def make_metric(
    name: str, settings: MeasureSettings, case: Case, base: Sequence[Shot], classes: Sequence[Shot]
) -> Metric:
    """The metric of a name.

    Args:
        name: as `measure.metrics` has it.
        settings: its models.
        case: the unit: its prompts, its subject and its targets.
        base: the base's own pictures of its prompts, for drift.
        classes: the base's pictures of the class, for identity.

    Raises:
        TrainingError: an unknown name, or what the metric needs and the comparison does not have.
    """
    plain: dict[str, Callable[[], Metric]] = {
        PROMPT: lambda: prompt_accuracy(case.identifier),
        **{part: partial(prompt_accuracy, case.identifier, part) for part in PARTS},
        REST: lambda: _rest(name, case),
        IDENTITY: lambda: _identity(name, case, classes),
        MARGIN: lambda: _identity(name, case, classes),
        SUBJECT: lambda: subject_similarity(*_masked(name, case), case.noun),
        "class IoU": lambda: class_iou(lambda shot: _condition(name, case, shot)),
        "canny F1": lambda: _canny(name, case),
        "MS-SSIM": lambda: kinds.MsSsim(target=lambda shot: _target(name, case, shot)),
        "saturation": kinds.Saturation,
        "contrast": kinds.Contrast,
        "clipped share": kinds.Clipped,
    }
    if name in plain:
        return plain[name]()
    scored = scorer(name, settings, case, lambda shot: _target(name, case, shot))
    if scored is not None:
        return scored
    found = IN_SPACE.fullmatch(name)
    if found is None:
        known = [*plain, *(one for several in SCORERS.values() for one in several)]
        raise TrainingError(
            f"measure.metrics: {name!r} is unknown; there are {', '.join(known)}, and alignment, identity, similarity, "
            "masked similarity, diversity, drift, kernel distance of a space, such as 'similarity (dino)'"
        )
    what, where = found.groups()
    features = space_of(where, settings)
    if what == "alignment":
        require(hasattr(features, "text"), f"measure.metrics: {name}: only clip and siglip2 know words")
        without = lambda shot: without_identifier(shot.prompt, case.identifier)  # noqa: E731
        return TextAlignment(name=name, clip=features, prompt=without)
    if what == "diversity":
        return kinds.Diversity(name=name, features=features)
    if what == "drift":
        require(settings.base_arm, f"{name} compares with the base's own pictures: set measure.base_arm true")
        return kinds.Drift(name=name, features=features, base=base)
    if what == "kernel distance":
        return kinds.Kid(name=name, features=features, references=reference(settings.reference, name))
    shown, masks = pictures(_folder(name, case))
    if what == "identity":
        require(len(shown) > 1, f"{name} needs two pictures in {case.folder}, to see how alike they are")
        look, own = kinds.look_of(features, shown)
        return kinds.Identity(name=name, look=look, own=own, classes=lambda: classes)
    if what == "similarity":
        return kinds.Similarity(name=name, features=features, references=shown)
    if "detector" in settings.models:
        found_in = located(settings, case.noun)
        cut = partial(found_in, shown) if masks is None else masks
        return kinds.Similarity(name=name, features=features, references=shown, reference_masks=cut, mask=found_in)
    require(masks is not None, f"{name} needs {case.folder}/masks, or measure.models.detector, which finds the subject")
    _shows(name, case.folder, masks or ())
    label = label_of(name, case.noun)
    seen = lambda shots: [_resized(m, shots[0].size) for m in judge().segment(shots) == label]  # noqa: E731
    return kinds.Similarity(name=name, features=features, references=shown, reference_masks=masks, mask=seen)


# ---------------------------------------------------------------------------------------------- small things


def _identity(name: str, case: Case, classes: Sequence[Shot]) -> Metric:
    found = _masked(name, case)
    return identity(*found, case.noun, case.identifier, lambda: classes, margin=name == MARGIN)


def _folder(what: str, case: Case) -> Path:
    require(case.folder is not None, f"{what} needs a subject: set measure.subjects")
    assert case.folder is not None
    return case.folder


def _condition(what: str, case: Case, shot: Shot) -> Image.Image:
    require(shot.prompt in case.conditions, f"{what} needs conditions: set measure.targets and measure.control")
    return case.conditions[shot.prompt].resize(shot.image.size, Image.Resampling.NEAREST)


def _target(what: str, case: Case, shot: Shot) -> Image.Image:
    require(shot.prompt in case.targets, f"{what} needs target pictures: set measure.targets")
    return case.targets[shot.prompt].resize(shot.image.size, Image.Resampling.LANCZOS)


def _masked(what: str, case: Case) -> tuple[list[Image.Image], list[np.ndarray]]:
    """The subject's pictures and their masks."""
    folder = _folder(what, case)
    shown, masks = pictures(folder)
    require(masks is not None, f"{what} needs {folder / 'masks'}, white where the subject is")
    assert masks is not None
    _shows(what, folder, masks)
    return shown, masks


def _shows(what: str, folder: Path | None, masks: Sequence[np.ndarray]) -> None:
    require(
        any(mask.any() for mask in masks), f"{what}: every mask in {folder}/masks is black, so none shows the subject"
    )


def _resized(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 127

"""Metrics by name, for a case and a base: the pocket judge offline, CLIP, DINO and others where their weights are.

| name | what | needs |
|---|---|---|
| prompt accuracy | share of what the prompt says that the judge sees | pocket |
| identity, identity margin | is it the subject rather than its class: 1 or 0, and by how much | pocket, subject |
| subject similarity | the subject's region against its pictures, in the judge's features | pocket, subject |
| class IoU | the condition's classes against those the judge sees | pocket, targets |
| canny F1, MS-SSIM | edges against the condition, structure against the target | targets |
| alignment (SPACE) | cosine of picture and prompt, identifier left out | clip or siglip2 |
| identity (SPACE) | the same in another space, of whole pictures | subject |
| similarity (SPACE), masked similarity (SPACE) | cosine to the subject's pictures | subject |
| diversity (SPACE) | distance to the other pictures of a prompt | two seeds |
| drift (SPACE) | distance to the base's own picture of the same prompt and seed | adapter, `base_arm` |
| kernel distance (SPACE) | to `reference`; the mean over pictures is KID | reference |
| saturation, contrast, clipped share | burnt pictures | |
| preference, VQAScore, questions, objects, depth | see `scorers` | a model each |

SPACE is one of `spaces.SPACES`.
"""

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
from training.pocket import PocketError, captions, judge
from training.pocket.metrics import (
    IDENTITY,
    MARGIN,
    PARTS,
    PROMPT,
    SUBJECT,
    class_iou,
    identity,
    label_of,
    prompt_accuracy,
    subject_similarity,
)

from .scorers import PREFERENCE, SCORERS, check_scorers, located, scorer
from .settings import MeasureSettings
from .spaces import check_frechet, check_spaces, pictures, reference, space_of
from .units import Case

__all__ = [
    "PREFERENCE",
    "PROMPT",
    "SUBJECT",
    "check_metrics",
    "defaults",
    "judged",
    "metrics",
    "of_subject",
    "prompt_accuracy",
    "subject_similarity",
]

IN_SPACE = re.compile(r"(alignment|identity|similarity|masked similarity|diversity|drift|kernel distance) \((\w+)\)")


# How far each goes in whatever it measures, for the two that say what an adapter does for a subject.
OF_SUBJECT = re.compile(r"identity|identity \(\w+\)|subject similarity|(masked )?similarity \(\w+\)")
OF_PROMPT = (PROMPT, "alignment (clip)", "alignment (siglip2)", "VQAScore", *SCORERS["vqa"], *SCORERS["detector"])


def of_subject(settings: MeasureSettings, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The metrics among `names` that say whether it is the subject, and how far the prompt is kept.

    Both null where there is no subject, or one of them is not measured and not named.
    """
    if not settings.subjects:
        return None, None
    identity = settings.identity or next((name for name in names if OF_SUBJECT.fullmatch(name)), None)
    accuracy = settings.accuracy or next((name for name in names if name in OF_PROMPT), None)
    return (identity, accuracy) if identity and accuracy else (None, None)


def defaults(settings: MeasureSettings, *, pocket: bool) -> list[str]:
    """What is measured where the settings name nothing; the first decides."""
    if settings.metrics:
        return settings.metrics
    if settings.targets:
        own = ["class IoU"] if settings.control == "segmentation" else ["canny F1"]
        return [*own, PROMPT] if pocket else [*own, "alignment (clip)"]
    if pocket:
        return [IDENTITY, PROMPT, SUBJECT] if settings.subjects else [PROMPT]
    if not settings.subjects:
        return ["alignment (clip)"]
    looks = next((name for name in ("dinov3", "dinov2") if name in settings.spaces), "dino")
    return [f"identity ({looks})", "alignment (clip)", f"similarity ({looks})", "similarity (clip)"]


def metrics(
    settings: MeasureSettings,
    case: Case,
    *,
    pocket: bool,
    base: Sequence[Shot] = (),
    classes: Sequence[Shot] = (),
) -> list[Metric]:
    """The metrics of the settings, made for one case.

    Args:
        settings: which metrics, and their models.
        case: the unit: its prompts, its subject and its targets.
        pocket: whether the base is the embedded one.
        base: the base's own pictures of its prompts, for drift.
        classes: the base's pictures of the class, of the same prompts without the identifier, for identity.
    """
    return [_metric(name, settings, case, base, classes) for name in defaults(settings, pocket=pocket)]


def check_metrics(settings: MeasureSettings, units: Sequence[Case], *, pocket: bool) -> dict[str, bool]:
    """The metrics by name, and whether higher is better; all of them are made once, which says what one lacks.

    Args:
        settings: which metrics, and their models.
        units: each unit of the comparison.
        pocket: whether the base is the embedded one.

    Raises:
        TrainingError: an unknown or repeated metric, or what one needs and the comparison does not have.
    """
    names = defaults(settings, pocket=pocket)
    check_spaces(settings)
    check_scorers(settings, names, units)
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, f"measure.metrics: {twice!r} is there twice")
    made = [metrics(settings, case, pocket=pocket) for case in units]
    for name in names:
        require(
            not name.startswith("diversity") or len(settings.seeds) > 1,
            f"measure.metrics: {name} compares pictures of one prompt: give measure.seeds two at least",
        )
        require(
            name not in ("canny F1", "class IoU", "MS-SSIM") or settings.targets is not None,
            f"measure.metrics: {name} needs conditions: set measure.targets and measure.control",
        )
        wanted = {"class IoU": "canny", "canny F1": "segmentation"}.get(name)
        require(
            wanted is None or settings.control != wanted, f"measure.metrics: {name} does not fit conditions of {wanted}"
        )
        said = [judged(name, case, prompt) for case in units for prompt in case.prompts]
        require(sum(said) >= 2, f"measure.metrics: {name} needs two prompts that say so; {sum(said)} of {len(said)} do")
    if settings.frechet:
        check_frechet(settings)
    return {metric.name: metric.higher_is_better for metric in made[0]}


def judged(name: str, case: Case, prompt: str) -> bool:
    """Whether a metric has anything to judge in a prompt.

    Args:
        name: of the metric.
        case: whose subject the prompt may name.
        prompt: of the picture.

    Raises:
        TrainingError: the metric reads prompts of the pocket world, and this is none.
    """
    if name != PROMPT and name not in PARTS:
        return True
    try:
        said = captions.parse(without_identifier(prompt, case.identifier))
    except PocketError as error:
        raise TrainingError(f"measure.metrics: {name} cannot judge the prompt {prompt!r}: {error}") from error
    there = {
        "color accuracy": any(noun.color for noun in said.nouns),
        "relation accuracy": said.relation is not None,
        "background accuracy": said.background is not None,
    }
    return there.get(name, True)


def _canny(name: str, case: Case) -> Metric:
    require(case.edges is not None, f"{name} compares edges with conditions: set measure.targets")
    assert case.edges is not None
    return kinds.CannyF1(condition=lambda shot: _condition(name, case, shot), edges=case.edges)


def _metric(name: str, settings: MeasureSettings, case: Case, base: Sequence[Shot], classes: Sequence[Shot]) -> Metric:
    plain: dict[str, Callable[[], Metric]] = {
        PROMPT: lambda: prompt_accuracy(case.identifier),
        **{part: partial(prompt_accuracy, case.identifier, part) for part in PARTS},
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
    made = scorer(name, settings, case, lambda shot: _target(name, case, shot))
    if made is not None:
        return made
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
    return shown, masks


def _resized(mask: Tensor, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask.numpy().astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 127

"""Metrics by name, for a case and a base: the pocket judge offline, CLIP, DINO and others where their weights are.

| name | what | needs |
|---|---|---|
| prompt accuracy | share of what the prompt says that the judge sees | pocket |
| rest accuracy | the same without the subject: other objects, their colors, the background | pocket, subject |
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
from collections.abc import Sequence

from adapters.measuring.metrics import Metric
from adapters.measuring.sample import Shot
from adapters.scope import without_identifier
from training.config import require
from training.errors import TrainingError
from training.pocket import PocketError, captions
from training.pocket.metrics import IDENTITY, PARTS, PROMPT, REST, SUBJECT

from .judges import make_metric
from .scorers import PREFERENCE, SCORERS, check_scorers
from .settings import MeasureSettings
from .spaces import check_frechet, check_spaces
from .units import Case

__all__ = ["PREFERENCE", "PROMPT", "SUBJECT", "applies_to", "check_metrics", "defaults", "make_metrics", "of_subject"]

SSIM_SIDE = 11  # pixels of its window
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


def make_metrics(
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
    return [make_metric(name, settings, case, base, classes) for name in defaults(settings, pocket=pocket)]


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
    every = [make_metrics(settings, case, pocket=pocket) for case in units]
    for name in names:
        require(
            not name.startswith("diversity") or len(settings.seeds) > 1,
            f"measure.metrics: {name} compares pictures of one prompt: give measure.seeds two at least",
        )
        require(
            name not in ("canny F1", "class IoU", "MS-SSIM") or settings.targets is not None,
            f"measure.metrics: {name} needs conditions: set measure.targets and measure.control",
        )
        sides = [side for case in units for picture in case.targets.values() for side in picture.size]
        require(
            name != "MS-SSIM" or min(sides) >= SSIM_SIDE,
            f"measure.metrics: MS-SSIM needs targets of {SSIM_SIDE} pixels a side or more, not {min(sides, default=0)}",
        )
        wanted = {"class IoU": "canny", "canny F1": "segmentation"}.get(name)
        require(
            wanted is None or settings.control != wanted, f"measure.metrics: {name} does not fit conditions of {wanted}"
        )
        said = [applies_to(name, case, prompt) for case in units for prompt in case.prompts]
        require(sum(said) >= 2, f"measure.metrics: {name} needs two prompts that say so; {sum(said)} of {len(said)} do")
    if settings.frechet:
        check_frechet(settings)
    return {metric.name: metric.higher_is_better for metric in every[0]}


def applies_to(name: str, case: Case, prompt: str) -> bool:
    """Whether a metric has anything to judge in a prompt.

    Args:
        name: of the metric.
        case: whose subject the prompt may name.
        prompt: of the picture.

    Raises:
        TrainingError: the metric reads prompts of the pocket world, and this is none.
    """
    if name not in (PROMPT, REST, *PARTS):
        return True
    try:
        said = captions.parse_caption(without_identifier(prompt, case.identifier))
    except PocketError as error:
        raise TrainingError(f"measure.metrics: {name} cannot judge the prompt {prompt!r}: {error}") from error
    there = {
        "color accuracy": any(noun.color for noun in said.nouns),
        "relation accuracy": said.relation is not None,
        "background accuracy": said.background is not None,
        REST: said.background is not None or any(noun.name != case.noun for noun in said.nouns),
    }
    return there.get(name, True)

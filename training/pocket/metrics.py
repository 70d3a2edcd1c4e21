"""Metrics of the pocket judge: what it sees of a prompt, of a subject and of a condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adapters.measuring.metrics import Identity, Measure
from adapters.measuring.sample import Shot
from adapters.scope import without_identifier

from ..config import require
from . import captions, judge, scenes
from .errors import PocketError
from .judging import LEAST_AREA, Score, score_agreement, to_pixels
from .world import CLASSES, SIZE

__all__ = [
    "IDENTITY",
    "MARGIN",
    "PARTS",
    "PROMPT",
    "REST",
    "SUBJECT",
    "class_iou",
    "identity",
    "label_of",
    "prompt_accuracy",
    "rest_accuracy",
    "subject_regions",
    "subject_similarity",
]

PROMPT, REST, SUBJECT = "prompt accuracy", "rest accuracy", "subject similarity"
IDENTITY, MARGIN = "identity", "identity margin"
PARTS = {
    "object accuracy": "objects",
    "color accuracy": "colors",
    "relation accuracy": "relation",
    "background accuracy": "background",
}


def prompt_accuracy(identifier: str, name: str = PROMPT) -> Measure:
    """Share of what the prompt says (objects, colors, relation, background) that the judge sees; or of one kind of it.

    The identifier is left out of the prompt: a subject counts as an object of its class. NaN where the prompt says
    nothing of the kind.
    """
    part = PARTS.get(name, "mean")

    def measure(shots: Sequence[Shot]) -> list[float]:
        values = [getattr(score, part) for score in _scores(shots, identifier)]
        return [float("nan") if value is None else value for value in values]

    return Measure(name, True, measure)


def rest_accuracy(identifier: str, noun: str) -> Measure:
    """`prompt_accuracy` without the subject: the other objects, their colors and the background.

    It tells what the adapter does to everything else in the prompt, and does not depend on whether the judge takes the
    subject for a thing of its class.

    Args:
        identifier: left out of prompts.
        noun: the subject's class, which is left out too.

    Raises:
        TrainingError: the judge does not know the class.
    """
    label_of(REST, noun)

    def measure(shots: Sequence[Shot]) -> list[float]:
        values = []
        for shot, seen in zip(shots, judge().look([shot.image for shot in shots]), strict=True):
            said = captions.parse_caption(without_identifier(shot.prompt, identifier))
            values.append(score_agreement(seen, said, without=noun).mean)
        return values

    return Measure(REST, True, measure)


def _scores(shots: Sequence[Shot], identifier: str) -> list[Score]:
    return judge().scores(
        [shot.image for shot in shots], [without_identifier(shot.prompt, identifier) for shot in shots]
    )


def subject_similarity(pictures: Sequence[Image.Image], masks: Sequence[np.ndarray], noun: str) -> Measure:
    """Mean cosine between the subject in a picture and in each reference, in the judge's features.

    Features are standardised over the objects of 256 drawn scenes, or the cosine of any two things would be near one.
    The region is where the judge sees the class; a picture in which it sees none scores 0.

    Args:
        pictures: of the subject.
        masks: (H, W) bool each, true where the subject is.
        noun: the subject's class, one of `world.CLASSES`.
    """
    mean, spread = _statistics()
    wanted = _unit((judge().features(pictures, _stacked(masks)) - mean) / spread)
    label = label_of(SUBJECT, noun)

    def measure(shots: Sequence[Shot]) -> list[float]:
        shown = to_pixels([shot.image for shot in shots])
        regions = judge().segment(shown) == label
        features = _unit((judge().features(shown, regions) - mean) / spread)
        there = regions.float().mean((1, 2)) > 0.01
        return ((features @ wanted.T).mean(1) * there).tolist()

    return Measure(SUBJECT, True, measure)


def identity(
    pictures: Sequence[Image.Image],
    masks: Sequence[np.ndarray],
    noun: str,
    identifier: str,
    classes: Callable[[], Sequence[Shot]],
    *,
    margin: bool = False,
) -> Identity:
    """`adapters.measuring.metrics.Identity` in the judge's features, in the subject's region.

    A region in which the judge does not see the class counts only if it is liker to the subject than nineteen of twenty
    objects of other classes. For its agreement with a blind eye, see benchmarks/study/README.md.

    Args:
        pictures: of the subject.
        masks: (H, W) bool each, true where the subject is.
        noun: the subject's class, one of `world.CLASSES`.
        identifier: left out of prompts.
        classes: gives the base's pictures of the same prompts without the identifier.
        margin: the margin itself rather than whether it is above 0.
    """
    mean, spread = _statistics()
    label_of(IDENTITY, noun)
    wanted = _unit((judge().features(pictures, _stacked(masks)) - mean) / spread)

    def look(shots: Sequence[Shot]) -> np.ndarray:
        shown = to_pixels([shot.image for shot in shots])
        regions, named = subject_regions(shown, [without_identifier(shot.prompt, identifier) for shot in shots], noun)
        features = _unit((judge().features(shown, regions) - mean) / spread)
        unlike = (features @ wanted.T).mean(1) < _other_likeness(wanted, noun)
        features[~regions.flatten(1).any(1) | (~named & unlike)] = torch.nan
        return features.double().numpy()

    def drawn() -> list[Shot]:
        """The base's pictures in which the judge sees the class; the others are no standard."""
        shots = list(classes())
        prompts = [without_identifier(shot.prompt, identifier) for shot in shots]
        _, named = subject_regions(to_pixels([shot.image for shot in shots]), prompts, noun)
        return [shot for shot, there in zip(shots, named.tolist(), strict=True) if there]

    own = wanted.double().numpy()
    return Identity(name=MARGIN if margin else IDENTITY, look=look, own=own, classes=drawn, margin=margin)


def subject_regions(images: Tensor, prompts: Sequence[str], noun: str) -> tuple[Tensor, Tensor]:
    """Where the subject would be, (B, 32, 32) bool, and whether the judge sees its class there, (B,) bool.

    A subject need not look like its class to the judge: where it sees none, the largest region counts that is no other
    object of the prompt; it may be empty.

    Args:
        images: (B, 3, S, S), as the judge takes them.
        prompts: one a picture.
        noun: the subject's class.
    """
    label, seen = label_of(IDENTITY, noun), judge().segment(images)
    regions = seen == label
    named = regions.float().mean((1, 2)) > 0.01
    for number in (~named).nonzero().flatten().tolist():
        areas = torch.bincount(seen[number].flatten(), minlength=len(CLASSES) + 2) / seen[number].numel()
        areas[[0, *_other_labels(prompts[number], noun)]] = 0
        largest = int(areas.argmax())
        regions[number] = (seen[number] == largest) & (areas[largest] >= LEAST_AREA)
    return regions, named


def _other_labels(prompt: str, noun: str) -> list[int]:
    """Labels of the prompt's objects but one of the noun; none of a prompt outside the grammar."""
    try:
        said = [item.name for item in captions.parse_caption(prompt).nouns]
    except PocketError:
        return []
    return [list(CLASSES).index(name) + 1 for name in said if name != noun]


def class_iou(condition: Callable[[Shot], Image.Image], name: str = "class IoU") -> Measure:
    """Mean IoU over the classes of a condition in the palette's colors, at the judge's 32 x 32.

    Args:
        condition: the picture that a shot was conditioned on.
        name: of the metric.
    """

    def measure(shots: Sequence[Shot]) -> list[float]:
        seen = judge().segment([shot.image for shot in shots]).numpy()
        colors = scenes.palette().astype(int)
        values = []
        for shot, found in zip(shots, seen, strict=True):
            small = condition(shot).convert("RGB").resize(found.shape[::-1], Image.Resampling.NEAREST)
            wanted = np.abs(np.asarray(small, int)[:, :, None] - colors).sum(-1).argmin(-1)
            ious = [
                ((wanted == k) & (found == k)).sum() / ((wanted == k) | (found == k)).sum()
                for k in np.unique(wanted)[1:]
            ]
            values.append(float(np.mean(ious)) if ious else float("nan"))
        return values

    return Measure(name, True, measure)


def label_of(what: str, noun: str) -> int:
    """The judge's label of a class.

    Raises:
        TrainingError: the judge does not know the class; the message begins with ``what``.
    """
    require(noun in CLASSES, f"{what}: the pocket judge knows no {noun!r}; it knows {', '.join(CLASSES)}")
    return list(CLASSES).index(noun) + 1


def _stacked(masks: Sequence[np.ndarray]) -> Tensor:
    """(H, W) bool each, of any sizes, as shares (B, 64, 64): photos come in mixed sizes."""
    each = (torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None] for mask in masks)
    return torch.cat([torch.nn.functional.interpolate(mask, (SIZE, SIZE), mode="area") for mask in each])[:, 0]


@lru_cache(maxsize=1)
def _objects() -> tuple[Tensor, list[str]]:
    """The judge's features (256, D) of the first objects of held-out scenes, and their classes."""
    drawn = [scenes.sample(scenes.HELD_OUT_SEED, i) for i in range(256)]
    masks = torch.from_numpy(np.stack([scene.masks[0] for scene in drawn]))
    features = judge().features([Image.fromarray(scene.image) for scene in drawn], masks)
    return features, [scene.description.nouns[0].name for scene in drawn]


def _statistics() -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (D,) each, of the judge's features over the first objects of held-out scenes."""
    features, _ = _objects()
    return features.mean(0), features.std(0) + 1e-6


def _other_likeness(wanted: Tensor, noun: str) -> float:
    """The mean cosine to a subject's pictures that one in twenty objects of other classes exceeds.

    Args:
        wanted: (k, D) unit features of the subject's pictures.
        noun: the subject's class.
    """
    features, names = _objects()
    mean, spread = _statistics()
    others = features[torch.tensor([name != noun for name in names])]
    return float(torch.quantile((_unit((others - mean) / spread) @ wanted.T).mean(1), 0.95))


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)

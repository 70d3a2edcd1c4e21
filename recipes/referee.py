"""The pocket judge's answers as metrics for ``adapters``: does a picture keep its prompt, does it show the subject."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adapters.metrics import Measure
from adapters.sample import Shot
from training.pocket import judge, scenes
from training.pocket.fitting import pixels
from training.pocket.judging import to_pixels
from training.pocket.world import CLASSES

__all__ = ["PROMPT", "SUBJECT", "prompt_accuracy", "subject_similarity"]

PROMPT, SUBJECT = "prompt accuracy", "subject similarity"


def prompt_accuracy(identifier: str) -> Measure:
    """Share of what the prompt says (objects, colours, relation, background) that the judge sees.

    The identifier is left out of the prompt: a subject counts as what it is one of.
    """

    def measure(shots: Sequence[Shot]) -> list[float]:
        prompts = [" ".join(word for word in shot.prompt.split() if word != identifier) for shot in shots]
        return [score.mean for score in judge().scores([shot.image for shot in shots], prompts)]

    return Measure(PROMPT, True, measure)


def subject_similarity(folder: Path, name: str) -> Measure:
    """Mean cosine between the subject in a picture and in each reference of ``folder``, in the judge's features.

    Features are standardised over the objects of 256 drawn scenes, or the cosine of any two things would be near one.
    The region is where the judge sees the class ``name``; a picture in which it sees none scores 0.
    """
    mean, spread = _statistics()
    wanted = _unit((_references(folder) - mean) / spread)
    label = list(CLASSES).index(name) + 1

    def measure(shots: Sequence[Shot]) -> list[float]:
        images = to_pixels([shot.image for shot in shots])
        masks = judge().segment(images) == label
        features = _unit((judge().features(images, masks) - mean) / spread)
        there = masks.float().mean((1, 2)) > 0.01
        return ((features @ wanted.T).mean(1) * there).tolist()

    return Measure(SUBJECT, True, measure)


def _statistics() -> tuple[Tensor, Tensor]:
    drawn = [scenes.sample(scenes.HELD_OUT_SEED, i) for i in range(256)]
    masks = torch.from_numpy(np.stack([scene.masks[0] for scene in drawn]))
    features = judge().features(pixels(scene.image for scene in drawn), masks)
    return features.mean(0), features.std(0) + 1e-6


def _references(folder: Path) -> Tensor:
    paths = sorted(folder.glob("*.png"))
    masks = [np.asarray(Image.open(folder / "masks" / path.name).convert("L")) > 127 for path in paths]
    return judge().features([Image.open(path) for path in paths], torch.from_numpy(np.stack(masks)))


def _unit(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)

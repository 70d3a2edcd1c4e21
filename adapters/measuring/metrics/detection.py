"""Objects in a picture by OWLv2 (arXiv:2306.09683) or Grounding DINO (arXiv:2303.05499), and GenEval's protocol.

GenEval (arXiv:2310.11513): a picture is right where every thing of its prompt is there as often as it says, in the
color it says (CLIP decides, on the crop), and where things lie to each other as it says. The detector there is a
Mask2Former of COCO classes, so its published figures are not comparable with these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ...errors import FileError
from ...files import MAX_JSON, read_bytes
from ..sample import Shot
from .phrases import COLORS, Saying, Thing, said_in
from .pretrained import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Pretrained, normalized

__all__ = ["Box", "Detector", "ObjectAccuracy", "lies", "read_objects"]

LEAST = {"owlv2": 0.2, "grounding-dino": 0.3}
"""Score from which a box counts, by detector."""
OVERLAP, APART = 0.5, 0.1  # of two boxes of one thing; GenEval's share of the sizes that things must lie apart by


@dataclass(frozen=True, kw_only=True)
class Box:
    """Where a thing was found, in pixels."""

    score: float
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Intersection over union."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        both = max(width, 0) * max(height, 0)
        return both / max(self.area + other.area - both, 1e-9)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(kw_only=True)
class Detector(Pretrained):
    """Boxes of a thing by its name; one picture at a time."""

    kinds: Sequence[str] = tuple(LEAST)
    model_class: ClassVar[str] = "AutoModelForZeroShotObjectDetection"
    least: float | None = None
    """Score from which a box counts; null: the detector's of `LEAST`."""
    side: int = 800
    """Shorter side that Grounding DINO sees; OWLv2 has its own."""

    def __call__(self, image: Image.Image, noun: str) -> list[Box]:
        """What is found of it, best first, one box a thing."""
        with torch.no_grad():
            scores, boxes = (self._owl if self.config.model_type == "owlv2" else self._grounded)(
                image.convert("RGB"), noun
            )
        least = LEAST[self.config.model_type] if self.least is None else self.least
        found = [
            Box(
                score=float(score),
                left=max(float(x - w / 2), 0),
                top=max(float(y - h / 2), 0),
                right=min(float(x + w / 2), image.width),
                bottom=min(float(y + h / 2), image.height),
            )
            for score, (x, y, w, h) in zip(scores, boxes, strict=True)
            if score >= least
        ]
        kept: list[Box] = []
        for box in sorted(found, key=lambda box: -box.score):
            if box.area > 0 and all(box.overlap(other) < OVERLAP for other in kept):
                kept.append(box)
        return kept

    def _owl(self, image: Image.Image, noun: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (n,) and boxes (n, 4) in pixels: padded to a square at the right and below, as OWLv2 was trained."""
        side, size = max(image.size), self._model.config.vision_config.image_size
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(image)
        values = normalized([square.resize((size, size), Image.Resampling.BICUBIC)], CLIP_MEAN, CLIP_STD)
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            f"a photo of a {noun}", padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        found = self._model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=values.to(self.device)
        )
        return found.logits[0, :, 0].sigmoid().cpu(), found.pred_boxes[0].cpu() * side

    def _grounded(self, image: Image.Image, noun: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The same by Grounding DINO, whose prompt is small letters with a full stop."""
        scale = min(self.side / min(image.size), 1333 / 800 * self.side / max(image.size))
        small = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.BILINEAR)
        values = normalized([small], IMAGENET_MEAN, IMAGENET_STD).to(self.device)
        tokens = self._tokenizer(f"{noun.lower()}.", return_tensors="pt").to(self.device)
        found = self._model(pixel_values=values, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        words = slice(1, tokens.input_ids.shape[1] - 2)  # without [CLS], the full stop and [SEP]
        scores = found.logits[0].sigmoid()[:, words].max(-1).values
        return scores.cpu(), found.pred_boxes[0].cpu() * torch.tensor([image.width, image.height] * 2)


def lies(one: Box, other: Box) -> set[str]:
    """How one box lies to another, by GenEval's rule: of the centres, apart by more than a tenth of the sizes."""
    centre = np.array(
        [one.left + one.right - other.left - other.right, one.top + one.bottom - other.top - other.bottom]
    )
    gap = centre / 2
    sizes = np.array([one.right - one.left + other.right - other.left, one.bottom - one.top + other.bottom - other.top])
    left = np.maximum(np.abs(gap) - APART * sizes, 0) * np.sign(gap)
    if np.all(np.abs(left) < 1e-3):
        return set()
    x, y = left / np.linalg.norm(gap)
    told = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, is_so in told.items() if is_so}


def read_objects(file: Path) -> dict[str, Saying]:
    """Prompt -> what it says, from a file of GenEval's form: a line of JSON a prompt, with `prompt` and `include`.

    Raises:
        FileError: it is not that.
    """
    try:
        lines = read_bytes(file, MAX_JSON).decode("utf-8-sig").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        return {row["prompt"]: _saying(row["include"]) for row in rows}
    except (ValueError, RecursionError, KeyError, TypeError, IndexError) as error:
        raise FileError(f'{file} must have a line of JSON a prompt, with "prompt" and "include" ({error!r})') from error


def _saying(include: Sequence[Mapping[str, Any]]) -> Saying:
    things = tuple(Thing(noun=one["class"], count=one.get("count", 1), color=one.get("color")) for one in include)
    relations = tuple(
        (index, one["position"][0], int(one["position"][1])) for index, one in enumerate(include) if "position" in one
    )
    if any(not 0 <= other < len(things) for _, _, other in relations):
        raise ValueError(f"a position of {include} names a thing that is not there")
    return Saying(things=things, relations=relations)


@dataclass(frozen=True, kw_only=True)
class ObjectAccuracy:
    """Per picture 1 where everything that its prompt says of things is so, else 0; NaN where it says nothing."""

    detector: Detector
    clip: Any = None
    """`Clip` or `Siglip`, for colors; without it colors are not looked at."""
    objects: Mapping[str, Saying]
    """By the prompt that `prompt` gives; one that is not there is read by `phrases.said_in`."""
    prompt: Callable[[Shot], str] = lambda shot: shot.prompt
    name: str = "detected objects"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        return [
            self._right(shot.image, self.objects.get(self.prompt(shot)) or said_in(self.prompt(shot))) for shot in shots
        ]

    def _right(self, image: Image.Image, said: Saying) -> float:
        if not said.things:
            return float("nan")
        found = []
        for thing in said.things:
            boxes = self.detector(image, thing.noun)
            if thing.color is not None and self.clip is not None:
                boxes = [box for box in boxes if self._color(image, box, thing) == thing.color]
            # A thing is counted exactly where a number is said, and is there or not where it is "a" thing.
            if len(boxes) != thing.count if thing.count > 1 else not boxes:
                return 0.0
            found.append(boxes)
        return float(all(how in lies(found[one][0], found[other][0]) for one, how, other in said.relations))

    def _color(self, image: Image.Image, box: Box, thing: Thing) -> str:
        crop = image.crop(
            (
                int(box.left),
                int(box.top),
                max(int(box.right), int(box.left) + 1),
                max(int(box.bottom), int(box.top) + 1),
            )
        )
        texts = [f"a photo of a {color} {thing.noun}" for color in COLORS]
        normal = torch.nn.functional.normalize
        return COLORS[int((normal(self.clip.text(texts), dim=1) @ normal(self.clip([crop]), dim=1)[0]).argmax())]

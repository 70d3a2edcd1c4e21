"""The judge: a small network that says what stands in a pocket picture, where, in which color and before what.

It was fitted on drawn scenes, never on samples of the model it judges, and with near misses (blobs of the right color,
halves, mixtures, smears) that count as "none of these", so that it is hard to please.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .captions import Description, parse_caption
from .world import BACKGROUNDS, CLASSES, COLORS, RELATIONS

__all__ = ["NEAR_MISS", "Found", "Judge", "Score", "Seen", "score_agreement", "to_pixels"]

NEAR_MISS = len(CLASSES) + 1  # per-pixel classes: 0 background, 1..K the classes, K + 1 "none of these"
LEAST_AREA = 0.02  # of the picture: what is smaller is not an object
AT_ONCE = 16  # pictures whose features fit a CPU's caches; 400 together take half a gigabyte and half as long again


@dataclass(frozen=True, kw_only=True)
class Found:
    """One object seen. ``area``, ``centre`` (x, y) in fractions of the picture; ``color`` of ``world.COLORS``."""

    area: float
    centre: tuple[float, float]
    color: str


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the judge sees in one picture."""

    objects: dict[str, Found]
    background: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """How far a picture keeps its prompt: fractions of the said objects and colors; relation, background (1 or 0).

    None where the prompt says nothing of the kind. A color counts only on an object that is there.
    """

    objects: float | None
    colors: float | None
    relation: float | None
    background: float | None

    @property
    def whole(self) -> float:
        """1 if everything said is right, else 0."""
        said = (self.objects, self.colors, self.relation, self.background)
        return float(all(value is None or value == 1 for value in said))

    @property
    def mean(self) -> float:
        """Mean over what is said; NaN where nothing is."""
        said = [value for value in (self.objects, self.colors, self.relation, self.background) if value is not None]
        return sum(said) / len(said) if said else float("nan")


def to_pixels(images: Sequence[Image.Image] | Tensor, size: int = 64) -> Tensor:
    """PIL pictures, or a tensor (B, 3, H, W) in [-1, 1], as (B, 3, size, size) in [-1, 1]."""
    if not isinstance(images, Tensor):
        arrays = [np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)) for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return images


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def _down(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(_conv(inside, outside, 2), _conv(outside, outside))


class Judge(nn.Module):
    """A U-shaped network on 64 x 64 pictures; per-pixel answers at 32 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 24)
        self.down32 = _down(24, 48)
        self.down16 = _down(48, 96)
        self.down8 = _down(96, 160)
        self.up16 = _conv(160 + 96, 64)
        self.up32 = _conv(64 + 48, 48)
        self.classes = nn.Conv2d(48, NEAR_MISS + 1, 1)
        self.colors = nn.Conv2d(48, len(COLORS), 1)
        self.present = nn.Conv2d(160, len(CLASSES), 1)
        self.background = nn.Linear(2 * 160, len(BACKGROUNDS))

    def levels(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, 48, 32, 32), (B, 96, 16, 16), (B, 160, 8, 8) of ``images`` (B, 3, 64, 64) in [-1, 1]."""
        x32 = self.down32(self.stem(images))
        x16 = self.down16(x32)
        return x32, x16, self.down8(x16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """``present`` (B, K), ``background`` (B, 8), ``classes`` (B, K + 2, 32, 32), ``colors`` (B, 6, 32, 32)

        An object is present where the surest place in the picture says so: averaged over the picture, small ones drown.
        """
        x32, x16, x8 = self.levels(images)
        pooled = torch.cat([x8.mean((2, 3)), x8.amax((2, 3))], dim=1)
        y16 = self.up16(torch.cat([F.interpolate(x8, scale_factor=2.0), x16], dim=1))
        y32 = self.up32(torch.cat([F.interpolate(y16, scale_factor=2.0), x32], dim=1))
        return {
            "present": self.present(x8).amax((2, 3)),
            "background": self.background(pooled),
            "classes": self.classes(y32),
            "colors": self.colors(y32),
        }

    def _batches(self, images: Sequence[Image.Image] | Tensor) -> Iterator[Tensor]:
        """The pictures as the network takes them, (B, 3, 64, 64), at most `AT_ONCE` together."""
        for start in range(0, max(len(images), 1), AT_ONCE):
            yield to_pixels(images[start : start + AT_ONCE]).to(self.present.weight)

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image] | Tensor) -> list[Seen]:
        """What is in each picture. An object needs both heads: named as present, and an area of pixels of its own."""
        return [seen for batch in self._batches(images) for seen in self._look(batch)]

    def _look(self, pixels: Tensor) -> list[Seen]:
        said = self(pixels)
        present = said["present"].sigmoid() > 0.5
        winners = said["classes"].argmax(1)
        seen = []
        for i in range(len(winners)):
            objects = {}
            for k, name in enumerate(CLASSES):
                mask = winners[i] == k + 1
                if present[i, k] and mask.float().mean() >= LEAST_AREA:
                    objects[name] = _found(mask, said["colors"][i])
            seen.append(Seen(objects=objects, background=list(BACKGROUNDS)[said["background"][i].argmax()]))
        return seen

    def scores(self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str]) -> list[Score]:
        """How far each picture keeps its prompt (in the scene grammar, see ``captions.parse_caption``)."""
        return [
            score_agreement(seen, parse_caption(prompt))
            for seen, prompt in zip(self.look(images), prompts, strict=True)
        ]

    @torch.no_grad()
    def segment(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """Per-pixel class (B, 32, 32): 0 background, k + 1 the k-th class, ``NEAR_MISS`` something else."""
        return torch.cat([self(batch)["classes"].argmax(1) for batch in self._batches(images)])

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image] | Tensor, masks: Tensor | None = None) -> Tensor:
        """Descriptors (B, 448) for distances between sets and likeness of subjects.

        Mean and spread of the two lower levels, mean of the top one.

        ``masks`` (B, H, W) bool limits them to a region of each picture.
        """
        found = []
        for number, batch in enumerate(self._batches(images)):
            own = None if masks is None else masks[number * AT_ONCE : (number + 1) * AT_ONCE]
            found.append(self._features(batch, own))
        return torch.cat(found)

    def _features(self, pixels: Tensor, masks: Tensor | None) -> Tensor:
        parts = []
        for level, spread in zip(self.levels(pixels), (True, True, False), strict=True):
            weight = torch.ones_like(level[:, :1])
            if masks is not None:
                weight = F.interpolate(masks[:, None].to(level), level.shape[-2:], mode="area") + 1e-6
            weight = weight / weight.sum((2, 3), keepdim=True)
            mean = (level * weight).sum((2, 3))
            parts.append(mean)
            if spread:
                parts.append(((level - mean[..., None, None]).square() * weight).sum((2, 3)).sqrt())
        return torch.cat(parts, dim=1)


def _found(mask: Tensor, colors: Tensor) -> Found:
    """``mask`` (H, W) bool of one object and the color logits (6, H, W) of its picture."""
    height, width = mask.shape
    rows, columns = mask.nonzero(as_tuple=True)
    centre = ((columns.float().mean().item() + 0.5) / width, (rows.float().mean().item() + 0.5) / height)
    votes = colors[:, mask].softmax(0).mean(1)
    return Found(area=mask.float().mean().item(), centre=centre, color=list(COLORS)[votes.argmax()])


def score_agreement(seen: Seen, said: Description, *, without: str | None = None) -> Score:
    """How far ``seen`` keeps ``said``; ``without`` a class, its object and the relation to it do not count."""
    nouns = [noun for noun in said.nouns if noun.name != without]
    there = [noun.name in seen.objects for noun in nouns]
    colored = [noun for noun in nouns if noun.color]
    right = [noun.name in seen.objects and seen.objects[noun.name].color == noun.color for noun in colored]
    relation = None
    if said.relation and without is None:
        relation = 0.0
        if all(there):
            (x1, y1), (x2, y2) = (seen.objects[noun.name].centre for noun in said.nouns)
            dx, dy = RELATIONS[said.relation]
            relation = float(dx * (x1 - x2) + dy * (y1 - y2) > 0)
    return Score(
        objects=sum(there) / len(there) if there else None,
        colors=sum(right) / len(right) if right else None,
        relation=relation,
        background=float(seen.background == said.background) if said.background else None,
    )

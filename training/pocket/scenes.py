"""Scenes with exact ground truth: a picture, its caption and a mask of every object, as a function of (seed, index).

Nothing is stored, so any split is reproducible: held-out scenes are simply another seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from . import backgrounds
from .captions import Description, Noun, parse_caption, write_caption
from .sprites import sprite
from .world import BACKGROUNDS, CLASSES, COLORS, RELATIONS, SIZE, TINTABLE

__all__ = ["HELD_OUT_SEED", "TRAIN_SEED", "Placed", "Scene", "from_prompt", "palette", "render_objects", "sample"]

TRAIN_SEED, HELD_OUT_SEED = 1, 2

# What the base is fitted on: the side by the number of objects and the step between their corners, as fractions of the
# picture; no mirror images. A step is a cell of the U-net's coarsest level, so that a drawing has the same latents
# wherever it stands, at every level: far less is left to learn.
SIDE = {1: 0.75, 2: 0.5, 3: 0.5}
GRID = 0.25
# Free scenes: smallest and largest side by the number of objects, anywhere, half of them mirrored.
FREE_SIDES = {1: (0.55, 0.80), 2: (0.42, 0.54), 3: (0.33, 0.42)}


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One object where it stands: ``side`` in pixels, (``x``, ``y``) its top left corner."""

    noun: Noun
    side: int
    x: int
    y: int
    flip: bool

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.side / 2, self.y + self.side / 2


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: (S, S, 3) uint8.
        caption: its description in words.
        description: the same as values.
        objects: where everything stands, in the caption's order.
        masks: (number of objects, S, S) bool, the visible pixels of each object.
    """

    image: np.ndarray = field(repr=False)
    caption: str
    description: Description
    objects: tuple[Placed, ...]
    masks: np.ndarray = field(repr=False)

    @property
    def classes(self) -> np.ndarray:
        """Per-pixel class (S, S) uint8: 0 the background, k + 1 the k-th of ``world.CLASSES``."""
        names = list(CLASSES)
        out = np.zeros(self.masks.shape[1:], np.uint8)
        for placed, mask in zip(self.objects, self.masks, strict=True):
            out[mask] = names.index(placed.noun.name) + 1
        return out


def sample(seed: int, index: int, size: int = SIZE, look: str = "noto", free: bool = False) -> Scene:
    """The ``index``-th scene of the split ``seed``: 50 % one object, 40 % two, 10 % three; the same in every look.

    ``free``: objects of many sides, anywhere, half of them mirrored: what the VAE and the judge are fitted on, which so
    know more than the base is shown.

    Args:
        seed: of the split.
        index: of the scene in the split.
        size: side in pixels.
        look: drawing style, see `sprites.LOOKS`.
        free: as above.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, index]))
    count = int(rng.choice(3, p=(0.5, 0.4, 0.1))) + 1
    names = rng.choice(len(CLASSES), count, replace=False)
    nouns = tuple(_noun(list(CLASSES)[i], rng) for i in names)
    relation = list(RELATIONS)[rng.integers(len(RELATIONS))] if count == 2 and rng.random() < 0.5 else None
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    return _scene(Description(nouns=nouns, relation=relation, background=background), rng, size, look=look, free=free)


def from_prompt(prompt: str, seed: int, size: int = SIZE) -> Scene:
    """A true picture of ``prompt`` (see ``parse_caption``); what the prompt leaves open is drawn from ``seed``.

    Args:
        prompt: in the words of the base's world.
        seed: of what the prompt leaves open.
        size: side in pixels.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, len(prompt)]))
    said = parse_caption(prompt)
    if said.background is None:
        said = Description(nouns=said.nouns, relation=said.relation, background=str(rng.choice(list(BACKGROUNDS))))
    return _scene(said, rng, size, caption=prompt)


def _noun(name: str, rng: np.random.Generator) -> Noun:
    tinted = name in TINTABLE and rng.random() < 0.6
    return Noun(name=name, color=str(rng.choice(list(COLORS))) if tinted else None)


def _scene(
    said: Description,
    rng: np.random.Generator,
    size: int,
    caption: str | None = None,
    look: str = "noto",
    free: bool = False,
) -> Scene:
    objects = _place(said, rng, size, free)
    if caption is None:
        silent = rng.random() < 0.06  # some captions leave the background out
        words = Description(nouns=said.nouns, relation=said.relation, background=None if silent else said.background)
        caption = write_caption(words, rng)
    assert said.background is not None
    image, masks = render_objects(backgrounds.draw_background(said.background, size, rng), objects, look)
    return Scene(image=image, caption=caption, description=said, objects=objects, masks=masks)


def _place(said: Description, rng: np.random.Generator, size: int, free: bool) -> tuple[Placed, ...]:
    """Positions that keep the said relation and hardly overlap: random tries, the least overlapping one wins."""
    count = len(said.nouns)
    low, high = (round(fraction * size) for fraction in FREE_SIDES[count])
    side, grid = round(SIDE[count] * size), round(GRID * size)
    best: tuple[Placed, ...] = ()
    least = np.inf
    for _ in range(12):
        if free:
            sides = rng.integers(low, high + 1, count)
            corners = [rng.integers(0, size - side + 1, 2) for side in sides]
        else:
            sides = np.full(count, side)
            corners = [grid * rng.integers(0, (size - side) // grid + 1, 2) for side in sides]
        if said.relation:
            corners = _related(RELATIONS[said.relation], sides, size, rng)
        if not free:
            corners = [corner // grid * grid for corner in corners]
        flips = rng.random(count) < (0.5 if free else 0)
        tried = tuple(
            Placed(noun=noun, side=int(side), x=int(corner[0]), y=int(corner[1]), flip=bool(flip))
            for noun, side, corner, flip in zip(said.nouns, sides, corners, flips, strict=True)
        )
        overlap = sum(_overlap(a, b) for i, a in enumerate(tried) for b in tried[:i])
        if overlap < least:
            best, least = tried, overlap
        if least < 0.06:
            break
    return best


def _related(step: tuple[int, int], sides: np.ndarray, size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Corners of two objects, the first ``step`` away from the second and the other axis nearly shared."""
    axis = 0 if step[0] else 1
    first, second = sides if step[axis] < 0 else sides[::-1]  # in order along the axis
    free = max(size - first - second, 0)
    start = int(rng.integers(0, free // 2 + 1))
    end = int(rng.integers(0, free - start + 1))
    along = np.array([start, size - second - end])
    if step[axis] > 0:
        along = along[::-1]
    middle = rng.uniform(0.35, 0.65) * size
    corners = []
    for side, position in zip(sides, along, strict=True):
        across = np.clip(middle + rng.uniform(-0.08, 0.08) * size - side / 2, 0, size - side)
        corner = np.empty(2, int)
        corner[axis], corner[1 - axis] = np.clip(position, 0, size - side), across
        corners.append(corner)
    return corners


def _overlap(a: Placed, b: Placed) -> float:
    """Shared area of two boxes over the smaller one's."""
    width = min(a.x + a.side, b.x + b.side) - max(a.x, b.x)
    height = min(a.y + a.side, b.y + b.side) - max(a.y, b.y)
    return max(width, 0) * max(height, 0) / min(a.side, b.side) ** 2


def render_objects(
    background: np.ndarray, objects: tuple[Placed, ...], look: str = "noto"
) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``objects`` onto ``background`` (S, S, 3) float32: the picture (S, S, 3) uint8, masks (n, S, S) bool.

    Args:
        background: (S, S, 3) float32 in [0, 1].
        objects: later ones cover earlier ones.
        look: drawing style, see `sprites.LOOKS`.
    """
    layers = []
    for placed in objects:
        color, alpha = sprite(placed.noun.name, placed.noun.color, placed.side, look)
        layers.append((color[:, ::-1], alpha[:, ::-1]) if placed.flip else (color, alpha))
    return paste_layers(background, layers, [(placed.x, placed.y) for placed in objects])


def paste_layers(
    background: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]], corners: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Lay premultiplied (color, alpha) drawings over ``background`` at their ``corners``; see ``render_objects``.

    Args:
        background: (S, S, 3) float32 in [0, 1].
        layers: color (h, w, 3) and alpha (h, w, 1) of each drawing, float32 in [0, 1].
        corners: (x, y) of each drawing's upper left corner in pixels.
    """
    image = background.copy()
    masks = np.zeros((len(layers), *image.shape[:2]), bool)
    for i, ((color, alpha), (x, y)) in enumerate(zip(layers, corners, strict=True)):
        window = (slice(y, y + alpha.shape[0]), slice(x, x + alpha.shape[1]))
        image[window] = image[window] * (1 - alpha) + color
        solid = alpha[..., 0] > 0.5
        masks[:i, *window] &= ~solid
        masks[i, *window] = solid
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8), masks


def palette() -> np.ndarray:
    """Colors (classes + 1, 3) uint8 of the segmentation condition: black background, then evenly spread hues."""
    count = len(CLASSES)
    hsv = np.zeros((1, count + 1, 3), np.float32)
    hsv[0, 1:, 0] = np.arange(count) * 360 / count
    hsv[0, 1:, 1] = np.where(np.arange(count) % 2, 0.55, 1.0)
    hsv[0, 1:, 2] = np.where(np.arange(count) % 3, 1.0, 0.65)
    colors: np.ndarray = np.rint(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0] * 255).astype(np.uint8)
    return colors

"""Fit the judge on drawn scenes in which some objects are replaced by near misses, and report what it gets right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .. import scenes
from ..judging import NEAR_MISS, Judge
from ..sprites import sprite
from ..world import BACKGROUNDS, CLASSES, COLORS
from .fitting import FitAverage, MuonAdamW, image_batch, learning_rate, load_state, save_state, seeded

__all__ = ["accuracy", "fit"]

SEED = 3  # a split of its own
NEAR = 0.3  # the share of objects that become near misses
OTHER_LOOK = (
    0.35  # the share of pictures in the second look: a dog stays a dog when personalization draws it differently
)
GRID = 32
SAVE_EVERY = 250


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Truth of a batch: (B, K), (B,), (B, 32, 32), (B, 32, 32); color -1 where no color was said."""

    present: Tensor
    background: Tensor
    classes: Tensor
    colors: Tensor


def fit(out: Path, *, steps: int = 3200, batch: int = 32, peak: float = 0.02, device: str = "cpu") -> Judge:
    """Fit for ``steps`` and return the averaged judge; continues from ``out/state.safetensors`` where that is.

    Args:
        out: receives the state.
        steps: in all, also those of earlier runs.
        batch: scenes of a step.
        peak: learning rate at the top of the schedule.
        device: such as "cpu" or "cuda".
    """
    torch.manual_seed(SEED)
    judge = Judge().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = MuonAdamW([judge], peak)
    ema = FitAverage(judge, 0.998)
    state = out / "state.safetensors"
    begin = load_state(state, {"judge": judge}, {"judge": ema}, optimizer) if state.exists() else 0
    bar = tqdm(range(begin, steps), initial=begin, total=steps, desc="judge", mininterval=10)
    for step in bar:
        images, labels = _batch(SEED, range(step * batch, (step + 1) * batch))
        optimizer.set_rate(learning_rate(step, steps, peak))
        images = _spoil(images, seeded(SEED, step)).to(device, memory_format=torch.channels_last)
        loss = _loss(judge(images), labels, device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(judge, step)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(state, {"judge": judge}, {"judge": ema}, optimizer, step + 1)
            bar.write(f"step {step + 1} loss {loss.item():.4f} {accuracy(_averaged(ema, device), 256)}")
    return _averaged(ema, device)


def _averaged(ema: FitAverage, device: str) -> Judge:
    judge = Judge()
    judge.load_state_dict(ema.average)
    return judge.to(device).eval()


def _loss(said: dict[str, Tensor], truth: Labels, device: str) -> Tensor:
    colored = truth.colors >= 0
    loss = 2 * F.binary_cross_entropy_with_logits(said["present"], truth.present.to(device))
    loss = loss + 0.3 * F.cross_entropy(said["background"], truth.background.to(device))
    loss = loss + F.cross_entropy(said["classes"], truth.classes.to(device))
    if colored.any():
        chosen = said["colors"].permute(0, 2, 3, 1)[colored.to(device)]
        loss = loss + 0.5 * F.cross_entropy(chosen, truth.colors[colored].to(device))
    return loss


def _batch(seed: int, indices: range) -> tuple[Tensor, Labels]:
    drawn = [_example(seed, i) for i in indices]
    images, present, background, classes, colors = zip(*drawn, strict=True)
    labels = Labels(
        present=torch.from_numpy(np.stack(present)),
        background=torch.tensor(background),
        classes=torch.from_numpy(np.stack(classes)),
        colors=torch.from_numpy(np.stack(colors)),
    )
    return image_batch(images), labels


def _example(seed: int, index: int) -> tuple[np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]:
    """One picture with its labels; every object is a near miss with probability ``NEAR``."""
    scene = scenes.sample(seed, index, free=True)
    rng = np.random.Generator(np.random.Philox(key=[seed, index + (1 << 40)]))
    near = rng.random(len(scene.objects)) < NEAR
    look = "fluent" if rng.random() < OTHER_LOOK else "noto"
    layers = []
    for placed, miss in zip(scene.objects, near, strict=True):
        # The second look keeps its own colors: in many of its drawings no one hue is the object's.
        color = placed.noun.color if look == "noto" else None
        layer = sprite(placed.noun.name, color, placed.side, look)
        layer = (layer[0][:, ::-1], layer[1][:, ::-1]) if placed.flip else layer
        layers.append(_near_miss(layer, rng) if miss else layer)
    assert scene.description.background is not None
    canvas = scenes.backgrounds.draw_background(scene.description.background, scene.image.shape[0], rng)
    image, masks = scenes.paste_layers(canvas, layers, [(placed.x, placed.y) for placed in scene.objects])
    names, tints = list(CLASSES), list(COLORS)
    present = np.zeros(len(names), np.float32)
    classes = np.zeros(masks.shape[1:], np.int64)
    colors = np.full(masks.shape[1:], -1, np.int64)
    for placed, mask, miss in zip(scene.objects, masks, near, strict=True):
        k = names.index(placed.noun.name)
        classes[mask] = NEAR_MISS if miss else k + 1
        if not miss:
            present[k] = 1
            if placed.noun.color and look == "noto":
                colors[mask] = tints.index(placed.noun.color)
    step = image.shape[0] // GRID
    background = list(BACKGROUNDS).index(scene.description.background)
    return image, present, background, classes[::step, ::step], colors[::step, ::step]


def _near_miss(layer: tuple[np.ndarray, np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A drawing no careful eye would name: a blob of its color, a half, a mixture of two, a smear, a jumble."""
    color, alpha = layer
    side = len(alpha)
    kind = rng.integers(5)
    if kind == 0:
        mean = (color.sum((0, 1)) / max(alpha.sum(), 1)).astype(np.float32)
        blob = np.zeros((side, side), np.float32)
        middle, axes = (
            (side // 2, side // 2),
            (int(side * rng.uniform(0.25, 0.48)), int(side * rng.uniform(0.25, 0.48))),
        )
        cv2.ellipse(blob, middle, axes, float(rng.uniform(0, 180)), 0, 360, 1.0, -1)
        return blob[..., None] * mean, blob[..., None]
    if kind == 1:
        keep = np.zeros_like(alpha)
        cut = int(side * rng.uniform(0.35, 0.5))
        window = [slice(None), slice(None)]
        window[rng.integers(2)] = slice(cut) if rng.random() < 0.5 else slice(side - cut, None)
        keep[tuple(window)] = 1
        return color * keep, alpha * keep
    if kind == 2:
        name = list(CLASSES)[rng.integers(len(CLASSES))]
        other = sprite(name, None, side)
        half = np.zeros_like(alpha)
        half[:, : side // 2] = 1
        half = half if rng.random() < 0.5 else half.transpose(1, 0, 2)
        return color * half + other[0][::-1] * (1 - half), alpha * half + other[1][::-1] * (1 - half)
    if kind == 3:
        sigma = side * rng.uniform(0.12, 0.2)
        smeared = cv2.GaussianBlur(np.concatenate([color, alpha], axis=2), (0, 0), sigma)
        return smeared[..., :3], smeared[..., 3:]
    grid = rng.random((2, 4, 4)).astype(np.float32) - 0.5
    shift = [cv2.resize(plane, (side, side), interpolation=cv2.INTER_CUBIC) * side * 0.9 for plane in grid]
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    jumbled = cv2.remap(np.concatenate([color, alpha], axis=2), x + shift[0], y + shift[1], cv2.INTER_LINEAR)
    return jumbled[..., :3], jumbled[..., 3:]


def _spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """What a VAE or a sampler may do to a good picture: a light blur, jitter of contrast and color, faint noise."""
    count = len(images)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    images = torch.lerp(images, soft, torch.rand(count, 1, 1, 1, generator=generator) * 0.8)
    gain = 1 + 0.16 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5) * torch.tensor([1.0, 0.6, 1.0]).view(
        3, 1, 1
    )
    offset = 0.12 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    noise = torch.randn(images.shape, generator=generator) * 0.05 * torch.rand(count, 1, 1, 1, generator=generator)
    return (images * gain + offset + noise).clamp(-1, 1)


@torch.no_grad()
def accuracy(
    judge: Judge, count: int = 1000, seed: int = scenes.HELD_OUT_SEED, change: Callable[[Tensor], Tensor] | None = None
) -> dict[str, float]:
    """On ``count`` held-out scenes: objects found, pictures with nothing missed or invented (``exact``), colors,
    backgrounds and pixels right; pictures with near misses in which one was taken for an object (``fooled``).

    ``change`` (say, a VAE round trip) maps the pictures (B, 3, S, S) first.

    Args:
        judge: in evaluation mode.
        count: scenes.
        seed: of the split.
        change: (B, 3, S, S) -> the same; None: pictures as they are.
    """
    tally = {name: [0.0, 0] for name in ("objects", "exact", "colors", "backgrounds", "pixels", "fooled")}

    def add(name: str, right: float, of: int) -> None:
        tally[name][0] += right
        tally[name][1] += of

    for start in range(0, count, 32):
        drawn = [scenes.sample(seed, i, free=True) for i in range(start, min(start + 32, count))]
        images = image_batch(scene.image for scene in drawn)
        images = images if change is None else change(images)
        where = judge.segment(images).cpu().numpy()
        for scene, seen, classes in zip(drawn, judge.look(images), where, strict=True):
            said = [placed.noun for placed in scene.objects]
            found = [noun.name in seen.objects for noun in said]
            add("objects", sum(found), len(found))
            add("exact", all(found) and len(seen.objects) == len(said), 1)
            for noun in said:
                if noun.color and noun.name in seen.objects:
                    add("colors", seen.objects[noun.name].color == noun.color, 1)
            add("backgrounds", seen.background == scene.description.background, 1)
            add("pixels", (classes == scene.classes[::2, ::2]).mean(), 1)
        images, labels = _batch(seed, range(start, min(start + 32, count)))
        images = images if change is None else change(images)
        for seen, truth, present in zip(judge.look(images), labels.classes, labels.present, strict=True):
            if (truth == NEAR_MISS).any():
                add("fooled", len(seen.objects) > int(present.sum()), 1)
    return {name: round(right / of, 4) for name, (right, of) in tally.items() if of}

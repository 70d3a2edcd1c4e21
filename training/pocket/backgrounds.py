"""The eight backgrounds, drawn: gradients, soft noise, a little structure; of pixel noise only what a VAE can keep."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["draw_background"]


def draw_background(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Background ``name`` as (size, size, 3) float32 in [0, 1].

    Args:
        name: one of `world.BACKGROUNDS`.
        size: side in pixels.
        rng: decides shapes, brightness and grain.
    """
    image = _PAINTERS[name](size, rng)
    image *= 1 + 0.06 * (rng.random() - 0.5)
    image += rng.standard_normal((size, size, 1), dtype=np.float32) * 0.006
    return np.clip(image, 0, 1, out=image)


def _gradient(size: int, top: tuple[float, ...], bottom: tuple[float, ...]) -> np.ndarray:
    ramp = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    return np.broadcast_to(
        (1 - ramp) * np.array(top, np.float32) + ramp * np.array(bottom, np.float32), (size, size, 3)
    ).copy()


def _clouds(size: int, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Soft noise (size, size, 1) of about unit range with ``rows`` x ``columns`` features."""
    coarse = rng.random((rows, columns), dtype=np.float32) - 0.5
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]


def _grass(size: int, rng: np.random.Generator) -> np.ndarray:
    image = _gradient(size, (0.46, 0.74, 0.30), (0.28, 0.56, 0.18))
    return image * (1 + 0.30 * _clouds(size, rng, 5, 5) + 0.16 * _clouds(size, rng, 10, 26))


def _sea(size: int, rng: np.random.Generator) -> np.ndarray:
    image = _gradient(size, (0.30, 0.66, 0.82), (0.05, 0.33, 0.58))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    waves = np.sin(
        2 * np.pi * (y * rng.uniform(5, 7) + 0.12 * np.sin(2 * np.pi * (x * 2 + rng.random())) + rng.random())
    )
    painted: np.ndarray = image + 0.05 * waves[..., None] + 0.06 * _clouds(size, rng, 4, 4)
    return painted


def _sky(size: int, rng: np.random.Generator) -> np.ndarray:
    image = _gradient(size, (0.42, 0.70, 0.95), (0.75, 0.89, 0.99))
    mask = np.zeros((size, size), np.float32)
    for _ in range(rng.integers(2, 5)):
        x, y = rng.integers(0, size, 2)
        width = int(rng.integers(size // 8, size // 4))
        cv2.ellipse(mask, (int(x), int(y)), (width, max(2, width // 3)), 0, 0, 360, 0.85, -1)
    soft = cv2.GaussianBlur(mask, (0, 0), size / 40)[..., None]
    return image * (1 - soft) + soft


def _snow(size: int, rng: np.random.Generator) -> np.ndarray:
    image = _gradient(size, (0.80, 0.86, 0.93), (0.96, 0.97, 0.99))
    image += 0.08 * _clouds(size, rng, 4, 3)
    return _dots(image, rng, int(rng.integers(14, 24)), (1.0, 1.0, 1.0))


def _sand(size: int, rng: np.random.Generator) -> np.ndarray:
    image = _gradient(size, (0.93, 0.83, 0.62), (0.86, 0.72, 0.48))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    ripples = np.sin(2 * np.pi * (y * 7 + rng.uniform(1, 3) * x + 0.3 * np.sin(2 * np.pi * x + rng.random() * 6)))
    painted: np.ndarray = image * (1 + 0.035 * ripples[..., None] + 0.06 * _clouds(size, rng, 5, 5))
    return painted


def _night(size: int, rng: np.random.Generator) -> np.ndarray:
    image = _gradient(size, (0.04, 0.05, 0.17), (0.13, 0.13, 0.34))
    return _dots(image, rng, int(rng.integers(16, 28)), (0.95, 0.95, 0.80))


def _dots(image: np.ndarray, rng: np.random.Generator, count: int, color: tuple[float, ...]) -> np.ndarray:
    bright, size = np.array(color, np.float32), image.shape[0]
    for x, y in rng.integers(0, size, (count, 2)):
        strength = rng.uniform(0.35, 0.75)
        image[y, x] += strength * (bright - image[y, x])
        image[y, (x + 1) % size] += 0.3 * strength * (bright - image[y, (x + 1) % size])
    return image


def _brick(size: int, rng: np.random.Generator) -> np.ndarray:
    height, width = size // 6, size // 3
    image = np.empty((size, size, 3), np.float32)
    image[:] = (0.76, 0.60, 0.52)  # mortar; a paler one would be most of the VAE's error
    dy, dx = int(rng.integers(height)), int(rng.integers(width))
    for row in range(-1, size // height + 1):
        for column in range(-1, size // width + 2):
            x = column * width - (row % 2) * width // 2 - dx
            y = row * height + dy
            shade = 1 + 0.18 * (rng.random() - 0.5)
            brick = (0.64 * shade, 0.31 * shade, 0.23 * shade)
            cv2.rectangle(image, (x, y), (x + width - 2, y + height - 2), brick, -1)
    return image


def _wood(size: int, rng: np.random.Generator) -> np.ndarray:
    plank = size // 5
    image = np.empty((size, size, 3), np.float32)
    image[:] = (0.66, 0.44, 0.25)
    offset = int(rng.integers(plank))
    for y in range(-offset, size, plank):
        image[max(y, 0) : y + plank] *= 1 + 0.22 * (rng.random() - 0.5)
    image *= 1 + 0.14 * _clouds(size, rng, 22, 4)
    for y in range(plank - offset, size, plank):
        image[y] *= 0.6
    return image


_PAINTERS = {
    "grass": _grass,
    "sea": _sea,
    "sky": _sky,
    "snow": _snow,
    "sand": _sand,
    "night": _night,
    "brick": _brick,
    "wood": _wood,
}

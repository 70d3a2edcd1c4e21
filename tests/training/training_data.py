"""Small images for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

RESOLUTION = 32  # pixels; 8x8 latents at the tiny VAE's factor of 4


def picture(seed: int, size: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Image.Image:
    """Smooth random colors, (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def fill(folder: Path, count: int = 5, *, captions: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"{number}.png")
        if captions:
            (folder / f"{number}.txt").write_text(f"picture {'abcdefgh'[number % 8]}")
    return folder

"""What an inpainting U-net is trained to fill: random holes in a picture, and the picture without them.

Its nine channels are the noisy latents (4), the hole (1) and the latents of the picture with the hole in it (4). Holes
are a function of a seed: the whole picture, rectangles, or strokes of a brush.
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from .models import Parts, encode_images

__all__ = ["beside", "hole"]

WHOLE, RECTANGLES = 0.25, 0.4  # shares of the samples; the rest are strokes
WIDEST = 0.15  # of a stroke, in the picture's shorter side


def hole(seed: int, size: tuple[int, int]) -> Tensor:
    """1 where the network is to paint, else 0: (1, H, W) float32; never empty.

    Args:
        seed: decides everything.
        size: (H, W) in pixels.
    """
    (height, width), random = size, Random(seed)
    kind = random.random()
    if kind < WHOLE:
        return torch.ones(1, height, width)
    page = Image.new("L", (width, height), 0)
    pen = ImageDraw.Draw(page)
    if kind < WHOLE + RECTANGLES:
        for _ in range(random.randint(1, 3)):
            wide, high = (max(1, round(side * random.uniform(0.2, 0.8))) for side in (width, height))
            left, top = random.randint(0, width - wide), random.randint(0, height - high)
            pen.rectangle((left, top, left + wide - 1, top + high - 1), fill=255)
    else:
        for _ in range(random.randint(1, 4)):
            points = [(random.randrange(width), random.randrange(height)) for _ in range(random.randint(2, 6))]
            brush = max(1, round(min(height, width) * random.uniform(0.05, WIDEST)))
            pen.line(points, fill=255, width=brush, joint="curve")
    return torch.from_numpy(np.asarray(page, dtype=np.float32) / 255).round()[None]


@torch.no_grad()
def beside(parts: Parts, pixels: Tensor, holes: Tensor) -> Tensor:
    """What the U-net is given beside the noisy latents, (B, 1 + C, h, w): hole, and latents of the rest, their mean.

    Args:
        parts: the base, whose VAE encodes.
        pixels: (B, 3, H, W) in [-1, 1].
        holes: (B, 1, H, W), of `hole`.
    """
    latents, _ = encode_images(parts.vae, pixels * (1 - holes))  # 0 is grey, as in diffusers' pipelines
    return torch.cat([functional.interpolate(holes, latents.shape[-2:]).to(latents), latents], dim=1)

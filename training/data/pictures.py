"""Single images: opened, checked, made upright 8-bit RGB, and their edges."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["canny", "decode", "inspect", "rgb"]


def rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB: EXIF rotation applied, alpha laid over white, CMYK converted, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / (257.0 if values.max() > 255 else 1.0)).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def inspect(data: bytes, minimum: int) -> tuple[str | None, tuple[int, int]]:
    """Why an encoded image cannot be trained on (None if it can), and its upright size."""
    try:
        image = Image.open(io.BytesIO(data))
        if getattr(image, "n_frames", 1) > 1:
            return f"is animated ({getattr(image, 'n_frames', 0)} frames); save one frame", image.size
        image.load()
        size = ImageOps.exif_transpose(image).size
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"cannot be read ({error})", (0, 0)
    if min(size) < minimum:
        return f"is {size[0]}x{size[1]}, below data.minimum = {minimum} pixels", size
    return None, size


def canny(image: Image.Image) -> Image.Image:
    """Edges with controlnet-aux's thresholds (100, 200), at the image's own size.

    OpenCV is called directly, as controlnet-aux's detector does: its package imports torchvision for other detectors.
    """
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(rgb(image)), 100, 200)).convert("RGB")

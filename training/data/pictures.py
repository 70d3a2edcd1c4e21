"""Single images: opened, checked, made upright and 8-bit as a picture, a mask or a condition."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, features

__all__ = ["ADVICE", "SUFFIXES", "Look", "Role", "condition_as_rgb", "decode", "inspect", "mask", "rgb"]

Role = Literal["image", "mask", "conditioning"]


def _heif() -> bool:
    """Registers pillow-heif's reader, where it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except (ImportError, OSError):  # not there, or its library does not load
        return False
    register_heif_opener()
    return True


_PLAIN = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif",
          ".jp2", ".tga", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm")  # fmt: skip
_HEIF, _AVIF = (".heic", ".heif", ".hif"), (".avif",)
_HAS_HEIF, _HAS_AVIF = _heif(), bool(features.check("avif"))
SUFFIXES = (*_PLAIN, *(_HEIF if _HAS_HEIF else ()), *(_AVIF if _HAS_AVIF else ()))
"""Names of files that this installation reads."""
ADVICE = {
    **(
        {}
        if _HAS_HEIF
        else dict.fromkeys(_HEIF, "HEIC is read where pillow-heif is installed: pip install pillow-heif")
    ),
    **({} if _HAS_AVIF else dict.fromkeys(_AVIF, "AVIF needs pillow>=11.3 with its AVIF reader")),
}
"""What would make a left-out kind of picture readable, by suffix."""
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # elsewhere, further pictures are thumbnails, depth maps or pages


def decode(data: bytes) -> Image.Image:
    """The main picture of an encoded file, loaded: the first one, of a TIFF the largest page."""
    image = Image.open(io.BytesIO(data))
    if image.format == "TIFF" and (pages := getattr(image, "n_frames", 1)) > 1:
        areas = []
        for page in range(pages):
            image.seek(page)
            areas.append(image.width * image.height)
        image.seek(areas.index(max(areas)))
    image.load()
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, which is then gone: a damaged one that is written anew cannot be read again."""
    turned = ImageOps.exif_transpose(image)
    for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
        turned.info.pop(name, None)
    return turned


def rgb(image: Image.Image) -> Image.Image:
    """Upright 8-bit RGB: EXIF rotation applied, alpha laid over white, CMYK converted, 16 bits and floats scaled."""
    image = _upright(image)
    if _deep(image):
        image = _eight_bits(image)
    if _transparent(image):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def mask(image: Image.Image) -> Image.Image:
    """A mask as upright 8-bit grey, white where the subject is.

    Transparency: a black-and-white drawing is laid over black; of anything else the opaque part is the subject, as in a
    cut-out. A mask of two levels, the lower one 0, reaches up to 255 whatever number or color stood for the subject.
    """
    image = _upright(image)
    if _deep(image):
        values = np.asarray(_eight_bits(image, ones=True))
    elif _transparent(image):
        values = _opaque(image.convert("RGBA"))
    else:
        values = np.asarray(image.convert("L"))
    levels = np.unique(values)
    if len(levels) == 2 and levels[0] == 0:
        values = np.where(values > 0, 255, 0).astype(np.uint8)
    return Image.fromarray(values)


def condition_as_rgb(image: Image.Image) -> Image.Image:
    """A condition as upright 8-bit RGB; a map of more bits is scaled by its own finite range."""
    image = _upright(image)
    return (_own_range(np.asarray(image, np.float64)) if _deep(image) else rgb(image)).convert("RGB")


def _deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _eight_bits(image: Image.Image, *, ones: bool = False) -> Image.Image:
    """Floats up to 1 (with `ones`, whole numbers too), numbers up to 255 or up to 65535; others by their own range."""
    values = np.asarray(image, np.float64)
    top = values.max()
    if values.min() < 0 or top > 65535:
        return _own_range(values)
    scale = 1 / 257 if top > 255 else 255.0 if top <= 1 and (ones or image.mode == "F") else 1.0
    return Image.fromarray((values * scale).round().astype(np.uint8))


def _own_range(values: np.ndarray) -> Image.Image:
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    spread = (values.clip(low, high) - low) / max(high - low, np.finfo(np.float64).tiny) * 255
    return Image.fromarray(spread.round().astype(np.uint8))


def _opaque(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    alpha = values[..., 3]
    seen = values[alpha > 127][:, :3]
    white = (seen >= 247).all(axis=1)
    if alpha.min() == 255 or ((white | (seen <= 8).all(axis=1)).all() and white.any()):
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("L"))
    return alpha


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known of an encoded image before training."""

    problem: str | None = None
    """Why it cannot be used."""
    broken: bool = False
    """Whether nothing of it can be read."""
    size: tuple[int, int] = (0, 0)
    """Upright (width, height)."""
    deep: bool = False
    """Whether it has more than 8 bits."""
    full: bool = False
    """Whether it is a mask that marks everything alike."""


def inspect(data: bytes, minimum: int, role: Role = "image") -> Look:
    """Looks at an encoded image as training will read it; `minimum` is the shortest allowed side in pixels.

    Args:
        data: content of the file.
        minimum: shortest allowed side in pixels.
        role: whether it is read as a picture, a mask or a condition.

    Returns:
        Size and what is wrong; nothing is raised.
    """
    try:
        opened = Image.open(io.BytesIO(data))
        if opened.format in ANIMATED and (frames := getattr(opened, "n_frames", 1)) > 1:
            return Look(problem=f"is animated ({frames} frames); save one frame", size=opened.size)
        image = _upright(decode(data))
        problem, full = _unusable(image, role)
    except Exception as error:  # Pillow's readers raise many unrelated kinds on broken files
        return Look(problem=f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})", broken=True)
    if problem is None and min(image.size) < minimum:
        problem = f"is {image.width}x{image.height}, below data.minimum = {minimum} pixels"
    return Look(problem=problem, size=image.size, deep=_deep(image), full=full)


def _unusable(image: Image.Image, role: Role) -> tuple[str | None, bool]:
    if image.mode == "F":
        values = np.asarray(image)
        bad = ~np.isfinite(values) if role != "conditioning" else np.isnan(values)
        if bad.any():
            return f"has {int(bad.sum())} pixels that are NaN or infinite; fill them", False
        if not np.isfinite(values).any():
            return "has no finite pixel", False
    if role != "mask":
        return None, False
    low, high = mask(image).getextrema()
    if high == 0:
        return "is black all over, so nothing of its picture would count; white marks the subject", False
    return None, low == high

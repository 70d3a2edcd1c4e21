"""The atlas of drawn objects in two looks: load, tint, and the lookup of a class in a look, color and size.

The base is fitted on the look "noto" alone; "fluent" is for what it must never have seen: subjects to personalize.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from .errors import PocketError
from .world import COLORS

__all__ = ["CELL", "LOOKS", "scaled", "sprite", "tint"]

DATA = Path(__file__).parent / "data"
CELL = 128  # pixels a side of one drawing in the atlas
LOOKS = ("noto", "fluent")


@lru_cache(maxsize=1)
def _atlas() -> dict[tuple[str, str], np.ndarray]:
    from adapters.files import read_json  # not above: it brings torch

    sheet = cv2.imread(str(DATA / "atlas.webp"), cv2.IMREAD_UNCHANGED)
    if sheet is None:
        raise PocketError(f"the sprite atlas {DATA / 'atlas.webp'} is missing or unreadable; reinstall the package")
    sheet = cv2.cvtColor(sheet, cv2.COLOR_BGRA2RGBA)
    names = read_json(DATA / "atlas.json")["names"]
    columns = sheet.shape[1] // CELL
    cells = {}
    for index, key in enumerate((look, name) for look in LOOKS for name in names):
        row, column = divmod(index, columns)
        cells[key] = sheet[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
    return cells


def tint(rgba: np.ndarray, color: str) -> np.ndarray:
    """``rgba`` (H, W, 4) uint8 with its main hue replaced by ``color``; shading and other hues stay."""
    hue, saturation, value = COLORS[color]
    hsv = cv2.cvtColor(rgba[..., :3].astype(np.float32) / 255, cv2.COLOR_RGB2HSV)  # degrees, [0, 1], [0, 1]
    vivid = (hsv[..., 1] > 0.22) & (hsv[..., 2] > 0.25) & (rgba[..., 3] > 128)
    votes, edges = np.histogram(hsv[..., 0][vivid], bins=36, range=(0, 360), weights=hsv[..., 1][vivid])
    main = edges[(votes + np.roll(votes, 1) + np.roll(votes, -1)).argmax()] + 5
    apart = np.abs((hsv[..., 0] - main + 180) % 360 - 180)
    body = (apart < 40) & (hsv[..., 1] > 0.15) & (hsv[..., 2] > 0.2) & (rgba[..., 3] > 0)
    bright = np.percentile(hsv[..., 2][body & (rgba[..., 3] > 128)], 85)
    relative = np.clip(hsv[..., 2] / bright, 0, 1.08)
    depth = np.clip(hsv[..., 1] / np.percentile(hsv[..., 1][body], 60), 0.55, 1.1)
    tinted = hsv.copy()
    tinted[..., 0][body] = hue
    tinted[..., 1][body] = np.clip(saturation * depth, 0, 1)[body]
    tinted[..., 2][body] = np.clip(value * relative, 0, 1)[body]
    out = rgba.copy()
    out[..., :3] = np.rint(cv2.cvtColor(tinted, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)
    return out


@lru_cache(maxsize=16384)
def sprite(name: str, color: str | None, size: int, look: str = "noto") -> tuple[np.ndarray, np.ndarray]:
    """A drawing ``size`` pixels a side: premultiplied color (size, size, 3), alpha (size, size, 1), float32 in [0, 1].

    Cached: do not write into what it returns.

    Args:
        name: of the drawing.
        color: to tint it in; None: its own colors.
        size: side in pixels.
        look: drawing style, see `LOOKS`.

    Raises:
        PocketError: the atlas has no such drawing.
    """
    cells = _atlas()
    if (look, name) not in cells:
        raise PocketError(
            f"the sprite atlas has no drawing of {name!r} in the look {look!r}; see world.CLASSES, sprites.LOOKS"
        )
    rgba = cells[look, name] if color is None else tint(cells[look, name], color)
    return scaled(rgba, size)


def scaled(rgba: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Any square RGBA drawing (S, S, 4) uint8 as ``sprite`` returns it."""
    pixels = rgba.astype(np.float32) / 255
    pixels[..., :3] *= pixels[..., 3:]
    small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    return small[..., :3], small[..., 3:]

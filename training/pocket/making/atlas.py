"""Rebuild the sprite atlas from the published vector drawings (needs resvg-py; users never run this, the atlas ships).

npm pack @iconify-json/noto && tar xzf iconify-json-noto-*.tgz
python -m training.pocket.atlas package/icons.json
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from ..errors import PocketError
from ..sprites import CELL, DATA
from ..world import CLASSES

COLUMNS = 8


def drawing(icons: dict[str, Any], key: str, side: int = CELL) -> np.ndarray:
    """One vector drawing as (side, side, 4) uint8, trimmed and centred so that its longer side fills the cell.

    Args:
        icons: the icon set as its JSON file has it.
        key: of the drawing in the set.
        side: of the cell in pixels.

    Raises:
        PocketError: the set has no such drawing.
    """
    import resvg_py

    if key not in icons["icons"]:
        raise PocketError(f"the icon set has no drawing {key!r}")
    width, height = icons.get("width", 16), icons.get("height", 16)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icons["icons"][key]["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * side, height=4 * side)
    return fitted(np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA")), side)


def fitted(rgba: np.ndarray, side: int) -> np.ndarray:
    """Trim transparent margins of ``rgba`` (H, W, 4) uint8, pad to a square, scale to ``side``."""
    rows, columns = np.nonzero(rgba[..., 3] > 8)
    cut = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    longest = max(cut.shape[:2])
    square = np.zeros((longest, longest, 4), np.uint8)
    top, left = (longest - cut.shape[0]) // 2, (longest - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
    pixels = square.astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    small = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
    color = small[..., :3] * 255 / np.maximum(small[..., 3:], 1)
    cell: np.ndarray = np.rint(np.clip(np.concatenate([color, small[..., 3:]], axis=2), 0, 255)).astype(np.uint8)
    return cell


def main(noto_json: str, fluent_json: str) -> None:
    from adapters.files import read_json, write_file, write_json  # not above: they bring torch

    drawings = []
    for path in (noto_json, fluent_json):
        icons = read_json(Path(path))
        drawings += [drawing(icons, key) for key in CLASSES.values()]
    sheet = np.zeros((-(-len(drawings) // COLUMNS) * CELL, COLUMNS * CELL, 4), np.uint8)
    for index, cell in enumerate(drawings):
        row, column = divmod(index, COLUMNS)
        sheet[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = cell
    with write_file(DATA / "atlas.webp") as part:
        Image.fromarray(sheet).save(part, "WEBP", lossless=True, quality=100, method=6, exact=True)
    origin = {
        "noto": "Noto Emoji (Google), Apache-2.0, via @iconify-json/noto",
        "fluent": "Fluent Emoji (Microsoft), MIT, via @iconify-json/fluent-emoji",
    }
    write_json(DATA / "atlas.json", {"origin": origin, "names": list(CLASSES)})


if __name__ == "__main__":
    main(*sys.argv[1:3])

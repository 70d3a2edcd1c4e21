"""The samples of a training on one sheet, which grows by a row at every validation: to keep open meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from PIL import Image, ImageDraw

from adapters.files import write_file

__all__ = ["SHEET", "newest_sheet", "write_sheet"]

SHEET = "sheet.png"
CELL, ROWS = 192, 40  # pixels of a picture's longer side; rows at most
MARGIN, LABEL = 4, 16


def write_sheet(samples: Path, prompts: Sequence[str]) -> Path | None:
    """Draws all samples that are there, a row a validation, a column a prompt; returns the file.

    Beyond `ROWS` validations, rows are left out evenly; the first and the last stay.

    Args:
        samples: folder with a folder a validation, `step-NNNNNN/NN.png`.
        prompts: of the pictures, in their order.

    Returns:
        `samples/sheet.png`; None where there are no pictures.
    """
    rows = [(folder, found) for folder in sorted(samples.glob("step-*")) if (found := sorted(folder.glob("*.png")))]
    if not rows:
        return None
    if len(rows) > ROWS:
        rows = [rows[round(number * (len(rows) - 1) / (ROWS - 1))] for number in range(ROWS)]
    with Image.open(rows[-1][1][0]) as first:
        scale = min(1.0, CELL / max(first.size))
        width, height = (max(1, round(side * scale)) for side in first.size)
    wide, high = width + MARGIN, height + MARGIN + LABEL
    page = Image.new("RGB", (wide * len(prompts) + MARGIN, high * len(rows) + LABEL + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    for column, prompt in enumerate(prompts):
        draw.text((MARGIN + column * wide, MARGIN), shorten(_plain(prompt), max(8, width // 6)), fill="black")
    for row, (folder, found) in enumerate(rows):
        top = LABEL + MARGIN + row * high
        draw.text((MARGIN, top), f"step {int(folder.name.removeprefix('step-'))}", fill="black")
        for path in found:
            column = int(path.stem)
            if column < len(prompts):
                with Image.open(path) as image:
                    small = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                page.paste(small, (MARGIN + column * wide, top + LABEL))
    with write_file(samples / SHEET) as part:
        page.save(part, format="PNG")
    return samples / SHEET


def newest_sheet(folder: Path) -> Path | None:
    """The sheet of a run's folder or, in a folder of runs, the one that was written last; None: there is none yet."""
    found = {}
    for sheet in (folder / "samples" / SHEET, *folder.glob(f"*/samples/{SHEET}")):
        with contextlib.suppress(OSError):  # one that is gone meanwhile is none
            found[sheet] = sheet.stat().st_mtime_ns
    return max(found, key=found.__getitem__, default=None)


def _plain(text: str) -> str:
    """Pillow's own font has Latin letters only."""
    return text.encode("latin-1", "replace").decode("latin-1")

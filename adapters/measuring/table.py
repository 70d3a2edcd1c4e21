"""The table of a comparison: one row per image, sampled, scored, written and read.

Everything that a comparison says is a function of these rows, see `adapters.gains`.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..errors import GainsError
from ..files import read_bytes
from .metrics import Metric, score
from .sample import Shot

__all__ = ["Arm", "Row", "measure", "read_csv", "tabulate", "write_csv"]

Arm = Callable[[Sequence[str], Sequence[int]], Sequence[Shot]]
_Number = TypeVar("_Number", int, float)
MAX_TABLE = 256 * 2**20
_CSV_ERRORS = {  # as Python's csv has it -> what it means for the reader of a file
    "field larger than field limit (131072)": "a cell of more than 131072 characters",
    "unexpected end of data": "a quote is opened and never closed",
}
_FIXED = ("arm", "subject", "prompt", "seed", "latents", "image", "seconds")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image's line of the table."""

    arm: str
    prompt: str
    seed: int
    latents: str
    subject: str = ""
    image: str = ""
    """First 8 hex digits of the SHA-256 of the RGB pixels."""
    seconds: float = 0.0
    numbers: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.subject, self.prompt, self.seed, self.latents


def measure(
    arms: Mapping[str, Arm],
    metrics: Sequence[Metric],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    subject: Callable[[Shot], str] | None = None,
) -> tuple[list[Row], dict[str, list[Shot]]]:
    """Sample every arm on the same prompts and seeds and score it; returns the table and the images.

    Args:
        arms: name -> function that samples prompts and seeds.
        metrics: shots to numbers, one an image.
        prompts: for every arm the same.
        seeds: for every prompt the same.
        subject: names the subject of a shot; None: there is one at most.
    """
    shots = {name: list(arm(prompts, seeds)) for name, arm in arms.items()}
    return tabulate(shots, metrics, subject=subject), shots


def tabulate(
    shots: Mapping[str, Sequence[Shot]], metrics: Sequence[Metric], *, subject: Callable[[Shot], str] | None = None
) -> list[Row]:
    """One row per image: what was recorded while sampling, and every metric, to four digits.

    More digits say nothing, and a table is to be small enough to be kept beside what it says.

    Args:
        shots: arm -> its images.
        metrics: shots to numbers, one an image, with names of their own.
        subject: names the subject of a shot; None: there is one at most.

    Raises:
        GainsError: two metrics of one name, or one with the name of a recorded number.
    """
    names = Counter(metric.name for metric in metrics)
    if twice := [name for name, n in names.items() if n > 1]:
        raise GainsError(f"two metrics are called {twice[0]!r}")
    rows = []
    for arm, images in shots.items():
        columns = {metric.name: score(metric, images) for metric in metrics}
        for index, shot in enumerate(images):
            if clash := set(shot.numbers) & set(columns):
                raise GainsError(f"{sorted(clash)} is both recorded while sampling and a metric; rename one")
            numbers = {**shot.numbers, **{name: float(values[index]) for name, values in columns.items()}}
            digest = hashlib.sha256(shot.image.convert("RGB").tobytes()).hexdigest()[:6]
            rows.append(
                Row(
                    arm=arm,
                    prompt=shot.prompt,
                    seed=shot.seed,
                    latents=shot.latents,
                    subject=subject(shot) if subject is not None else "",
                    image=digest,
                    seconds=round(shot.seconds, 3),
                    numbers={name: float(f"{value:.4g}") for name, value in numbers.items()},
                )
            )
    return rows


def write_csv(rows: Iterable[Row]) -> str:
    """The table as CSV text; floats are written so that they read back exactly."""
    rows = list(rows)
    metrics = sorted({name for row in rows for name in row.numbers})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow([*_FIXED, *metrics])
    for row in rows:
        fixed = [row.arm, row.subject, row.prompt, row.seed, row.latents, row.image, float(row.seconds)]
        writer.writerow([*fixed, *(float(row.numbers[m]) if m in row.numbers else "" for m in metrics)])
    return text.getvalue()


def read_csv(source: str | Path) -> list[Row]:
    """The table from CSV text or a file.

    Raises `GainsError`: names the file, the line and what is wrong there.
    """
    where = source if isinstance(source, Path) else "per-image table"
    # As it is, no other line ends: a prompt's own line breaks must come back as they were.
    text = io.StringIO(_decoded(source) if isinstance(source, Path) else source, newline="")
    reader = csv.reader(text, strict=True)
    rows: list[Row] = []
    line = 1
    try:
        header = next(reader, [])
        if tuple(header[: len(_FIXED)]) != _FIXED:
            raise ValueError(f"the columns start with {_shown(header[: len(_FIXED)])}, expected {list(_FIXED)}")
        line = reader.line_num + 1
        for cells in reader:
            rows.append(_row(header, cells))
            line = reader.line_num + 1
    except (csv.Error, ValueError) as error:
        raise GainsError(f"{where}, line {line}: {_CSV_ERRORS.get(str(error), error)}") from error
    return rows


def _decoded(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TABLE).decode()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise GainsError(f"{path}, line {line}: the byte {error.object[error.start]:#x} is not UTF-8") from error


def _row(header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells under {len(header)} columns")
    arm, subject, prompt, seed, latents, image, seconds = cells[: len(_FIXED)]
    metrics = zip(header[len(_FIXED) :], cells[len(_FIXED) :], strict=True)
    return Row(
        arm=arm,
        subject=subject,
        prompt=prompt,
        seed=_read(int, "seed", seed),
        latents=latents,
        image=image,
        seconds=_read(float, "seconds", seconds),
        numbers={name: _read(float, name, cell) for name, cell in metrics if cell != ""},
    )


def _read(kind: type[_Number], name: str, cell: str) -> _Number:
    try:
        return kind(cell)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{_shown(name)} is {_shown(cell)}, expected {what}") from error


def _shown(value: object) -> str:
    """Control characters as escapes, and not at any length: a terminal is to show what is there."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:120]}…"

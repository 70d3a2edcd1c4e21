"""The table of a comparison: one row per image, sampled, scored, written and read.

Everything that a comparison says is a function of these rows, see `adapters.gains`.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import GainsError
from .metrics import Metric, score
from .sample import Shot

__all__ = ["Arm", "Row", "measure", "read_csv", "tabulate", "write_csv"]

Arm = Callable[[Sequence[str], Sequence[int]], Sequence[Shot]]
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


def _cells(table: Iterator[list[str]]) -> Iterator[list[str]]:
    try:
        yield from table
    except csv.Error as error:  # a cell of more than 131,072 characters, a zero byte
        raise GainsError(f"per-image table: no CSV as written by `write_csv` ({error})") from error


def read_csv(source: str | Path) -> list[Row]:
    """The table from CSV text or a file."""
    # Bytes, not read_text: a prompt's own line breaks must come back as they were.
    text = source.read_bytes().decode("utf-8", errors="replace") if isinstance(source, Path) else source
    table = csv.reader(io.StringIO(text, newline=""))
    header = next(_cells(table), [])
    if tuple(header[: len(_FIXED)]) != _FIXED:
        raise GainsError(f"per-image table: columns start with {header[:7]}, expected {list(_FIXED)}")
    rows = []
    for number, cells in enumerate(_cells(table), start=2):
        try:
            arm, subject, prompt, seed, latents, image, seconds = cells[: len(_FIXED)]
            pairs = zip(header[len(_FIXED) :], cells[len(_FIXED) :], strict=True)
            rows.append(
                Row(
                    arm=arm,
                    subject=subject,
                    prompt=prompt,
                    seed=int(seed),
                    latents=latents,
                    image=image,
                    seconds=float(seconds),
                    numbers={name: float(cell) for name, cell in pairs if cell != ""},
                )
            )
        except ValueError as error:
            raise GainsError(f"per-image table, line {number}: {error}") from error
    return rows

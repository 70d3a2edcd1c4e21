"""Where words point: the means over the steps, from a table of one row an object and step (`pointing.py`)."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import GainsError
from adapters.files import read_json
from adapters.measuring.verify import json_difference

__all__ = ["check", "read_csv", "summary"]

_KEYS = ("prompt", "seed", "object", "step", "timestep")


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of every number by step; `objects` of the `said` are seen by the judge, the others have no IoU."""
    steps: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        steps[row["step"], row["timestep"]].append(row)
    first = steps[min(steps)]
    return {
        "said": len(first),
        "objects": sum(math.isfinite(row["iou"]) for row in first),
        "steps": [
            {"step": step, "timestep": t}
            | {name: _mean([row[name] for row in own]) for name in own[0] if name not in _KEYS}
            for (step, t), own in sorted(steps.items())
        ],
    }


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The table, numbers as numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {
                    name: cell if name in ("prompt", "object") else int(cell) if name in _KEYS else float(cell)
                    for name, cell in row.items()
                }
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, TypeError) as error:
        raise GainsError(f"{path}: no table of objects and steps ({error})") from error
    if not rows or not {*_KEYS, "iou"} <= set(rows[0]):
        raise GainsError(f"{path}: no table of objects and steps (no rows, or not the columns {', '.join(_KEYS)}, iou)")
    return rows


def check(folder: Path) -> dict[str, Any]:
    """Recompute `pointing.json` from `pointing.csv`; returns the summary.

    Raises:
        GainsError: the summary in the folder does not follow from its table.
    """
    ours = summary(read_csv(folder / "pointing.csv"))
    if changed := json_difference(ours, read_json(folder / "pointing.json"), "pointing"):
        raise GainsError(f"{folder}: {changed}; pointing.json does not follow from pointing.csv")
    return ours


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan

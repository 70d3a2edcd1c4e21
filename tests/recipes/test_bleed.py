"""The bleed matrix: what it averages, and when it is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapters.measuring.metrics import Measure
from recipes.common import bleed
from recipes.common.units import Case


@dataclass
class Shot:
    subject: str
    value: float


def test_rows_are_what_was_asked_for_and_columns_whom_it_is_like() -> None:
    units = [Case(name="dog", prompts=["a", "b"]), Case(name="owl", prompts=["c"])]
    shots = [Shot("dog", 1), Shot("dog", 3), Shot("owl", 10), Shot("dog", float("nan"))]

    def like(factor: float) -> Measure:
        return Measure("similarity", True, lambda some: [factor * shot.value for shot in some])

    metrics = {(one, other): like(1 if one == other else 0.5) for one in ("dog", "owl") for other in ("dog", "owl")}
    found = bleed.matrix(units, shots, metrics)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, [[2, 1], [5, 10]])
    lines = bleed.bleed_table("CFG", ["dog", "owl"], found)
    assert [line.split() for line in lines[1:]] == [
        ["dog", "owl"],
        ["dog", "2.000", "1.000"],
        ["owl", "5.000", "10.000"],
    ]

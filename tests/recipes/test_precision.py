"""`sampling.precision: auto` on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bases
import torch

import adapters
from adapters.measuring.sample import read
from recipes.common import draw, precision
from recipes.common.base import sampling_pipeline
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.config import BaseSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseSettings:
    return BaseSettings(path=str(tiny_bases.sd(tmp_path_factory.mktemp("base"))))


def drawn(base: BaseSettings, name: str, folder: Path) -> tuple[list[np.ndarray], str]:
    sampling = SamplingSettings(precision=name, steps=2, batch_size=2)  # type: ignore[arg-type]
    pipe = sampling_pipeline(base, sampling)
    before = adapters.describe(pipe)
    shots = draw.draw_shots(pipe, ["a dog", "a cat"], [1], GuidanceSettings(guidance_scale=3), sampling, folder, None)
    if name == "auto":
        assert {one.dtype for one in pipe.unet.parameters()} == {torch.float32}
        assert adapters.describe(pipe) == before
    [first, _] = sorted(folder.glob("*.png"))
    return [np.asarray(shot.image, dtype=float) for shot in shots], read(first)[1]["precision"]


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "bf16"), (1.0, "fp32")])
def test_auto_draws_as_what_it_chose(
    ratio: float, chosen: str, base: BaseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    sampling = SamplingSettings(precision="auto", steps=2, batch_size=2)
    said: list[str] = []
    first = precision.of_sampling(sampling_pipeline(base, sampling), sampling, said.append)
    [place] = (tmp_path / "user cache" / "scfg-toolkit" / "precision").iterdir()
    assert said == [line for line in said if line.startswith(f"sampling.precision auto: {first}; bfloat16 takes ")]
    place.write_text(json.dumps({"time of bf16 / fp32": ratio}), "utf-8")
    found, name = drawn(base, "auto", tmp_path / "auto")
    wanted, _ = drawn(base, chosen, tmp_path / "wanted")
    assert name == chosen
    # Loading in bfloat16 and rounding what was loaded are the same weights.
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))

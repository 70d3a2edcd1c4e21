"""The adapters that ship: whole, made on the base that ships, and doing what their cards say."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adapters
import scfg
from recipes.common.base import sampling_pipeline
from recipes.common.settings import SamplingSettings
from training import pocket
from training.config import BaseSettings

ROOT = Path(__file__).resolve().parents[2]
ZOO = sorted(path for path in (ROOT / "recipes" / "zoo").iterdir() if path.is_dir())


@pytest.mark.parametrize("release", ZOO, ids=lambda path: path.name)
def test_a_shipped_adapter_verifies_changes_the_picture_and_leaves_the_base(release: Path) -> None:
    assert adapters.measuring.verify.verify(release)["numbers"] > 50
    facts = json.loads((release / "gains.json").read_text())
    assert facts["design"]["notes"]["held out"]
    assert pocket.base_hash() in (release / "README.md").read_text("utf-8")
    pipe = sampling_pipeline(BaseSettings(path="pocket"), SamplingSettings(steps=8))
    subject = json.loads((ROOT / "recipes" / "subjects" / release.name / "subject.json").read_text())
    prompt = f"a {subject['identifier']} {subject['class']} in the snow"

    def draw(**more: object) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        return np.asarray(pipe(prompt, num_inference_steps=8, generator=generator, **more).images[0], np.float32)

    plain = draw(guidance_scale=3.0)
    attached = functools.partial(scfg.attach_config, pipe)
    with adapters.load(pipe, release, guidance=attached, place=scfg.place_of) as loaded:
        adapted = draw(**loaded.run.call_kwargs)
    assert np.abs(adapted - plain).mean() > 2, "the adapter draws another picture than the base"
    assert np.array_equal(draw(guidance_scale=3.0), plain), "and leaves the base as it was"


def test_samples_of_a_shipped_adapter_are_pictures() -> None:
    for release in ZOO:
        samples = sorted((release / "samples").rglob("*.png"))
        assert samples, release
        assert all(Image.open(path).size == (64, 64) for path in samples)


@pytest.mark.parametrize(
    ("arm", "ships"),
    [
        ("S-CFG placed", "S-CFG placed"),  # as much identity as plain CFG, and more accuracy: above the front
        ("base's unconditional", "CFG"),  # beyond the front's end
        ("CFG placed", "CFG"),  # not told from the front
    ],
)
def test_what_lies_above_the_front_of_plain_guidance_ships(arm: str, ships: str) -> None:
    with adapters.measuring.archive.unpacked(ROOT / "benchmarks/study/results/subjects-kept.zip") as folder:
        gains = adapters.measuring.verify.recompute(folder)
    assert gains.verdict.word != "gain"
    gains = replace(gains, design=replace(gains.design, arm=arm))
    assert gains.ships == ships
    told = f"This is with {arm}, the guidance that ships. With " in adapters.measuring.words.adapter(gains)
    assert told == (ships == arm)

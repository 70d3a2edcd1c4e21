"""Successive halving on a made-up landscape; held-out prompts and seeds stay held out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from adapters import tune
from adapters.errors import GainsError
from adapters.metrics import Measure
from adapters.sample import Shot

CANDIDATES = [{"scale": s} for s in (1, 2, 3, 4, 5, 6, 7, 8, 9)]
HELD = {"held_out_prompts": ["held"], "held_out_seeds": [100]}


def sample(settings, prompts, seeds):
    """Grey value peaks at scale 6, with noise that more seeds average away."""
    shots = []
    for prompt in prompts:
        for seed in seeds:
            noise = np.random.default_rng(hash((settings["scale"], seed)) % 2**32).normal(0, 8)
            value = int(np.clip(200 - 12 * (settings["scale"] - 6) ** 2 + noise, 0, 255))
            shots.append(Shot(prompt=prompt, seed=seed, latents="n", image=Image.new("RGB", (2, 2), (value,) * 3)))
    return shots


def brightness(up: bool) -> Measure:
    return Measure("brightness", up, lambda shots: [float(np.asarray(s.image).mean()) for s in shots])


def test_finds_the_peak_and_counts_what_it_spent():
    found = tune.search(CANDIDATES, sample, brightness(True), prompts=["a", "b"], seeds=range(9), **HELD)
    assert found.best == {"scale": 6}
    assert [len(r["results"]) for r in found.rounds] == [9, 3]
    assert [r["seeds"] for r in found.rounds] == [1, 3]
    assert found.images == 9 * 2 * 1 + 3 * 2 * 3


def test_lower_can_be_better():
    found = tune.search(CANDIDATES, sample, brightness(False), prompts=["a"], seeds=range(9), **HELD)
    assert found.best == {"scale": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["a", "held"]}, "held out"),
        ({"seeds": [99, 100]}, "held out"),
        ({"keep": 1.0}, "keep=1.0"),
        ({"prompts": []}, "prompts and seeds"),
    ],
)
def test_what_would_make_the_report_worthless_is_refused(change, message):
    with pytest.raises(GainsError, match=message):
        tune.search(CANDIDATES, sample, brightness(True), **{"prompts": ["a"], "seeds": range(3), **HELD, **change})
    with pytest.raises(GainsError, match="at least one"):
        tune.search([], sample, brightness(True), prompts=["a"], seeds=[1], **HELD)

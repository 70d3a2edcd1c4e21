"""Successive halving on a made-up landscape; held-out prompts and seeds stay held out."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from PIL import Image

from adapters import files
from adapters.errors import FileError, GainsError
from adapters.measuring import tune, verify
from adapters.measuring.metrics import Measure
from adapters.measuring.sample import Shot

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


def test_what_was_found_follows_from_every_images_number(tmp_path):
    up = {"higher_is_better": True}
    found = tune.search(CANDIDATES, sample, brightness(True), prompts=["a", "b"], seeds=range(9), **HELD)
    assert [len(result["values"]) for result in found.rounds[1]["results"]] == [6, 6, 6]
    assert tune.recomputed_winner(found.rounds, **up) == found.best
    record = {"higher is better": True, "best": {"S-CFG": {"scale": 6}}, "rounds": {"S-CFG": found.rounds}}

    def verified(**change):
        (tmp_path / "tuned.json").write_text(json.dumps({**record, **change}))
        files.write_manifest(tmp_path, {"format": 1, "kind": "results"})
        return verify.verify(tmp_path)

    assert verified()["tuned"] == {"S-CFG": {"scale": 6}}
    with pytest.raises(GainsError, match=r"recomputed \{'S-CFG': \{'scale': 6\}\}"):
        verified(best={"S-CFG": {"scale": 5}})
    with pytest.raises(FileError, match=r"not what recipes/tune\.py writes"):
        verified(rounds=3)
    one = copy.deepcopy(found.rounds)
    one[0]["results"][2]["values"][0] += 5
    with pytest.raises(GainsError, match="'scale': 3} has a mean of"):
        tune.recomputed_winner(one, **up)
    other = copy.deepcopy(found.rounds)
    other[1]["results"].reverse()
    with pytest.raises(GainsError, match="round 2 did not try the better ones"):
        tune.recomputed_winner(other, **up)


def test_what_no_image_can_be_judged_by_is_refused():
    nothing = Measure("nothing", True, lambda shots: [float("nan")] * len(shots))
    with pytest.raises(GainsError, match="no image of a candidate could be judged"):
        tune.search(CANDIDATES, sample, nothing, prompts=["a"], seeds=range(3), **HELD)


def test_lower_can_be_better():
    found = tune.search(CANDIDATES, sample, brightness(False), prompts=["a"], seeds=range(9), **HELD)
    assert found.best == {"scale": 1}


def shots_of(values: dict[int, list[int]]):
    """Pictures that are as bright as their candidate's value for the seed."""

    def drawn(settings, prompts, seeds):
        own = values[settings["scale"]]
        image = lambda seed: Image.new("L", (1, 1), own[min(seed, len(own) - 1)])  # noqa: E731
        return [Shot(prompt=p, seed=seed, latents="n", image=image(seed)) for p in prompts for seed in seeds]

    return drawn


@pytest.mark.parametrize(
    ("values", "seeds", "taken", "said"),
    [
        (
            {1: [0], 2: [0], 3: [0]},
            1,
            1,
            "all 3 candidates measure 0: the search cannot tell them apart, and the first",
        ),
        (
            {3: [7], 2: [7], 1: [7]},
            1,
            3,
            "all 3 candidates measure 7: the search cannot tell them apart, and the first",
        ),
        (
            {1: [4], 2: [9], 3: [9]},
            1,
            2,
            "2 of 3 candidates measure 9: the search cannot tell them apart, and the first",
        ),
        ({1: [4], 2: [9], 3: [4]}, 1, 2, ""),  # those that lose may tie
        ({1: [4]}, 1, 1, ""),
        # Six candidates, two of which go on to three seeds: the fourth would have won.
        (
            {1: [9], 2: [5, 5, 5], 3: [5], 4: [5, 99], 5: [1], 6: [0]},
            3,
            1,
            "3 of 6 candidates measure 5 in round 1: the search cannot tell them apart, and the first of them went on",
        ),
        ({1: [9, 0, 0], 2: [8, 1, 0], 3: [0], 4: [0]}, 3, 1, "all 2 candidates measure 3 in round 2: "),
    ],
)
def test_ties_go_to_the_first_and_are_said(values, seeds, taken, said):
    candidates = [{"scale": scale} for scale in values]
    bright = Measure("brightness", True, lambda shots: [float(shot.image.getpixel((0, 0))) for shot in shots])
    found = tune.search(candidates, shots_of(values), bright, prompts=["a"], seeds=range(seeds), **HELD)
    assert found.best == {"scale": taken}
    told = tune.undecided(found.rounds, higher_is_better=True)
    assert told.startswith(said)
    assert bool(told) == bool(said)


def test_a_joint_of_nothing_is_undecided_too():
    nothing = Measure("nothing", True, lambda shots: [0.0] * len(shots))
    bright = Measure("brightness", True, lambda shots: [float(shot.image.getpixel((0, 0))) for shot in shots])
    both = tune.Joint(metrics=[nothing, bright], references={"nothing": 1.0, "brightness": 1.0})
    found = tune.search(
        [{"scale": 1}, {"scale": 2}], shots_of({1: [4], 2: [9]}), both, prompts=["a"], seeds=[0], **HELD
    )
    assert found.best == {"scale": 1}
    assert tune.undecided(found.rounds, higher_is_better=True).startswith("all 2 candidates measure 0: ")


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


@pytest.mark.parametrize(("candidates", "seeds"), [(1, 1), (9, 1), (9, 4), (4, 3), (30, 2)])
def test_the_budget_is_what_a_search_draws(candidates: int, seeds: int) -> None:
    calls = []
    found = tune.search(
        [{"scale": number} for number in range(candidates)],
        lambda settings, prompts, own: [
            Shot(prompt=prompt, seed=seed, latents="", image=Image.new("L", (1, 1), settings["scale"]))
            for prompt in prompts
            for seed in own
        ],
        Measure("brightness", True, lambda shots: [float(shot.image.getpixel((0, 0))) for shot in shots]),
        prompts=["a dog", "a cat"],
        seeds=list(range(seeds)),
        progress=lambda done, total: calls.append((done, total)),
        **HELD,
    )
    assert found.images == tune.budget(candidates, 2, seeds)
    assert calls[-1] == (found.images, found.images)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)

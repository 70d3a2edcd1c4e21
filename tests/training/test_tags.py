"""Captions of tags: what is said at a position, what is cached, and that a resumed run says the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import config, dreambooth, loop, lora, models
from training.config import TagSettings
from training.data import crops, images, tags
from training.errors import TrainingError

CAPTION = "one, two,three ,  four, five"


def words(caption: str) -> list[str]:
    return caption.split(", ") if caption else []


def test_without_settings_captions_stay_as_they_are() -> None:
    for caption in (CAPTION, "", "a dog,  asleep,", ", "):
        plain = TagSettings(keep=1)
        assert tags.vary_tags(caption, plain, 5) == tags.full(caption, plain) == tags.least(caption, plain) == caption


def test_shuffling_keeps_all_tags_and_the_first_in_their_places() -> None:
    chosen = TagSettings(shuffle=True, keep=2)
    drawn = [words(tags.vary_tags(CAPTION, chosen, seed)) for seed in range(300)]
    assert all(sorted(some) == sorted(["one", "two", "three", "four", "five"]) for some in drawn)
    assert all(some[:2] == ["one", "two"] for some in drawn)
    counts = Counter(tuple(some[2:]) for some in drawn)
    assert len(counts) == 6  # each of 3! orders, about 50 times
    assert min(counts.values()) > 25


def test_tags_are_dropped_one_by_one_or_all_and_the_first_never() -> None:
    single = [words(tags.vary_tags(CAPTION, TagSettings(drop=0.3, keep=1), seed)) for seed in range(1000)]
    assert all(some[0] == "one" for some in single)
    for tag in ("two", "three", "four", "five"):
        assert 0.63 < sum(tag in some for some in single) / 1000 < 0.77
    assert all(some == sorted(some, key=["one", "two", "three", "four", "five"].index) for some in single)
    whole = Counter(tags.vary_tags(CAPTION, TagSettings(drop_all=0.4, keep=1), seed) for seed in range(1000))
    assert whole.keys() == {"one", "one, two, three, four, five"}
    assert 330 < whole["one"] < 470
    assert {tags.vary_tags(CAPTION, TagSettings(drop_all=1), seed) for seed in range(9)} == {""}


@pytest.mark.parametrize("caption", [CAPTION, f"sks dog, {CAPTION}", "sks dog", ""])
def test_a_prefix_comes_first_once_and_always(caption: str) -> None:
    chosen = TagSettings(prefix="sks dog", shuffle=True, drop=0.9, drop_all=0.5)
    for seed in range(200):
        found = words(tags.vary_tags(caption, chosen, seed))
        assert found[0] == "sks dog"
        assert found.count("sks dog") == 1
    assert tags.least(caption, chosen) == "sks dog"
    assert tags.full(caption, TagSettings(prefix="sks dog")).startswith("sks dog")


def test_another_separator_leaves_commas_alone() -> None:
    chosen = TagSettings(shuffle=True, separator=";")
    assert {tags.vary_tags("a, b; c", chosen, seed) for seed in range(20)} == {"a, b; c", "c; a, b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": -1}, r"data.tags.keep must not be negative, got -1"),
        ({"drop": 1.5}, r"data.tags.drop must be from 0 to 1, got 1.5"),
        ({"drop_all": -0.1}, r"data.tags.drop_all must be from 0 to 1"),
        ({"separator": " "}, r"data.tags.separator must not be blank"),
        ({"prefix": ""}, r"data.tags.prefix must not be blank"),
    ],
)
def test_bad_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TagSettings(**changes)


def views(folder: Path, chosen: TagSettings) -> crops.Views:
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"sks dog, a{number}, b, c")
    return crops.Views(images.folder(folder, minimum=8), resolution=32, tags=chosen)


class Crash(Exception):
    """An interruption."""


def train(base: Path, data: crops.Views, out: Path, crash: int = 0) -> tuple[Path, list[str]]:
    """Five steps; returns the last checkpoint's weights and what was said."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith(f"step {crash}/"):
            raise Crash

    settings = config.TrainSettings(
        steps=5, batch_size=2, learning_rate=1e-2, trackers=[], log_every=1, save_every=2, precision="fp32"
    )
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    prior = dreambooth.prior(parts, config.DreamBoothSettings(identifier="sks"), data, folder=out / "class")
    assert loop.train(method, data, settings, out=out, prior=prior, say=say)
    return out / "checkpoints/step-000005/weights.safetensors", said


def test_cached_captions_are_the_encoded_ones_and_resuming_says_the_same(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    chosen = {"shuffle": True, "drop": 0.3, "keep": 1}
    cached, lines = train(base, views(pictures, TagSettings(**chosen)), tmp_path / "cached")
    assert [line for line in lines if "captions, all of which are cached" in line]
    live, lines = train(base, views(pictures, TagSettings(**chosen, cached=3)), tmp_path / "live")
    assert [line for line in lines if "more than data.tags.cached 3 captions, so the text encoders stay" in line]
    with pytest.raises(Crash):
        train(base, views(pictures, TagSettings(**chosen)), tmp_path / "cut", crash=4)
    resumed, _ = train(base, views(pictures, TagSettings(**chosen)), tmp_path / "cut")
    one, other, again = load_file(cached), load_file(live), load_file(resumed)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(value, again[name])
    plain, _ = train(base, views(pictures, TagSettings()), tmp_path / "plain")
    assert any(not torch.allclose(value, one[name], atol=1e-4) for name, value in load_file(plain).items())


def test_an_identifier_that_may_be_dropped_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"dreambooth.identifier: sks is not in the caption ''"):
        train(base, views(pictures, TagSettings(drop=0.1)), tmp_path)


def test_class_captions_follow_the_tags_that_were_drawn(pictures: Path) -> None:
    data = views(pictures, TagSettings(shuffle=True, drop=0.5, prefix="a sks owl"))
    own = data.renamed(lambda caption: dreambooth.class_caption(caption, identifier="sks", words={}))
    for seed in range(50):
        said = data.draw(0, seed)
        assert said.startswith("a sks owl")
        assert own.draw(0, seed) == said.replace("a sks owl", "an owl").replace("sks dog", "dog")
    assert own.caption(0) == "an owl, dog, a0, b, c"

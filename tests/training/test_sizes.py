"""Prior preservation where the subject's pictures have several shapes and resolutions, and where two subjects do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from recipes.common.training import subjects
from recipes.dreambooth_lora import Settings
from training import config, loop, lora, models
from training.data import cache

SHAPES = {"0": (32, 32), "1": (64, 32), "2": (32, 64), "3": (36, 32)}


def subject(folder: Path, noun: str, names: str) -> Path:
    """Pictures of several shapes with a white square on grey, and their masks."""
    holes = folder / "masks"
    holes.mkdir(parents=True)
    for name in names:
        width, height = SHAPES[name]
        hole = np.zeros((height, width), np.uint8)
        hole[8:20, 8:20] = 255
        Image.fromarray(hole).save(holes / f"{name}.png")
        Image.fromarray(np.maximum(hole, 90)).convert("RGB").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a sks {noun}")
    return folder


def settings(tmp_path: Path, base: Path, **prior: Any) -> Settings:
    dogs, owls = tmp_path / "dogs", tmp_path / "owls"
    if not dogs.exists():
        subject(dogs, "dog", "0123")
        subject(owls, "owl", "12")
    (tmp_path / "lines.txt").write_text("{} on grass\na cat\n")
    shapes: dict[str, Any] = {"resolution": 32, "resolutions": [16], "minimum": 8, "buckets": 3}
    return Settings(
        base=config.BaseSettings(path=str(base)),
        data=config.DataSettings(source=str(dogs), masks=str(dogs / "masks"), **shapes),
        dreambooth=config.DreamBoothSettings(
            identifier="sks",
            class_prompt="a dog",
            class_prompt_file=str(tmp_path / "lines.txt"),
            class_images=4,
            steps=1,
            **prior,
        ),
        concepts={"owl": config.ConceptSettings(source=str(owls), masks=str(owls / "masks"), class_prompt="an owl")},
        out=str(tmp_path / "out"),
    )


def train(chosen: Settings, base: Path, out: Path, **changes: Any) -> loop.Result:
    parts = models.load_parts(base)
    data, prior, others = subjects(parts, chosen)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    asked = {"steps": 12, "batch_size": 4, "trackers": [], "log_every": 1, "save_every": 5, **changes}
    made = loop.train(
        method,
        data,
        config.TrainSettings(**asked),
        out=out,
        prior=prior,
        further=others,
        say=lambda line: None,
    )
    assert made is not None
    return made


@pytest.mark.parametrize("prior", [{"company": 0.5}, {"surroundings": "base"}, {"preserve": "pictures"}])
def test_class_samples_go_with_buckets_resolutions_and_two_subjects(
    prior: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.company.drawn_object", middle)  # the tiny base draws nothing
    chosen, seen = settings(tmp_path, base, **prior), []
    ready = cache.Encoded.__getitem__
    monkeypatch.setattr(
        cache.Encoded, "__getitem__", lambda self, index: seen.append(self.sizes[index]) or ready(self, index)
    )
    result = train(chosen, base, tmp_path / "whole")
    assert np.isfinite(result.losses).all()
    sizes = set(seen)
    assert {(32, 32), (16, 16)} <= sizes
    assert any(height > width for height, width in sizes)
    assert any(height < width for height, width in sizes)
    drawn = [Image.open(path).size for path in (tmp_path / "out" / "class_images").glob("*.png")]
    assert set(drawn) == {(32, 32)}  # once, at the largest resolution, and cut to every size
    train(chosen, base, tmp_path / "cut", steps=5)
    train(chosen, base, tmp_path / "cut")
    ours, theirs = (
        load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    rows = [json.loads(line)["loss"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert rows == result.losses


def middle(parts: models.Parts, entry: dict[str, torch.Tensor], caption: str, without: str) -> torch.Tensor:
    found = torch.zeros(1, *entry["mean"].shape[1:])
    height, width = found.shape[1:]
    found[:, height // 4 : -height // 4, width // 4 : -width // 4] = 1
    return found

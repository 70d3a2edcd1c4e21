"""`precision: auto`: what is chosen, that it is chosen once, and that a run keeps it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import training_driver
import yaml
from safetensors.torch import load_file

from training import config, lora, models, precision
from training.errors import TrainingError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    return tmp_path / "user cache" / "scfg-toolkit" / "precision"


def decided(slow: torch.dtype, said: list[str], **facts: Any) -> str:
    """What is chosen where passes in `slow` take longer."""

    @contextlib.contextmanager
    def trial(dtype: torch.dtype) -> Iterator[precision.Pass]:
        yield lambda: time.sleep(0.06 if dtype == slow else 0.001)

    return precision.decide_precision("x.precision", facts, trial, device=CPU, say=said.append)


@pytest.mark.parametrize(("slow", "chosen"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_the_faster_one_is_chosen_and_remembered(slow: torch.dtype, chosen: str) -> None:
    said: list[str] = []
    assert decided(slow, said, size=1) == chosen
    other = torch.bfloat16 if slow == torch.float32 else torch.float32
    assert decided(other, said, size=1) == chosen  # as it was, though a trial would end differently now
    assert said[0] == said[1]
    assert decided(other, said, size=2) != chosen  # another network or size is another question


def test_a_damaged_answer_is_found_anew(own_memory: Path) -> None:
    said: list[str] = []
    decided(torch.float32, said)
    [place] = own_memory.iterdir()
    for text in ("{", "[]", '{"time of bf16 / fp32": "x"}', '{"time of bf16 / fp32": -1}'):
        place.write_text(text, "utf-8")
        assert decided(torch.float32, said) == "bf16"


def test_what_cannot_be_remembered_is_float32(own_memory: Path) -> None:
    own_memory.parent.parent.mkdir()
    own_memory.parent.write_text("in the way", "utf-8")
    said: list[str] = []
    assert decided(torch.float32, said) == "fp32"
    assert "is not writable" in said[0]


def test_lowered_weights_come_back_as_the_tensors_they_were(base: Path) -> None:
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    before = [(one, one.data_ptr(), one.data.clone()) for one in parts.unet.parameters()]
    trained = {id(one) for one in method.trainable().values()}
    with precision.lowered([parts.unet], torch.bfloat16):
        assert {one.dtype for one, *_ in before if id(one) in trained} == {torch.float32}
        assert {one.dtype for one, *_ in before if id(one) not in trained} == {torch.bfloat16}
    assert all(one.data_ptr() == place and torch.equal(one, copy) for one, place, copy in before)


def trained(asked: dict[str, Any], said: list[str], **train: Any) -> dict[str, torch.Tensor]:
    result = training_driver.train({**asked, "train": {**asked["train"], **train}}, say=said.append)
    assert result is not None
    files = sorted(result.folder.rglob("*.safetensors"))
    return {f"{file.parent.name} {name}": value for file in files for name, value in load_file(file).items()}


@pytest.fixture
def asked(base: Path, pictures: Path, tmp_path: Path) -> dict[str, Any]:
    train = {"steps": 3, "batch_size": 2, "save_every": 2}
    return {
        "base": str(base),
        "pictures": str(pictures),
        "method": "lora",
        "out": str(tmp_path / "out"),
        "train": train,
    }


def remember(folder: Path, ratio: float) -> None:
    """As if every trial had ended so."""
    for place in folder.iterdir():
        place.write_text(json.dumps({"time of bf16 / fp32": ratio}), "utf-8")


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "bf16"), (1.0, "fp32")])
@pytest.mark.parametrize("method", ["lora", "text", "full", "controlnet"])
def test_auto_trains_as_what_it_chose(
    method: str, ratio: float, chosen: str, asked: dict[str, Any], own_memory: Path, tmp_path: Path
) -> None:
    asked["method"] = method
    assert training_driver.train({**asked, "train": {**asked["train"], "precision": "auto", "dry_run": True}}) is None
    remember(own_memory, ratio)
    said: list[str] = []
    found = trained(asked, said, precision="auto")
    assert any(line.startswith(f"train.precision auto: {chosen}; ") for line in said)
    wanted = trained({**asked, "out": str(tmp_path / "plain")}, [], precision=chosen)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    for place in ("out", "plain"):
        settings = yaml.safe_load(
            (tmp_path / place / "checkpoints" / "step-000003" / "settings.yaml").read_text("utf-8")
        )
        assert settings["train"]["precision"] == chosen


def test_a_resumed_run_keeps_what_was_chosen(asked: dict[str, Any], own_memory: Path, tmp_path: Path) -> None:
    training_driver.train({**asked, "train": {**asked["train"], "precision": "auto", "dry_run": True}})
    remember(own_memory, 0.5)
    trained(asked, [], precision="auto", steps=2)
    remember(own_memory, 1.0)  # another machine, say
    said: list[str] = []
    found = trained(asked, said, precision="auto")
    assert f"train.precision auto: bf16, as in {tmp_path / 'out' / 'checkpoints' / 'step-000002'}" in said
    whole = trained({**asked, "out": str(tmp_path / "whole")}, [], precision="bf16")
    assert all(torch.equal(value, whole[name]) for name, value in found.items())
    with pytest.raises(TrainingError, match=r"train.precision: bf16 -> fp32"):
        trained(asked, [], precision="fp32", steps=4)


def test_the_loss_in_bfloat16_is_near_that_in_float32(asked: dict[str, Any], tmp_path: Path) -> None:
    losses = {}
    for name in ("fp32", "bf16"):
        validation = config.ValidationSettings(loss_samples=4)
        trained({**asked, "out": str(tmp_path / name)}, [], precision=name, steps=6, validation=validation)
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text("utf-8").splitlines()]
        losses[name] = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)

"""Interrupted and resumed = uninterrupted, bit for bit on the CPU, for every method and option that has state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_driver
from safetensors.torch import load_file, save_file

from adapters.errors import FileError
from adapters.files import sha256
from adapters.source import open_source
from training import checkpoint, config
from training.errors import Stopped, TrainingError

STEPS = 7
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "lora with dropout": ("dropout", {}, False),
    "dropout of ranks": ("drops", {"gradient_checkpointing": True}, False),
    "pissa": ("pissa", {"ema": 0.9}, False),
    "eva": ("eva", {"ema": 0.9}, True),
    "text encoder": ("text", {}, False),
    "full": ("full", {}, False),
    "controlnet": ("controlnet", {}, False),
    "ema and schedule": ("lora", {"ema": 0.9, "schedule": "cosine", "warmup": 2}, False),
    "accumulation": ("lora", {"accumulation": 2}, False),
    "schedule-free": ("lora", {"optimizer": "schedulefree", "warmup": 2}, False),
    "rates": ("lora", {"rates": {"lora_A": 0, "attn2": 3}, "optimizer": "adafactor"}, False),
    "8 bits": ("lora", {"quantize": "int8", "gradient_checkpointing": True}, True),
    "blocks in main memory": ("dropout", {"offload": True, "ema": 0.9}, True),
    "4 bits": ("dora", {"quantize": "nf4"}, False),
    "prior": ("lora", {}, True),
    "full with prior": ("full", {}, True),
}


# What other programs, other encodings and crashes may leave in a log.
NO_LOG = b'\xff\xfe{}\n[1]\nnull\n{"loss": 1}\n{"step": "2"}\n{"step": true}\n' + b"[" * 2000 + b'\n{"step": 1, "lo'


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


class Crash(Exception):
    """An interruption that leaves training no time to do anything."""


def asked_for(name: str, base: Path, pictures: Path, tmp_path: Path) -> dict[str, Any]:
    method, options, prior = CASES[name]
    train = {"steps": STEPS, "batch_size": 2, "save_every": 2, **options}
    asked: dict[str, Any] = {"base": str(base), "pictures": str(pictures), "method": method, "train": train}
    return asked | ({"class_folder": str(tmp_path / "class")} if prior else {})


def same_end(one: Path, other: Path) -> None:
    """Same weights, optimizer state and average at the last step, and the same losses on the way."""
    last = f"checkpoints/step-{STEPS:06d}"
    files = sorted(path.name for path in (one / last).glob("*.safetensors"))
    assert {"weights.safetensors", "optimizer.safetensors"} <= set(files)
    for file in files:
        ours, theirs = load_file(one / last / file), load_file(other / last / file)
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[key] == theirs[key]).all()) for key in ours), file
    logs = [(way / "log.jsonl").read_text().splitlines() for way in (one, other)]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


@pytest.mark.parametrize("name", CASES)
def test_interrupted_and_resumed_is_uninterrupted(name: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    if package := {"schedule-free": "schedulefree", "4 bits": "bitsandbytes"}.get(name):
        pytest.importorskip(package)
    asked = asked_for(name, base, pictures, tmp_path)
    training_driver.train({**asked, "out": tmp_path / "whole"}, say=lambda line: None)

    def crash(line: str) -> None:
        if line.startswith(f"step {3 + len(name) % 4}/"):
            raise Crash

    cut, said = {**asked, "out": tmp_path / "cut"}, []
    with pytest.raises(Crash):
        training_driver.train(cut, say=crash)
    with (tmp_path / "cut" / "log.jsonl").open("ab") as file:
        file.write(NO_LOG)
    there = sorted((tmp_path / "cut" / "checkpoints").iterdir())
    if len(there) > 1:
        flip(there[-1] / "optimizer.safetensors")
        with pytest.raises(TrainingError, match=rf"{there[-1]} is damaged .* set train.if_damaged to earlier"):
            training_driver.train({**cut, "train": {**asked["train"], "resume": "latest", "if_damaged": "stop"}})
    training_driver.train({**cut, "train": {**asked["train"], "resume": "latest"}}, say=said.append)
    assert any(f"{there[-1]} is damaged" in line for line in said) == (len(there) > 1)
    same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_schedule_free_optimizer_ships_its_average_and_looking_at_it_changes_no_bit(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    pytest.importorskip("schedulefree")
    asked = asked_for("schedule-free", base, pictures, tmp_path)
    training_driver.train({**asked, "out": tmp_path / "blind"}, say=lambda line: None)
    looking = {"validation": config.ValidationSettings(every=1, loss_samples=2), "snapshot_every": 1, "save_every": 1}
    training_driver.train(
        {**asked, "train": {**asked["train"], **looking}, "out": tmp_path / "seen"}, say=lambda line: None
    )
    last = f"checkpoints/step-{STEPS:06d}/weights.safetensors"
    weights = [load_file(tmp_path / way / last) for way in ("blind", "seen")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    shipped = [load_file(tmp_path / way / "lora/pytorch_lora_weights.safetensors") for way in ("blind", "seen")]
    assert all(torch.equal(shipped[0][key], shipped[1][key]) for key in shipped[0])
    for key, value in weights[0].items():
        assert not torch.equal(shipped[0][key.replace(".default", "")], value)


@pytest.mark.parametrize("at", [3, STEPS])
def test_sigterm_finishes_the_step_saves_and_says_how_to_go_on(
    at: int, base: Path, pictures: Path, tmp_path: Path
) -> None:
    asked = asked_for("lora with dropout", base, pictures, tmp_path)
    training_driver.train({**asked, "out": tmp_path / "whole"}, say=lambda line: None)
    before = signal.getsignal(signal.SIGTERM)

    def stop(line: str) -> None:
        if line.startswith(f"step {at}/"):
            signal.raise_signal(signal.SIGTERM)

    cut = {**asked, "out": tmp_path / "cut", "train": {**asked["train"], "save_every": 100}}
    with pytest.raises(Stopped, match=rf"stopped after step {min(at + 1, STEPS)}.*--train.resume latest"):
        training_driver.train(cut, say=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    training_driver.train({**cut, "train": {**cut["train"], "resume": "latest"}}, say=lambda line: None)
    same_end(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("prior", signal.SIGKILL), ("full", signal.SIGTERM)])
def test_a_killed_process_can_be_resumed(
    name: str, number: signal.Signals, base: Path, pictures: Path, tmp_path: Path
) -> None:
    def run(asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, training_driver.__file__, json.dumps(asked)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    asked = asked_for(name, base, pictures, tmp_path)
    training_driver.train({**asked, "out": tmp_path / "whole"}, say=lambda line: None)
    cut = {**asked, "out": str(tmp_path / "cut")}
    first = run({**cut, "at": 5, "signal": int(number)})
    assert first.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), first.stderr
    if number == signal.SIGTERM:
        assert "stopped after step 6, saved" in first.stderr
    second = run({**cut, "train": {**asked["train"], "resume": "latest"}})
    assert second.returncode == 0, second.stderr
    same_end(tmp_path / "whole", tmp_path / "cut")


def test_resuming_with_other_settings_or_data_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    asked = {**asked_for("accumulation", base, pictures, tmp_path), "out": tmp_path / "out"}
    training_driver.train({**asked, "train": {**asked["train"], "steps": 2}}, say=lambda line: None)

    def resumed(**changes: object) -> None:
        train = {**asked["train"], "steps": 3, "resume": "latest", **changes}
        training_driver.train({**asked, "train": train}, say=lambda line: None)

    with pytest.raises(TrainingError, match=r"train.learning_rate: 0.01 -> 0.5; train.seed: 0 -> 4"):
        resumed(learning_rate=0.5, seed=4)
    with pytest.raises(TrainingError, match=r"samples per step: 4 -> 2"):
        resumed(accumulation=1)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\1")
    try:
        with pytest.raises(TrainingError, match=r"base model: \w+ -> \w+"):
            resumed()
    finally:
        weights.write_bytes(before)
    (pictures / "0.txt").write_text("another caption")
    with pytest.raises(TrainingError, match="content of the data: "):
        resumed()
    (pictures / "0.txt").write_text("picture a")
    resumed(accumulation=1, batch_size=4, log_every=2, keep=1)  # none of which changes the weights


def test_what_the_data_and_the_base_are_counts_not_where_they_lie(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Settings name places; what they hold is compared by content."""
    asked = {**asked_for("accumulation", base, pictures, tmp_path), "out": tmp_path / "out"}

    def run(steps: int, *, place: Path = pictures, root: Path = base, rate: float = 0.01) -> None:
        settings = {**asked["train"], "steps": steps, "learning_rate": rate}
        record = {"base": {"path": str(root)}, "data": {"source": str(place)}, "train": {"learning_rate": rate}}
        training_driver.train(
            {**asked, "base": root, "pictures": place, "train": settings}, say=lambda line: None, record=record
        )

    run(2)
    moved, elsewhere = tmp_path / "moved" / "pictures", tmp_path / "elsewhere"
    shutil.copytree(pictures, moved)
    shutil.copytree(base, elsewhere)
    run(3, place=moved, root=elsewhere)
    with pytest.raises(TrainingError, match=r"train.steps 2 is less than the 3 steps that .*step-000003 has"):
        run(2)
    with pytest.raises(TrainingError, match=r"changed: train.learning_rate: 0.01 -> 0.5; take"):
        run(4, place=pictures, rate=0.5)
    texts = [(pictures / f"{number}.txt").read_text("utf-8") for number in (0, 1)]
    for number in (0, 1):  # the same captions, at other pictures
        (pictures / f"{number}.txt").write_text(texts[1 - number], "utf-8")
    with pytest.raises(TrainingError, match=r"changed: content of the data: \w+ -> \w+; data.source: .*moved.* -> "):
        run(4)
    scheduler = elsewhere / "scheduler" / "scheduler_config.json"
    changed = json.loads(scheduler.read_text("utf-8")) | {"prediction_type": "epsilon"}
    scheduler.write_text(json.dumps(changed), "utf-8")
    with pytest.raises(TrainingError, match=r"schedule of the base.prediction_type: v_prediction -> epsilon"):
        run(4, place=moved, root=elsewhere)


def test_a_validation_that_a_kill_prevented_is_made_at_resuming(base: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    validation = config.ValidationSettings(prompts=["a", "b"], every=2, steps=1, loss_samples=2)
    train = {"steps": 4, "batch_size": 2, "save_every": 2, "validation": validation}
    asked = {"base": str(base), "pictures": str(pictures), "method": "lora", "train": train, "out": out}

    def content() -> tuple[dict[str, bytes], list[dict[str, Any]]]:
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        pictures = {str(path): path.read_bytes() for path in (out / "samples").rglob("*.png")}
        return pictures, [row for row in rows if "validation_loss" in row]

    training_driver.train(asked)
    whole = content()
    assert len(whole[0]) == 7  # and the sheet of all
    assert [row["step"] for row in whole[1]] == [0, 2, 4]
    training_driver.train(asked)
    assert content() == whole  # nothing is made twice
    (out / "samples" / "step-000004" / "01.png").unlink()
    training_driver.train(asked)
    assert content()[0] == whole[0]
    log = (out / "log.jsonl").read_text("utf-8").splitlines()
    (out / "log.jsonl").write_text("\n".join(log[:-1]) + "\n")
    training_driver.train(asked)
    assert content() == whole


def test_a_damaged_snapshot_is_never_tuned_on(base: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {**asked_for("prior", base, pictures, tmp_path), "out": out}

    def run(steps: int) -> None:
        training_driver.train({**asked, "train": {**asked["train"], "steps": steps, "snapshot_every": 1}})

    run(2)
    snapshot = out / "snapshots" / "step-000001"
    kept = {path.name: path.read_bytes() for path in snapshot.iterdir()}
    assert {"manifest.json", "settings.yaml", "pytorch_lora_weights.safetensors"} <= kept.keys()
    for name in kept:
        (snapshot / name).unlink()
        with pytest.raises(TrainingError, match=r"a snapshot is damaged \(.*delete .*step-000001 to go on without it"):
            run(3)
        (snapshot / name).write_bytes(kept[name])
    flip(snapshot / "pytorch_lora_weights.safetensors")
    with pytest.raises(TrainingError, match="a snapshot is damaged"):
        run(3)
    with pytest.raises(FileError, match="is not the file the manifest was written for"):
        open_source(snapshot)
    flip(out / "snapshots" / "step-000002" / "pytorch_lora_weights.safetensors")
    shutil.rmtree(snapshot)
    with pytest.raises(TrainingError, match=r"delete .*step-000002 to"):
        run(2)
    shutil.rmtree(out / "snapshots" / "step-000002")
    run(3)
    exchanged = tmp_path / "class" / "00000.png"
    shutil.copyfile(tmp_path / "class" / "00001.png", exchanged)
    with pytest.raises(TrainingError, match=r"changed: content of class_images: \w+ -> \w+"):
        run(4)


def test_a_further_subject_s_folders_may_move_as_long_as_they_hold_the_same(tmp_path: Path) -> None:
    def facts(source: str, classes: str, content: str = "a", share: float = 1.0) -> dict[str, Any]:
        owl = {"source": source, "masks": f"{source}/masks", "prompt": None, "class_folder": classes, "share": share}
        contents = {"content of the data": content, "content of class_images": "b"}
        return {**contents, "settings": {"concepts": {"owl": owl}}}

    saved = replace(state(1), facts=facts("here/owls", "here/class"))
    checkpoint.refuse_changes(tmp_path, saved, facts("there/owls", "there/class"), free=[])
    with pytest.raises(TrainingError, match=r"changed: concepts.owl.share: 1.0 -> 2.0; take"):
        checkpoint.refuse_changes(tmp_path, saved, facts("there/owls", "there/class", share=2.0), free=[])
    with pytest.raises(TrainingError, match=r"concepts.owl.source: here/owls -> there/owls; content of the data: a"):
        checkpoint.refuse_changes(tmp_path, saved, facts("there/owls", "there/class", content="c"), free=[])


def state(step: int, size: int = 3) -> checkpoint.State:
    facts = {"settings": {"train": {"steps": 5}}}
    return checkpoint.State(
        step=step,
        weights={"a": torch.arange(float(size))},
        optimizer={
            "state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.ones(3), "note": 4}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
        },
        facts=facts,
    )


def test_a_checkpoint_comes_back_as_it_was_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        path = checkpoint.save(tmp_path, state(step), keep=2)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["step-000002", "step-000010"]
    found = checkpoint.find("latest", tmp_path)
    assert found is not None
    assert found[0] == path
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.step == 10
    assert loaded.weights["a"].tolist() == [0, 1, 2]
    assert loaded.optimizer["state"][0]["note"] == 4
    assert loaded.optimizer["state"][0]["exp_avg"].tolist() == [1, 1, 1]
    assert not list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.bin"))


def test_a_full_disk_leaves_earlier_checkpoints_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"cannot save .*step-000002.*No space left.*before is intact"):
        checkpoint.save(tmp_path, state(2), keep=2)
    assert [item.name for item in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.load_checkpoint(tmp_path / "step-000001").step == 1


def test_a_really_full_disk(tmp_path: Path) -> None:
    """/dev/full gives the error of a full disk on writing."""
    checkpoint.save(tmp_path, state(1), keep=2)
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    target = tmp_path / "step-000002"
    with pytest.raises(TrainingError, match=r"No space left"), checkpoint.atomic_folder(target) as place:
        os.symlink("/dev/full", place / "w") or (place / "w").write_bytes(b"x" * 100_000)
    assert [item.name for item in tmp_path.iterdir()] == ["step-000001"]


def test_a_path_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(3), keep=2)
    with pytest.raises(TrainingError, match=r"train.resume nowhere is no checkpoint.*step-000003"):
        checkpoint.find("nowhere", tmp_path)


def alter(place: Path, **changes: object) -> None:
    values = json.loads((place / "state.json").read_text())
    (place / "state.json").write_text(json.dumps({**values, **changes}))


def exchange(place: Path) -> None:
    (place / "weights.safetensors").write_bytes((place.parent / "step-000001" / "weights.safetensors").read_bytes())


def poison(place: Path) -> None:
    """As no run of ours saves it, with digests that are right."""
    save_file({"a": torch.tensor([0, torch.nan, 2])}, place / "weights.safetensors")
    record = json.loads((place / "state.json").read_text())
    record["sha256"]["weights.safetensors"] = sha256(place / "weights.safetensors")
    del record["own sha256"]
    alter(place, **record, **{"own sha256": checkpoint._own_digest(record)})


DAMAGES = {
    "weights that are not finite": poison,
    "a step far ahead": lambda place: alter(place, step=10**9),
    "a negative step": lambda place: alter(place, step=-3),
    "an earlier step": lambda place: alter(place, step=1),
    "other counts": lambda place: alter(place, ema_updates=7),
    "a renamed folder": lambda place: place.rename(place.with_name("step-000003")),
    "a flipped bit in the weights": lambda place: flip(place / "weights.safetensors"),
    "a flipped bit in the moments": lambda place: flip(place / "optimizer.safetensors"),
    "a flipped bit in the header": lambda place: flip(place / "weights.safetensors", 9),
    "a flipped bit in the record": lambda place: flip(place / "state.json", 30),
    "another one's weights": exchange,
    "cut weights": lambda place: os.truncate(place / "weights.safetensors", 50),
    "an empty record": lambda place: os.truncate(place / "state.json", 0),
    "a list for a record": lambda place: (place / "state.json").write_text("[]"),
    "no moments": lambda place: (place / "optimizer.safetensors").unlink(),
    "no record": lambda place: (place / "state.json").unlink(),
    "a FIFO": lambda place: ((place / "state.json").unlink(), os.mkfifo(place / "state.json")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(name: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    changed = state(2)
    changed.weights["a"] += 1
    DAMAGES[name](checkpoint.save(tmp_path, changed, keep=2))
    said: list[str] = []
    found = checkpoint.find("latest", tmp_path, said.append)
    assert found is not None
    assert (found[0].name, found[1].step, found[1].weights["a"].tolist()) == ("step-000001", 1, [0, 1, 2])
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert checkpoint.save(tmp_path, state(1), keep=1).is_dir()  # the damaged later one does not push it out
    flip(tmp_path / "step-000001" / "weights.safetensors")
    with pytest.raises(TrainingError, match=r"all checkpoints in .* are damaged"):
        checkpoint.find("latest", tmp_path, said.append)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    broken = state(2)
    broken.weights["a"][1] = torch.nan
    with pytest.raises(TrainingError, match=r"no longer finite at step 2, such as a, .*learning_rate"):
        checkpoint.save(tmp_path, broken, keep=2)
    assert not list(tmp_path.iterdir())

"""Interrupted and resumed = uninterrupted, bit for bit on the CPU, for every method and option that has state."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

# Reads what to train from its arguments; kills itself (-9) or signals itself at a step, as an outside event would.
DRIVER = """
import json, os, signal, sys
from training import config, controlnet, dreambooth, images, loop, lora, models, views
from training.errors import exit_on_error

asked = json.loads(sys.argv[1])
with exit_on_error():
    parts = models.load(asked["base"])
    method = {
        "lora": lambda: lora.prepare(parts, config.LoraSettings(rank=2, dropout=0.3)),
        "full": lambda: dreambooth.prepare(parts),
        "controlnet": lambda: controlnet.prepare(parts, config.ControlNetSettings(dropout=0.2)),
        "text": lambda: lora.prepare(parts, config.LoraSettings(rank=2, text_encoder=True)),
    }[asked["method"]]()
    source = images.folder(asked["pictures"], conditioning=asked["pictures"], minimum=8)
    data = views.Views(source, resolution=32, multiple=parts.multiple, flip=True)
    prior = None
    if asked.get("prior"):
        chosen = config.DreamBoothSettings(class_prompt="dog", class_images=3, steps=2)
        prior = dreambooth.prior(parts, chosen, resolution=32, folder=asked["class_folder"])

    def say(line):
        if asked.get("kill") and line.startswith(f"step {asked['kill']}/"):
            os.kill(os.getpid(), asked["signal"])

    settings = config.TrainSettings(**{**asked["train"], "trackers": [], "log_every": 1})
    loop.train(method, data, settings, out=asked["out"], prior=prior, say=say)
"""


def run(asked: dict) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(asked)], capture_output=True, text=True, check=False
    )


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(path / "checkpoints" / "step-000007" / "weights.safetensors") for path in (one, other))
    return ours.keys() == theirs.keys() and all(bool((ours[key] == theirs[key]).all()) for key in ours)


CASES = {
    "lora": ("lora", {}, False),
    "text-encoder": ("text", {}, False),
    "full": ("full", {}, False),
    "controlnet": ("controlnet", {}, False),
    "ema": ("lora", {"ema": 0.9, "schedule": "cosine", "warmup": 2}, False),
    "accumulation": ("lora", {"accumulation": 2}, False),
    "prior": ("lora", {}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_and_resumed_is_uninterrupted(
    name: str, number: signal.Signals, base: Path, pictures: Path, tmp_path: Path
) -> None:
    method, options, prior = CASES[name]
    train = {"steps": 7, "batch_size": 2, "learning_rate": 1e-2, "save_every": 2, **options}
    asked = {"base": str(base), "pictures": str(pictures), "method": method, "prior": prior}
    asked["class_folder"] = str(tmp_path / "class")
    whole = run({**asked, "train": train, "out": str(tmp_path / "whole")})
    assert whole.returncode == 0, whole.stderr
    cut = {**asked, "out": str(tmp_path / "cut")}
    first = run({**cut, "train": train, "kill": 3 + len(name) % 3, "signal": int(number)})
    if number == signal.SIGKILL:
        assert first.returncode == -signal.SIGKILL
    else:
        assert first.returncode == 130
        assert "--train.resume latest" in first.stderr
    assert not (tmp_path / "cut" / "checkpoints" / "step-000007").exists()
    second = run({**cut, "train": {**train, "resume": "latest"}})
    assert second.returncode == 0, second.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    logs = [(tmp_path / way / "log.jsonl").read_text().splitlines() for way in ("whole", "cut")]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in log] for log in logs]
    assert losses[0] == losses[1]
    if options.get("ema"):
        ours, theirs = (
            load_file(tmp_path / way / "lora" / "pytorch_lora_weights.safetensors") for way in ("whole", "cut")
        )
        assert all(bool((ours[key] == theirs[key]).all()) for key in ours)

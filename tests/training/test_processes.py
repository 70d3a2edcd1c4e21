"""One process with batch 4 = two processes with batch 2, on the CPU through accelerate's launcher (gloo)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_driver
from safetensors.torch import load_file

RATE, STEPS = 1e-2, 20


def launch(asked: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; this form starts two."""
    program = "import sys; from accelerate.commands.accelerate_cli import main; sys.argv[0] = 'accelerate'; main()"
    command = [sys.executable, "-c", program, "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [training_driver.__file__, json.dumps(asked)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "controlnet"])
def test_two_processes_train_like_one(method: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    train = {"steps": STEPS, "learning_rate": RATE, "save_every": 10, "clip": None}
    asked = {"base": str(base), "pictures": str(pictures), "method": method}
    one, two = tmp_path / "one", tmp_path / "two"
    training_driver.train({**asked, "out": one, "train": {**train, "batch_size": 4}}, say=lambda line: None)
    done = launch({**asked, "out": str(two), "train": {**train, "batch_size": 2}, "processes": 2})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes: 2" in done.stdout
    torch.testing.assert_close(losses(one), losses(two), rtol=0, atol=1e-5)
    last = f"checkpoints/step-{STEPS:06d}/weights.safetensors"
    ours, theirs = load_file(one / last), load_file(two / last)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 0.02 * RATE * STEPS


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_save_once(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Only the process that prints is signalled; both stop, and the run goes on to the end of an uninterrupted one."""
    train = {"steps": STEPS, "learning_rate": RATE, "save_every": 100, "batch_size": 2}
    asked = {"base": str(base), "pictures": str(pictures), "method": "lora", "processes": 2}
    whole = launch({**asked, "out": str(tmp_path / "whole"), "train": train})
    assert whole.returncode == 0, whole.stderr[-3000:]
    cut = {**asked, "out": str(tmp_path / "cut"), "train": train}
    stopped = launch({**cut, "at": 3, "signal": int(signal.SIGTERM)})
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped after step 8, saved") == 2, stopped.stderr[-3000:]
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-000008"]
    resumed = launch({**cut, "train": {**train, "resume": "latest"}})
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    last = f"checkpoints/step-{STEPS:06d}/weights.safetensors"
    ours, theirs = load_file(tmp_path / "whole" / last), load_file(tmp_path / "cut" / last)
    assert all(bool((ours[key] == theirs[key]).all()) for key in ours)


@pytest.mark.slow
def test_an_error_line_is_there_above_the_launcher_s(base: Path, tmp_path: Path) -> None:
    done = launch({"base": str(base), "pictures": str(tmp_path / "gone"), "method": "lora", "out": "o", "train": {}})
    assert done.returncode != 0
    assert f"error: data.source: folder {tmp_path / 'gone'} does not exist" in done.stderr

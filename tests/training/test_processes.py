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


def launch(asked: dict[str, Any], **environment: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; this form starts two."""
    program = "import sys; from accelerate.commands.accelerate_cli import main; sys.argv[0] = 'accelerate'; main()"
    command = [sys.executable, "-c", program, "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [training_driver.__file__, json.dumps(asked)]
    variables = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=300)


def losses(out: Path) -> list[float]:
    """Of training and validation."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row.get("loss", row.get("validation_loss")) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {}),
        ("controlnet", {}),
        ("lora", {"quantize": "int8"}),
        ("lora", {"quantize": "nf4"}),
        ("lora", {"offload": True}),
    ],
    ids=str,
)
def test_two_processes_train_like_one(
    method: str, options: dict[str, Any], base: Path, pictures: Path, tmp_path: Path
) -> None:
    if options.get("quantize") == "nf4":
        pytest.importorskip("bitsandbytes")
    train = {**options, "steps": STEPS, "learning_rate": RATE, "save_every": 10, "clip": None}
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
@pytest.mark.parametrize("method", ["full", "controlnet"])
def test_divided_weights_train_and_resume_like_one_process(
    method: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    """FSDP, which `accelerate launch --use_fsdp` asks for by this variable: average, accumulation and clipping on."""
    train = {"learning_rate": RATE, "save_every": 100, "ema": 0.9, "clip": 1.0, "steps": STEPS}
    asked = {"base": str(base), "pictures": str(pictures), "method": method}
    one, two = tmp_path / "one", tmp_path / "two"
    training_driver.train({**asked, "out": one, "train": {**train, "batch_size": 4}}, say=lambda line: None)
    divided = {**asked, "out": str(two), "processes": 2}
    for steps, more in ((STEPS // 2, {}), (STEPS, {"resume": "latest"})):
        settings = {**train, "batch_size": 1, "accumulation": 2, **more, "steps": steps}
        done = launch({**divided, "train": settings}, ACCELERATE_USE_FSDP="true")
        assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(one), losses(two), rtol=0, atol=1e-5)
    shipped = "dreambooth/unet" if method == "full" else "controlnet"
    assert (one / shipped / "config.json").read_text() == (two / shipped / "config.json").read_text()
    for file in ("weights", "ema", "optimizer"):
        last = f"checkpoints/step-{STEPS:06d}/{file}.safetensors"
        ours, theirs = load_file(one / last), load_file(two / last)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 0.02 * RATE * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "text", "tokens", "dora", "pissa"])
def test_a_lora_on_a_divided_base_trains_and_resumes_like_one_process(
    method: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    """Also towards the base's own prediction, which only one of the processes may need in a micro-step."""
    train = {"save_every": 100, "ema": 0.9, "clip": 1.0, "learning_rate": RATE, "batch_size": 1, "steps": STEPS}
    asked = {"base": str(base), "pictures": str(pictures), "method": method, "class_folder": str(tmp_path / "class")}
    asked["validation"] = {"loss_samples": 2, "every": 5, "prompts": ["a d"], "steps": 2}
    if method == "tokens":
        for caption in pictures.glob("*.txt"):
            caption.write_text(f"{caption.read_text()} <rex>")
    one, two = tmp_path / "one", tmp_path / "two"
    training_driver.train({**asked, "out": one, "train": {**train, "accumulation": 4}}, say=lambda line: None)
    for steps in (STEPS // 2, STEPS):
        settings = {**train, "accumulation": 2, "steps": steps}
        divided = {**asked, "out": str(two), "processes": 2, "shares": True, "train": settings}
        done = launch(divided, ACCELERATE_USE_FSDP="true")
        assert done.returncode == 0, done.stderr[-3000:]
    # Its part of the base, whose small weights do not divide evenly, and all of what trains.
    shares = {line.split()[2]: float(line.split()[-1]) for line in done.stdout.splitlines() if "share of" in line}
    assert shares == {"frozen": pytest.approx(0.5, abs=0.03), "trained": 1}
    torch.testing.assert_close(losses(one), losses(two), rtol=0, atol=1e-5)
    for file in ("weights", "ema", "optimizer"):
        last = f"checkpoints/step-{STEPS:06d}/{file}.safetensors"
        ours, theirs = load_file(one / last), load_file(two / last)
        assert ours.keys() == theirs.keys()
        assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 0.02 * RATE * STEPS
    name = "pytorch_lora_weights.safetensors"
    ours, theirs = load_file(one / "lora" / name), load_file(two / "lora" / name)
    assert ours.keys() == theirs.keys()


@pytest.mark.slow
def test_a_lora_on_a_divided_base_in_bf16_is_float32_and_trains_like_one_process(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    """One process lays its convolutions out in another way, so bf16 rounds otherwise; SGD follows the gradients."""
    train = {"learning_rate": 1.0, "optimizer": "torch.optim:SGD", "precision": "bf16", "steps": 10, "clip": None}
    asked = {"base": str(base), "pictures": str(pictures), "method": "lora"}
    one, two = tmp_path / "one", tmp_path / "two"
    training_driver.train({**asked, "out": one, "train": {**train, "batch_size": 4}}, say=lambda line: None)
    divided = {**asked, "out": str(two), "processes": 2, "shares": True, "train": {**train, "batch_size": 2}}
    done = launch(divided, ACCELERATE_USE_FSDP="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "types of frozen: ['torch.bfloat16']" in done.stdout
    assert "types of trained: ['torch.float32']" in done.stdout
    torch.testing.assert_close(losses(one), losses(two), rtol=0.01, atol=0)
    ours, theirs = (load_file(out / "checkpoints/step-000010/weights.safetensors") for out in (one, two))
    ups = [torch.cat([found[key].flatten() for key in sorted(found) if "lora_B" in key]) for found in (ours, theirs)]
    assert ups[0].abs().max() > 1e-4  # they start at zero
    assert (ups[0] - ups[1]).norm() < 0.05 * ups[0].norm()


@pytest.mark.slow
def test_an_error_line_is_there_above_the_launcher_s(base: Path, tmp_path: Path) -> None:
    done = launch({"base": str(base), "pictures": str(tmp_path / "gone"), "method": "lora", "out": "o", "train": {}})
    assert done.returncode != 0
    assert f"error: data.source: folder {tmp_path / 'gone'} does not exist" in done.stderr

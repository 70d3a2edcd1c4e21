"""accelerate's own settings beside ours: taken where ours are at their defaults, else an error that names both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.config import TrainSettings
from training.errors import TrainingError
from training.launcher import adopted


def test_the_launcher_s_precision_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert adopted(TrainSettings(precision="fp16")).precision == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    taken = adopted(TrainSettings())
    assert taken.precision == "bf16"
    assert adopted(taken) == taken
    with pytest.raises(TrainingError, match=r"train.precision is fp16 and accelerate launch .*--mixed_precision bf16"):
        adopted(TrainSettings(precision="fp16"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(TrainingError, match=r"--mixed_precision fp8: train.precision knows fp32, bf16 and fp16"):
        adopted(TrainSettings())


def test_so_are_its_compiler_and_its_accumulation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert not adopted(TrainSettings()).compile
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert adopted(TrainSettings()).compile
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(TrainingError, match=r"--dynamo_backend eager: .*train.compile: true"):
        adopted(TrainSettings())
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert adopted(TrainSettings()).accumulation == 4
    with pytest.raises(TrainingError, match=r"train.accumulation is 2 and .*--gradient_accumulation_steps 4"):
        adopted(TrainSettings(accumulation=2))


def test_accumulation_is_found_where_the_launcher_was_called(tmp_path: Path) -> None:
    """accelerate hands it on to DeepSpeed only."""
    script = tmp_path / "recipe.py"
    script.write_text(
        "from training.config import TrainSettings\n"
        "from training.launcher import adopted\n"
        "found = adopted(TrainSettings())\n"
        "print(found.accumulation, found.precision)\n",
        "utf-8",
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--gradient_accumulation_steps=4"]
    done = subprocess.run(
        [*command, "--mixed_precision", "bf16", str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["4", "bf16"], done.stderr

"""accelerate's own settings beside ours: taken where ours are at their defaults, else an error that names both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training import environment
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


def test_threads_wait_briefly_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.WAITING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    environment.wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    environment.wait_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    environment.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    environment.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == str(environment.SPINS)


BODY = "from training.errors import exit_on_error\nwith exit_on_error():\n    import torch"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP")
@pytest.mark.parametrize(
    "command",
    [["-c", BODY], pytest.param(["-m", "recipes", "train", "--config", "pocket_dog"], marks=pytest.mark.slow)],
)
def test_the_process_that_trains_has_told_openmp(command: list[str], tmp_path: Path) -> None:
    """OpenMP prints what it has read when it is loaded, which is when torch is imported."""
    kept = {name: value for name, value in os.environ.items() if name not in environment.WAITING}
    words = ["--train.dry_run", "true", "--out", str(tmp_path / "out")] if "train" in command else []
    done = subprocess.run(
        [sys.executable, *command, *words],
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("this torch comes with another OpenMP")
    assert f"GOMP_SPINCOUNT = '{environment.SPINS}'" in done.stderr

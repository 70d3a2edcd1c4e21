"""The benchmarks' small modes run from the command line and print their tables."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_the_small_benchmark_prints_every_arm() -> None:
    command = [sys.executable, str(BENCHMARKS / "training.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n| {arm} | " in done.stdout for arm in ("floor", "trainer", "plain"))
    assert "as fast as the plain loop" in done.stdout


def test_the_small_sampling_benchmark_prints_every_arm() -> None:
    command = [sys.executable, str(BENCHMARKS / "sampling.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    arms = [f"{p}, {g}" for g in ("CFG", "S-CFG", "CFG, adapter") for p in ("fp32", "bf16")]
    assert all(f"\n| {arm} | " in done.stdout for arm in arms)
    assert "| guidance | float32 | bfloat16 | difference" in done.stdout


@pytest.mark.slow
def test_the_small_sampling_benchmark_times_scopes() -> None:
    command = [sys.executable, str(BENCHMARKS / "sampling.py"), "--smoke", "--scopes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(done.stdout.count(f"\n| {place} |") == 2 for place in ("no scope, merged", "off in the first fifth"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "rows"),
    [
        ("memory.py", ["bf16", "bf16, checkpointing", "int8", "int8, checkpointing"]),
        ("quantize.py", ["float32", "bfloat16", "bfloat16, int8"]),
        ("scale.py", ["entries", "100", "rows of the table"]),
    ],
)
def test_other_small_benchmarks_print_every_row(script: str, rows: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--smoke"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n| {row} | " in done.stdout for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_benchmark_of_gpus_says_in_one_line_that_there_is_none(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: torch finds no CUDA GPU here; use a machine with one, or --device cpu --smoke to test the parts"
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_part_of_the_benchmark_of_gpus_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["part"]: row for row in json.loads((tmp_path / "cpu.json").read_text("utf-8"))["parts"]}
    kinds = {name.split()[0] for name in rows}
    assert kinds == {"sampling", "masks", "resume", "training", "quantized", "compile"}
    without = importlib.util.find_spec("bitsandbytes") is None
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    assert set(failed) == ({"quantized sd15 nf4", "quantized sdxl nf4"} if without else set()), failed
    assert all("pip install bitsandbytes" in error for error in failed.values())
    assert rows["resume fp32"]["result"] == {"repeated": 1.0, "resumed": 1.0}
    assert rows["masks"]["result"]["float32"]["regions"] == 1.0
    assert "| sdxl batch 8 trainer | " in done.stdout
    assert ("## Without a result" in done.stdout) == without


@pytest.mark.slow
def test_parts_of_the_benchmark_of_gpus_that_take_too_long_are_recorded(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--smoke", "--out", str(tmp_path)]
    command += ["--only", "masks", "resume", "--minutes"]
    for minutes, message in (("0", "not run: the time is up"), ("0.25", "not finished within")):
        done = subprocess.run([*command, minutes], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = json.loads((tmp_path / "cpu.json").read_text("utf-8"))["parts"]
        assert [row["part"] for row in rows] == ["masks", "resume fp32"]
        assert any(row.get("error", "").startswith(message) for row in rows), rows

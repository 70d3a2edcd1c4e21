"""The benchmarks' small modes run from the command line and print their tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    ],
)
def test_the_small_benchmarks_of_bits_print_every_arm(script: str, rows: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), "--smoke"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n| {row} | " in done.stdout for row in rows)

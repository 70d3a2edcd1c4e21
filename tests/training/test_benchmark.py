"""The training benchmark's small mode runs from the command line and prints its table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "training.py"


def test_the_small_benchmark_prints_every_arm() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--smoke"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"\n| {arm} | " in done.stdout for arm in ("floor", "trainer", "plain"))
    assert "as fast as the plain loop" in done.stdout

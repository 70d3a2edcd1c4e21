"""Shared test set-up: no network, few threads, the golden folder where it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded outputs of the published method; it lies beside a developer's checkout."""
    if not GOLDEN.is_dir():
        pytest.skip(f"recorded outputs of the published method are not at {GOLDEN}")
    return GOLDEN

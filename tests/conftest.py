"""Shared test set-up: no network, few threads, checked shapes, the golden folder where it is there.

Shape annotations of scfg's tensor modules are checked under pytest. The import hook must come before the first import
of scfg, by whichever test. The modules that users' settings enter first (guidance, attach) are left out, so that a bad
value meets their own error, as it does outside pytest.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: threads of theirs would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TENSOR_MODULES = ["scfg.attention", "scfg.regions", "scfg.scale", "scfg.segment", "scfg.trace", "scfg.visualize"]

if "scfg" not in sys.modules:
    install_import_hook(TENSOR_MODULES, "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of recorded outputs of the published method; it lies beside a developer's checkout."""
    if not GOLDEN.is_dir():
        pytest.skip(f"recorded outputs of the published method are not at {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def bfloat16_attention() -> None:
    """torch 2.13 with ATEN_CPU_CAPABILITY=default on a CPU with AMX has attention in bfloat16 that raises by itself."""
    import torch

    words = torch.zeros(1, 2, 512, 16, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(words, words, words)
    except RuntimeError as error:
        pytest.skip(f"this torch has no attention in bfloat16 here: {error}")

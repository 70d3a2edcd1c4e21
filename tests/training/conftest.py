"""Tiny random bases of each family, and folders of small images: built once per session, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_bases
from training_data import RESOLUTION, fill

assert RESOLUTION == tiny_bases.RESOLUTION


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SD-shaped base with v-prediction, like the pocket base but a hundredth of it."""
    return tiny_bases.sd(tmp_path_factory.mktemp("base"), prediction="v_prediction")


@pytest.fixture(scope="session")
def sdxl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bases.sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five captioned images."""
    return fill(tmp_path / "pictures")

"""The documents as a site: every page, link and anchor, and the API pages made from docstrings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    guidance = (tmp_path / "api" / "scfg.html").read_text("utf-8")
    assert 'id="scfg.SemanticCFG"' in guidance
    assert "Finest region grid" in guidance  # a field's own line
    study = (tmp_path / "study.html").read_text("utf-8")
    assert 'href="pocket.html"' in study
    assert (tmp_path / "files" / "benchmarks" / "study" / "results" / "text-ddim.svg").is_file()

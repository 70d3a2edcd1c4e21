"""The demo goes the whole way, and what it ships is read by plain diffusers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import adapters

ROOT = Path(__file__).resolve().parents[2]
RELEASE = {"pytorch_lora_weights.safetensors", "README.md", "report.html", "gains.json", "per_image.csv", "samples"}


def recipe(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("demo")
    done = recipe("demo", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_it_ships_a_verified_folder_and_says_what_to_open(demo) -> None:
    out, said = demo
    assert {path.name for path in (out / "release").iterdir()} >= RELEASE
    adapters.verify.verify(out / "release")
    assert str(out / "release" / "report.html") in said
    assert "S-CFG" in said
    assert "prompt accuracy" in said
    assert Image.open(out / "sheet.png").size[0] > 500


def test_plain_diffusers_makes_the_shipped_pictures(demo) -> None:
    from diffusers import StableDiffusionPipeline

    from training.pocket import base_path

    out, _ = demo
    shots = list(adapters.sample.shots_in(out / "pictures" / "CFG"))
    assert shots
    pipe = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipe.load_lora_weights(out / "release")
    for shot in shots:
        image = pipe(
            shot.prompt,
            num_inference_steps=25,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(shot.seed),
        ).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(shot.image, int)).max() <= 1


def test_arms_differ_where_they_should(demo) -> None:
    out, _ = demo
    cfg, semantic = (next(iter(adapters.sample.shots_in(out / "pictures" / arm))) for arm in ("CFG", "S-CFG"))
    assert cfg.key == semantic.key
    assert (np.asarray(cfg.image) != np.asarray(semantic.image)).any()


BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.mark.parametrize(
    ("package", "version", "code", "said"),
    [
        ("torchvision", "0.27.0", BROKEN, "pip uninstall torchvision"),
        ("torch", "2.3.1", None, "torch 2.3.1 is installed, at least 2.6 is needed"),
    ],
)
def test_a_wrong_installation_is_named_with_the_remedy(tmp_path: Path, package, version, code, said) -> None:
    facts = tmp_path / f"{package}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if code:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    done = recipe("demo", "--quick", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_output_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = recipe("demo", "--quick", "--out", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr

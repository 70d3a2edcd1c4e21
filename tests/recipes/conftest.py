"""What the tests of recipes share: a recipe as its own process or in this one, and small models on disk."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
Recipe = Callable[..., subprocess.CompletedProcess[str]]


@dataclass(frozen=True)
class Said:
    """How a recipe ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Runs `python recipes/NAME.py ARGUMENTS` and returns what it said."""

    def run(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **variables},
        )

    return run


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Three photos of a dog, without captions or masks."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(3):
        Image.open(ROOT / "recipes" / "subjects" / "dog" / f"{number}.webp").save(folder / f"{number}.png")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """A recipe's main in this process, from the repository's root: seconds of imports less than `recipe`."""

    def run(name: str, *arguments: object) -> Said:
        from recipes.common.cli import explained, launch
        from training.errors import exit_on_error

        module = importlib.import_module(name if "." in name else f"recipes.{name}")
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            if hasattr(module, "main"):
                with exit_on_error(explained):
                    module.main()
            else:
                launch(module.Settings, module.run)
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture
def done(call: Callable[..., Said]) -> Callable[..., str]:
    """As `call`, for what must go well; returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        said = call(name, *arguments)
        assert said.code == 0, said.err
        return said.out

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> tuple[Path, str]:
    """The demo's quick form, run once."""
    out = tmp_path_factory.mktemp("demo")
    ended = recipe("demo", "--quick", "--out", out)
    assert ended.returncode == 0, ended.stderr
    return out, ended.stdout


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models of a few thousand parameters: sd15, sd21, sdxl, their ControlNets, if, if2, clip, dino."""
    import tiny_bases

    root = tmp_path_factory.mktemp("models")
    # Long enough for a prompt of letters; DreamBooth's prompts are longer, and are cut as CLIP cuts them.
    tiny_bases.sd(root / "sd15", length=40)
    tiny_bases.sd(root / "sd21", prediction="v_prediction", length=40, seed=7)
    tiny_bases.sdxl(root / "sdxl", length=40)
    for name in ("sd15", "sd21", "sdxl"):
        tiny_bases.controlnet(root / f"controlnet-{name}", root / name)
    tiny_bases.deepfloyd(root / "if")
    tiny_bases.deepfloyd_upscaler(root / "if2")
    tiny_bases.clip(root / "clip")
    tiny_bases.vit(root / "dino")
    return root


def photo(seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """Smooth random colors, (width, height)."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the networked configs find in `data`: coco, ade20k, captions, subjects."""
    data = tmp_path_factory.mktemp("data")
    for name in ("coco", "ade20k"):
        rows = []
        (data / name / "conditioning").mkdir(parents=True)
        for number in range(3):
            photo(number).save(data / name / f"{number}.png")
            photo(number + 10).save(data / name / "conditioning" / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "text": f"a {('dog', 'cat', 'fox')[number]} in the fog"})
        (data / name / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.rmtree(data / "coco" / "conditioning")
    (data / "coco_captions.txt").write_text("a dog in the fog\na cat\n")
    for number, (name, noun) in enumerate((("rex", "dog"), ("mia", "cat"))):
        folder = data / "dreambooth" / name
        folder.mkdir(parents=True)
        for index in range(3):
            photo(20 + 10 * number + index).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"a sks {noun}")
        facts = {"class": noun, "identifier": "sks", "prompts": [f"a sks {noun} in a box", f"a red sks {noun}"]}
        (folder / "subject.json").write_text(json.dumps(facts))
    return data


@pytest.fixture
def refused(call: Callable, tmp_path: Path) -> Callable[..., str]:
    """The error of a recipe that must not run; nothing may have been made."""

    def run(name: str, *arguments: object, out: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        said = call(name, *arguments, f"--out={out or tmp_path / 'out'}")
        assert said.code == 2, said.out + said.err
        assert "Traceback" not in said.err
        lines = [line for line in said.err.splitlines() if line.strip()]
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
        return lines[0]

    return run

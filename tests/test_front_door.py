"""The command `scfg-toolkit`: from any folder, from a checkout and from a wheel, in one process and in several."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image, ImageOps

import adapters
from recipes.__main__ import RECIPES, TOOLS, main
from recipes.common.cli import TRAININGS, shipped_configs, training_recipe, with_config_files
from training.command_line import parse
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sysconfig.get_paths()["purelib"]


def test_every_command_is_in_the_help_and_an_unknown_one_is_an_error(capsys) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in (*RECIPES, *TOOLS, "configs"):
        assert f"\n  {name} " in text
    assert max(map(len, text.splitlines())) <= 120
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: scfg-toolkit has no command 'trian'; `scfg-toolkit --help` lists them\n"


@pytest.mark.parametrize("command", [name for name in RECIPES if name not in ("train", "studio")])
def test_a_command_is_the_recipe_of_that_name(command: str) -> None:
    assert (ROOT / "recipes" / f"{command}.py").is_file()


def test_the_config_says_which_training_it_is_for(tmp_path: Path) -> None:
    assert training_recipe([]) == "dreambooth_lora"
    assert training_recipe(["--config", "pocket_dog"]) == "dreambooth_lora"
    assert training_recipe(["--config=dreambooth/pocket_dog", "--train.steps=3"]) == "dreambooth"
    assert training_recipe(["--config", "pocket_canny"]) == "controlnet"
    assert training_recipe(["--config", "pocket_fluent"]) == "text_to_image_lora"
    assert training_recipe(["--config", "pocket_dog"], "dreambooth") == "dreambooth"
    mine = tmp_path / "config.yaml"
    mine.write_text("base: {path: pocket}\n")
    assert training_recipe([f"--config={mine}"]) == "dreambooth_lora"
    mine.write_text("base: {path: pocket}\ncontrolnet: {dropout: 0.1}\n")
    assert training_recipe([f"--config={mine}"]) == "controlnet"
    mine.write_text("base: [\n")
    with pytest.raises(TrainingError, match="cannot be read"):
        training_recipe([f"--config={mine}"])


def test_an_unknown_config_is_named_with_those_that_ship() -> None:
    with pytest.raises(TrainingError, match=r"config pocket_cat: there is no such file .* measure/pocket_text"):
        with_config_files(["--config", "pocket_cat"], "measure")
    assert {name.split("/")[0] for name in shipped_configs()} >= {*TRAININGS, "measure", "sample", "controlled"}


@pytest.mark.parametrize("name", [name for name in shipped_configs() if "/pocket" in name])
def test_the_paths_of_a_shipped_config_are_found_from_an_empty_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib import import_module

    monkeypatch.chdir(tmp_path)
    recipe = name.split("/")[0]
    settings = parse(import_module(f"recipes.{recipe}").Settings, with_config_files(["--config", name], recipe))
    assert settings.out.startswith("runs/"), "what a run makes belongs into the working directory"
    text = repr(settings)
    assert "'recipes/" not in text, text
    written = (ROOT / "recipes" / "configs" / f"{name}.yaml").read_text("utf-8").split("\n", 1)[1]
    assert ("recipes/" in written) == (str(ROOT / "recipes") in text)


def test_a_path_in_the_working_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import dreambooth_lora

    (tmp_path / "recipes" / "subjects" / "dog").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    words = with_config_files(["--config", "pocket_dog"], "dreambooth_lora")
    settings = parse(dreambooth_lora.Settings, words)
    assert settings.data.source == "recipes/subjects/dog"
    assert settings.data.masks == str(ROOT / "recipes" / "subjects" / "dog" / "masks")


def run_in(folder: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [*map(str, words)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**known, "HF_HUB_OFFLINE": "1", **variables},
    )


def test_a_recipe_s_file_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """-S leaves site-packages out, and with it an installed copy of this project."""
    script = ROOT / "recipes" / "new.py"
    ended = run_in(tmp_path, sys.executable, "-S", script, "--help", PYTHONPATH=LIBRARY)
    assert ended.returncode == 0, ended.stderr
    assert "--class" in ended.stdout
    bare = run_in(tmp_path, sys.executable, "-S", script, "--help")
    assert bare.returncode == 2
    assert bare.stderr.startswith("error: yaml, PIL cannot be imported by ")
    assert len(bare.stderr.splitlines()) == 1


@pytest.mark.slow
def test_two_processes_make_the_pictures_and_an_error_is_only_said(tmp_path: Path) -> None:
    sample = [sys.executable, "-m", "recipes", "sample", "--processes", "2", "--config", "pocket"]
    few = ["--sampling.steps", "2", "--out", tmp_path / "out"]
    ended = run_in(tmp_path, *sample, *few, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    assert "accelerate launch" not in ended.stderr
    assert (tmp_path / "out" / "sheet.png").is_file()
    ended = run_in(tmp_path, *sample, *few, "--guidance.guidance_scale", "0.5", PYTHONPATH=str(ROOT))
    assert ended.returncode == 2
    assert "error: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "were not passed to" not in ended.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program of a fresh environment with this project's wheel, and the packages of the running one beside it."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    assert setuptools
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for room in ("scfg", "training", "adapters", "recipes"):
        shutil.copytree(ROOT / room, source / room, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = ["-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", root, source]
    made = run_in(root, sys.executable, *pip, *build)
    assert made.returncode == 0, made.stderr
    python = root / "env" / "bin" / "python"
    run_in(root, sys.executable, "-m", "venv", "--system-site-packages", root / "env")
    [wheel] = root.glob("*.whl")
    made = run_in(root, python, *pip, "install", "--no-deps", "--no-index", wheel)
    assert made.returncode == 0, made.stderr
    [library] = (root / "env" / "lib").glob("python3*/site-packages")
    (library / "beside.pth").write_text(LIBRARY + "\n")  # its packages; not what its own .pth files add
    return root / "env" / "bin" / "scfg-toolkit"


@pytest.mark.slow
def test_the_wheel_trains_and_samples_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    python = installed.parent / "python"
    where = run_in(tmp_path, python, "-c", "import recipes, scfg; print(recipes.__file__); print(scfg.__version__)")
    place, version = where.stdout.split()
    assert Path(place).is_relative_to(installed.parents[1]), where.stdout
    assert run_in(tmp_path, installed, "--version").stdout == f"scfg-toolkit {version}\n"
    quick = ["--train.steps", "2", "--train.warmup", "0", "--dreambooth.class_images", "4", "--dreambooth.steps", "8"]
    later = ["--tune", "null", "--measure.limit", "2", "--measure.seeds", "[1]", "--measure.overlays", "0"]
    ended = run_in(tmp_path, installed, "train", "--config", "pocket_dog", *quick, *later, "--sampling.steps", "8")
    assert ended.returncode == 0, ended.stderr
    release = tmp_path / "runs" / "pocket_dog" / "release"
    checked = run_in(tmp_path, installed, "verify", release)
    assert json.loads(checked.stdout)["kind"] == "lora", checked.stderr
    ended = run_in(
        tmp_path, installed, "sample", "--config", "pocket", "--adapter", release, "--sampling.steps", "2", "--out", "x"
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "x" / "sheet.png").is_file()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of mixed sizes where the guide has them: one is turned by its EXIF, and one is not read here."""
    folder = tmp_path / "photos" / "rex"
    folder.mkdir(parents=True)
    for number, size in enumerate([(96, 64), (128, 160), (64, 64), (200, 150)]):
        image = Image.effect_noise(size, 40).convert("RGB")
        image.paste((200, 120, 40), (20, 15, 50, 45))
        exif = image.getexif()
        exif[0x0112] = 6 if number == 0 else 1
        image.save(folder / f"{number}.jpg", exif=exif)
    (folder / "IMG_0001.HEIC").write_bytes(b"not read here")
    return folder


def other_photos(folder: Path) -> None:
    """Another set in its place: high and wide, PNG and JPEG, two turned by their EXIF, and one broken."""
    for file in folder.iterdir():
        file.unlink()
    for number, size in enumerate([(70, 220), (260, 90), (120, 120)]):
        image = Image.effect_noise(size, 60).convert("RGB")
        image.paste((40, 90, 200), (10, 10, 60, 60))
        exif = image.getexif()
        exif[0x0112] = (8, 3, 1)[number]
        image.save(folder / f"DSC {number}.jpg", exif=exif)
    image.save(folder / "last.png")
    (folder / "broken.jpg").write_bytes((folder / "DSC 2.jpg").read_bytes()[:200])


def commands_on_pocket() -> list[list[str]]:
    """What the guide tells to type for one's own photos on the pocket base."""
    text = (ROOT / "docs" / "getting-started.md").read_text("utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    [block] = [found for found in blocks if "new photos/rex --class dog --base pocket" in found]
    return [shlex.split(line) for line in block.splitlines()]


FEW = ["--train.steps=4", "--train.warmup=0", "--dreambooth.class_images=4", "--dreambooth.steps=4"]
FEW += [
    "--sampling.steps=8",
    "--tune.guidance_scales=[4.0]",
    "--measure.limit=2",
    "--measure.seeds=[1]",
    "--measure.overlays=1",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noun", "masked", "others"), [("dog", False, False), ("gift", True, False), ("car", False, True)]
)
def test_a_newcomer_s_photos_become_a_release(
    noun: str, masked: bool, others: bool, photos: Path, tmp_path: Path
) -> None:
    """The guide's commands as they stand (one class in place of another), the run with few steps and pictures."""
    if others:
        other_photos(photos)
    if masked:
        (photos / "masks").mkdir()
        for file in photos.glob("*.jpg"):
            with Image.open(file) as image:
                size = ImageOps.exif_transpose(image).size
            mask = Image.new("L", size)
            mask.paste(255, (20, 15, 50, 45))
            mask.save(photos / "masks" / f"{file.stem}.png")
    new, train = [[noun if word == "dog" else word for word in words[1:]] for words in commands_on_pocket()]
    program = [sys.executable, "-m", "recipes"]
    said = run_in(tmp_path, *program, *new, PYTHONPATH=str(ROOT))
    assert said.returncode == 0, said.stderr
    if others:
        assert "4 photos (2 turned upright), 120x120 to 260x90 pixels" in said.stdout
        assert "broken.jpg" in said.stdout
    else:
        assert "4 photos (1 turned upright), 64x64 to 200x150 pixels" in said.stdout
        assert "left out: IMG_0001.HEIC" in said.stdout
    assert said.stdout.splitlines()[-1].strip() == shlex.join(["scfg-toolkit", *train])
    ended = run_in(tmp_path, *program, *train, *FEW, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    release = tmp_path / "runs" / "try" / "release"
    assert adapters.measuring.verify.verify(release)["kind"] == "lora"
    assert ("similarity (judge)" in (release / "README.md").read_text("utf-8")) == (not masked)
    again = run_in(tmp_path, *program, *train, *FEW, PYTHONPATH=str(ROOT))
    assert again.returncode == 0, again.stderr

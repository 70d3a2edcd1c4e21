"""Every config is what its recipe reads, names its own command, and says only what differs from the defaults."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from training.command_line import parse

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
STUDY = ROOT / "benchmarks" / "study" / "configs"
SHIPPED = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "accelerate")
FILES = [*SHIPPED, *sorted(STUDY.glob("*/*.yaml"))]
LAUNCHER = sorted((CONFIGS / "accelerate").glob("*.yaml"))
RECIPES = (
    "dreambooth",
    "dreambooth_lora",
    "text_to_image_lora",
    "controlnet",
    "sample",
    "measure",
    "tune",
    "ship",
    "controlled",
    "new",
    "demo",
)


def name_of(path: Path) -> str:
    return path.relative_to(STUDY if path.is_relative_to(STUDY) else CONFIGS).as_posix()


def settings_of(path: Path) -> type:
    room = "benchmarks.study" if path.parent.name == "pointing" else "recipes"
    return importlib.import_module(f"{room}.{path.parent.name}").Settings


def tables_of(kind: type) -> dict[str, type]:
    """Field -> settings class, for those of a settings class that are settings themselves, null by default or not."""
    hints = {name: (hint, *typing.get_args(hint)) for name, hint in typing.get_type_hints(kind).items()}
    dicts = {name for name, (hint, *_) in hints.items() if typing.get_origin(hint) is dict}
    return {name: part for name, parts in hints.items() if name not in dicts for part in parts if is_dataclass(part)}


def default_of(item: Field) -> object:
    return item.default_factory() if item.default_factory is not MISSING else item.default


def repeated(given: dict, kind: type, start: object = None) -> list[str]:
    """Dotted names of the values that are what would be there without them; a list or a mapping is one value.

    Args:
        given: settings as a config has them.
        kind: the class of the settings.
        start: the settings that the values change; null: the class's own defaults.
    """
    tables, found = tables_of(kind), []
    for item in fields(kind):
        if item.name not in given:
            continue
        value, default = given[item.name], default_of(item) if start is None else getattr(start, item.name)
        if item.name in tables:
            inner = default if is_dataclass(default) else None
            found += [f"{item.name}.{name}" for name in repeated(value, tables[item.name], inner)]
        elif value == default:
            found.append(item.name)
    return found


def test_there_are_configs_for_every_recipe_that_takes_one() -> None:
    """ship.py reads what a run left behind; tune.py is mostly a stage of another run."""
    folders = {path.parent.name for path in SHIPPED}
    assert folders == set(RECIPES) - {"tune", "ship", "new", "demo"}
    assert len(LAUNCHER) == 2


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_parses_and_its_first_line_launches_it(path: Path) -> None:
    parse(settings_of(path), ["--config", str(path)])
    first = path.read_text("utf-8").splitlines()[0]
    place = path.relative_to(ROOT).as_posix()
    recipe = path.parent.name
    start = f"accelerate launch recipes/{recipe}.py"
    if recipe == "pointing":
        start = "python -m benchmarks.study.pointing"
    command = f"# {start} --config {place}"
    assert first == command or first.startswith(f"{command} --")
    more = shlex.split(first.removeprefix(command))
    parse(settings_of(path), ["--config", str(path), *more])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_says_only_what_differs_from_the_defaults(path: Path) -> None:
    assert repeated(yaml.safe_load(path.read_text("utf-8")), settings_of(path)) == []


def test_the_look_for_repeated_defaults_sees_them() -> None:
    from recipes import controlnet, dreambooth_lora

    given = {
        "base": {"path": "pocket", "variant": None},
        "out": "runs/x",
        "train": {"steps": 300, "batch_size": 1, "validation": {"every": 250}},
        "measure": {"seeds": [1, 2, 3], "limit": 2},
        "ship": {"license": "other"},
    }
    assert set(repeated(given, dreambooth_lora.Settings)) == {
        "measure.seeds",
        "ship.license",
        "base.variant",
        "train.batch_size",
        "train.validation.every",
    }
    given = {"objective": {"caption_dropout": 0.1}}
    assert repeated(given, dreambooth_lora.Settings) == []
    assert repeated(given, controlnet.Settings) == ["objective.caption_dropout"]


@pytest.mark.parametrize("path", LAUNCHER, ids=name_of)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(path))
    assert read.num_processes == 2
    assert read.distributed_type.value == yaml.safe_load(path.read_text("utf-8"))["distributed_type"]
    words = shlex.split(path.read_text("utf-8").splitlines()[0], comments=False)
    assert words[:5] == ["#", "accelerate", "launch", "--config_file", path.relative_to(ROOT).as_posix()]
    assert (ROOT / words[5]).is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_help_answers_at_once_without_torch(name: str) -> None:
    """torchvision is imported to see that it loads, where it is installed, and brings torch with it."""
    program = (
        "import importlib.util, runpy, sys\n"
        f"sys.argv = ['recipes/{name}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('recipes/{name}.py', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    print('ended', end.code or 0, sorted(heavy), importlib.util.find_spec('torchvision') is not None)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == ""
    *text, last = ended.stdout.splitlines()
    assert last in ("ended 0 [] False", "ended 0 ['torch'] True")
    assert "--out" in "\n".join(text)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_the_settings_for_masks_that_a_config_offers_can_be_taken_as_they_stand(name: str, tmp_path: Path) -> None:
    text = (CONFIGS / "dreambooth_lora" / f"{name}_subject.yaml").read_text("utf-8")
    lines = [
        line.replace("  # ", "  ", 1) if line.startswith("  # ") and ": " in line else line
        for line in text.splitlines()
    ]
    offered = tmp_path / "config.yaml"
    offered.write_text("\n".join(line for line in lines if "With masks" not in line), "utf-8")
    dreambooth = parse(settings_of(CONFIGS / "dreambooth_lora" / "any"), [f"--config={offered}"]).dreambooth
    assert (dreambooth.company, dreambooth.prior_ratio, dreambooth.prior_weight) == (0.5, 0.5, 0.5)
    prompts = (ROOT / dreambooth.class_prompt_file).read_text("utf-8").splitlines()
    assert sum("{}" in prompt for prompt in prompts) > len(prompts) / 2

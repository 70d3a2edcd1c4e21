"""What the documents tell people to type: commands parse with the recipe they name, README's Python runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from recipes.__main__ import RECIPES
from recipes.common import foreign
from recipes.common.cli import training_recipe
from training.command_line import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"X\.py|\.\.\.|\[|\{")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text("utf-8"), flags=re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """Every command line in a bash block, in backquotes or in a config's first line, that needs no filling in."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
        lines += re.findall(r"`((?:python|accelerate launch|make|scfg-toolkit) [^`\n]+)`", text)
        for line in lines:
            command = line.split("#")[0].strip()
            command = re.sub(r"^(\w+=\S+ )+", "", command)
            if command and not PLACEHOLDER.search(command):
                found.append((page.name, shlex.split(command)))
    return found


LAUNCHER = ("--processes", "--launcher", "--recipe")


def own_words(arguments: list[str], recipe: str) -> list[str]:
    """A command's words without those of scfg-toolkit itself, and with the file of a config that is named."""
    pairs = list(zip(["", *arguments], arguments, strict=False))
    kept = [(before, word) for before, word in pairs if word not in LAUNCHER and before not in LAUNCHER]
    return [_file(word, recipe) if before == "--config" else word for before, word in kept]


def _file(config: str, recipe: str) -> str:
    """A shipped config's file by name, from the root; any other config as it is."""
    named = ROOT / "recipes" / "configs" / recipe / f"{config}.yaml"
    return named.relative_to(ROOT).as_posix() if named.is_file() else config


def script(words: list[str]) -> tuple[Path, list[str]] | None:
    """The Python file that a command runs, and its arguments."""
    if words[0] == "scfg-toolkit" and words[1] in RECIPES and len(words) > 2:  # not only named
        command, *arguments = words[1:]
        made = any(word.startswith("runs/") for word in arguments)  # by recipes/new.py: a LoRA of a subject
        recipe = command if command != "train" else training_recipe([] if made else arguments)
        return ROOT / "recipes" / f"{recipe}.py", own_words(arguments, recipe)
    for place, word in enumerate(words):
        if word.endswith(".py"):
            return ROOT / word, words[place + 1 :]
    return None


RUN = [(page, *made) for page, words in commands() if (made := script(words))]


def test_there_is_something_to_check() -> None:
    assert len(RUN) > 15
    assert {path.name for _, path, _ in RUN} >= {"demo.py", "new.py", "measure.py", "dreambooth_lora.py", "pocket.py"}


def short_form(path: Path, arguments: list[str]) -> bool:
    """Whether a command measures an adapter without a config."""
    return path.name == "measure.py" and not arguments[0].startswith("-")


@pytest.mark.parametrize(("page", "path", "arguments"), RUN, ids=[f"{p}: {s.name}" for p, s, _ in RUN])
def test_a_command_is_one_that_its_script_takes(page: str, path: Path, arguments: list[str]) -> None:
    assert path.is_file(), f"{page} names {path}"
    module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    kind = getattr(import_module(module), "Settings", None) if module.startswith("recipes.") else None
    if kind is None:  # argparse
        known = path.read_text("utf-8")
        for word in arguments:
            name = word.split("=")[0].replace("--no-", "--")
            assert not word.startswith("--") or f'"{name}"' in known, f"{page}: {path.name} has no {word}"
        return
    if short_form(path, arguments):
        _, more = foreign.parser().parse_known_args(arguments)
        parse(kind, ["--base.path=pocket", "--out=x", *more])
        return
    configs = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--config"]
    if any(not (ROOT / config).is_file() for config in configs):
        assert all(config.startswith("runs/") for config in configs), f"{page}: {configs} do not ship"
        return
    parse(kind, [str(ROOT / word) if word in configs else word for word in arguments])


# Put before a command's own words, so that what it says itself still holds.
FEW = ["--sampling.steps=4", "--measure.limit=2", "--measure.seeds=[1]", "--measure.overlays=1"]
SMALL = {
    "dreambooth_lora.py": [
        "--train.steps=2",
        "--train.warmup=0",
        "--tune.guidance_scales=[4.0]",
        "--tune.seeds=[101]",
        *FEW,
    ],
    "measure.py": FEW,
    "ship.py": [],
}


@pytest.mark.slow
def test_the_guides_recipes_run_one_after_the_other(tmp_path: Path) -> None:
    """As they stand, on the pocket base, with fewer steps and pictures, and with runs/ elsewhere."""
    ran = []
    for page, path, arguments in RUN:
        written = any(re.fullmatch(r"runs/.*/config\.yaml", word) for word in arguments)  # by recipes/new.py, elsewhere
        if path.name not in SMALL or written or short_form(path, arguments):
            continue
        out = []
        if "--config" in arguments:
            place = ROOT / arguments[arguments.index("--config") + 1]
            out = ["--out", yaml.safe_load(place.read_text("utf-8"))["out"]]
        begin = arguments.index("--config") + 2 if "--config" in arguments else 0
        rest = arguments[begin:]
        if "--train.steps" in rest:  # a page's own number of steps comes later on the line and would win
            at = rest.index("--train.steps")
            rest = rest[:at] + rest[at + 2 :]
        words = [*arguments[:begin], *SMALL[path.name], *rest, *out]
        words = [re.sub(r"^runs/", f"{tmp_path}/", word) for word in words]
        ended = subprocess.run([sys.executable, path, *words], cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, f"{page}: {path.name} {words}\n{ended.stderr[-2000:]}"
        ran.append(path.name)
    assert set(ran) == set(SMALL)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    named = {words[1] for _, words in commands() if words[0] == "make" and words[1:]}
    assert named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_a_page_compiles_and_its_links_lead_somewhere(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_readme_s_ten_lines_run_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(ROOT / "README.md", "python")[0]
    names: dict = {}
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (64, 64)
    assert len(names["run"].trace) == 50


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {ROOT / "README.md"}
    for _ in PAGES:
        for page in list(reached):
            links = re.findall(r"\]\((?!http)([^)#]+\.md)", page.read_text("utf-8"))
            reached |= {(page.parent / link).resolve() for link in links}
    assert set(PAGES) <= reached, f"no way to {[page.name for page in set(PAGES) - reached]}"

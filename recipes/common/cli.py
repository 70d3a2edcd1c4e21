"""A recipe as a command: its settings and shipped configs, its errors as one line, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml

from training.command_line import parse
from training.config import TrainSettings
from training.errors import TrainingError, exit_on_error
from training.launcher import adopted
from training.text import read_text

__all__ = [
    "CONFIGS",
    "TRAININGS",
    "alone",
    "explained",
    "launch",
    "named",
    "quiet",
    "say",
    "shipped_configs",
    "training_recipe",
    "with_config_files",
]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# In the order in which a config's name is looked for.
TRAININGS = ("dreambooth_lora", "dreambooth", "text_to_image_lora", "controlnet")
SettingsT = TypeVar("SettingsT")


def launch(kind: type[SettingsT], run: Callable[[SettingsT], Any]) -> None:
    """A recipe's main: settings from the command line, and every explained error as one line on stderr."""
    with exit_on_error(explained):
        if not {"-h", "--help", "--print_config"} & set(sys.argv[1:]):
            quiet()
        settings = _settings(kind, Path(run.__code__.co_filename).stem)
        with alone(settings):
            run(settings)


def alone(settings: Any) -> AbstractContextManager[None]:
    """Keeps other runs out of the settings' `out` while in the context; trial runs write nothing and lock nothing."""
    from training.lock import held
    from training.ranks import state

    out, training = getattr(settings, "out", None), getattr(settings, "train", None)
    trial = getattr(settings, "dry_run", False) or getattr(training, "dry_run", False)
    return held(out) if out and not trial and state().is_main_process else nullcontext()


def _settings(kind: type[SettingsT], recipe: str) -> SettingsT:
    """What the command line, its configs and the launcher say; what is wrong with it is one line."""
    words = with_config_files(sys.argv[1:], recipe)
    try:
        settings = parse(kind, words)
        if isinstance(train := getattr(settings, "train", None), TrainSettings):
            settings = replace(cast(Any, settings), train=adopted(train))
        return settings
    except TrainingError as error:
        raise TrainingError(" ".join(str(error).split())) from error


# ---------------------------------------------------------------------------------------------- configs by name


def shipped_configs() -> list[str]:
    """`recipe/name` of every config that ships, by recipe."""
    names = (path.relative_to(CONFIGS).with_suffix("").as_posix() for path in sorted(CONFIGS.glob("*/*.yaml")))
    return [name for name in names if not name.startswith("accelerate/")]


def with_config_files(words: Sequence[str], *recipes: str) -> list[str]:
    """A command line in which every `--config NAME` of a shipped config is its file; `recipe/name` tells two apart.

    Raises:
        TrainingError: neither a file nor a shipped config of these recipes.
    """
    words = list(words)
    for place, name in _configs_of(words):
        if not Path(name).is_file():
            file = _shipped(name, recipes)
            words[place] = f"--config={file}" if words[place].startswith("--config=") else str(file)
    return words


def _configs_of(words: Sequence[str]) -> list[tuple[int, str]]:
    """Where on the command line configs are named, and their names."""
    apart = [(place, word) for place, word in enumerate(words) if place and words[place - 1] == "--config"]
    joined = [
        (place, word.removeprefix("--config=")) for place, word in enumerate(words) if word.startswith("--config=")
    ]
    return apart + joined


def _shipped(name: str, recipes: Sequence[str]) -> Path:
    for recipe in recipes:
        for file in (CONFIGS / recipe / f"{name}.yaml", CONFIGS / f"{name}.yaml"):
            if file.is_file() and file.parent.name == recipe:
                return file
    known = [config for config in shipped_configs() if config.split("/")[0] in recipes]
    there = f"; these ship: {', '.join(known)}" if known else ""
    raise TrainingError(f"config {name}: there is no such file (looked from {Path.cwd()}){there}")


def training_recipe(words: Sequence[str], chosen: str | None = None) -> str:
    """The training recipe that a command line is for.

    Where none is chosen, the folder that the config lies in says it, as in configs/controlnet/; then the config's own
    table `controlnet`. All others are a LoRA of a subject.
    """
    files = [Path(name) for _, name in _configs_of(with_config_files(words, *([chosen] if chosen else TRAININGS)))]
    if chosen or not files:
        return chosen or TRAININGS[0]
    if files[0].parent.name in TRAININGS:
        return files[0].parent.name
    try:
        tables = yaml.safe_load(read_text(files[0], "--config"))
    except (yaml.YAMLError, RecursionError) as error:
        raise TrainingError(f"config {files[0]} cannot be read: {' '.join(str(error).split())}") from error
    return "controlnet" if isinstance(tables, dict) and "controlnet" in tables else TRAININGS[0]


# ---------------------------------------------------------------------------------------------- errors and words


def explained() -> tuple[type[Exception], ...]:
    import adapters
    import scfg
    from training.pocket import PocketError

    return adapters.AdapterError, scfg.ScfgError, PocketError


@contextmanager
def named(flag: str) -> Iterator[None]:
    """Whatever a room finds wrong inside is said of a flag."""
    errors: tuple[type[Exception], ...] = (TrainingError, *explained())
    try:
        yield
    except errors as error:
        raise TrainingError(f"{flag}: {error}") from error


def quiet() -> None:
    """Loading takes a second: no bars for it, and no word on image processors that nothing here uses."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def say(line: str) -> None:
    """Print on the main process only."""
    from training.ranks import state

    if state().is_main_process:
        print(line, flush=True)

"""How settings are read from YAML files and the command line. Importing this module loads no torch."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from . import naming, typed
from .errors import TrainingError

__all__ = ["parse"]

SettingsT = TypeVar("SettingsT")


def parse(kind: type[SettingsT], args: Sequence[str] | None = None) -> SettingsT:
    """Reads an instance of the dataclass `kind` from `--config` files and dotted overrides (later ones win).

    Args:
        kind: the recipe's dataclass; its docstring heads `--help`.
        args: command line; default: this process's. Texts arrive as typed, except `null`, which unsets a setting.

    Raises:
        TrainingError: an unknown name or a bad value, named.
    """
    from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_loader, set_parsing_settings

    class Parser(ArgumentParser):
        def parse_path(self, path: Any, *args: Any, **more: Any) -> Any:  # its own reads texts as YAML does
            values = _prompts_as_lists(typed.config(kind, path))
            exact = yaml.safe_dump(values, default_style='"', sort_keys=False)
            return self.parse_string(exact, *args, **more)

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("typed", partial(typed.value, load=get_loader("yaml")), exceptions=(yaml.YAMLError,))
    parser = Parser(description=kind.__doc__, exit_on_error=False, allow_abbrev=False, parser_mode="typed")
    parser.add_argument("--config", action="config", help="YAML file with settings; may be given several times")
    parser.add_class_arguments(kind, as_group=False)
    words = list(sys.argv[1:] if args is None else args)
    _check_letters(words)
    arguments = _as_today(kind, _configs_first(words))
    if {"-h", "--help"} & set(arguments):
        print(parser.format_help() if "all" in arguments else _short_help(parser, kind))
        raise SystemExit(0)
    naming.check_flags(kind, arguments)
    for file in _config_files(arguments):
        naming.check_keys(kind, typed.config(kind, file))
    try:
        read = parser.parse_args(arguments)
        values = vars(parser.instantiate(read) if hasattr(parser, "instantiate") else parser.instantiate_classes(read))
        names = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
        settings = _at_home(kind(**{name: value for name, value in values.items() if name in names}))
        _check_letters(settings)
        found: SettingsT = _located(settings, [Path(file).resolve() for file in _config_files(arguments)])
        return found
    except (ArgumentError, ValueError, TypeError, OSError) as error:
        raise TrainingError(naming.in_words(str(error))) from error
    except RecursionError as error:
        raise TrainingError("a setting on the command line is nested too deeply") from error


COMMON = (  # what most runs set; of these --help shows the first ten that a command has
    "base.path",
    "data.source",
    "adapter",
    "controlnet",
    "pictures",
    "prompt",
    "annotator",
    "prompts",
    "dreambooth.identifier",
    "lora.rank",
    "train.steps",
    "train.batch_size",
    "train.learning_rate",
    "measure.subjects",
    "guidance.method",
    "sampling.steps",
    "seeds",
    "out",
)


def _short_help(parser: Any, kind: type) -> str:
    """The most common settings of a recipe; `--help all` shows the rest."""
    helps = {action.dest: action.help for action in parser._actions}
    shown = [name for name in COMMON if name in helps]
    shown = [*[name for name in shown if name != "out"][:9], *(["out"] if "out" in shown else [])]
    width = max(map(len, shown), default=0)
    lines = [
        inspect.cleandoc(kind.__doc__ or ""),
        "",
        f"{'--config':{width + 2}}  a YAML file, or the name of a shipped config",
    ]
    for name in shown:
        said = str(helps[name] or "").split(" (required")[0].split(" (default")[0].split(" (type")[0]
        lines.append(f"--{name:{width}}  {' '.join(said.split())}")
    return "\n".join([*lines, "", f"--help all shows all {len(list(naming.names(kind)))} settings."])


PROMPTS = ("prompts", "drift_prompts")  # lists, of which one entry may be given alone


def _as_today(kind: type, arguments: Sequence[str]) -> list[str]:
    """A command line with today's names, in which a single prompt is a list of one."""
    words = list(arguments)
    for place, word in enumerate(words):
        flag, joined, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        flag = naming.current_flag(kind, flag)
        words[place] = f"{flag}{joined}{value}"
        after = place + 1 < len(words) and not joined
        given = words[place + 1] if after else value
        if flag.rsplit(".", 1)[-1].removeprefix("--") in PROMPTS and given and not given.startswith("["):
            given = given if given == "null" else json.dumps([given])
        elif given.startswith("{"):
            given = _table(kind, flag, given)
        words[place + after] = given if after else f"{flag}{joined}{given}"
    return words


def _table(kind: type, flag: str, text: str) -> str:
    """A flag's table of settings, the same way; what needs no change is left as it is."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError):
        return text
    parts = flag.removeprefix("--").removesuffix("+").split(".")
    changed = values
    for part in reversed(parts):
        changed = {part: changed}
    changed = naming.current(kind, _prompts_as_lists(changed), "--")
    for part in parts:
        changed = changed[part]
    return text if changed == values else json.dumps(changed)


def _prompts_as_lists(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: [value] if key in PROMPTS and isinstance(value, str) else _prompts_as_lists(value)
        for key, value in values.items()
    }


def _at_home(value: Any, name: str = "") -> Any:
    """`~` at the begin of a path is the home folder, as in a shell; prompts are not paths."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = {item.name: _at_home(getattr(value, item.name), item.name) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **inner)
    if isinstance(value, list | tuple):
        return type(value)(_at_home(item, name) for item in value)
    if isinstance(value, dict):
        return {key: _at_home(item, key) for key, item in value.items()}
    spoken = "prompt" in name and not name.endswith("file")
    if isinstance(value, str) and value.startswith("~") and "/" in value and not spoken:
        return os.path.expanduser(value)
    return value


def _check_letters(value: Any, name: str = "") -> None:
    """Refuses what no file could hold: it would come to light when the first table is written, hours later."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    if isinstance(value, dict):
        for key, item in value.items():
            _check_letters(key, name)
            _check_letters(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for item in value:
            _check_letters(item, name)
    elif isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
        what = "holds a zero byte" if "\0" in value else "is not UTF-8; if it is a path, rename the file or folder"
        raise TrainingError(f"{name} {value[:200]!r} {what}".lstrip())


def _configs_first(args: list[str]) -> list[str]:
    """Puts `--config FILE` before the overrides, whatever order they were typed in, so that overrides always win."""
    first, rest = [], []
    while args:
        word = args.pop(0)
        if word == "--config" and args:
            first += [word, args.pop(0)]
        elif word.startswith("--config="):
            first.append(word)
        else:
            rest.append(word)
    return first + rest


def _config_files(args: Sequence[str]) -> list[str]:
    """The files that `--config` names, in a command line in which they come first."""
    apart = [word for before, word in pairwise(args) if before == "--config"]
    return apart + [word.removeprefix("--config=") for word in args if word.startswith("--config=")]


OUTPUTS = ("out", "cache_folder", "class_folder", "push")  # folders that are made, never looked for
LEVELS = 4  # a shipped config lies three folders below the one that its paths start from


def _located(settings: Any, files: Sequence[Path]) -> Any:
    """Resolves relative paths that the working directory does not have, from a config's folder or one above it."""
    places = [place for file in files for place in file.parents[:LEVELS]]

    def there(name: str) -> bool:
        return os.path.exists(name) or bool(glob(name))  # a folder may be called `rex [2]`

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(item) for item in value]
        if isinstance(value, dict):
            return {key: found(item) for key, item in value.items()}
        if dataclasses.is_dataclass(value):
            return _located(value, files)
        if not isinstance(value, str) or "/" not in value or Path(value).is_absolute() or there(value):
            return value
        return next((str(place / value) for place in places if there(str(place / value))), value)

    fields = [item.name for item in dataclasses.fields(settings) if item.name not in OUTPUTS]
    changed = {name: new for name in fields if (new := found(value := getattr(settings, name))) != value}
    return dataclasses.replace(settings, **changed) if changed else settings

"""Settings that are given to `new` on its command line: checked, and put among those of the config that it writes."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from training import naming
from training.command_line import parse
from training.config import require, resolved, write_settings

__all__ = ["merged", "standing"]

SettingsT = TypeVar("SettingsT")
OWN = {  # what `new` asks for itself
    "config": "it is what is written here",
    "base.path": "give --base",
    "data.source": "give the folder as the first word",
    "dreambooth.identifier": "give --identifier",
    "train.dry_run": "one step is tried anyway",
}


def merged(kind: type[SettingsT], values: Mapping[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], SettingsT]:
    """The tables of a config, and in them the settings of a command line; and the same as a training reads them.

    Args:
        kind: the training's settings.
        values: the config's tables.
        words: settings of the training with their values.

    Raises:
        TrainingError: an unknown name, a value that cannot be, or a setting that `new` has an option for.
    """
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    names = [naming.current_flag(kind, flag).removeprefix("--").removesuffix("+") for flag in flags]
    for name in names:
        require(name not in OWN, f"--{name}: {OWN.get(name)}")
    with tempfile.TemporaryDirectory() as home:
        config = Path(home) / "config.yaml"
        write_settings(dict(values), config)
        read = parse(kind, [f"--config={config}", *words])
    found = copy.deepcopy(dict(values))
    for name in names:
        _put(found, read, resolved(read), name.split("."))
    return found, read


def _put(tables: dict[str, Any], read: Any, plain: Mapping[str, Any], parts: Sequence[str]) -> None:
    """One setting into its table; a mapping such as `measure.arms` is a single value, whatever was said of it."""
    first, *rest = parts
    inner = getattr(read, first)
    if rest and dataclasses.is_dataclass(inner):
        tables[first] = tables.get(first) or {}
        _put(tables[first], inner, plain[first], rest)
    else:
        tables[first] = plain[first]


@contextmanager
def standing(file: Path, facts: Mapping[str, Any]) -> Iterator[None]:
    """A subject's facts are in their file; it is taken away again where what follows is refused."""
    from adapters.files import write_json

    there = file.exists()
    if not there:
        write_json(file, dict(facts))
    try:
        yield
    except BaseException:
        if not there:
            file.unlink()
        raise

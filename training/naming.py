"""Settings by name, for people who mistype them: which there are, what was meant, and what is wrong with a value.

The parser knows all this too, but its messages speak of classes and unions. Here every error names the setting as it
is typed on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from .errors import TrainingError

__all__ = ["check_flags", "check_keys", "current", "current_flag", "in_words", "names", "note", "was"]

OWN = ("config", "help", "print_config")  # flags of the parser itself


def check_keys(kind: type, values: Any, place: str = "") -> None:
    """Every key of nested settings is a field; the values are left to the parser.

    Args:
        kind: the dataclass that they are for.
        values: as YAML has them.
        place: their dotted name, with a dot at its end.

    Raises:
        TrainingError: a key that is none, with the nearest that is.
    """
    if not isinstance(values, Mapping):
        return
    fields = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in fields:
            raise TrainingError(_unknown(f"{place}{name}", [f"{place}{field}" for field in fields]))
        inner, by_key = _settings_in(fields[name])
        if inner is not None and by_key and isinstance(value, Mapping):
            for key, one in value.items():
                check_keys(inner, one, f"{place}{name}.{key}.")
        elif inner is not None and not by_key:
            check_keys(inner, value, f"{place}{name}.")


def check_flags(kind: type, arguments: Sequence[str]) -> None:
    """Every flag of a command line is a setting, written out; raises as `check_keys`."""
    for word in arguments:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name in OWN:
            continue
        if not re.match(r"[A-Za-z_]", name):
            raise TrainingError(f"{word}: a value that begins with -- needs an equals sign, as in --data.prompt={word}")
        try:
            nested: Any = yaml.safe_load(value) if value[:1] == "{" else None
        except yaml.YAMLError as error:
            if not _takes_text(kind, name):
                raise TrainingError(
                    f"--{name}: {value} is neither JSON nor YAML ({' '.join(str(error).split())})"
                ) from error
            nested = None
        except RecursionError as error:
            raise TrainingError(f"--{name}: nested too deeply") from error
        for part in reversed(name.removesuffix("+").split(".")):
            nested = {part: nested}
        check_keys(kind, nested, "--")


def _takes_text(kind: type, name: str) -> bool:
    """Whether a flag's setting may be any text, such as a prompt that begins with a brace."""
    found: Any = kind
    for part in name.removesuffix("+").split("."):
        fields = typing.get_type_hints(found) if dataclasses.is_dataclass(found) else {}
        hint = fields.get(part)
        found = _settings_in(hint)[0]
    several = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return str in several


def was(kind: type) -> dict[str, str]:
    """Names that settings of a dataclass had before -> their names of today; a field says it in its metadata."""
    return {item.metadata["was"]: item.name for item in dataclasses.fields(kind) if "was" in item.metadata}


@functools.cache
def note(old: str, new: str) -> None:
    """Say once, and by one process of several, that a name has changed."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {old} is now called {new}; the old name still works in this version", file=sys.stderr)


def current(kind: type, values: Any, place: str = "", *, say: Callable[[str, str], None] = note) -> Any:
    """Settings under their names of today. A name of before is accepted for one version, with a note.

    Args:
        kind: the dataclass that they are for.
        values: as YAML has them.
        place: their dotted name, with a dot at its end.
        say: what is done about a name of before, given it and today's.

    Raises:
        TrainingError: a setting is given under both names.
    """
    if not isinstance(values, Mapping):
        return values
    fields, renamed = typing.get_type_hints(kind), was(kind)
    found: dict[Any, Any] = {}
    for old, value in values.items():
        name: str = renamed.get(old) or old
        if name != old:
            if name in values:
                raise TrainingError(f"{place}{old} is the old name of {place}{name}; give one of them")
            say(old, name)
        inner, by_key = _settings_in(fields[name]) if name in fields else (None, False)
        if inner is not None and by_key and isinstance(value, Mapping):
            value = {
                key: current(inner, _filled(inner, one), f"{place}{name}.{key}.", say=say) for key, one in value.items()
            }
        elif inner is not None and not by_key:
            value = current(inner, value, f"{place}{name}.", say=say)
        found[name] = value
    return found


def _filled(kind: type, values: Any) -> Any:
    """Settings that are all left at their defaults, with one of these: the parser takes `{}` for no settings."""
    plain = {item.name: item.default for item in dataclasses.fields(kind) if item.default is not dataclasses.MISSING}
    return dict(list(plain.items())[:1]) if values == {} else values


def current_flag(kind: type, flag: str) -> str:
    """A flag, without its value, as it is called today; raises as `current`."""
    if not flag.startswith("--"):
        return flag
    bare = flag.removesuffix("+")
    nested: Any = None
    for part in reversed(bare.removeprefix("--").split(".")):
        nested = {part: nested}
    nested, parts = current(kind, nested, "--"), []
    while nested:
        ((part, nested),) = nested.items()
        parts.append(part)
    return f"--{'.'.join(parts)}{flag[len(bare) :]}"


def names(kind: type, place: str = "") -> Iterator[str]:
    """Dotted names of all settings of a dataclass, groups before their members."""
    for name, annotation in typing.get_type_hints(kind).items():
        yield f"{place}{name}"
        inner, by_key = _settings_in(annotation)
        if inner is not None and not by_key:
            yield from names(inner, f"{place}{name}.")


def in_words(message: str) -> str:
    """The parser's message about a value, with the setting's whole name and without classes.

    `Parser key "measure": Does not validate ... Parser key "seeds": Expected a List[int]. Got value: x` becomes
    `measure.seeds: expected List[int], got x`.
    """
    said, place = " ".join(message.split()), ""
    while True:
        if found := re.match(r'Parser key "([\w.]+)": (.*)', said):
            place, said = f"{place}{found[1]}.", found[2]
        elif found := re.match(r"Does not validate against any of the Union subtypes .*?Errors: - (.*)", said):
            said = re.split(r" - Expected a <class 'NoneType'>", found[1])[0]
        elif found := re.match(r"Problem with given class_path '[\w.]+': (.*)", said):
            said = found[1]
        else:
            break
    if found := re.match(r"Expected a (.*?)\.? Got value: (.*)", said):
        said = _expected(found[1], found[2])
    return said if not place or said.startswith(place) else f"{place[:-1]}: {said}"


def _expected(kind: str, given: str) -> str:
    if choices := re.match(r"typing\.Literal\[(.*)\]", kind):
        allowed = [choice.strip(" '\"") for choice in choices[1].split(",")]
        return f"expected one of {', '.join(allowed)}, got {given}{_meant(given, allowed)}"
    plain = re.sub(r"<class '([\w.]+)'>", r"\1", kind).replace("typing.", "")
    return f"expected {plain}, got {given}"


def _unknown(name: str, known: Sequence[str]) -> str:
    group = name.rpartition(".")[0]
    members = [one.removeprefix(f"{group}.") for one in known if group]
    more = f"; {group} has {', '.join(members)}" if members and not _meant(name, known) else ""
    return f"{name}: there is no such setting{_meant(name, known)}{more}"


def _meant(name: str, known: Sequence[str]) -> str:
    """The nearest of the names, by their last parts, the others being the same."""
    by_part = {_part(one): one for one in known}
    near = difflib.get_close_matches(_part(name), by_part, n=1)
    return f"; did you mean {by_part[near[0]]}?" if near else ""


def _part(name: str) -> str:
    return name.removeprefix("--").rpartition(".")[2]


def _settings_in(annotation: Any) -> tuple[type | None, bool]:
    """The dataclass in an annotation, also an optional one, and whether it stands under keys of a mapping."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation, False
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return next((found for one in inner if (found := _settings_in(one))[0] is not None), (None, False))
    if origin is dict:
        return _settings_in(inner[1])[0], True
    return None, False

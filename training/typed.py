"""Settings in YAML whose texts arrive as they were typed.

YAML takes `#1 dog` for a comment, `&x` for an anchor, `yes` for true and `2024-01-01` for a date. On the command line
none of it is meant. In a config, a plain word stays a word where the setting is a text, and what YAML would leave out
of a text is an error that names its line.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from . import naming
from .errors import TrainingError
from .text import read_text

__all__ = ["config", "value"]

QUOTES = "a text with any of : # [ ] { } & * ! | > % @ ` needs quotes"
NULL, TEXT = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"


def value(word: str, load: Callable[[str], Any]) -> Any:
    """A word of the command line: what YAML reads in it, or itself where YAML reads nothing, as in `---` or `#1 dog`.

    Args:
        word: as typed; never `null`, which unsets a setting.
        load: the parser's YAML loader.
    """
    read = load(word)
    return word if read is None or word.startswith("- ") else read


def config(kind: type, file: str) -> dict[str, Any]:
    """A config for the dataclass `kind`.

    Raises:
        TrainingError: unreadable, no YAML, not made of names and values, or with a text that YAML cuts short.
    """
    text = read_text(file, "--config")
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise TrainingError(f"--config {file}: settings are written as `name: value`, one a line")
        for name, node in _texts(kind, root, ""):
            if problem := _problem(node, text):
                raise TrainingError(f"--config {file}, line {node.start_mark.line + 1}: {name}: {problem}")
            if isinstance(node, yaml.ScalarNode) and node.tag != NULL and node.tag.startswith("tag:"):
                node.tag = TEXT
        return dict(naming.current(kind, yaml.SafeLoader("").construct_document(root)))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise TrainingError(f"--config {file}{line}: {error.problem}; {QUOTES}") from error
    except yaml.YAMLError as error:
        raise TrainingError(f"--config {file}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise TrainingError(f"--config {file}: nested too deeply") from error


def _texts(hint: Any, node: yaml.Node, name: str) -> Iterator[tuple[str, yaml.Node]]:
    """The values in a node that are texts by their annotation, with the settings' dotted names."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = [one for one in (typing.get_args(hint) if union else (hint,)) if one is not types.NoneType]
    if members and all(map(_is_text, members)):
        yield name, node
    for member in members:
        origin, inner = typing.get_origin(member), typing.get_args(member)
        if isinstance(node, yaml.ScalarNode) and _is_text(member) and len(members) > 1:
            yield name, node
        elif isinstance(node, yaml.SequenceNode) and origin is list:
            for item in node.value:
                yield from _texts(inner[0], item, name)
        elif isinstance(node, yaml.MappingNode) and origin is dict:
            for key, item in node.value:
                yield from _texts(inner[0], key, name)
                yield from _texts(inner[1], item, f"{name}.{key.value}")
        elif isinstance(node, yaml.MappingNode) and dataclasses.is_dataclass(member):
            hints, renamed = typing.get_type_hints(member), naming.was(typing.cast(type, member))
            for key, item in node.value:
                field = renamed.get(str(key.value), str(key.value))
                yield from _texts(hints.get(field), item, f"{name}.{field}" if name else field)


def _is_text(hint: Any) -> bool:
    literal = typing.get_origin(hint) is typing.Literal
    return hint is str or (literal and all(isinstance(one, str) for one in typing.get_args(hint)))


def _problem(node: yaml.Node, text: str) -> str | None:
    """What of a text YAML would leave out or take for something else."""
    start, end = node.start_mark.index, node.end_mark.index
    rest = text[end:].partition("\n")[0]
    anchor = re.match(r"&(\S+)", text[start:])
    if not isinstance(node, yaml.ScalarNode):
        kind = "list" if isinstance(node, yaml.SequenceNode) else "mapping"
        return f"YAML takes {' '.join(text[start:end].split())} for a {kind}; put the text in quotes"
    if anchor and f"*{anchor[1]}" not in text:
        return f"YAML takes &{anchor[1]} for an anchor's name; put the text in quotes"
    if node.style is None and (found := re.match(r"[ \t]+(#[^\s#].*)", rest)):
        return f"YAML takes {found[1].strip()} for a comment; put the text in quotes, or a space after the #"
    if node.value == "null" and node.style is not None:
        return "the text null means that nothing is set; write it another way"
    return None

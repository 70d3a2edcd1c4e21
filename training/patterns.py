"""Settings by pattern: a regular expression, looked for anywhere in a name, and a value for what it finds.

Names are dotted: a layer is `unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k`, a parameter has
`.lora_A.default.weight` or the like after it. Where several patterns find a name, the first one catches it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from .errors import TrainingError

__all__ = ["by_name", "caught", "caught_table"]

Value = TypeVar("Value")


def caught(setting: str, patterns: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """Pattern -> the names that it catches.

    Args:
        setting: where the patterns are from, for the message.
        patterns: regular expressions, in their order.
        names: dotted names of layers or parameters.

    Raises:
        TrainingError: a pattern that catches nothing.
    """
    names = list(names)
    found: dict[str, list[str]] = {}
    taken: set[str] = set()
    for pattern in patterns:
        fits = [name for name in names if re.search(pattern, name)]
        found[pattern] = [name for name in fits if name not in taken]
        taken.update(fits)
        if not fits:
            some = ", ".join(names[:: len(names) // 3 + 1])
            raise TrainingError(f"{setting}: {pattern!r} is in none of the {len(names)} names, such as {some}")
        if not found[pattern]:
            raise TrainingError(f"{setting}: all that {pattern!r} finds is caught by patterns before it; put it first")
    return found


def by_name(patterns: Mapping[str, Value], found: Mapping[str, list[str]]) -> dict[str, Value]:
    """Name -> the value of the pattern that caught it."""
    return {name: patterns[pattern] for pattern, names in found.items() for name in names}


def caught_table(
    setting: str, found: Mapping[str, list[str]], names: Iterable[str], said: Callable[[list[str]], str]
) -> list[str]:
    """A line per pattern, and one for the names that none catches.

    Args:
        setting: where the patterns are from.
        found: pattern -> the names that it caught.
        names: all names.
        said: of names, what they get.
    """
    if not found:
        return []
    taken = {name for some in found.values() for name in some}
    rest = [name for name in names if name not in taken]
    rows = [*found.items(), *([("the rest", rest)] if rest else [])]
    width = max(len(pattern) for pattern, _ in rows)
    return [f"  {setting}", *(f"    {pattern:{width}}  {len(some):>5}  {said(some)}" for pattern, some in rows)]

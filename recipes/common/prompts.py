"""Prompts from settings and files."""

from __future__ import annotations

from collections.abc import Sequence

from training.config import require
from training.text import read_text

__all__ = ["texts"]


def texts(prompts: Sequence[str], file: str | None, *, name: str = "") -> list[str]:
    """Prompts from settings and a file with one a line; {} becomes `name` with its article.

    Args:
        prompts: of the settings.
        file: with a prompt a line; None: there is none.
        name: what {} stands for; empty: there is nothing.

    Raises:
        TrainingError: a {} without a name, or a file that cannot be read.
    """
    lines = list(prompts)
    if file is not None:
        lines += [line.strip() for line in read_text(file, "prompt_file").split("\n") if line.strip()]
    article = "an" if name[:1].lower() in tuple("aeiou") else "a"
    filled = [line.replace("a {}", f"{article} {{}}").replace("{}", name) if name else line for line in lines]
    for line in filled:
        require("{}" not in line, f"prompt {line!r} has a {{}} but no subject is given; set measure.subjects")
    return list(dict.fromkeys(filled))

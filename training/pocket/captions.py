"""The scene grammar in words: a description to a caption with varied wording, and a caption back to its description.

    [a picture of | a photo of | a drawing of] OBJECT [RELATION OBJECT | and OBJECT | , OBJECT and OBJECT] [BACKGROUND]

where OBJECT is ``a [COLOR] CLASS``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import PocketError
from .world import BACKGROUNDS, CLASSES, COLORS, RELATIONS, TINTABLE

__all__ = ["Description", "Noun", "article", "parse_caption", "vocabulary", "write_caption"]

PREFIXES = ("a picture of", "a photo of", "a drawing of")
PHRASES = {phrase: name for name, phrases in BACKGROUNDS.items() for phrase in phrases}


@dataclass(frozen=True, kw_only=True)
class Noun:
    """One object of a scene in words. ``color`` None means its natural colors."""

    name: str
    color: str | None = None

    def __post_init__(self) -> None:
        if self.name not in CLASSES:
            raise PocketError(f"unknown class {self.name!r} in a scene; known are {', '.join(CLASSES)}")
        if self.color is not None and self.color not in COLORS:
            raise PocketError(f"unknown color {self.color!r} of {self.name!r}; known are {', '.join(COLORS)}")
        if self.color is not None and self.name not in TINTABLE:
            raise PocketError(
                f"{self.name!r} keeps its own colors and cannot be {self.color}; "
                f"tintable are {', '.join(sorted(TINTABLE))}"
            )


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a caption says: one to three objects, where the first stands from the second, and the background.

    ``relation`` (two objects only) and ``background`` may be None: not said.
    """

    nouns: tuple[Noun, ...]
    relation: str | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.nouns) <= 3:
            raise PocketError(f"a scene has one to three objects, not {len(self.nouns)}")
        if self.background is not None and self.background not in BACKGROUNDS:
            raise PocketError(f"unknown background {self.background!r}; known are {', '.join(BACKGROUNDS)}")
        if self.relation is not None and (self.relation not in RELATIONS or len(self.nouns) != 2):
            raise PocketError(
                f"relation {self.relation!r} between {len(self.nouns)} objects; "
                f"two objects take one of {', '.join(RELATIONS)}"
            )


def article(words: str) -> str:
    """``words`` with its indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def write_caption(description: Description, rng: np.random.Generator) -> str:
    """A caption of ``description``; ``rng`` chooses among the wordings."""
    said = [article(f"{noun.color} {noun.name}" if noun.color else noun.name) for noun in description.nouns]
    if description.relation:
        text = f"{said[0]} {description.relation} {said[1]}"
    elif len(said) == 3:
        text = f"{said[0]}, {said[1]} and {said[2]}"
    else:
        text = " and ".join(said)
    if rng.random() < 0.25 and len(said) == 1:
        text = f"{PREFIXES[rng.integers(len(PREFIXES))]} {text}"
    if description.background:
        phrases = BACKGROUNDS[description.background]
        text = f"{text} {phrases[rng.integers(len(phrases))]}"
    return text


def parse_caption(caption: str) -> Description:
    """The description a caption of the grammar stands for.

    Raises:
        PocketError: a word or an order of words outside the grammar; the message names the word.
    """
    rest = " ".join(caption.lower().replace(",", " , ").split())
    for prefix in PREFIXES:
        rest = rest.removeprefix(prefix).strip()
    background = None
    for phrase in sorted(PHRASES, key=len, reverse=True):
        if rest.endswith(phrase):
            background, rest = PHRASES[phrase], rest[: -len(phrase)].strip()
            break
    relation = next((phrase for phrase in RELATIONS if f" {phrase} " in f" {rest} "), None)
    if relation:
        rest = f" {rest} ".replace(f" {relation} ", " and ", 1).strip()
    nouns = [_noun(part, caption) for part in rest.replace(" , ", " and ").split(" and ")]
    return Description(nouns=tuple(nouns), relation=relation, background=background)


def _noun(words: str, caption: str) -> Noun:
    parts = words.split()
    if len(parts) < 2 or parts[0] not in ("a", "an"):
        raise PocketError(f"cannot read {words!r} in {caption!r}; the grammar is '[a|an] [COLOR] CLASS ... BACKGROUND'")
    colors = [part for part in parts[1:-1] if part in COLORS]
    unknown = [part for part in parts[1:-1] if part not in COLORS]
    if unknown or len(colors) > 1:
        raise PocketError(
            f"unknown words {' '.join(unknown or colors)!r} in {caption!r}; colors are {', '.join(COLORS)}"
        )
    return Noun(name=parts[-1], color=colors[0] if colors else None)


def vocabulary() -> list[str]:
    """Every word and sign a caption can hold, and a few that personalization prompts use, in a fixed order."""
    texts = [
        *PREFIXES,
        *RELATIONS,
        *PHRASES,
        *CLASSES,
        *COLORS,
        "an and , with in style of the a sks toy small big two three",
    ]
    return list(dict.fromkeys(word for text in texts for word in text.split()))

"""What a prompt says, as far as rules can read it: things with count and color, and how they lie to each other.

Made for prompts such as GenEval's, "a photo of two red cars left of a dog". A prompt beyond these rules gives fewer
things than it says; give questions or objects in a file then.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["COLORS", "Saying", "Thing", "said_in"]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {"a": 1, "an": 1, "the": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
IRREGULAR = {"buses": "bus", "children": "child", "knives": "knife", "men": "man", "mice": "mouse", "women": "woman"}
# Longer ones first; the word that the second thing is bound to the first by.
RELATIONS = {
    "to the left of": "left of",
    "to the right of": "right of",
    "left of": "left of",
    "right of": "right of",
    "above": "above",
    "below": "below",
    "under": "below",
}
JOINTS = ("and", "with", "next to", "beside", "near", "behind", "in front of", "on top of", "inside", "in", "on", "at")
_OPENING = re.compile(r"^(an? )?(photo|picture|painting|drawing|image|render(ing)?)s? of ", re.IGNORECASE)
_SPLIT = re.compile(r"\s*(?:,|\b(" + "|".join([*RELATIONS, *JOINTS]) + r")\b)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One noun of a prompt."""

    noun: str
    count: int = 1
    color: str | None = None

    @property
    def phrase(self) -> str:
        """As it would be asked for."""
        named = f"{self.color} {self.noun}" if self.color else self.noun
        return named if self.count == 1 else f"{self.count} {named}"


@dataclass(frozen=True, kw_only=True)
class Saying:
    """Everything that was read in a prompt."""

    things: tuple[Thing, ...] = ()
    relations: tuple[tuple[int, str, int], ...] = field(default=())
    """(thing, relation, thing it stands in relation to)."""


def said_in(prompt: str) -> Saying:
    """The things and relations of a prompt."""
    things: list[Thing] = []
    relations: list[tuple[int, str, int]] = []
    joint: str | None = None
    text = _OPENING.sub("", prompt.strip().rstrip("."))
    pieces = _SPLIT.split(text)
    for index in range(0, len(pieces), 2):
        thing = _thing(pieces[index])
        if thing is not None:
            things.append(thing)
            relation = RELATIONS.get((joint or "").lower())
            if relation is not None and len(things) > 1:
                relations.append((len(things) - 2, relation, len(things) - 1))
        joint = pieces[index + 1] if index + 1 < len(pieces) else None
    return Saying(things=tuple(things), relations=tuple(relations))


def _thing(piece: str) -> Thing | None:
    words = piece.lower().split()
    count, color = 1, None
    while words and (words[0] in COUNTS or words[0] in COLORS):
        first = words.pop(0)
        count, color = (COUNTS[first], color) if first in COUNTS else (count, first)
    if not words:
        return None
    noun = " ".join(words)
    if count > 1:
        *before, last = noun.split()
        noun = " ".join([*before, IRREGULAR.get(last) or re.sub(r"(?<=ch|sh|ss)es$|(?<=x)es$|(?<!s)s$", "", last)])
    return Thing(noun=noun, count=count, color=color)

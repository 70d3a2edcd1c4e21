"""Words, not tokens, where people look: which token positions belong to which word of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Word", "prompt_words"]


@dataclass(frozen=True)
class Word:
    """A word and the positions of its sub-tokens in the text encoder's output."""

    text: str
    positions: tuple[int, ...]


def prompt_words(tokenizer: Any, prompt: str, length: int) -> list[Word]:
    """Words of a prompt as a CLIP or T5 tokenizer cuts it; BOS, EOS and padding belong to none.

    CLIP ends a word with `</w>`, sentence-piece (T5) begins one with `▁`. What exceeds `length` tokens is left out.
    """
    ids = tokenizer(prompt, truncation=True, max_length=length).input_ids
    special = set(tokenizer.all_special_ids)
    words: list[Word] = []
    pieces: list[tuple[str, int]] = []

    def close() -> None:
        text = "".join(piece for piece, _ in pieces)
        if text:
            words.append(Word(text, tuple(position for _, position in pieces)))
        pieces.clear()

    for position, (token_id, token) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)):
        if token_id in special:
            close()
            continue
        if token.startswith("▁"):
            close()
        pieces.append((token.removeprefix("▁").removesuffix("</w>"), position))
        if token.endswith("</w>"):
            close()
    close()
    return words

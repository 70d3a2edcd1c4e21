"""Words and phrases, not tokens, where people look: which token positions belong to which of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Word", "competitors", "prompt_phrases", "prompt_words"]

# English words that join phrases and belong to none; a word of place is one of them before "of" ("to the left of").
_JOINING = (
    "a an the this that these those some any each every no its his her their my your our and or but nor with without "
    "of on onto in into inside outside at by to from for over under above below beside besides between behind near "
    "next against around across along through before after while as is are was were be been being has have having "
    "who which where there it he she they"
)
_PLACES = "left right front back top bottom side middle center centre"


@dataclass(frozen=True)
class Word:
    """A word, or a phrase, and the positions of its sub-tokens in the text encoder's output."""

    text: str
    positions: tuple[int, ...]


def prompt_words(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> list[Word]:
    """Words of a prompt as a CLIP or T5 tokenizer cuts it; BOS, EOS and padding belong to none.

    CLIP ends a word with `</w>`, sentence-piece (T5) begins one with `▁`. What exceeds `length` tokens is left out. A
    `length` of several times what the tokenizer takes at once means chunks, each with BOS and EOS of its own.

    Args:
        tokenizer: of transformers, CLIP's or T5's.
        prompt: one prompt.
        length: tokens that the pipeline gives the U-net, 77 for CLIP, 231 for three chunks.
    """
    ids, positions = _placed(tokenizer, prompt, length)
    special = set(tokenizer.all_special_ids)
    words: list[Word] = []
    pieces: list[tuple[str, int]] = []

    def close() -> None:
        text = "".join(piece for piece, _ in pieces)
        if text:
            words.append(Word(text, tuple(position for _, position in pieces)))
        pieces.clear()

    for position, token_id, token in zip(positions, ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
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


def _placed(tokenizer: PreTrainedTokenizerBase, prompt: str, length: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and their positions."""
    limit = tokenizer.model_max_length
    if length <= limit or length % limit or tokenizer.bos_token_id is None:
        ids = tokenizer(prompt, truncation=True, max_length=length).input_ids
        return ids, list(range(len(ids)))
    body = limit - 2
    ids = tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids
    ids = ids[: length // limit * body]
    return ids, [number // body * limit + 1 + number % body for number in range(len(ids))]


def prompt_phrases(words: list[Word]) -> list[Word]:
    """Runs of words between articles, prepositions, conjunctions and punctuation: "red dog", "grass". English.

    What joins phrases competes for no region. A prompt of joining words alone keeps its words.
    """
    phrases: list[Word] = []
    run: list[Word] = []
    after = [word.text for word in words[1:]] + [""]
    for word, following in zip(words, after, strict=True):
        if _joins(word.text, following):
            phrases += _merged(run)
            run = []
        else:
            run.append(word)
    return phrases + _merged(run) or words


def competitors(words: list[Word], tokens: str) -> list[Word]:
    """What competes for regions with `tokens="prompt"` (the words) and `tokens="phrases"`."""
    return prompt_phrases(words) if tokens == "phrases" else words


def _joins(text: str, following: str) -> bool:
    low = text.lower()
    return (
        low in _JOINING.split()
        or not any(map(str.isalnum, low))
        or (low in _PLACES.split() and following.lower() == "of")
    )


def _merged(run: list[Word]) -> list[Word]:
    if not run:
        return []
    return [Word(" ".join(word.text for word in run), tuple(place for word in run for place in word.positions))]

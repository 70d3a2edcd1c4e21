"""A ``CLIPTokenizer`` whose merges make every word of the pocket world one token; letters are the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .captions import vocabulary

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

__all__ = ["MAX_LENGTH", "build_tokenizer", "merges_for"]

MAX_LENGTH = 20  # the longest caption of the grammar has 18 tokens, begin and end included
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def _byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that byte-level BPE works on (GPT-2's table, which CLIP shares)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in [*printable, *others]]


def merges_for(words: list[str]) -> list[tuple[str, str]]:
    """Merges, in order of rank, that join each of ``words`` into one token.

    A word added later only gets merges of a lower rank than all before, and byte-pair encoding always applies the
    highest rank it can, so the words that already joined keep joining.
    """
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            pieces = _merged(pieces, pair)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = _merged(pieces, merges[-1])
    return merges


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the pocket base: 748 tokens, ``MAX_LENGTH`` long, padded with the end token as SD-1.x is."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    merges = merges_for(vocabulary())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=END,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )

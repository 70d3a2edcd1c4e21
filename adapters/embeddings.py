"""Learned tokens on a pipeline: its own tokenizers and embedding tables are set aside and come back as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .adapter import Tokens
from .errors import AdapterError, BaseMismatchError
from .placement import computing_device, is_offloaded, stored, unwrapped
from .tokens import token_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["learned"]

_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


@contextmanager
def learned(pipe: DiffusionPipeline, tokens: Tokens) -> Iterator[None]:
    """The tokens in the pipeline's text encoders for as long as the context lasts.

    Raises:
        BaseMismatchError: vectors of another width, or for an encoder that the pipeline has not.
        AdapterError: a token that a tokenizer knows already.
    """
    with ExitStack() as undo:
        for component, tokenizer in _TOKENIZERS.items():
            own = {token: rows[component] for token, rows in tokens.items() if component in rows}
            if not own:
                continue
            if getattr(pipe, component, None) is None:
                raise BaseMismatchError(
                    f"{next(iter(own))!r} has vectors for {component}, which {type(pipe).__name__} has not"
                )
            undo.enter_context(_with_rows(pipe, component, tokenizer, own))
        yield


@contextmanager
def _with_rows(pipe: DiffusionPipeline, component: str, name: str, own: Mapping[str, torch.Tensor]) -> Iterator[None]:
    encoder, tokenizer = unwrapped(getattr(pipe, component)), getattr(pipe, name)
    table = encoder.get_input_embeddings()
    width = table.weight.shape[1]
    for token, rows in own.items():
        if rows.shape[1] != width:
            raise BaseMismatchError(f"token {token[:40]!r} has width {rows.shape[1]}, {component} has {width}")
    words = token_words({token: {component: rows} for token, rows in own.items()})
    if taken := [word for word in words if word in tokenizer.get_vocab()]:
        raise AdapterError(
            f"{taken[0]!r} is in the {name}'s vocabulary already; detach the adapter that added it first"
        )
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(words)
    numbers = longer.convert_tokens_to_ids(words)
    _check_read(longer, words, numbers)
    device = _device(encoder, table)
    ids = torch.tensor(numbers, device=device)
    values = stored(table).detach().to(device)
    weight = values.new_zeros(max(len(values), int(ids.max()) + 1), width)
    weight[: len(values)] = values
    weight[ids] = torch.cat(list(own.values())).to(weight)
    rows = torch.nn.Embedding.from_pretrained(weight)
    rows._instead_of = (table,)  # type: ignore[assignment]  # for `base.describe`; in a tuple, so that it is no submodule
    encoder.set_input_embeddings(rows)
    setattr(pipe, name, longer)
    try:
        yield
    finally:
        setattr(pipe, name, tokenizer)
        encoder.set_input_embeddings(table)


def _check_read(tokenizer: Any, words: Sequence[str], numbers: Sequence[int]) -> None:
    """Every word has a number of its own, which is what a prompt gives: an empty one would take another word's row."""
    read = tokenizer(list(words), add_special_tokens=False).input_ids
    unread = [word for word, number, ids in zip(words, numbers, read, strict=True) if ids != [number]]
    if unread or len(set(numbers)) < len(numbers):
        word = unread[0] if unread else next(word for word in words if words.count(word) > 1)
        raise AdapterError(
            f"the token {word[:40]!r} is not read as one word of its own (it is empty, or another one differs by case "
            "alone or has its name); rename it"
        )


def _device(encoder: torch.nn.Module, table: torch.nn.Module) -> torch.device:
    if not is_offloaded(table):
        return next(table.parameters()).device
    return computing_device(encoder, next(path for path, module in encoder.named_modules() if module is table))

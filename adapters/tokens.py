"""Learned embeddings in files: `learned_embeds.safetensors`, and what OneTrainer bundles with a LoRA.

With one text encoder the file holds token -> (vectors, width), as `pipe.load_textual_inversion` reads it. With two it
holds `clip_l` and `clip_g`, the vectors of all tokens in a row, and the header says which tokens they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from . import files
from .adapter import Tokens
from .errors import FormatError

__all__ = ["EMBEDS_FILE", "bundled", "read_tokens", "token_words", "write_tokens"]

EMBEDS_FILE = "learned_embeds.safetensors"
_SLOTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_COUNTS = "tokens"
MAX_VECTORS = 4096  # of one file: each is a word of the tokenizer, and a prompt holds 75


def bundled(tensors: Mapping[str, torch.Tensor]) -> tuple[Tokens, dict[str, torch.Tensor]]:
    """(tokens, the other tensors) of a file with `bundle_emb.TOKEN.clip_l` keys beside its weights."""
    tokens: dict[str, dict[str, torch.Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        if not key.startswith("bundle_emb."):
            rest[key] = tensor
            continue
        token, _, slot = key.removeprefix("bundle_emb.").rpartition(".")
        slot = "clip_l" if (token.endswith(".string_to_param"), slot) == (True, "*") else slot
        token = token.removesuffix(".string_to_param")
        if slot not in _SLOTS or not token:
            raise FormatError(
                f"{key!r}: only embeddings before the text encoder (clip_l, clip_g) can be put on a pipeline"
            )
        tokens.setdefault(token, {})[_SLOTS[slot]] = _rows(key, tensor)
    return tokens, rest


def read_tokens(path: Path) -> Tokens:
    """The tokens of a `learned_embeds.safetensors`."""
    tensors, metadata = files.read_tensors(path)
    if len(tensors) > MAX_VECTORS:
        raise FormatError(f"{path}: {len(tensors)} tokens; at most {MAX_VECTORS} are put into a tokenizer")
    if not set(tensors) <= set(_SLOTS):
        return {token: {"text_encoder": _rows(f"{path}: {token}", rows)} for token, rows in tensors.items()}
    try:
        counts = {str(token): int(count) for token, count in json.loads(metadata[_COUNTS]).items()}
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(
            f"{path}: holds {', '.join(sorted(tensors))}, and its header does not say which tokens"
        ) from error
    tokens: dict[str, dict[str, torch.Tensor]] = {token: {} for token in counts}
    for slot, tensor in tensors.items():
        rows = _rows(f"{path}: {slot}", tensor)
        if len(rows) != sum(counts.values()) or min(counts.values(), default=0) < 1:
            raise FormatError(
                f"{path}: {slot} has {len(rows)} vectors, the header's tokens need {sum(counts.values())}"
            )
        for token, own in zip(counts, rows.split(list(counts.values())), strict=True):
            tokens[token][_SLOTS[slot]] = own
    return tokens


def write_tokens(path: Path, tokens: Tokens, metadata: Mapping[str, str] | None = None) -> None:
    """Write them as `read_tokens` and diffusers read them.

    Args:
        path: of the safetensors file.
        tokens: token -> text encoder -> vectors (n, width).
        metadata: further text of the header.

    Raises:
        FormatError: tokens that have vectors for different text encoders.
    """
    if all(set(own) == {"text_encoder"} for own in tokens.values()):
        files.write_tensors(path, {token: own["text_encoder"] for token, own in tokens.items()}, metadata)
        return
    slots = {slot: name for slot, name in _SLOTS.items() if all(name in own for own in tokens.values())}
    if len(slots) != len({name for own in tokens.values() for name in own}):
        raise FormatError(f"{path}: every token needs vectors for the same text encoders")
    tensors = {slot: torch.cat([own[name] for own in tokens.values()]) for slot, name in slots.items()}
    counts = {token: len(next(iter(own.values()))) for token, own in tokens.items()}
    files.write_tensors(path, tensors, {_COUNTS: json.dumps(counts), **(metadata or {})})


def token_words(tokens: Tokens) -> list[str]:
    """What a tokenizer learns: a token of several vectors is several words, put in the prompt for the first."""
    counts = {token: len(next(iter(own.values()))) for token, own in tokens.items()}
    return [token if i == 0 else f"{token}_{i}" for token, count in counts.items() for i in range(count)]


def _rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    numbers = tensor.is_floating_point() and tensor.element_size() > 1
    if tensor.ndim not in (1, 2) or not tensor.numel() or not numbers or not tensor.isfinite().all():
        raise FormatError(f"{name}: shape {tuple(tensor.shape)}, {tensor.dtype}; expected finite vectors (n, width)")
    if tensor.ndim == 2 and len(tensor) > MAX_VECTORS:
        raise FormatError(f"{name}: {len(tensor)} vectors; at most {MAX_VECTORS} are put into a tokenizer")
    return tensor.reshape(-1, tensor.shape[-1])

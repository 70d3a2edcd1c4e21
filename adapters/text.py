"""How CLIP's text becomes what the U-net reads: which layer (clip-skip), and prompts of more than 77 tokens in chunks.

One rule for training, sampling, measuring and regions, which an adapter's folder keeps and `load` follows.
`clip_skip` counts as A1111, kohya and ComfyUI do: 1 is the encoder's last layer, 2 the one before. diffusers' argument
of the same name counts the layers that are left out (SD: one less, SDXL: two less), and leaves the negative prompt as
it is; here both halves of a guided prediction follow the rule, as they do in A1111.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import AdapterError, FileError
from .files import MANIFEST, read_json
from .source import open_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["TextRule", "checked", "encode", "follow", "rule_in", "rule_of", "ruled", "tokenize"]

MARKS = 2  # of every chunk: where it begins and ends
MOST_CHUNKS = 16
OWN_LAYER = {"sd": 1, "sdxl": 2}
"""Family -> the layer, from the last one on, that its U-net was trained with."""


@dataclass(frozen=True, kw_only=True)
class TextRule:
    """What is read of CLIP's text encoders.

    Raises:
        AdapterError: a number out of range.
    """

    clip_skip: int | None = None
    """Layer that is read, counted from the last one, which is 1. None: the family's own (SD 1, SDXL 2)."""
    chunks: int = 1
    """Chunks of 75 tokens, each between its own marks. Short prompts fill them with padding."""

    def __post_init__(self) -> None:
        if self.clip_skip is not None and self.clip_skip < 1:
            raise AdapterError(
                f"clip_skip {self.clip_skip}: 1 is the last layer, 2 the one before; leave it out for the base's own"
            )
        if not 1 <= self.chunks <= MOST_CHUNKS:
            raise AdapterError(f"prompt_chunks {self.chunks}: give 1 to {MOST_CHUNKS}")

    @property
    def neutral(self) -> bool:
        """Whether it is what a plain pipeline does."""
        return self == TextRule()

    def to_config(self) -> dict[str, int | None]:
        """As a manifest keeps it under "text"."""
        return {"clip_skip": self.clip_skip, "chunks": self.chunks}

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any] | None) -> TextRule:
        """The rule that a folder was trained with; the neutral one where it says none.

        Raises:
            FileError: an entry that is no rule.
        """
        told = (manifest or {}).get("text")
        if told is None:
            return cls()
        try:
            rule = cls(**told)
            if not all(isinstance(value, int | None) for value in told.values()) or rule.chunks is None:
                raise TypeError("expected whole numbers")
        except (TypeError, AdapterError) as error:
            raise FileError(f"manifest.json: text: {str(told)[:80]} is not understood ({error})") from error
        return rule

    def said(self, limit: int = 77) -> str:
        """In words, for cards and messages.

        Args:
            limit: tokens that the encoder takes at once.
        """
        layer = "the last layer as usual" if self.clip_skip is None else f"clip-skip {self.clip_skip}"
        return f"{layer}, prompts of up to {self.chunks * (limit - MARKS)} tokens"


def checked(rule: TextRule, encoders: Sequence[Any], tokenizers: Sequence[Any]) -> TextRule:
    """The rule as these encoders can follow it; a layer that is the family's own is None.

    Args:
        rule: as it was set.
        encoders: CLIP's, one (SD) or two (SDXL).
        tokenizers: theirs.

    Raises:
        AdapterError: other encoders than CLIP's, or a layer that they do not have.
    """
    if rule.neutral:
        return rule
    kinds = [type(encoder).__name__ for encoder in encoders]
    if not kinds or not all(kind.startswith("CLIPText") for kind in kinds):
        raise AdapterError(
            f"clip_skip and prompt_chunks are for CLIP's text encoders, this base has {', '.join(kinds) or 'none'}"
        )
    own = OWN_LAYER["sd" if len(encoders) == 1 else "sdxl"]
    layers = min(encoder.config.num_hidden_layers for encoder in encoders)
    skip = own if rule.clip_skip is None else rule.clip_skip
    if not own <= skip <= layers:
        why = "; SDXL is trained with 2, and programs that show 1 for it mean that" if skip < own else ""
        raise AdapterError(f"clip_skip {skip}: this base takes {own} to {layers}{why}")
    if rule.chunks > 1 and any(tokenizer.bos_token_id is None for tokenizer in tokenizers):
        raise AdapterError(f"prompt_chunks {rule.chunks}: the tokenizer has no mark to begin a chunk with")
    return replace(rule, clip_skip=None if skip == own else skip)


def tokenize(tokenizers: Sequence[Any], texts: list[str], rule: TextRule) -> list[Tensor]:
    """Token ids for each text encoder, each (B, chunks * L) int64; what exceeds the chunks is cut.

    Args:
        tokenizers: CLIP's.
        texts: B of them.
        rule: how many chunks of L tokens.
    """
    if rule.chunks == 1:
        return [
            words(
                texts, padding="max_length", truncation=True, max_length=words.model_max_length, return_tensors="pt"
            ).input_ids
            for words in tokenizers
        ]
    return [torch.tensor([_chunked(words, text, rule.chunks) for text in texts]) for words in tokenizers]


def _chunked(words: Any, text: str, chunks: int) -> list[int]:
    body = words.model_max_length - MARKS
    ids = words(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    found: list[int] = []
    for start in range(0, chunks * body, body):
        own = ids[start : start + body]
        padding = [words.pad_token_id] * (body - len(own))
        found += [words.bos_token_id, *own, words.eos_token_id, *padding]
    return found


def encode(encoders: Sequence[Any], ids: Sequence[Tensor], rule: TextRule) -> dict[str, Tensor]:
    """`embeds` (B, chunks * L, D), and for SDXL `pooled` (B, P), that of the first chunk.

    Args:
        encoders: one (SD), whose final layer norm is applied to any layer, or two (SDXL), side by side without it.
        ids: tokens (B, chunks * L) for each encoder.
        rule: checked.
    """
    images = len(ids[0])
    each = [
        own.reshape(images * rule.chunks, -1).to(encoder.device) for encoder, own in zip(encoders, ids, strict=True)
    ]
    if len(encoders) == 1 and rule.clip_skip is None:
        return {"embeds": _joined(encoders[0](each[0])[0], images)}
    outputs = [encoder(own, output_hidden_states=True) for encoder, own in zip(encoders, each, strict=True)]
    states = [output.hidden_states[-(rule.clip_skip or OWN_LAYER["sdxl"])] for output in outputs]
    if len(encoders) == 1:
        norm = getattr(encoders[0], "text_model", encoders[0]).final_layer_norm
        return {"embeds": _joined(norm(states[0]), images)}
    pooled = outputs[-1].text_embeds[:: rule.chunks]
    return {"embeds": torch.cat([_joined(state, images) for state in states], dim=-1), "pooled": pooled}


def _joined(states: Tensor, images: int) -> Tensor:
    return states if len(states) == images else states.reshape(images, -1, states.shape[-1])


# ---------------------------------------------------------------------------------------------- on a pipeline


def rule_in(adapter: str | Path) -> TextRule:
    """The rule that an adapter was trained with; a folder's weights are not looked at.

    Args:
        adapter: folder, file or hub id; a network's folder within a trained pipeline has that pipeline's.

    Raises:
        FileError: there is no such adapter, or its manifest is damaged.
    """
    path = Path(adapter).expanduser()
    if not path.is_dir():
        return TextRule.from_manifest(open_source(adapter).manifest)
    found = [place for place in (path / MANIFEST, path.parent / MANIFEST) if place.is_file()]
    manifest = read_json(found[0]) if found else None
    return TextRule.from_manifest(manifest if isinstance(manifest, dict) else None)


def rule_of(pipe: DiffusionPipeline) -> TextRule:
    """The rule that the pipeline follows."""
    found: TextRule = vars(pipe).get("_text_rule", TextRule())
    return found


def follow(pipe: DiffusionPipeline, rule: TextRule) -> None:
    """Prompts that the pipeline is given as texts follow the rule from now on; embeddings are taken as they are.

    Args:
        pipe: with CLIP's text encoders. Pipelines made from it (`from_pipe`) have to be told again.
        rule: any; the neutral one leaves the pipeline's own code alone.

    Raises:
        AdapterError: what `checked` raises.
    """
    rule = checked(rule, *_parts(pipe))
    if not rule.neutral:
        pipe._text_rule = rule
        pipe.encode_prompt = _encoder(pipe, rule)


@contextmanager
def ruled(pipe: DiffusionPipeline, rule: TextRule) -> Iterator[None]:
    """`follow`, until the context is left."""
    before = {name: vars(pipe)[name] for name in ("_text_rule", "encode_prompt") if name in vars(pipe)}
    follow(pipe, rule)
    try:
        yield
    finally:
        for name in ("_text_rule", "encode_prompt"):
            vars(pipe).pop(name, None)
        vars(pipe).update(before)


def _parts(pipe: Any) -> tuple[list[Any], list[Any]]:
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    return [one for one in encoders if one is not None], [one for one in tokenizers if one is not None]


def _encoder(pipe: Any, rule: TextRule) -> Any:
    """`encode_prompt` with the embeddings made here; repeating, precision and the rest stay the pipeline's."""
    original = pipe.encode_prompt
    signature = inspect.signature(original)

    @functools.wraps(original)  # others who listen read the signature
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        own = _asked(pipe, rule, given.pop("clip_skip", None))
        with _scaled(pipe, given.get("lora_scale")):
            if given.get("prompt") is not None and given["prompt_embeds"] is None:
                _put(given, "", _embedded(pipe, own, given["prompt"], given.get("prompt_2")))
            if given["do_classifier_free_guidance"] and given["negative_prompt_embeds"] is None:
                negative = _negative(pipe, given)
                if negative is not None:
                    _put(given, "negative_", _embedded(pipe, own, negative, given.get("negative_prompt_2")))
        return original(*bound.args, **bound.kwargs)

    return encode_prompt


def _asked(pipe: Any, rule: TextRule, clip_skip: int | None) -> TextRule:
    """The rule, or the layer that this very call asks for in diffusers' count."""
    if clip_skip is None:
        return rule
    encoders, tokenizers = _parts(pipe)
    own = OWN_LAYER["sd" if len(encoders) == 1 else "sdxl"]
    return checked(replace(rule, clip_skip=clip_skip + own), encoders, tokenizers)


def _negative(pipe: Any, given: Mapping[str, Any]) -> Any:
    """The negative prompts as SD and SDXL have them without one; None: zeros, which the pipeline makes."""
    negative = given["negative_prompt"]
    if negative is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
        return None
    if negative is None or isinstance(negative, str):
        prompt = given["prompt"]
        count = 1 if isinstance(prompt, str) else len(prompt if prompt is not None else given["prompt_embeds"])
        return [negative or ""] * count
    return negative


@contextmanager
def _scaled(pipe: Any, scale: float | None) -> Iterator[None]:
    """A LoRA of the text encoders at the scale of this call."""
    from diffusers.utils import scale_lora_layers, unscale_lora_layers

    encoders = [] if scale is None else _parts(pipe)[0]
    for encoder in encoders:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in encoders:
            unscale_lora_layers(encoder, scale)


def _embedded(pipe: Any, rule: TextRule, texts: Any, second: Any) -> dict[str, Tensor]:
    """Texts as the rule has them; the second encoder may be asked others."""
    encoders, tokenizers = _parts(pipe)
    expand = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion: one word, several vectors
    ids = []
    for words, own in zip(tokenizers, (texts, second or texts), strict=False):
        listed = [own] if isinstance(own, str) else list(own)
        ids += tokenize([words], listed if expand is None else expand(listed, words), rule)
    return encode(encoders, ids, rule)


def _put(given: dict[str, Any], prefix: str, text: Mapping[str, Tensor]) -> None:
    given[f"{prefix}prompt_embeds"] = text["embeds"]
    if "pooled" in text:
        given[f"{prefix}pooled_prompt_embeds"] = text["pooled"]

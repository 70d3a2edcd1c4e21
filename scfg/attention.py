"""Head-averaged attention of chosen U-net blocks, seen while the U-net runs, in memory O(N*T) per block kept.

The modules' own attention is untouched: forward hooks read what `to_q` and `to_k` put out, so fused kernels, LoRA
layers and IP-Adapter processors all stay as they are, and the queries and keys cost nothing.

`mean_attention` never holds (heads, N, N): it adds one head after the other (on a GPU, some at once) into one (N, N)
matrix per image, which its caller drops before the next block. Above `EXPLICIT_LIMIT` entries even that is too much,
and `apply_mean_attention` computes mean_heads(softmax(QK^T)) @ V as a fused scaled-dot-product call, with V cut into
pieces as wide as a head. (Any other width makes torch take its math path, which builds (heads, N, N) silently.)
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .errors import ScfgError
from .precision import widened

__all__ = [
    "EXPLICIT_LIMIT",
    "AttentionRecorder",
    "Block",
    "Projections",
    "apply_mean_attention",
    "eager",
    "find_blocks",
    "mean_attention",
    "select_blocks",
]

# Entries up to which one (N, N) matrix per image is formed (64 MiB); beyond, the fused pass, at 2-4 times the time.
EXPLICIT_LIMIT = 2**24
# The published code looks at latent / R, latent / 2R, ... down to latent / 8.
COARSEST_RATIO = 8
# From this latent size on, "auto" takes the published ratio; below it a quarter would leave too few positions.
LARGE_LATENT, LARGE_LATENT_RATIO = 64, 4


def mean_attention(
    query: Float[Tensor, "B N C"], key: Float[Tensor, "B M C"], *, heads: int, scale: float
) -> Float[Tensor, "B N M"]:
    """mean over heads of softmax(scale * Q K^T), a few heads at a time, in float32 or wider, without gradients.

    Args:
        query: projected queries (B, N, C); N positions of the image.
        key: projected keys (B, M, C); M positions or tokens that are attended to.
        heads: attention heads that C is divided into.
        scale: factor of the products, usually 1 / sqrt(C / heads).

    Returns:
        Attention weights (B, N, M); every row sums to 1.
    """
    query, key = _split_heads(query, heads), _split_heads(key, heads)  # (B, heads, N|M, C / heads)
    total = query.new_zeros(query.shape[0], query.shape[2], key.shape[2])
    at_once = min(heads, _heads_at_once(total))
    # Taken once for all heads: fresh memory of this size costs the CPU up to half of the whole time.
    scores = total.new_empty(at_once, *total.shape)
    weights = torch.empty_like(scores)
    for first in range(0, heads, at_once):
        some = slice(first, first + at_once)
        queries, keys = query[:, some].transpose(0, 1), key[:, some].transpose(0, 1)  # (heads, B, N|M, C / heads)
        into, out = scores[: len(queries)], weights[: len(queries)]
        flat = into.flatten(0, 1)
        torch.baddbmm(flat, queries.flatten(0, 1), keys.flatten(0, 1).mT, beta=0.0, alpha=scale, out=flat)
        torch.softmax(into, dim=-1, out=out)
        total += out[0] if len(out) == 1 else out.sum(0)
    return total.div_(heads)


def _heads_at_once(total: Float[Tensor, "B N M"]) -> int:
    """One on a CPU, whose caches hold no more; on a GPU several, whose time would else go to starting small kernels."""
    return 1 if total.device.type == "cpu" else max(1, EXPLICIT_LIMIT // total.numel())


def apply_mean_attention(
    query: Float[Tensor, "B N C"],
    key: Float[Tensor, "B M C"],
    value: Float[Tensor, "B M T"],
    *,
    heads: int,
    scale: float,
) -> Float[Tensor, "B N T"]:
    """mean over heads of softmax(scale * Q K^T) V, fused, in float32 or wider: nothing of size N x M is formed.

    Args:
        query: projected queries (B, N, C); N positions of the image.
        key: projected keys (B, M, C); M positions or tokens that are attended to.
        value: maps (B, M, T) to average with the attention weights; T maps.
        heads: attention heads that C is divided into.
        scale: factor of the products, usually 1 / sqrt(C / heads).

    Returns:
        Averaged maps (B, N, T).
    """
    query, key = _split_heads(query, heads), _split_heads(key, heads)
    width = query.shape[-1]
    pieces = []
    for piece in value.to(query.dtype).split(width, dim=-1):
        padded = F.pad(piece, (0, width - piece.shape[-1]))
        spread = padded[:, None].expand(-1, heads, -1, -1)  # (B, heads, M, width)
        out = F.scaled_dot_product_attention(query, key, spread, scale=scale).mean(dim=1)
        pieces.append(out[..., : piece.shape[-1]])
    return torch.cat(pieces, dim=-1)


def _split_heads(tokens: Float[Tensor, "B N C"], heads: int) -> Float[Tensor, "B heads N D"]:
    heads_first: Tensor = widened(tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
    return heads_first


@dataclass(frozen=True, kw_only=True)
class Block:
    """One place in a U-net where text meets image tokens.

    Attributes:
        name: its place, e.g. `up_blocks.1.attentions.0.transformer_blocks.0`.
        ratio: latent size / attention grid size.
        middle: whether it is part of the U-net's mid block.
        self_attention: the `Attention` of image tokens among themselves.
        cross_attention: the `Attention` to text; the same module where one softmax runs over [text | image] (IF).
    """

    name: str
    ratio: int
    middle: bool
    self_attention: Any
    cross_attention: Any

    @property
    def joint(self) -> bool:
        return self.self_attention is self.cross_attention

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Attention grid for a (height, width) prediction: every strided convolution rounds up."""
        return -(-height // self.ratio), -(-width // self.ratio)


def find_blocks(unet: Any) -> list[Block]:
    """All text-attending blocks in the order in which they run, with ratios read off the down-sampling path."""
    level, found = 0, list[Block]()
    for index, stage in enumerate(unet.down_blocks):
        found += _stage_blocks(stage, f"down_blocks.{index}", level)
        level += getattr(stage, "downsamplers", None) is not None
    if unet.mid_block is not None:
        found += _stage_blocks(unet.mid_block, "mid_block", level)
    for index, stage in enumerate(unet.up_blocks):
        found += _stage_blocks(stage, f"up_blocks.{index}", level)
        level -= getattr(stage, "upsamplers", None) is not None
    return found


def _stage_blocks(stage: Any, name: str, level: int) -> Iterator[Block]:
    for index, attention in enumerate(getattr(stage, "attentions", None) or ()):
        if attention is None:  # a mid block may have gaps
            continue
        place = {"ratio": 2**level, "middle": name == "mid_block"}
        if getattr(attention, "add_k_proj", None) is not None and not attention.only_cross_attention:
            yield Block(name=f"{name}.attentions.{index}", self_attention=attention, cross_attention=attention, **place)
        for depth, block in enumerate(getattr(attention, "transformer_blocks", ())):
            own, cross = getattr(block, "attn1", None), getattr(block, "attn2", None)
            if own is None or cross is None or own.is_cross_attention or not cross.is_cross_attention:
                continue
            yield Block(
                name=f"{name}.attentions.{index}.transformer_blocks.{depth}",
                self_attention=own,
                cross_attention=cross,
                **place,
            )


def select_blocks(
    blocks: list[Block], height: int, width: int, latent_ratio: int | str, last_blocks: int | None = None
) -> list[Block]:
    """The blocks whose maps count for a (height, width) prediction; the first ratio is the finest.

    An integer R means ratios R, 2R, 4R, ... up to 8 (the published rule). "auto" takes the finest grid of at most a
    quarter of the latent from 64 on, else the finest there is, with every coarser grid down to an eighth, and
    the mid block too where the finest ratio is below 2. `last_blocks` keeps that many of each ratio, the last to run.

    Args:
        blocks: blocks of the U-net with self-attention and cross-attention to text, in the order in which they run.
        height: rows of the latent.
        width: columns of the latent.
        latent_ratio: the finest ratio that counts, latent side / side of the block's grid, or "auto".
        last_blocks: how many blocks of each ratio count; None: all.

    Raises:
        ScfgError: no block has ratio R, or the finest grid has a side of one token.
    """
    ratios = sorted({block.ratio for block in blocks})
    if not ratios:
        raise ScfgError("this U-net has no block with both self- and text cross-attention; semantic guidance needs one")
    if latent_ratio == "auto":
        large = min(height, width) >= LARGE_LATENT
        finest = next((r for r in ratios if not large or r >= LARGE_LATENT_RATIO), ratios[-1])
        wanted = {r for r in ratios if finest <= r <= max(finest, COARSEST_RATIO)}
    else:
        finest = int(latent_ratio)
        wanted = {finest * 2**k for k in range(COARSEST_RATIO.bit_length())}
        wanted = {r for r in wanted if r <= max(COARSEST_RATIO, finest)}
        if finest not in ratios:
            raise ScfgError(
                f"latent_ratio={latent_ratio}: this U-net attends to text at latent ratios {ratios} only; "
                f"choose one of them or latent_ratio='auto'"
            )
    chosen = [b for b in blocks if b.ratio in wanted or (b.middle and finest < 2 and latent_ratio == "auto")]
    if last_blocks is not None:
        kept: list[Block] = []
        for ratio in sorted({b.ratio for b in chosen}):
            kept += [b for b in chosen if b.ratio == ratio][-last_blocks:]
        chosen = [b for b in chosen if b in kept]
    grid = next(b for b in chosen if b.ratio == finest).grid(height, width)
    if min(grid) < 2:
        raise ScfgError(
            f"latent_ratio={latent_ratio}: a {height}x{width} prediction leaves a {grid[0]}x{grid[1]} attention grid, "
            f"and regions need at least 2x2; use a smaller ratio (this U-net has {ratios}) or a larger image"
        )
    return chosen


@dataclass(frozen=True, kw_only=True)
class Projections:
    """What one block's projections put out, all rows of the batch.

    Attributes:
        query: (B, N, C) of the self-attention.
        key: (B, N, C) of the self-attention.
        cross_query: (B, N, C) of the cross-attention; `query` itself in a joint block.
        cross_key: (B, T, C), the text's keys.
    """

    query: Tensor
    key: Tensor
    cross_query: Tensor
    cross_key: Tensor


# A module's projection -> the slots its output fills, for self-attention, cross-attention and the joint kind.
# Fused projections (`pipe.fuse_qkv_projections()`) put out several at once, side by side in the last dimension.
_Slots = dict[str, tuple[str | None, ...]]
_SELF: _Slots = {"to_q": ("query",), "to_k": ("key",), "to_qkv": ("query", "key", None)}
_CROSS: _Slots = {"to_q": ("cross_query",), "to_k": ("cross_key",), "to_kv": ("cross_key", None)}
_JOINT: _Slots = {"to_q": ("query",), "to_k": ("key",), "add_k_proj": ("cross_key",)}


def eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that torch.compile leaves out of its graphs. The compiler (a second to import) is not loaded for it."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook


class AttentionRecorder:
    """Hands each chosen block's projections to `consume` as soon as they are complete, and then lets go of them.

    Args:
        blocks: blocks to watch.
        consume: called as `consume(block, projections)` inside the U-net's forward.
    """

    def __init__(self, blocks: list[Block], consume: Callable[[Block, Projections], None]) -> None:
        self.blocks = blocks
        self._consume = consume
        self._held: dict[str, dict[str, Tensor]] = {}
        self._handles: list[RemovableHandle] = []
        self._thread: int | None = None
        # The same function objects at every step, so that torch.compile does not compile anew.
        self._takers = [
            (attention, name, eager(functools.partial(self._take, block, slots)))
            for block in blocks
            for attention, table in self._tables(block)
            for name, slots in table.items()
        ]

    @staticmethod
    def _tables(block: Block) -> list[tuple[Any, _Slots]]:
        if block.joint:
            return [(block.self_attention, _JOINT)]
        return [(block.self_attention, _SELF), (block.cross_attention, _CROSS)]

    def start(self) -> None:
        """Watch the next forward. Projections are looked up now: a LoRA loaded since the last call replaced them."""
        self.stop()
        self._thread = threading.get_ident()
        for attention, name, taker in self._takers:
            module = getattr(attention, name, None)
            if module is not None:
                self._handles.append(module.register_forward_hook(taker))

    def stop(self) -> None:
        """Remove every hook and drop what was held. Safe to call at any time."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._held.clear()

    def _take(
        self, block: Block, slots: tuple[str | None, ...], module: Any, args: tuple[Any, ...], output: Tensor
    ) -> None:
        if not self._handles:  # compiled code may still call a hook that was removed
            return
        if self._thread != threading.get_ident():  # another pipeline's call of the same U-net
            return
        held = self._held.setdefault(block.name, {})
        for slot, part in zip(slots, output.detach().chunk(len(slots), dim=-1), strict=True):
            if slot is not None:
                held[slot] = part
        if block.joint and "query" in held:
            held["cross_query"] = held["query"]
        if len(held) == len(Projections.__dataclass_fields__):
            self._consume(block, Projections(**self._held.pop(block.name)))

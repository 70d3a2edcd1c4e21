"""One U-net call watched from start to finish: attention in, regions out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .attention import (
    EXPLICIT_LIMIT,
    AttentionRecorder,
    Block,
    Projections,
    apply_mean_attention,
    find_blocks,
    mean_attention,
    select_blocks,
)
from .errors import ScfgError
from .regions import RegionAverage, complete
from .semantic import SemanticCFG

__all__ = ["NO_TEXT", "Segmenter", "background_positions", "foreground_half", "grouping"]

# The published IF code adds this to its joint probabilities.
JOINT_EPS = 1e-20
NO_TEXT = "the unconditional half carries no text: the foreground is taken from the conditional half"


class Segmenter:
    """Turns the attention of one U-net forward into `Regions`.

    Args:
        unet: the (unwrapped) U-net.
        settings: which blocks, and how maps become regions.
    """

    def __init__(self, unet: Any, settings: SemanticCFG) -> None:
        self.settings = settings
        self._blocks = find_blocks(unet)
        self._recorders: dict[tuple[int, int], AttentionRecorder] = {}
        self._active: AttentionRecorder | None = None

    def start(
        self,
        size: tuple[int, int],
        *,
        tokens: slice | None,
        foreground: slice | None,
        background: list[int],
        groups: Float[Tensor, "B T R"] | None = None,
    ) -> None:
        """Watch the next forward.

        Args:
            size: (H, W) of the prediction.
            tokens: batch rows whose text tokens compete for regions; None: this forward gives no regions.
            foreground: batch rows that tell foreground from background; None: no foreground is needed from it.
            background: token positions that stand for the background (BOS).
            groups: token -> word membership per image, where words compete instead of tokens.
        """
        self.stop()
        if size not in self._recorders:
            chosen = select_blocks(self._blocks, *size, self.settings.latent_ratio, self.settings.last_blocks)
            self._recorders[size] = AttentionRecorder(chosen, self._consume)
        self._active = self._recorders[size]
        finest = min(self._active.blocks, key=lambda block: block.ratio)
        self._average = RegionAverage(finest.grid(*size), self.settings.smoothing_sigma)
        self._size, self._tokens, self._foreground = size, tokens, foreground
        self._background, self._groups = background, groups
        self._seen: set[str] = set()
        self._active.start()

    @property
    def watching(self) -> bool:
        """Whether a forward is being watched."""
        return self._active is not None

    def finish(self) -> RegionAverage | None:
        """What the forward gave; None where a block was silent or ran on another grid (caching, token merging)."""
        all_seen = self._active is not None and len(self._seen) == len(self._active.blocks)
        self.stop()
        return self._average if all_seen else None

    def stop(self) -> None:
        """Stop watching; safe at any time."""
        if self._active is not None:
            self._active.stop()
        self._active = None

    def _consume(self, block: Block, projections: Projections) -> None:
        grid = block.grid(*self._size)
        # An adapter with a scope runs the U-net's blocks twice in one call: what it adapts comes first, and counts.
        if projections.query.shape[1] != grid[0] * grid[1] or block.name in self._seen:
            return
        self._seen.add(block.name)
        # Half precision ends here: softmax over up to N entries and spatial means need float32.
        with torch.no_grad(), torch.autocast(projections.query.device.type, enabled=False):
            if self._tokens is not None:
                self._add(block, projections, grid, self._tokens, pair=self._foreground == self._tokens)
            if self._foreground is not None and self._foreground != self._tokens:
                self._add_pair(block, projections, grid, self._foreground)

    def _add(self, block: Block, projections: Projections, grid: tuple[int, int], rows: slice, *, pair: bool) -> None:
        attend, cross = token_maps(block, projections, rows)
        competing = cross if self._groups is None else cross @ self._groups.to(cross)
        if pair:
            competing = torch.cat([competing, cross @ self._pairing(cross)], dim=-1)
        maps = self._complete(attend, competing)
        if pair:
            maps, both = maps[..., :-2], maps[..., -2:]
            self._average.add_pair(both, grid)
        self._average.add_tokens(maps, grid)

    def _add_pair(self, block: Block, projections: Projections, grid: tuple[int, int], rows: slice) -> None:
        # Only the background token and the sum of all others matter here: completion of two columns instead of T.
        attend, cross = token_maps(block, projections, rows)
        self._average.add_pair(self._complete(attend, cross @ self._pairing(cross)), grid)

    def _complete(self, attend: Callable[[Tensor], Tensor], cross: Tensor) -> Tensor:
        return complete(attend, cross, completion=self.settings.completion, steps=self.settings.completion_steps)

    def _pairing(self, cross: Tensor) -> Float[Tensor, "T 2"]:
        other = torch.ones(cross.shape[-1], dtype=cross.dtype, device=cross.device)
        other[self._background] = 0.0
        return torch.stack([1.0 - other, other], dim=-1)


def token_maps(
    block: Block, projections: Projections, rows: slice
) -> tuple[Callable[[Tensor], Tensor], Float[Tensor, "B N T"]]:
    """x -> S x with the head-averaged self-attention S, and the head-averaged cross-attention A, of some rows.

    Args:
        block: where the projections were recorded.
        projections: queries and keys of the block's self- and cross-attention.
        rows: of the batch: the conditional or the unconditional half.
    """
    own, other = block.self_attention, block.cross_attention
    query, key, cross_key = projections.query[rows], projections.key[rows], projections.cross_key[rows]
    batch, positions, text = query.shape[0], query.shape[1], cross_key.shape[1]
    explicit = batch * positions * positions <= EXPLICIT_LIMIT
    if block.joint:  # one softmax over [text | image], split without renormalizing
        key = torch.cat([cross_key, key], dim=1)
        if explicit:
            both = mean_attention(query, key, heads=own.heads, scale=own.scale) + JOINT_EPS
            return both[..., text:].matmul, both[..., :text]

        def attend(x: Tensor) -> Tensor:
            padded = torch.cat([x.new_zeros(batch, text, x.shape[-1]), x], dim=1)
            return apply_mean_attention(query, key, padded, heads=own.heads, scale=own.scale)

        picks_text = torch.eye(text + positions, text, device=query.device).expand(batch, -1, -1)
        return attend, apply_mean_attention(query, key, picks_text, heads=own.heads, scale=own.scale)
    cross = mean_attention(projections.cross_query[rows], cross_key, heads=other.heads, scale=other.scale)
    if explicit:
        return mean_attention(query, key, heads=own.heads, scale=own.scale).matmul, cross
    return lambda x: apply_mean_attention(query, key, x, heads=own.heads, scale=own.scale), cross


def foreground_half(wanted: str, uncond_context: Float[Tensor, "B T C"]) -> str:
    """The half that tells the foreground: what the setting wants, where its attention means something.

    Raises:
        ScfgError: the unconditional half is wanted and its embeddings are all zero.
    """
    if wanted == "conditional":
        return wanted
    if bool(uncond_context.any()):
        return "unconditional"
    if wanted == "unconditional":
        raise ScfgError(
            "foreground='unconditional', but the unconditional half carries no text (negative prompt embeddings are "
            "all zero, as SDXL makes them without a negative prompt): its attention is rounding noise. "
            "Use foreground='auto' or 'conditional', or give a negative prompt"
        )
    return "conditional"


def background_positions(length: int, chunk: int | None) -> list[int]:
    """Positions of BOS: 0, and the start of every further chunk of a long prompt.

    Args:
        length: tokens of the context.
        chunk: tokens the text encoder takes at once, where its tokenizer begins them with BOS; else None.
    """
    if chunk is None or length % chunk:
        return [0]
    return list(range(0, length, chunk))


def grouping(words: list[list[tuple[int, ...]]], length: int, device: torch.device) -> Float[Tensor, "B T R"]:
    """Membership of tokens in words; images with fewer words get empty columns, which never win a position.

    Args:
        words: image -> word -> positions of its tokens.
        length: tokens T of the text.
        device: of the result.

    Returns:
        1 where token t belongs to word r, else 0.
    """
    matrix = torch.zeros(len(words), length, max(len(image) for image in words), device=device)
    for image, positions in enumerate(words):
        for word, tokens in enumerate(positions):
            matrix[image, list(tokens), word] = 1.0
    return matrix

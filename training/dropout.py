"""Dropout of ranks and of whole updates while a LoRA trains; peft has these for LoHa and LoKr only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["drop"]


@dataclass(frozen=True)
class _Drop:
    """A forward hook of a down projection; what it leaves out, the up projection does not add."""

    ranks: float
    modules: float

    def __call__(self, down: nn.Module, inputs: tuple[Any, ...], low: Tensor) -> Tensor:
        """low: (B, …, r) of a linear layer, (B, r, h, w) of a convolution."""
        if not down.training:
            return low
        if torch.rand(()) < self.modules:
            return low * 0
        where = 1 if isinstance(down, nn.Conv2d) else -1
        shape = [1] * low.ndim
        shape[0], shape[where] = low.shape[0], low.shape[where]
        kept = torch.rand(shape, device=low.device) >= self.ranks
        return low * kept / (1 - self.ranks)


def drop(network: nn.Module, adapter: str, *, ranks: float, modules: float) -> None:
    """In training, leaves out each rank of a sample's update, or a layer's whole update, with these probabilities.

    Ranks that are kept count 1/(1 - p) as much; whole updates are not rescaled, as in peft's LoHa and LoKr.

    Args:
        network: with LoRA layers, hooked in place.
        adapter: peft's name of the LoRA.
        ranks: probability that a rank is left out for a sample, below 1.
        modules: probability that a layer's whole update is left out.
    """
    for layer in network.modules():
        found = getattr(layer, "lora_A", None)
        if isinstance(found, nn.ModuleDict) and adapter in found:
            found[adapter].register_forward_hook(_Drop(ranks, modules))

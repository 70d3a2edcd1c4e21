"""A bound on the size of each layer's update, as kohya's `scale_weight_norms` (max-norm regularisation) sets one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

__all__ = ["bounded", "norms"]


def _layers(models: Mapping[str, Any], adapter: str) -> Iterable[tuple[Tensor, Tensor, float]]:
    """Down matrix (r, ...), up matrix (out, r, ...) and scale of every adapted layer."""
    for model in models.values():
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                yield layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]


@torch.no_grad()
def norms(models: Mapping[str, Any], adapter: str) -> Tensor:
    """Frobenius norm of each layer's update `s B A`, (layers,) float32.

    It is the root of the trace of (BᵀB)(AAᵀ), which are (r, r): the update itself, as large as the weight, is not made.

    Args:
        models: networks with plain LoRA layers.
        adapter: its name in peft.
    """
    found = []
    for down, up, scale in _layers(models, adapter):
        a, b = down.flatten(1), up.flatten(1)
        found.append(abs(scale) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
    return torch.stack(found)


def bounded(models: Mapping[str, Any], adapter: str, largest: float) -> Callable[[], None]:
    """A function that scales down each update whose norm is above `largest`, half in A and half in B.

    Args:
        models: networks with plain LoRA layers.
        adapter: its name in peft.
        largest: norm that an update may have.
    """

    @torch.no_grad()
    def after_step() -> None:
        # No look at the numbers: on a GPU it would wait for them.
        factors = (largest / norms(models, adapter).clamp(min=largest)).sqrt()
        for (down, up, _), factor in zip(_layers(models, adapter), factors, strict=True):
            down.mul_(factor)
            up.mul_(factor)

    return after_step

"""LoRA layers as one operation each, forward and backward.

peft computes ``base(x) + lora_B(lora_A(x)) * scaling``: on the way it writes the layer's output three times and adds
a dozen small operations to forward and backward pass, which at small sizes cost more than their arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .replaced import replaced

__all__ = ["fused"]


def fused(networks: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within the context, plain LoRA layers over frozen linear ones compute in one operation each.

    Results and gradients are peft's up to rounding. What is not plain (dropout, DoRA, a bias in the adapter, several
    adapters, LoRA weights of another dtype than the layer's) stays with peft, as do calls while adapters are disabled
    or merged.
    """
    return replaced(networks, _fits, _Fused)


def _fits(module: Any) -> bool:
    if not isinstance(module, Linear) or len(module.active_adapters) != 1:
        return False
    base, name = module.get_base_layer(), module.active_adapters[0]
    return (
        type(base) is nn.Linear
        and "forward" not in base.__dict__  # somebody else's
        and name in module.lora_A
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], nn.Identity)
        and not module.lora_A[name]._forward_hooks  # dropout of ranks
        and module.lora_B[name].bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
        and base.weight.dtype == module.lora_A[name].weight.dtype
    )


class _Fused:
    """The forward pass of one layer. An object and no closure: a deep copy of the layer then computes with its own."""

    def __init__(self, module: Linear) -> None:
        self.module = module
        self.name = module.active_adapters[0]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, name = self.module, self.name
        base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
        usual = not (args or kwargs or module.disable_adapters or module.merged) and module.active_adapters == [name]
        if not usual or x.dtype != base.weight.dtype or torch.is_autocast_enabled(x.device.type):
            out: Tensor = type(module).forward(module, x, *args, **kwargs)
        else:
            out = _Lora.apply(x, base.weight, base.bias, down, up, module.scaling[name])
        return out


class _Lora(torch.autograd.Function):
    """``x W^T + b + s (x A^T) B^T`` with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ down.t()
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        out.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        wanted = gradient.reshape(-1, gradient.shape[-1])
        wanted_low = (wanted @ up).mul_(ctx.scaling)
        x = None
        if ctx.needs_input_grad[0]:
            x = (wanted @ weight).addmm_(wanted_low, down).view(*gradient.shape[:-1], -1)
        return x, None, None, wanted_low.t() @ rows, (wanted.t() @ low).mul_(ctx.scaling), None

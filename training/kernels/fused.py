"""LoRA layers as one operation each, forward and backward.

peft computes ``base(x) + lora_B(lora_A(x)) * scaling``: on the way it writes the layer's output three times and adds
a dozen small operations to forward and backward pass, which at small sizes cost more than their arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .replaced import replaced

__all__ = ["fused"]


def fused(networks: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within the context, plain LoRA layers over frozen linear ones and convolutions compute in fewer operations.

    Results and gradients are peft's up to rounding. What is not plain (dropout, DoRA, a bias in the adapter, several
    adapters, LoRA weights of another dtype than the layer's) stays with peft, as do calls while adapters are disabled
    or merged, and convolutions of latents that are not channels-last.
    """
    return replaced(networks, _fits, lambda one: _Fused(one) if isinstance(one, Linear) else _FusedConvolution(one))


def _fits(module: Any) -> bool:
    if not isinstance(module, Linear | Conv2d) or len(module.active_adapters) != 1:
        return False
    base, name = module.get_base_layer(), module.active_adapters[0]
    if name not in module.lora_A or name in module.lora_variant:
        return False
    down, up = module.lora_A[name], module.lora_B[name]
    if isinstance(module, Linear):
        alone = type(base) is nn.Linear and "forward" not in base.__dict__  # somebody else's
    else:
        alone = type(base) is nn.Conv2d and not base._forward_hooks and up.kernel_size == (1, 1) and up.groups == 1
    return (
        alone
        and isinstance(module.lora_dropout[name], nn.Identity)
        and not down._forward_hooks  # dropout of ranks
        and up.bias is None
        and not any(parameter.requires_grad for parameter in base.parameters())
        and base.weight.dtype == down.weight.dtype
    )


class _Fused:
    """The forward pass of one linear layer. An object and no closure: a deep copy then computes with its own."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.name = module.active_adapters[0]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.usual(x, args, kwargs):
            return self.compute(x)
        out: Tensor = type(self.module).forward(self.module, x, *args, **kwargs)
        return out

    def usual(self, x: Tensor, args: Any, kwargs: Any) -> bool:
        """Whether the adapter acts alone, in the precision of its weights."""
        module = self.module
        return (
            not (args or kwargs or module.disable_adapters or module.merged)
            and module.active_adapters == [self.name]
            and x.dtype == module.base_layer.weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
        )

    def compute(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        module, name = self.module, self.name
        base, down, up = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
        out: Tensor = _Lora.apply(x, base.weight, base.bias, down, up, module.scaling[name])
        return out


class _FusedConvolution(_Fused):
    """The forward pass of one convolution: where latents are channels-last, a 1 x 1 kernel is a matrix product."""

    def usual(self, x: Tensor, args: Any, kwargs: Any) -> bool:
        return _is_channels_last(x) and super().usual(x, args, kwargs)

    def compute(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) channels-last -> (B, D, h, w)."""
        module, name = self.module, self.name
        down, up = module.lora_A[name], module.lora_B[name].weight
        if down.kernel_size == down.stride == (1, 1) and down.padding == (0, 0):
            low = linear(x.permute(0, 2, 3, 1), down.weight.flatten(1)).permute(0, 3, 1, 2)
        else:
            low = down(x)
        out: Tensor = module.base_layer(x)
        if not _is_channels_last(out) or not _is_channels_last(low):
            out = out + module.lora_B[name](low) * module.scaling[name]
        else:
            out = _Up.apply(out, low, up.flatten(1), module.scaling[name])
        return out


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) channels-last -> (B H W, C), the same memory: a copy would be written into for nothing."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


class _Up(torch.autograd.Function):
    """``out + s (low up^T)`` at every position, written into `out`, with gradients of out, low and up."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, low: Tensor, up: Tensor, scaling: float) -> Tensor:
        _rows(out).addmm_(_rows(low), up.t(), alpha=scaling)
        ctx.mark_dirty(out)
        ctx.save_for_backward(low, up)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low, up = ctx.saved_tensors
        wanted = _rows(gradient.contiguous(memory_format=torch.channels_last))
        batch, _, height, width = low.shape
        back = (wanted @ up).mul_(ctx.scaling).view(batch, height, width, -1).permute(0, 3, 1, 2)
        return gradient, back, (wanted.t() @ _rows(low)).mul_(ctx.scaling), None


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

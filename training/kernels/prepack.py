"""Frozen convolutions on a CPU, their weights kept in the order that the kernels read.

oneDNN reads a convolution's weight in blocks. Given a plain one it reorders it in every call, forward and backward: at
the deep levels of a U-net, where weights are large and latents small, that takes longer than the convolution. And one
small picture goes to a slower kernel altogether. A weight that does not train need be reordered only once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .replaced import replaced

__all__ = ["SMALLEST", "possible", "prepacked", "prepacked_bytes"]

# Entries of a weight from which on reordering it takes longer than what a call through autograd's Python costs.
SMALLEST = 2**20


def possible() -> bool:
    """Whether this build of torch has the operators, which its own CPU compiler uses."""
    names = ("_reorder_convolution_weight", "_convolution_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def prepacked(networks: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within the context, large frozen float32 convolutions of stride 1 compute from reordered copies of their weights.

    The results are those of the plain convolution up to float32's rounding. A copy is made at the first call, another
    at the first gradient: twice the convolutions' memory more, less the inputs, which need no longer be kept for the
    backward pass. The weights must not be written in place through ``.data`` meanwhile (merging an adapter does); other
    changes are noticed.
    """
    return replaced(networks, _fits, _Packed)


def prepacked_bytes(networks: Iterable[nn.Module]) -> int:
    """Of all copies made so far."""
    found = (module.__dict__.get("forward") for network in networks for module in network.modules())
    return sum(item.bytes for item in found if isinstance(item, _Packed))


def _fits(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.numel() >= SMALLEST
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and not any(parameter.requires_grad for parameter in module.parameters())
        and module.stride == module.dilation == (1, 1)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and all(pad < side for pad, side in zip(module.padding, module.kernel_size, strict=True))  # see `backward`
    )


class _Packed:
    """The forward pass of one convolution. An object and no closure: a deep copy of the module must get its own."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module
        self.plain = type(module).forward
        self.key: Any = None
        self.ahead: Tensor | None = None
        self.back: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return _Packed(copy.deepcopy(self.module, memo))  # reordered weights cannot be copied

    @property
    def bytes(self) -> int:
        return sum(self.module.weight.nbytes for made in (self.ahead, self.back) if made is not None)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.module.weight
        if x.dtype != torch.float32 or x.ndim != 4 or weight.requires_grad or weight.dtype != torch.float32:
            return self.plain(self.module, x)
        key = (weight.data_ptr(), weight._version, weight.dtype)
        if key != self.key:
            self.key, self.ahead, self.back = key, None, None
        out: Tensor = _Convolution.apply(x, self)
        return out

    def forward(self, x: Tensor) -> Tensor:
        if self.ahead is None:
            self.ahead = _reordered(self.module.weight, self._padding(), x)
        return _convolve(x, self.ahead, self.module.bias, self._padding())

    def _padding(self) -> list[int]:
        assert not isinstance(self.module.padding, str)  # see `_fits`
        return list(self.module.padding)

    def backward(self, gradient: Tensor) -> Tensor:
        """The gradient of the input: a convolution with the kernel turned round and its channels exchanged."""
        padding = [side - 1 - pad for side, pad in zip(self.module.kernel_size, self._padding(), strict=True)]
        if self.back is None:
            turned = self.module.weight.flip(2, 3).transpose(0, 1)
            self.back = _reordered(turned.contiguous(memory_format=torch.channels_last), padding, gradient)
        return _convolve(gradient, self.back, None, padding)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: _Packed) -> Tensor:
        ctx.packed = packed
        return packed.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packed.backward(gradient), None


def _reordered(weight: Tensor, padding: list[int], like: Tensor) -> Tensor:
    shape = list(like.shape)
    out: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), padding, [1, 1], [1, 1], 1, shape)
    return out


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, padding, [1, 1], [1, 1], 1, "none", [], "")
    return out

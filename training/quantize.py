"""Frozen linear layers in 8 or 4 bits while a LoRA trains beside them (QLoRA, https://arxiv.org/abs/2305.14314).

- `int8`: each row of a weight is rounded to 8 bits with one scale, as in LLM.int8() (https://arxiv.org/abs/2208.07339);
  the layer's input is not rounded.
- `nf4`: blocks of 64 weights are rounded to 16 levels, and their scales to 8 bits; bitsandbytes' layer.

bitsandbytes' own 8-bit layer keeps the input of every layer for the backward pass, also under gradient checkpointing:
on SDXL that is as much as 8 bits save. So 8 bits are a small layer of this module.

Layers are exchanged when all that needs the real weights is done: the base is known, the adapter has its start.
Convolutions, norms and biases stay in the compute precision.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import sharding
from .errors import TrainingError
from .ranks import state

__all__ = ["check_quantization", "linear_bytes", "quantize_networks", "scale_bytes", "unrounded_numel"]

PACKAGE = "bitsandbytes"
BLOCK, BLOCKS = 64, 256  # weights with one scale in nf4, and such scales with one scale of their own
LEVELS = 4 * (16 + 256 + 1)  # bytes for each layer: levels of its weights and of their scales, and the scales' mean


def check_quantization(kind: str | None, *, whole: bool = False, adapter: str = "lora", dora: bool = False) -> None:
    """Looks whether a run can train beside quantized weights.

    Args:
        kind: int8 or nf4; None: nothing is quantized, and nothing can be wrong.
        whole: the U-net itself trains.
        adapter: see `LoraSettings.kind`; another name: there is none.
        dora: see `LoraSettings.dora`.

    Raises:
        TrainingError: it cannot, or a package is not installed.
    """
    if kind is None:
        return
    if whole:
        raise TrainingError(
            f"train.quantize {kind}: the U-net itself trains here, and rounded weights cannot; leave it out, or train "
            "a LoRA"
        )
    if kind == "nf4" and adapter in ("loha", "lokr"):
        raise TrainingError(f"train.quantize nf4 does not go with lora.kind {adapter} in peft; use int8")
    if kind == "int8" and dora:
        raise TrainingError("train.quantize int8 does not go with lora.dora in peft; use nf4")
    if sharding.asked(state()):
        raise TrainingError(
            f"train.quantize {kind} does not go with --use_fsdp; use --multi_gpu (DDP), or leave it out"
        )
    if kind == "nf4":
        try:
            importlib.import_module(PACKAGE)
        except ImportError as error:
            raise TrainingError(f"train.quantize nf4 needs the package {PACKAGE}: pip install {PACKAGE}") from error


def quantize_networks(networks: Iterable[nn.Module], kind: str, dtype: torch.dtype, device: torch.device) -> int:
    """Exchanges the frozen linear layers of networks, also those below adapters; returns how many.

    Args:
        networks: changed in place.
        kind: int8 or nf4.
        dtype: compute precision.
        device: where the networks will run; layers get there one by one, so it never holds them all unrounded.
    """
    count = 0
    for network in networks:
        for owner in list(network.modules()):
            for name, layer in list(owner.named_children()):
                if type(layer) is nn.Linear and not any(one.requires_grad for one in layer.parameters()):
                    made = Int8Linear(layer) if kind == "int8" else _in_four_bits(layer, dtype)
                    setattr(owner, name, made.to(device))
                    count += 1
    return count


class Int8Linear(nn.Linear):
    """A frozen linear layer with its weight in 8 bits.

    Args:
        layer: that it takes the place of.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        out: Tensor = _Product.apply(x, self.weight, self.scale, self.bias)
        return out


class _Product(torch.autograd.Function):
    """``x W^T + b``, which keeps nothing but the rounded weight for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return linear(x, _unrounded(weight, scale, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        return gradient @ _unrounded(weight, scale, gradient.dtype), None, None, None


def _unrounded(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) in the dtype, multiplied in float32."""
    return torch.mul(weight, scale, out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def _in_four_bits(layer: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer, which rounds its weight once it is moved to its device."""
    import bitsandbytes as bnb

    with torch.device("meta"):
        made = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
        )
    made.support_avx512bf16_for_cpu = False  # a form for drawing, out of which no gradient comes
    weight = layer.weight.detach().to("cpu", dtype)  # from elsewhere it would not be rounded
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    made.bias = layer.bias
    return made  # type: ignore[no-any-return]


def linear_bytes(kind: str, rows: int, columns: int) -> int:
    """What a linear layer's weight takes, with its scales.

    Args:
        kind: int8 or nf4.
        rows: outputs.
        columns: inputs.
    """
    if kind == "int8":
        return rows * columns + 4 * rows
    blocks = math.ceil(rows * columns / BLOCK)
    return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / BLOCKS) + LEVELS


def scale_bytes(networks: Iterable[nn.Module]) -> int:
    """What quantized layers hold beside their parameters."""
    found = [scale for network in networks for layer in network.modules() for scale in _scales(layer)]
    return sum({one.data_ptr(): one.numel() * one.element_size() for one in found}.values())


def unrounded_numel(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for: in nf4 two lie in a byte."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def _scales(layer: Any) -> list[Tensor]:
    if isinstance(layer, Int8Linear):
        return [layer.get_buffer("scale")]
    four = getattr(getattr(layer, "weight", None), "quant_state", None)
    if four is None:
        return []
    return [four.absmax, four.code, four.offset, four.state2.absmax, four.state2.code]

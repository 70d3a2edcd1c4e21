"""Frozen weights of a U-net's blocks in main memory, each on the device only while its block computes.

A block runs as one unit of gradient checkpointing, with its weights brought for that one pass: forward, and again when
the backward pass computes it anew. So the copies on the device live as long as the activations that belong to them, and
never more than two blocks' weights are there: of the one that computes, and of the one that comes next, which travels
meanwhile on a CUDA stream of its own.

What trains (a LoRA in the blocks) and what is between the blocks stays on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import sharding
from .config import TrainSettings
from .errors import TrainingError
from .ranks import state

__all__ = ["BLOCKS", "check_offload", "keep_blocks", "kept_numel", "waiting_bytes"]

BLOCKS = (ResnetBlock2D, BasicTransformerBlock)
"""Of every U-net of diffusers, those that its own gradient checkpointing computes anew one by one."""


def check_offload(settings: TrainSettings, *, whole: bool = False) -> None:
    """Looks whether a run can train as `train.offload` says.

    Args:
        settings: of the training.
        whole: the U-net itself trains.

    Raises:
        TrainingError: it cannot.
    """
    if not settings.offload:
        return
    if whole:
        raise TrainingError(
            "train.offload: the U-net itself trains here, and only frozen weights can wait in main memory; leave it "
            "out, or train a LoRA"
        )
    if settings.compile:
        raise TrainingError("train.offload does not go with train.compile; set one of them to false")
    if settings.quantize == "nf4":
        raise TrainingError("train.offload does not go with train.quantize nf4; use int8, or leave one of them out")
    if sharding.asked(state()):
        raise TrainingError("train.offload does not go with --use_fsdp; use --multi_gpu (DDP), or leave it out")


def keep_blocks(network: nn.Module, device: torch.device) -> bool:
    """Moves a network to the device, but for the frozen weights of its blocks, which come there as a block computes.

    Between two passes the blocks have no such weights: `named_parameters` lists them no more, so that nothing moves
    them, or counts them with those on the device.

    Args:
        network: changed in place; its blocks are in main memory.
        device: where it computes.

    Returns:
        Whether there are such blocks; a ControlNet that trains has none.
    """
    belt = _Belt(device)
    for module in network.modules():
        if isinstance(module, BLOCKS) and not isinstance(module.__dict__.get("forward"), _Block):
            kept = _take_out(module, pinned=device.type == "cuda")
            if kept:
                module.forward = _Block(module, kept, belt)  # type: ignore[method-assign]
    network.to(device)
    return bool(_blocks(network))


def kept_numel(network: nn.Module) -> int:
    """How many numbers of a network wait in main memory."""
    return sum(value.numel() for block in _blocks(network) for *_, value in block.kept)


def waiting_bytes(network: nn.Module) -> int:
    """What a network's weights in main memory take."""
    return sum(value.numel() * value.element_size() for block in _blocks(network) for *_, value in block.kept)


def _blocks(network: nn.Module) -> list[_Block]:
    found = (module.__dict__.get("forward") for module in network.modules())
    return [own for own in found if isinstance(own, _Block)]


Slot = tuple[nn.Module, str, Tensor]
"""The layer that owns a weight, the weight's name in it, and its values in main memory."""


def _frozen(block: nn.Module) -> list[Slot]:
    return [
        (owner, name, value)
        for owner in block.modules()
        for name, value in owner._parameters.items()
        if value is not None and not value.requires_grad
    ]


def _take_out(block: nn.Module, *, pinned: bool) -> list[Slot]:
    """A block's frozen weights, which it has no more; pinned memory travels while the device computes."""
    kept = [(owner, name, value.detach()) for owner, name, value in _frozen(block)]
    for owner, name, _ in kept:
        owner._parameters[name] = None
    return [(owner, name, value.pin_memory() if pinned else value) for owner, name, value in kept]


class _Block:
    """The forward pass of one block with weights that are brought for it.

    Args:
        block: without its frozen weights.
        kept: these.
        belt: that brings them.
    """

    def __init__(self, block: nn.Module, kept: list[Slot], belt: _Belt) -> None:
        self.forward, self.kept, self.belt = block.forward, kept, belt

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(self._run, *args, use_reentrant=False, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self._filled(self.belt.take(self)):
            return self.forward(*args, **kwargs)

    @contextlib.contextmanager
    def _filled(self, brought: list[Tensor]) -> Iterator[None]:
        """Within the context, the layers have their weights."""
        try:
            for (owner, name, _), value in zip(self.kept, brought, strict=True):
                owner._parameters[name] = value  # type: ignore[assignment]
            yield
        finally:
            for owner, name, _ in self.kept:
                owner._parameters[name] = None


class _Belt:
    """Brings blocks' weights to the device, those of the next block while one computes.

    Args:
        device: where they compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.order: dict[_Block, int] = {}  # as the first pass meets them
        self.last = -1
        self.sent: dict[int, list[Tensor]] = {}

    def take(self, block: _Block) -> list[Tensor]:
        """A block's weights on the device."""
        number = self.order.setdefault(block, len(self.order))
        brought = self.sent.pop(number, None) or self._send(block)
        if self.stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self.stream)
            for value in brought:
                value.record_stream(now)  # else its memory could be given away while it is still read
        following = number + (1 if number > self.last or number == 0 else -1)  # the backward pass goes back
        self.last = number
        self.sent.clear()
        if 0 <= following < len(self.order):
            self.sent[following] = self._send(list(self.order)[following])
        return brought

    def _send(self, block: _Block) -> list[Tensor]:
        stream = torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext()
        with stream:
            return [value.to(self.device, non_blocking=True, copy=True) for *_, value in block.kept]

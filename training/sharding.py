"""Weights divided over the processes (FSDP2), where the launcher is asked with `--use_fsdp`.

Each process keeps a part of every weight; a block's weights are gathered only while the block runs. Of a network that
trains whole, gradients and optimizer state are divided too. What trains beside frozen weights (a LoRA, new tokens) is
small: it stays whole in each process, and its gradients are averaged.

torch's `fully_shard` is called here rather than by accelerate's `prepare`, which knows GPUs only: so the same lines
run, and are tested, with two processes on a CPU. Checkpoints hold whole tensors, as without it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed import all_reduce, broadcast, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import TrainSettings
from .errors import TrainingError
from .method import Method

__all__ = ["asked", "average", "divide", "gathered", "like", "local", "sync"]


def asked(accelerator: Accelerator) -> bool:
    """Whether the launcher was told to divide weights and there is more than one process to divide them over."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def divide(method: Method, settings: TrainSettings, accelerator: Accelerator) -> None:
    """Replaces parameters of the method's networks by their parts: all, or the frozen ones beside those that train.

    Args:
        method: whose networks are divided in place.
        settings: of which the precision matters.
        accelerator: its device and processes.

    Raises:
        TrainingError: fp16 with divided gradients, whose loss scaling looks at one process only.
    """
    if method.whole and settings.precision == "fp16":
        raise TrainingError(
            f"train.precision fp16 does not go with --use_fsdp in method {method.name}; use bf16 or fp32"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    beside = [] if method.whole else list(method.trainable().values())
    for parameter in beside:
        broadcast(parameter.data, src=0)  # as DDP does: starts may be computed, and rounded, on each device
    kept = set(beside)
    for network in method.networks():
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        # By default the outermost stays gathered until its backward pass: evaluation would then see old weights.
        kind = type(network).__name__
        fully_shard(network, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
        type(network).__name__ = kind  # `fully_shard` makes it FSDP..., which diffusers would write into config.json


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The large blocks of a U-net or ControlNet; other networks are gathered as one."""
    lists = [getattr(network, name, None) or [] for name in ("down_blocks", "up_blocks")]
    middle = getattr(network, "mid_block", None)
    return [*lists[0], *([middle] if middle is not None else []), *lists[1]]


def sync(method: Method, *, gradients: bool) -> None:
    """Whether the next backward pass sums gradients over the processes: only the last micro-step of a step does."""
    for network in method.networks():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(gradients)


@torch.no_grad()
def average(method: Method, parameters: Iterable[nn.Parameter]) -> None:
    """Averages the gradients of what stays whole over the processes; nothing where nothing is divided.

    Args:
        method: whose networks may be divided.
        parameters: that train, in the same order in every process.
    """
    if method.whole or not any(isinstance(network, FSDPModule) for network in method.networks()):
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])  # one message instead of hundreds
    all_reduce(together)
    together /= get_world_size()
    for gradient, mean in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; what is not divided is returned as it is. Call without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any) -> Any:
    """The gathered tensor on the CPU, also in dicts; every process must call. What is not divided stays as it is."""
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


@torch.no_grad()
def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor divided as a parameter of its shape is; as it is where nothing is divided."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)

"""Networks that train whole, divided over the processes (FSDP2), where the launcher is asked with `--use_fsdp`.

Each process keeps a part of every weight, its gradient and its optimizer state; a block's weights are gathered only
while the block runs. torch's `fully_shard` is called here rather than by accelerate's `prepare`, which knows GPUs only:
so the same lines run, and are tested, with two processes on a CPU. Checkpoints hold whole tensors, as without it.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .config import TrainSettings
from .errors import TrainingError
from .method import Method

__all__ = ["asked", "divide", "like", "local", "sync", "whole"]


def asked(accelerator: Accelerator) -> bool:
    """Whether the launcher was told to divide weights and there is more than one process to divide them over."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def divide(method: Method, settings: TrainSettings, accelerator: Accelerator) -> None:
    """Replaces the parameters of the method's networks by their parts.

    Args:
        method: whose networks are divided in place.
        settings: of which the precision matters.
        accelerator: its device and processes.

    Raises:
        TrainingError: frozen weights among them (LoRA), or fp16, whose loss scaling looks at one process only.
    """
    if settings.precision == "fp16":
        raise TrainingError("train.precision fp16 does not go with --use_fsdp; use bf16 or fp32")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for name, network in method.models.items():
        if not all(parameter.requires_grad for parameter in network.parameters()):
            raise TrainingError(
                f"--use_fsdp divides networks that train whole, and most of {name} is frozen by method {method.name}: "
                "use --multi_gpu, where only what trains takes part"
            )
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # By default the outermost stays gathered until its backward pass: evaluation would then see old weights.
        kind = type(network).__name__
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        type(network).__name__ = kind  # `fully_shard` makes it FSDP..., which diffusers would write into config.json


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The large blocks of a U-net or ControlNet; other networks are gathered as one."""
    lists = [getattr(network, name, None) or [] for name in ("down_blocks", "up_blocks")]
    middle = getattr(network, "mid_block", None)
    return [*lists[0], *([middle] if middle is not None else []), *lists[1]]


def sync(method: Method, *, gradients: bool) -> None:
    """Whether the next backward pass sums gradients over the processes: only the last micro-step of a step does."""
    for network in method.models.values():
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(gradients)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory; what is not divided is returned as it is. Call without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """The gathered tensor on the CPU, also in dicts; every process must call. What is not divided stays as it is."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


@torch.no_grad()
def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor divided as a parameter of its shape is; as it is where nothing is divided."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)

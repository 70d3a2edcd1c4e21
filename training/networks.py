"""The networks of every training step: device, precision, kernels, memory layout and compilation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.upsampling import Upsample2D

from . import offload, quantize, sharding
from .config import TrainSettings
from .kernels import fused, prepack
from .method import Method

__all__ = ["DTYPES", "cast", "compile_network", "configure_networks", "kernels", "lay_ready"]

# Up to here the plain kernel is faster on a CPU; beyond, its (tokens x tokens) matrix outgrows the caches.
PLAIN_TOKENS = 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def lay_ready(method: Method, settings: TrainSettings, accelerator: Accelerator, resolution: int) -> None:
    """The networks of every step get to the device, in the precision and form in which they compute.

    Args:
        method: whose networks are changed in place.
        settings: precision, quantization, offload, attention, gradient checkpointing and compilation.
        accelerator: its device and processes.
        resolution: of the training pictures, pixels.
    """
    device, dtype = accelerator.device, DTYPES[settings.precision]
    if settings.quantize:
        place = torch.device("cpu") if settings.offload else device
        quantize.quantize_networks(method.networks(), settings.quantize, dtype, place)
    cast(method, device, dtype, move=not settings.offload)
    tokens = resolution**2 // method.parts.vae_scale_factor**2
    configure_networks(method, settings, device, tokens=tokens, divided=sharding.asked(accelerator))


def cast(method: Method, device: torch.device, dtype: torch.dtype, *, move: bool = True) -> None:
    """Frozen networks that run in every step get the compute precision; whatever trains stays float32.

    Args:
        method: whose networks are moved and cast in place.
        device: where they run.
        dtype: compute precision.
        move: whether the networks get there at once; otherwise they are only cast.
    """
    for module in method.networks():
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():  # what is quantized is no such number
                parameter.data = parameter.data.to(dtype)
        if move:
            module.to(device)  # not before: the device might not have the room for float32
        module.train()


def configure_networks(
    method: Method, settings: TrainSettings, device: torch.device, *, tokens: int, divided: bool = False
) -> None:
    """Attention kernel, memory layout, offload, gradient checkpointing and compilation of the networks of every step.

    Args:
        method: whose networks are changed in place.
        settings: attention, offload, gradient checkpointing and compilation.
        device: where they run.
        tokens: latents of an image, the longest sequence that attention sees.
        divided: weights will be divided over the processes (FSDP), which takes contiguous ones only.
    """
    small = device.type == "cpu" and tokens <= PLAIN_TOKENS
    plain = settings.attention == "plain" or (settings.attention == "auto" and small)
    for network in method.networks():
        if hasattr(network, "set_attn_processor"):
            network.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())
        if device.type == "cpu" and not divided:
            _lay_out(network)
        waits = settings.offload and offload.keep_blocks(network, device)  # such blocks are recomputed as they come
        if settings.gradient_checkpointing and not waits and hasattr(network, "enable_gradient_checkpointing"):
            network.enable_gradient_checkpointing()
        if settings.compile:
            compile_network(network)


def _lay_out(network: Any) -> None:
    """Convolutions then run on their inputs as they lie; but peft takes the down matrices of a DoRA by `view`."""
    network.to(memory_format=torch.channels_last)
    parameters = dict(network.named_parameters())
    if any(".lora_magnitude_vector." in name for name in parameters):
        for name, parameter in parameters.items():
            if ".lora_A." in name:
                parameter.data = parameter.data.contiguous()


@contextlib.contextmanager
def kernels(method: Method, settings: TrainSettings, accelerator: Accelerator) -> Iterator[None]:
    """`fused` LoRA layers and `prepacked` convolutions in the networks of every step, where asked for and possible.

    Args:
        method: whose networks are changed while the context lasts.
        settings: `fuse`, `prepack`, `compile` and `offload`.
        accelerator: its device and processes.
    """
    left = settings.compile or settings.offload or sharding.asked(accelerator)
    ours = [] if left else method.networks()
    packs = settings.prepack and accelerator.device.type == "cpu" and prepack.possible()
    with fused.fused(ours if settings.fuse else []), prepack.prepacked(ours if packs else []):
        yield


def compile_network(network: torch.nn.Module) -> None:
    """torch.compile, with the upsampling between the levels left out of the graphs.

    The CPU compiler of torch 2.13 loses the gradient through nearest upsampling of channels-last latents: whatever lies
    below it does not learn, the loss looks as it should and nothing is said.
    """
    for module in network.modules():
        if isinstance(module, Upsample2D):
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
    # Sizes are few; with symbolic ones torch 2.13's CPU compiler fails on graphs cut at the upsampling.
    network.compile(dynamic=False)

"""Where a model's weights really are: behind torch.compile's wrapper, or in the map of an offloaded model.

accelerate's sequential offload (`pipe.enable_sequential_cpu_offload`) empties every parameter (device `meta`) and keeps
the values in a map per layer; its hook puts them in for the layer's own forward only. Model offload and diffusers'
group offload keep parameters whole and only move them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .errors import AdapterError

__all__ = [
    "computing_device",
    "is_hooked",
    "is_moved",
    "is_offloaded",
    "named_values",
    "offload_like",
    "stored",
    "unwrapped",
]


def unwrapped(model: Any) -> Any:
    """The model itself where `torch.compile(model)` stands for it."""
    return getattr(model, "_orig_mod", model)


def is_offloaded(layer: torch.nn.Module) -> bool:
    """Whether the layer's own parameters are empty outside its forward."""
    return any(value.device.type == "meta" for value in layer.parameters(recurse=False))


def is_moved(model: torch.nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers puts the model's weights in place before its layers run."""
    return any(map(is_hooked, model.modules()))


def is_hooked(module: torch.nn.Module) -> bool:
    """The same of one module alone."""
    own = module.__dict__
    return "_hf_hook" in own or "_diffusers_hook" in own


def stored(layer: torch.nn.Module, name: str = "weight", *, writable: bool = False) -> torch.Tensor:
    """A layer's parameter with its values, also where it is offloaded.

    Args:
        layer: of any kind.
        name: of its parameter.
        writable: what is written into the tensor must reach the next forward.

    Raises:
        AdapterError: the values are nowhere in memory, or on disk and `writable`.
    """
    value: torch.Tensor = getattr(layer, name)
    if value.device.type != "meta":
        return value
    hook = _offload_hook(layer)
    if hook is None:
        raise AdapterError(
            f"a {type(layer).__name__}'s {name} is on the meta device: the pipeline's weights are not loaded"
        )
    kept: torch.Tensor = hook.weights_map[name]
    if writable and kept.data_ptr() != hook.weights_map[name].data_ptr():
        raise AdapterError(
            "the pipeline's weights are offloaded to disk and cannot be changed there; offload to the CPU"
        )
    return kept


def named_values(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """`named_parameters` with values, also of an offloaded model."""
    for name, value in model.named_parameters():
        if value.device.type == "meta":
            owner, _, leaf = name.rpartition(".")
            yield name, stored(model.get_submodule(owner), leaf)
        else:
            yield name, value


def computing_device(model: torch.nn.Module, path: str) -> torch.device:
    """Where the layer at `path` computes; its parameters may lie elsewhere meanwhile."""
    layer: Any = model.get_submodule(path)
    while hasattr(layer, "base_layer"):  # peft's layers have the model's in them, hooks and all
        layer = layer.base_layer
    hook = _offload_hook(layer)
    if hook is not None:
        return torch.device(hook.execution_device)
    parts = path.split(".")
    for length in range(len(parts), -1, -1):  # a group's hook sits on the layer or on the block around it
        registry = getattr(model.get_submodule(".".join(parts[:length])), "_diffusers_hook", None)
        group = getattr(registry.get_hook("group_offloading"), "group", None) if registry is not None else None
        if group is not None:
            return torch.device(group.onload_device)
    device: torch.device = next(layer.parameters()).device
    return device


def offload_like(model: torch.nn.Module, example: torch.nn.Module) -> torch.nn.Module:
    """`model` where `example` is: on its device, or offloaded as it is."""
    from accelerate import cpu_offload
    from accelerate.hooks import add_hook_to_module

    hook = next((found for layer in example.modules() if (found := _offload_hook(layer)) is not None), None)
    if hook is not None:
        offloaded: torch.nn.Module = cpu_offload(
            model, hook.execution_device, offload_buffers=len(example._parameters) > 0
        )
        return offloaded
    if (whole := getattr(example, "_hf_hook", None)) is not None:  # model offload moves it when it is called
        hooked: torch.nn.Module = add_hook_to_module(model, whole)
        return hooked
    return model.to(next(example.parameters()).device)


def _offload_hook(layer: torch.nn.Module) -> Any:
    """accelerate's hook that holds the layer's values, or None."""
    hook = getattr(layer, "_hf_hook", None)
    for found in getattr(hook, "hooks", (hook,)):
        if getattr(found, "offload", False) is True and getattr(found, "weights_map", None) is not None:
            return found
    return None

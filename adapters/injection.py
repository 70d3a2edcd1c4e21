"""One component of an adapter beside a model's weights, through peft, and off again.

peft makes the layers; their tensors are then put in as they are, so that ranks, alphas and Kronecker factors need not
follow from one config.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .adapter import Adapter, Module
from .compose import change_shape
from .errors import AdapterError, BaseMismatchError, FormatError
from .placement import computing_device
from .seat import Seat, Switches, has, refuse_fused, tuners
from .spelling import to_peft

if TYPE_CHECKING:
    pass

__all__ = ["fit_to_model", "injected"]

_CONFIGS = {"lora": "LoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig"}


@contextmanager
def injected(model: torch.nn.Module, adapter: Adapter, component: str, name: str, weight: float) -> Iterator[None]:
    """The adapter's part, which `fit_to_model` has checked, on `model` for as long as the context lasts.

    Args:
        model: a network of diffusers or transformers.
        adapter: of which the modules of `component` are used.
        component: the model's name in its pipeline, such as "unet".
        name: peft's name for the adapter on this model.
        weight: scale of the adapter's change.

    Raises:
        AdapterError: the name is taken, or weights are fused.
        FormatError: what peft cannot compute.
    """
    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"name={name!r} is taken on this {component}; detach it first or choose another")
    refuse_fused(model, component)
    real = _real_paths(model)
    modules = {real[path]: module for path, module in adapter.part(component).items()}
    before = _Before(model)
    try:
        _inject(model, _config(adapter, component, list(modules)), name)
        before.switches.restore(model)
        _fill(model, modules, name, weight, plain=before.plain)
        before.restore_flags(model)
        model._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' and transformers' own flag
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        _remove(model, name, before)
        before.switches.restore(model)
        if isinstance(error, AdapterError):
            raise
        raise FormatError(f"peft cannot put these weights on {component}: {error}") from error
    try:
        yield
    finally:
        _remove(model, name, before)


def fit_to_model(model: torch.nn.Module, adapter: Adapter, component: str) -> dict[str, Module]:
    """The component's modules checked against the model; linear and 1x1-convolution shapes exchanged where needed.

    Args:
        model: a network of diffusers or transformers.
        adapter: of which the modules of `component` are used.
        component: the model's name in its pipeline, such as "unet".

    Returns:
        Path of the layer -> its module, in the shape that the layer takes.

    Raises:
        AdapterError: a layer already carries another kind of adapter.
        BaseMismatchError: a layer is missing, or its shape is another.
    """
    real, carrying = _real_paths(model), dict(tuners(model))
    fitted = {}
    for path, module in adapter.part(component).items():
        name = f"{component}.{path}"
        layer: Any = model.get_submodule(real[path]) if path in real else None
        if path in real and real[path] in carrying:
            beside = any(p.removesuffix(".weight") in layer.adapter_layer_names for p in module.tensors)
            if not beside and module.merges_only is None:
                raise AdapterError(f"{name} already carries another kind of adapter; detach or merge it first")
            layer = layer.get_base_layer()
        shape = getattr(getattr(layer, "weight", None), "shape", None)
        if shape is None:
            raise BaseMismatchError(f"{name}: the pipeline has no such layer; the adapter is for another base")
        fitted[name] = _shaped(module, name, tuple(shape))
        _check_beside(module, name, layer)
    return fitted


def _real_paths(model: torch.nn.Module) -> dict[str, str]:
    """The adapter's name of a layer -> the model's: transformers' text encoders have `text_model.` before some."""
    return {path.removeprefix("text_model."): path for path, _ in model.named_modules() if "base_layer" not in path}


def _shaped(module: Module, name: str, shape: tuple[int, ...]) -> Module:
    tensors = dict(module.tensors)
    if module.kind == "lora":
        down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
        if len(shape) == 4 and shape[2:] == (1, 1) and down.ndim == 2:
            tensors["lora_A.weight"], tensors["lora_B.weight"] = down[..., None, None], up[..., None, None]
        elif len(shape) == 2 and down.ndim == 4 and down.shape[2:] == (1, 1):
            tensors["lora_A.weight"], tensors["lora_B.weight"] = down[..., 0, 0], up[..., 0, 0]
    if module.dora:
        kept = tensors["lora_magnitude_vector"].reshape(-1)
        tensors["lora_magnitude_vector"] = kept.reshape(1, -1, 1, 1) if len(shape) == 4 else kept
    if set(tensors) <= {"diff_b", "b_norm"}:
        return module
    changes = change_shape(tensors)
    fits = changes == shape
    if module.kind != "lora":  # its product is reshaped to the weight, whose kernel may be in its columns
        fits = (changes[0], math.prod(changes[1:])) == (shape[0], math.prod(shape[1:]))
    if not fits:
        raise BaseMismatchError(f"{name}: the adapter changes a weight of shape {changes}, the base's is {shape}")
    return replace(module, tensors=tensors)


def _check_beside(module: Module, name: str, layer: Any) -> None:
    """A bias and LyCORIS' magnitudes, of which broadcasting would take any."""
    for parameter in ("diff_b", "b_norm"):
        if parameter in module.tensors and layer.bias is None:
            raise BaseMismatchError(f"{name}: the adapter changes a bias, the base's layer has none")
        if parameter in module.tensors and module.tensors[parameter].numel() != layer.bias.numel():
            sizes = f"{module.tensors[parameter].numel()} values, the base's has {layer.bias.numel()}"
            raise BaseMismatchError(f"{name}: the adapter's change of the bias has {sizes}")
    if "dora_scale" in module.tensors:
        scale, shape = module.tensors["dora_scale"], tuple(layer.weight.shape)
        if scale.numel() != shape[0] and (scale.shape[0] != 1 or scale.numel() != shape[1]):
            raise BaseMismatchError(
                f"{name}: dora_scale {tuple(scale.shape)} is neither one per output nor one per input of {shape}"
            )


# ---------------------------------------------------------------------------------------------- on


def _config(adapter: Adapter, component: str, paths: list[str]) -> Any:
    import peft  # seconds of imports, which only putting an adapter on a model needs

    modules = adapter.part(component)
    kind = next(iter(modules.values())).kind
    if kind == "lora":
        settings = to_peft(adapter, component)[1]
    else:
        ranks, alphas = (Counter(getattr(m, which) for m in modules.values()) for which in ("rank", "alpha"))
        settings = {"r": ranks.most_common(1)[0][0], "alpha": alphas.most_common(1)[0][0]}
    settings = {key: value for key, value in settings.items() if key != "peft_type"}
    return getattr(peft, _CONFIGS[kind])(**{**settings, "target_modules": sorted(paths)})


def _inject(model: torch.nn.Module, config: Any, name: str) -> None:
    import peft

    with torch.random.fork_rng(devices=[]):  # starting values, all of which are replaced
        peft.inject_adapter_in_model(config, model, adapter_name=name)


def _fill(model: torch.nn.Module, modules: dict[str, Module], name: str, weight: float, *, plain: set[str]) -> None:
    """Our tensors into the layers that peft made, and these switched on."""
    made = {path: layer for path, layer in tuners(model) if has(layer, name)}
    if made.keys() != modules.keys():
        raise FormatError(f"peft adapts {len(made)} layers instead of {len(modules)}")
    for path, layer in made.items():
        base = layer.get_base_layer()
        _place(layer, modules[path], name, computing_device(model, path), base.weight.dtype)
        _scale(layer, modules[path], name, weight)
        layer.train(base.training)
        Seat.of(layer, ours_alone=path in plain).enter(name)


def _place(layer: Any, module: Module, name: str, device: torch.device, dtype: torch.dtype) -> None:
    if module.kind != "lora":
        for attribute in layer.adapter_layer_names:
            if name in (held := getattr(layer, attribute)):
                del held[name]
    for parameter, tensor in module.tensors.items():
        value = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
        held = getattr(layer, parameter.removesuffix(".weight"))
        if module.kind == "lora":
            held[name].weight = value
        else:
            held[name] = value


def _scale(layer: Any, module: Module, name: str, weight: float) -> None:
    alphas = layer.lora_alpha if module.kind == "lora" else layer.alpha
    rslora = module.kind == "lora" and layer.use_rslora.get(name, False)
    layer.r[name] = module.rank
    alphas[name] = module.scale * (module.rank**0.5 if rslora else module.rank)
    layer.scaling[name] = weight * module.scale


# ---------------------------------------------------------------------------------------------- off


class _Before:
    """What injection touches besides layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.switches = Switches(model)
        self.loaded = vars(model).get("_hf_peft_config_loaded")
        carrying = {path for path, _ in tuners(model)}
        self.plain = {path for path, _ in model.named_modules()} - carrying
        self._flags = {name: p.requires_grad for name, p in model.named_parameters()}

    def restore_flags(self, model: torch.nn.Module) -> None:
        """`requires_grad` of the parameters that were there, some now one level deeper."""
        for name, parameter in model.named_parameters():
            flag = self._flags.get(name, self._flags.get(name.replace(".base_layer.", ".")))
            if flag is not None and parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _remove(model: torch.nn.Module, name: str, before: _Before) -> None:
    """Delete one adapter; layers that carry none after it become the plain layers they were."""
    for path, layer in tuners(model):
        if not has(layer, name):
            continue
        if "_seat" in vars(layer):
            vars(layer)["_seat"].leave(name)
        else:  # injected, and then something failed
            layer.delete_adapter(name)
        if not any(getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    config = getattr(model, "peft_config", {})
    config.pop(name, None)
    if not config:
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(attribute, None)
        if before.loaded is not None:
            model._hf_peft_config_loaded = before.loaded
    before.restore_flags(model)

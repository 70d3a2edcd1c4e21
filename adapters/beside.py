"""An adapted network and the base's as one, for `scope`: a LoRA's layers switched and scaled, or two whole U-nets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .errors import AdapterError
from .placement import is_hooked, is_moved
from .seat import switched_off

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Both", "Whole", "with_layers"]


class Both(Protocol):
    """The adapted network and the base's, as one."""

    @property
    def base(self) -> torch.nn.Module:
        """The network that computes the base's prediction."""

    def adapted(self, rows: int, share: float | None, *args: Any, **kwargs: Any) -> Any:
        """The adapted prediction; the first `rows` of the batch take `share` of the change, None: all of it."""

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The base's prediction."""


@contextmanager
def with_layers(unet: torch.nn.Module, name: str, *, merged: bool) -> Iterator[_Beside]:
    """The adapter's layers with hooks on them, until the context is left.

    Args:
        unet: the adapted network.
        name: peft's name of the adapter on it.
        merged: keep a second copy of the layers' weights with a LoRA in them, where the adapter is one.

    Raises:
        AdapterError: another adapter is on the U-net as well, or this one is merged into its weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    others = sorted({active for layer in layers for active in layer.active_adapters if active != name})
    if others:
        raise AdapterError(f"scope: the U-net carries other adapters too ({', '.join(others)}); take them off first")
    if not any(name in getattr(layer, attribute, {}) for layer in layers for attribute in layer.adapter_layer_names):
        raise AdapterError("scope: this adapter is merged into the U-net's weights; load it without sequential offload")
    network = _Beside(unet, layers)
    if merged and all(_linear(layer, name) for layer in layers) and not is_moved(unet):
        network.whole = {weight: weight.detach() + delta for weight, delta in _changes(layers, name)}
    handles = []
    for layer in layers:
        if _linear(layer, name):
            handles.append(layer.lora_A[name].register_forward_hook(network.scale))
        else:
            handles.append(layer.get_base_layer().register_forward_hook(network.keep(layer)))
            handles.append(layer.register_forward_hook(network.mix))
    try:
        yield network
    finally:
        for handle in handles:
            handle.remove()


def _linear(layer: BaseTunerLayer, name: str) -> bool:
    """Whether the layer's change is linear in what its first factor gives: a LoRA, and no variant such as DoRA."""
    if name not in getattr(layer, "lora_A", {}):
        return False
    return name not in getattr(layer, "lora_variant", {}) and not getattr(layer, "lora_bias", {}).get(name, False)


def _changes(layers: Sequence[BaseTunerLayer], name: str) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each layer's weight, and what the adapter adds to it."""
    for layer in layers:
        weight: Any = layer.get_base_layer().weight
        yield weight, layer.get_delta_weight(name).to(weight.dtype)  # type: ignore[operator]  # of peft's LoRA layers


class _Beside:
    """A U-net whose layers carry an adapter beside them.

    A LoRA's share is that of what its first factor gives, which has few channels: it costs next to nothing. Of the
    other kinds, the base layer's output is kept and mixed with the adapted one.

    Attributes:
        whole: the layers' weights with all of the change in them, where these are kept.
    """

    def __init__(self, unet: torch.nn.Module, layers: list[BaseTunerLayer]) -> None:
        self.unet, self.forward, self.layers = unet, unet.forward, layers
        self.modules = list(unet.modules())  # asked in every step, and slow to walk
        self.whole: dict[torch.nn.Parameter, Tensor] = {}
        self.rows, self.share = 0, None  # type: int, float | None
        self.kept: dict[BaseTunerLayer, Tensor] = {}

    @property
    def base(self) -> torch.nn.Module:
        return self.unet

    @property
    def taken(self) -> bool:
        """Whether the weights are another's meanwhile: fused with an adapter, or offloaded."""
        return any(layer.merged for layer in self.layers) or any(map(is_hooked, self.modules))

    def adapted(self, rows: int, share: float | None, *args: Any, **kwargs: Any) -> Any:
        if share is None and self.whole and not self.taken:
            with switched_off(self.layers), _holding(self.whole):
                return self.forward(*args, **kwargs)
        self.rows, self.share = rows, share
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.share = None
            self.kept.clear()

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        with switched_off(self.layers):
            return self.forward(*args, **kwargs)

    def scale(self, factor: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.share is None:
            return None
        return torch.cat([output[: self.rows] * self.share, output[self.rows :]])

    def keep(self, layer: BaseTunerLayer) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self.share is not None:
                self.kept[layer] = output

        return hook

    def mix(self, layer: BaseTunerLayer, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self.share is None:
            return None
        base, rows = self.kept.pop(layer), slice(0, self.rows)
        first = base[rows] if self.share == 0 else torch.lerp(base[rows], output[rows], self.share)
        return torch.cat([first, output[self.rows :]])


@contextmanager
def _holding(values: Mapping[torch.nn.Parameter, Tensor]) -> Iterator[None]:
    """The parameters have these values for as long as the context lasts; copied only if the model moved."""
    before = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value.to(parameter.device)
        yield
    finally:
        for parameter, value in before.items():
            parameter.data = value


class Whole:
    """A U-net that is another one than the base's."""

    def __init__(self, *, tuned: Callable[..., Any], base: torch.nn.Module) -> None:
        self.tuned, self.base = tuned, base

    def adapted(self, rows: int, share: float | None, *args: Any, **kwargs: Any) -> Any:
        # The whole batch, although some of it is not used: what watches the attention expects both halves.
        output = self.tuned(*args, **kwargs)
        if share is None:
            return output
        mixed = torch.cat([self.base(*args, **kwargs)[0][:rows], output[0][rows:]])
        return (mixed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=mixed)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        return self.base(*args, **kwargs)

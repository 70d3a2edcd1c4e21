"""Ours beside the user's adapters on one peft layer: theirs stay as they are, and are so again when ours leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .errors import AdapterError

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Seat", "Switches", "has", "refuse_fused", "switched_off", "tuners"]


def tuners(model: torch.nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The layers that carry an adapter, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def has(layer: BaseTunerLayer, name: str) -> bool:
    """Whether the layer carries that adapter."""
    return any(name in getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names)


def refuse_fused(model: torch.nn.Module, component: str) -> None:
    """A layer with fused weights computes no other adapter, and to unfuse would not give back the weights' bits."""
    fused = sorted({name for _, layer in tuners(model) for name in layer.merged_adapters})
    if fused:
        raise AdapterError(
            f"{component}: the weights of {', '.join(fused)} are fused into it (fuse_lora); call unfuse_lora() first, "
            "or unload_lora_weights() after fusing"
        )


@contextmanager
def switched_off(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """The layers compute what they do without their adapters, for as long as the context lasts."""
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True  # `enable_adapters` would also turn gradients off, and all of them on
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


class Switches:
    """Which adapters are on, and whether all are off, of every layer; peft sets both anew when it adds an adapter."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._before = {path: (layer._active_adapter, layer._disable_adapters) for path, layer in tuners(model)}

    def restore(self, model: torch.nn.Module) -> None:
        """Of the layers that were there."""
        for path, layer in tuners(model):
            if path in self._before:
                layer._active_adapter, layer._disable_adapters = self._before[path]


class Seat:
    """One layer while adapters of ours are on it; lies on the layer as `_seat`.

    A fusing meanwhile (`fuse_lora`) takes ours along, because a fused layer computes nothing beside its weights.
    """

    def __init__(self, layer: BaseTunerLayer, *, ours_alone: bool) -> None:
        self._layer = layer
        self._theirs: Any = [] if ours_alone else layer._active_adapter
        self._disabled = False if ours_alone else layer._disable_adapters
        self._ours: list[str] = []
        self._shown: list[str] = []
        self._kept: torch.Tensor | None = None
        vars(layer).update(_seat=self, merge=self._merge)

    @classmethod
    def of(cls, layer: BaseTunerLayer, *, ours_alone: bool) -> Seat:
        """The layer's seat, made where it has none; `ours_alone`: the layer was plain before."""
        return vars(layer).get("_seat") or cls(layer, ours_alone=ours_alone)

    def enter(self, name: str) -> None:
        """Switch ours on, beside theirs as far as they are."""
        self._note_changes()
        self._ours.append(name)
        self._show()

    def leave(self, name: str) -> None:
        """Take ours off and delete it from the layer."""
        layer, fused = self._layer, list(self._layer.merged_adapters)
        self._note_changes()
        if self._kept is not None:
            if fused:
                layer.unmerge()
            layer.get_base_layer().weight.data.copy_(self._kept)
            self._kept = None
        self._ours.remove(name)
        self._show()
        layer.delete_adapter(name)
        left = [other for other in fused if other != name]
        if not self._ours:
            del vars(layer)["_seat"], vars(layer)["merge"]
            layer._active_adapter, layer._disable_adapters = self._theirs, self._disabled
        if left:
            layer.merge(adapter_names=left)

    def _show(self) -> None:
        theirs = [] if self._disabled else _listed(self._theirs)
        self._shown = [*theirs, *self._ours]
        self._layer._active_adapter, self._layer._disable_adapters = list(self._shown), False

    def _note_changes(self) -> None:
        """What the user switched meanwhile is the user's state from now on."""
        if not self._shown:
            return
        now = _listed(self._layer._active_adapter)
        if now != self._shown:
            self._theirs = [name for name in now if name not in self._ours]
            self._disabled = False
        self._disabled = self._disabled or self._layer._disable_adapters

    def _merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        layer = self._layer
        if self._kept is None:
            self._kept = layer.get_base_layer().weight.detach().clone()
        names = _listed(layer._active_adapter) if adapter_names is None else [*adapter_names]
        wanted = [name for name in dict.fromkeys([*names, *self._ours]) if name not in layer.merged_adapters]
        type(layer).merge(layer, safe_merge=safe_merge, adapter_names=wanted)


def _listed(active: str | Sequence[str]) -> list[str]:
    return [active] if isinstance(active, str) else list(active)

"""The in-memory form of a LoRA-like adapter, whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from .errors import AdapterError

__all__ = ["BESIDE", "COMPONENTS", "KIND_OF", "Adapter", "Kind", "Module", "Tokens"]

Kind = Literal["lora", "loha", "lokr", "full", "norm"]
"""full: a whole difference of a layer's weight; norm: the same of a normalization. Both in LyCORIS' words."""
Tokens = Mapping[str, Mapping[str, torch.Tensor]]
"""Learned token -> component -> vectors (n, width)."""
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
_PARAMETERS: dict[Kind, tuple[str, ...]] = {
    "lora": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full": ("diff",),
    "norm": ("w_norm",),
}
KIND_OF: dict[str, Kind] = {name: kind for kind, names in _PARAMETERS.items() for name in names}
BESIDE: dict[str, tuple[Kind, ...]] = {
    "dora_scale": ("lora", "loha", "lokr"),
    "diff_b": ("full", "lora", "loha", "lokr"),
    "b_norm": ("norm",),
}
"""Parameters that peft has no place for -> the kinds beside whose own they may lie."""
_WEIGHT_DECOMPOSED = {"lora": "dora", "loha": "doha", "lokr": "dokr"}


@dataclass(frozen=True, kw_only=True)
class Module:
    """What one adapted layer carries."""

    kind: Kind
    tensors: Mapping[str, torch.Tensor]
    """By peft's parameter names: `lora_A.weight` (r, in[, kh, kw]), `lora_B.weight` (out, r[, 1, 1]), …

    By LyCORIS' where peft has none: `dora_scale` (out, 1[, 1, 1]) or, over inputs, (1, in[, 1, 1]); `diff` (out, in[,
    kh, kw]), `diff_b` (out,), `w_norm` and `b_norm` (width,).
    """
    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor on the product of the matrices: alpha/r, or alpha/sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def dora(self) -> bool:
        """A DoRA as peft has it: a LoRA with a magnitude per output."""
        return "lora_magnitude_vector" in self.tensors

    @property
    def decomposed(self) -> bool:
        """Whether magnitudes rescale the changed weight, peft's or others."""
        return self.dora or "dora_scale" in self.tensors

    @property
    def merges_only(self) -> str | None:
        """What of it no layer of peft computes, so that it can only be added into the weights; None: nothing."""
        if self.kind == "full":
            return "a whole weight difference"
        if self.kind == "norm":
            return "a trained norm"
        if "dora_scale" in self.tensors:
            return "DoRA magnitudes over inputs" if self.kind == "lora" else f"DoRA magnitudes on a {self.kind}"
        return "a trained bias" if "diff_b" in self.tensors else None

    @property
    def full(self) -> bool:
        """A LoKr whose two factors are both whole matrices; LyCORIS ignores its alpha."""
        return "lokr_w1" in self.tensors and "lokr_w2" in self.tensors


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """All adapted layers, keyed `component.module`, with text-encoder modules spelt without `text_model.`."""

    modules: Mapping[str, Module]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per component: settings peft needs beyond rank and alpha (LoKr's decompose_factor, …)."""
    tokens: Tokens = field(default_factory=dict)
    """Learned embeddings that belong to it."""

    def part(self, component: str) -> dict[str, Module]:
        """The modules of one component, without its prefix."""
        prefix = component + "."
        return {name.removeprefix(prefix): m for name, m in self.modules.items() if name.startswith(prefix)}

    @property
    def components(self) -> list[str]:
        return [name for name in COMPONENTS if self.part(name)]

    @property
    def kinds(self) -> list[str]:
        """lora, loha, lokr, with magnitudes dora, doha, dokr; full, norm: those that occur."""
        return sorted({_WEIGHT_DECOMPOSED[m.kind] if m.decomposed else m.kind for m in self.modules.values()})

    def to(self, dtype: torch.dtype) -> Adapter:
        """The same in another precision; its tokens stay as they are.

        Raises:
            AdapterError: a number is too large for it.
        """
        modules = {}
        for name, module in self.modules.items():
            cast = {key: value.to(dtype) for key, value in module.tensors.items()}
            if not all(bool(value.isfinite().all()) for value in cast.values()):
                raise AdapterError(f"{name}: a number is too large for {str(dtype).removeprefix('torch.')}; take bf16")
            modules[name] = replace(module, tensors=cast)
        return replace(self, modules=modules)

    @property
    def merges_only(self) -> str | None:
        """What can only be merged, and why; None: peft computes all of it."""
        for name, module in self.modules.items():
            if why := module.merges_only:
                return f"{name} has {why}"
        for component in self.components:
            kinds = sorted({"dora" if module.dora else module.kind for module in self.part(component).values()})
            if len(kinds) > 1:
                return f"{component} mixes {' and '.join(kinds)}"
        return None

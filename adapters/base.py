"""Who a pipeline's base model is: its architecture and, more loosely, its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from .compose import merged_into
from .placement import named_values, stored, unwrapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["describe", "fingerprint", "modules_of"]

_PARTS = ("unet", "text_encoder", "text_encoder_2")
_ADAPTER_PARTS = ("lora_", "hada_", "lokr_")


def modules_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The trainable components an adapter can sit on, themselves where torch.compile has wrapped them."""
    return {name: unwrapped(part) for name in _PARTS if (part := getattr(pipe, name, None)) is not None}


def describe(pipe: DiffusionPipeline) -> dict[str, str]:
    """`name`, `family`, `architecture` and `weights` of a base, the same with or without adapters attached.

    `architecture` hashes parameter names and shapes; `weights` is the `fingerprint` of its trainable parts.
    """
    parts = modules_of(pipe)
    shapes = [
        [f"{part}.{name}", list(value.shape)]
        for part, module in parts.items()
        for name, value in sorted(_own_parameters(module))
    ]
    architecture = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    name = str(getattr(pipe.config, "_name_or_path", "") or getattr(pipe, "name_or_path", ""))
    family = "sdxl" if "text_encoder_2" in parts else "sd"
    return {"name": name, "family": family, "architecture": architecture[:16], "weights": fingerprint(parts)}


def fingerprint(parts: Mapping[str, torch.nn.Module]) -> str:
    """Hash of up to 64 evenly spaced entries of every parameter, adapters left out.

    Rounded as float16 stores them, so that a float16 copy of a model agrees and a fine-tuned one does not.
    """
    digest = hashlib.sha256()
    for module in parts.values():
        for name, value in sorted(_own_parameters(module)):
            flat = value.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 64)][:64].half().cpu().numpy()
            digest.update(name.encode() + picked.tobytes())
    return digest.hexdigest()[:16]


def _own_parameters(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The base's own: adapters beside layers, what was merged into weights and learned tokens are not seen."""
    own: dict[str, torch.Tensor] = {}
    for path, layer in module.named_modules():
        table: Any = layer
        while "_instead_of" in vars(table):
            table = vars(table)["_instead_of"][0]
        if table is not layer:
            own[f"{path.removeprefix('text_model.')}.weight"] = stored(table)
    for merged in reversed(merged_into(module)):
        own |= merged.originals(module)
    named = (
        (name.replace(".base_layer.", ".").removeprefix("text_model."), value) for name, value in named_values(module)
    )
    return [
        (name, own.get(name, value))
        for name, value in named
        if not any(part.startswith(_ADAPTER_PARTS) for part in name.split("."))
    ]

"""An `Adapter` onto disk: one writer for what training leaves, what ships and what is converted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from . import files
from .adapter import Adapter
from .spelling import to_diffusers, to_kohya, to_peft
from .tokens import EMBEDS_FILE, write_tokens

__all__ = [
    "LORA_FILE",
    "PEFT_CONFIG",
    "PEFT_FILE",
    "suits_diffusers",
    "write_adapter",
    "write_diffusers",
    "write_kohya",
    "write_peft",
]

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


def write_adapter(folder: Path, adapter: Adapter, metadata: Mapping[str, str] | None = None) -> None:
    """The spelling that most programs read: diffusers' for LoRA and DoRA, else peft's, a folder per component.

    `pipe.load_lora_weights(folder)` reads the first, `PeftModel.from_pretrained(unet, folder / "unet")` the second.

    Args:
        folder: where the files go.
        adapter: of any kind.
        metadata: further text of the headers.
    """
    if suits_diffusers(adapter):
        write_diffusers(folder / LORA_FILE, adapter, metadata)
    else:
        write_peft(folder, adapter, metadata, unet="unet")
    if adapter.tokens:
        write_tokens(folder / EMBEDS_FILE, adapter.tokens, metadata)


def suits_diffusers(adapter: Adapter) -> bool:
    """Whether diffusers' spelling holds all of it: LoRA and DoRA, with nothing beside them."""
    return set(adapter.kinds) <= {"lora", "dora"} and adapter.merges_only is None


def write_diffusers(path: Path, adapter: Adapter, metadata: Mapping[str, str] | None = None) -> None:
    """One file in diffusers' keys.

    Args:
        path: of the safetensors file.
        adapter: a LoRA or DoRA, see `suits_diffusers`.
        metadata: further text of the header.
    """
    tensors, header = to_diffusers(adapter)
    files.write_tensors(path, tensors, {**(metadata or {}), **header})


def write_peft(folder: Path, adapter: Adapter, metadata: Mapping[str, str] | None = None, *, unet: str = "") -> None:
    """Weights and config per component; the U-net's in `folder` itself or in its folder `unet`.

    Args:
        folder: where the files go.
        adapter: of any kind that peft has.
        metadata: further text of the header.
        unet: folder of the U-net's files in `folder`.
    """
    made = {component: to_peft(adapter, component) for component in adapter.components}  # all or nothing
    for component, (tensors, config) in made.items():
        place = folder / (unet if component == "unet" else component)
        place.mkdir(parents=True, exist_ok=True)
        files.write_tensors(place / PEFT_FILE, tensors, metadata)
        (place / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def write_kohya(path: Path, adapter: Adapter, *, sdxl: bool | None = None) -> None:
    """One file in kohya / LyCORIS keys that diffusers' own reader takes as well: every LoRA with one alpha.

    Args:
        path: of the safetensors file.
        adapter: of any kind.
        sdxl: whether the base is SDXL; None: as far as the adapter tells.
    """
    files.write_tensors(path, *to_kohya(adapter, uniform_alpha=True, sdxl=sdxl))

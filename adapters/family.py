"""Which family of bases an adapter was made for, by what its layers take in."""

from __future__ import annotations

from .adapter import Adapter
from .compose import change_shape

__all__ = ["FAMILIES", "family_of"]

FAMILIES = {768: "SD-1.x", 1024: "SD-2.x", 2048: "SDXL", 128: "pocket"}
"""Width of the text that a base's U-net attends to -> the bases that have it."""
_TEXT = (".attn2.to_k", ".attn2.to_v")


def family_of(adapter: Adapter) -> str | None:
    """One of `FAMILIES`, from the width of the text in cross-attention; None where that says nothing.

    An adapter without layers there is known by a second text encoder, which only SDXL has, and else by the width of
    the only one.
    """
    unet = adapter.part("unet")
    widths = {change_shape(module.tensors)[1] for name, module in unet.items() if name.endswith(_TEXT)}
    if not widths and adapter.part("text_encoder_2"):
        return "SDXL"
    if not widths:
        encoder = adapter.part("text_encoder")
        widths = {change_shape(module.tensors)[1] for name, module in encoder.items() if name.endswith(".q_proj")}
    return FAMILIES.get(widths.pop()) if len(widths) == 1 else None

"""What is in a sample and in a batch on the way from the cache to the loss: the keys and the shape of each tensor.

`data.cache` holds an `EntryTensors` a view and a `CaptionTensors` a caption. `data.batches.Feed` draws a `DrawnSample`
at a position and stacks them to a `DrawnBatch`. `prepare.Prepared.ready` makes of that the `Batch` that a method's step
takes. Keys that are not `Required` are there only where the class says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Required, TypedDict, cast

from torch import Tensor

__all__ = ["Batch", "CaptionTensors", "DrawnBatch", "DrawnSample", "EntryTensors", "ids_of", "tensors"]


class CaptionTensors(TypedDict, total=False):
    """Captions as text encoders give them (`embeds`, `pooled`), or as they take them (`ids_0`, `ids_1`).

    In the cache a caption has a tensor of its own, without B.
    """

    embeds: Tensor
    """(B, T, D)."""
    pooled: Tensor
    """(B, P), of SDXL."""
    ids_0: Tensor
    """Token ids (B, T) int64 of the first encoder, where it trains or captions are not cached."""
    ids_1: Tensor
    """Those of the second encoder, of SDXL."""


class EntryTensors(TypedDict, total=False):
    """A view: its latents' distribution or, where it is not cached or a hole is cut into it, its pixels."""

    frame: Required[Tensor]
    """(6,) original size, upper left corner of the crop and target size, each (y, x) in pixels."""
    mean: Tensor
    """(C, h, w) of the scaled latents."""
    std: Tensor
    """(C, h, w) of the scaled latents."""
    pixels: Tensor
    """(3, H, W) in [-1, 1], in place of `mean` and `std`."""
    mask: Tensor
    """(1, h, w) in [0, 1], of data with masks."""
    conditioning: Tensor
    """(3, H, W) uint8, of data with conditions."""


class DrawnSample(EntryTensors, total=False):
    """A view with what was drawn for one position of the run."""

    caption: Required[str]
    timesteps: Required[Tensor]
    """() int64."""
    noise: Required[Tensor]
    """(C, h, w)."""
    posterior: Required[Tensor]
    """(C, h, w), standard normal: the latents are mean + std * posterior."""
    weight: Required[Tensor]
    """() of the loss."""
    hole: Tensor
    """(1, H, W), 1 where an inpainting network paints."""
    asked: str
    """What the base is asked, where a sample is trained towards its prediction."""
    inside: Tensor
    """(1, h, w) beside `asked`: 1 where the sample's own target stays."""


class DrawnBatch(CaptionTensors, total=False):
    """Samples of one size, stacked, on the CPU."""

    captions: list[str]
    """Of a feed without `text`, which others have turned into tensors."""
    frame: Required[Tensor]
    """(B, 6)."""
    timesteps: Required[Tensor]
    """(B,) int64."""
    noise: Required[Tensor]
    """(B, C, h, w)."""
    posterior: Required[Tensor]
    """(B, C, h, w)."""
    weight: Required[Tensor]
    """(B,)."""
    mean: Tensor
    """(B, C, h, w)."""
    std: Tensor
    """(B, C, h, w)."""
    pixels: Tensor
    """(B, 3, H, W), in place of `mean` and `std`."""
    hole: Tensor
    """(B, 1, H, W), of inpainting."""
    mask: Tensor
    """(B, 1, h, w), where the loss uses masks."""
    conditioning: Tensor
    """(B, 3, H, W) uint8, where the method reads conditions."""
    preserved: Tensor
    """(n,) int64, rows for which the base is asked; there, if perhaps empty, wherever a run asks the base at all."""
    inside: Tensor
    """(n, 1, h, w), of the rows `preserved` where there are any."""
    base_embeds: Tensor
    """`embeds`, and so on, of what the base is asked in the rows `preserved`."""
    base_pooled: Tensor
    base_ids_0: Tensor
    base_ids_1: Tensor


class Batch(CaptionTensors, total=False):
    """What a step takes, on its device."""

    latents: Required[Tensor]
    """(B, C, h, w)."""
    frame: Required[Tensor]
    """(B, 6)."""
    timesteps: Required[Tensor]
    """(B,) int64."""
    noise: Required[Tensor]
    """(B, C, h, w)."""
    weight: Tensor
    """(B,), of batches that train."""
    beside: Tensor
    """(B, 1 + C, h, w), what an inpainting network is given beside the noisy latents."""
    mask: Tensor
    """(B, 1, h, w), where the loss uses masks."""
    conditioning: Tensor
    """(B, 3, H, W) uint8, where the method reads conditions."""
    preserved: Tensor
    """(n,) int64, see `DrawnBatch`."""
    inside: Tensor
    """(n, 1, h, w)."""
    wanted: Tensor
    """(n, C, h, w), what the base predicts for the rows `preserved`."""
    base_embeds: Tensor
    base_pooled: Tensor
    base_ids_0: Tensor
    base_ids_1: Tensor


def ids_of(ids: list[Tensor]) -> CaptionTensors:
    """Token ids (B, T), one tensor for each text encoder, under their keys."""
    return cast(CaptionTensors, {f"ids_{number}": one for number, one in enumerate(ids)})


def tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same object as a plain dict, for keys that are computed."""
    return cast(dict[str, Tensor], batch)

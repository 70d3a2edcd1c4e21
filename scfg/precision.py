"""How precisely guidance computes: never less than float32, whatever the model's weights are."""

from __future__ import annotations

from torch import Tensor

__all__ = ["widened"]


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, the rest as it is: a softmax over many entries and spatial means need that."""
    return values.float() if values.dtype.itemsize < 4 else values

"""Layers that compute another way for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["replaced"]


@contextlib.contextmanager
def replaced(
    networks: Iterable[nn.Module], fits: Callable[[Any], bool], make: Callable[[Any], Callable[..., Any]]
) -> Iterator[None]:
    """Within the context, `make(module)` is the forward pass of every module that `fits` and has none of its own.

    Args:
        networks: searched with all modules in them.
        fits: whether a module is replaced.
        make: module -> its new forward pass.
    """
    chosen: list[Any] = [
        module
        for network in networks
        for module in network.modules()
        if "forward" not in module.__dict__ and fits(module)
    ]
    for module in chosen:
        module.forward = make(module)
    try:
        yield
    finally:
        for module in chosen:
            module.__dict__.pop("forward", None)

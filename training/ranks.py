"""This process among the others."""

from __future__ import annotations

import os

from accelerate import PartialState

__all__ = ["state"]


def state() -> PartialState:
    """Accelerate's process state; whoever asks first starts the process group.

    A bare `PartialState()` does not read `ACCELERATE_USE_CPU` as `Accelerator()` does: asked first, each of several
    processes on CPUs would silently take itself for the only one.
    """
    return PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"))

"""What must be right with the installation: checked without importing torch, so that the remedy comes first."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata

from .errors import TrainingError

__all__ = ["check"]

OLDEST_TORCH = (2, 6)
_INSTALL = "install the tested one with `pip install -c constraints.txt torch==2.13.0`"


def check() -> None:
    """Raises `TrainingError` for a missing or too old torch, and for a torchvision that does not load beside it."""
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise TrainingError(f"torch is not installed; {_INSTALL}") from None
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        raise TrainingError(f"torch {found} is installed, at least {needed} is needed; {_INSTALL}")
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever its extension library raises, usually a RuntimeError about an operator
        raise TrainingError(
            f"torchvision is installed but does not load beside torch {found} ({error}), and diffusers, transformers "
            "and peft break with it; nothing here needs it: `pip uninstall torchvision`"
        ) from error

"""What must be right with the installation: checked without importing torch, so that the remedy comes first."""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata

__all__ = ["problem"]

OLDEST_TORCH = (2, 6)
_INSTALL = "install the tested one with `pip install -c constraints.txt torch==2.13.0`"


def problem() -> str | None:
    """What is wrong, and the remedy: torch is missing or too old, or torchvision does not load beside it."""
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return f"torch is not installed; {_INSTALL}"
    if tuple(int(part) for part in found.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        return f"torch {found} is installed, at least {needed} is needed; {_INSTALL}"
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever its extension library raises, usually a RuntimeError about an operator
        return (
            f"torchvision is installed but does not load beside torch {found} ({error}), and diffusers, transformers "
            "and peft break with it; nothing here needs it: `pip uninstall torchvision`"
        )
    return None

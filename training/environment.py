"""What is asked of the machine before torch is imported: the installation, how threads wait, the user's cache."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["problem", "user_cache", "wait_briefly"]

OLDEST_TORCH = (2, 6)
_INSTALL = "install the tested one with `pip install -c constraints.txt torch==2.13.0`"

# GNU OpenMP's threads spin 300,000 rounds at every barrier before they sleep. Where other programs want the cores too,
# the spinning thread keeps one from the thread that it waits for. With 1000 rounds a thread sleeps at most barriers,
# and where waking is slow a quiet machine loses two fifths of its speed; with 5000 it loses nothing.
SPINS = 5000
WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def wait_briefly() -> None:
    """Lets torch's CPU threads spin only `SPINS` rounds before they sleep, unless the user has chosen.

    GNU OpenMP, with which torch comes on Linux, reads this when it is loaded. Other libraries do not read it.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


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


def user_cache(kind: str) -> Path:
    """The folder of what this user's runs keep of one kind; it may be deleted, and is not made here."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "scfg-toolkit" / kind

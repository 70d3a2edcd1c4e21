"""The one error class of this room."""

from __future__ import annotations

__all__ = ["ScfgError"]


class ScfgError(ValueError):
    """A setting, a pipeline or a file that semantic guidance cannot work with; the message names it and the remedy."""

"""What goes wrong with the embedded base model, said by name."""

from __future__ import annotations

__all__ = ["PocketError"]


class PocketError(ValueError):
    """An unknown word in a scene, or weights that are missing or damaged."""

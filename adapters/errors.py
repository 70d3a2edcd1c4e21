"""Errors of this room: each message names the thing, its value, what is allowed and what to do."""

from __future__ import annotations

__all__ = ["AdapterError", "BaseMismatchError", "FileError", "FormatError", "GainsError", "SignatureError"]


class AdapterError(ValueError):
    """Base of everything `adapters` raises on purpose."""


class FileError(AdapterError):
    """A file or folder that cannot be trusted: truncated, altered, a pickle, a path that leaves the folder."""


class FormatError(AdapterError):
    """Weights that are readable but mean nothing we (or peft) can represent."""


class BaseMismatchError(AdapterError):
    """An adapter made for another architecture than the pipeline's."""


class GainsError(AdapterError):
    """A comparison that would not mean what it says."""


class SignatureError(AdapterError):
    """A release that is not signed as it should be, or a key that cannot sign."""

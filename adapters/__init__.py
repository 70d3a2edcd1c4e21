"""The shipped thing: weights, card, guider and measured gains, in and out. Imports nothing else of this project.

`load` puts an adapter on a pipeline, `measuring` samples pictures and compares arms, `ship.ship` writes the release
folder, `measuring.verify.verify` recomputes its numbers.
"""

from __future__ import annotations

from . import compose, files, keys, loading, measuring, ship, signing, source, text
from .base import describe
from .card import Card
from .errors import AdapterError, BaseMismatchError, FileError, FormatError, GainsError, SignatureError
from .keys import Adapter
from .loading import Attached, load
from .measuring.gains import Design, Gains
from .measuring.sample import Shot
from .measuring.table import Row
from .scope import Scope

__all__ = [
    "Adapter",
    "AdapterError",
    "Attached",
    "BaseMismatchError",
    "Card",
    "Design",
    "FileError",
    "FormatError",
    "Gains",
    "GainsError",
    "Row",
    "Scope",
    "Shot",
    "SignatureError",
    "compose",
    "describe",
    "files",
    "keys",
    "load",
    "loading",
    "measuring",
    "ship",
    "signing",
    "source",
    "text",
]

"""The shipped thing: weights, card, guider and measured gains, in and out. Imports nothing else of this project."""

from __future__ import annotations

from .attach import Attached, load
from .base import describe
from .card import Card
from .errors import AdapterError, BaseMismatchError, FileError, FormatError, GainsError
from .gains import Design, Gains, Row, compare, measure, tabulate
from .keys import Adapter
from .sample import Shot, images
from .ship import push, ship
from .verify import verify

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
    "Shot",
    "compare",
    "describe",
    "images",
    "load",
    "measure",
    "push",
    "ship",
    "tabulate",
    "verify",
]

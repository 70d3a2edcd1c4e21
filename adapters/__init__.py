"""The shipped thing: weights, card, guider and measured gains, in and out. Imports nothing else of this project.

`sample.images` makes pictures, `gains.compare` compares arms, `ship.ship` writes the release folder, `load` puts it on
a pipeline, `verify.verify` recomputes its numbers.
"""

from __future__ import annotations

from . import (
    archive,
    attach,
    compose,
    files,
    gains,
    keys,
    metrics,
    pointing,
    report,
    sample,
    ship,
    source,
    table,
    tune,
    verify,
)
from .attach import Attached, load
from .base import describe
from .card import Card
from .errors import AdapterError, BaseMismatchError, FileError, FormatError, GainsError
from .gains import Design, Gains
from .keys import Adapter
from .sample import Shot
from .table import Row

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
    "archive",
    "attach",
    "compose",
    "describe",
    "files",
    "gains",
    "keys",
    "load",
    "metrics",
    "pointing",
    "report",
    "sample",
    "ship",
    "source",
    "table",
    "tune",
    "verify",
]

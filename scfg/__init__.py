"""Semantic-aware classifier-free guidance for diffusers U-net pipelines. Imports nothing else of this project."""

from __future__ import annotations

from .attach import Run, attach
from .config import GuiderConfig, from_config, read_config, to_config
from .errors import ScfgError
from .guidance import CFG, METHODS, Dose, Interval, Placebo, Pointwise, SemanticCFG, guidance

__all__ = [
    "CFG",
    "METHODS",
    "Dose",
    "GuiderConfig",
    "Interval",
    "Placebo",
    "Pointwise",
    "Run",
    "ScfgError",
    "SemanticCFG",
    "attach",
    "from_config",
    "guidance",
    "read_config",
    "to_config",
]

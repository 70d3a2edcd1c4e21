"""Semantic-aware classifier-free guidance for diffusers U-net pipelines. Imports nothing else of this project."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .arms import CFG, METHODS, Dose, Interval, Placebo, Pointwise, make_guidance
from .config import GuiderConfig, attach_config, read_config, to_config
from .errors import ScfgError
from .guidance import Guidance, GuidanceInputs
from .places import WordMaps, place_of
from .run import Run, attach
from .semantic import SemanticCFG
from .trace import Step
from .words import Word, prompt_phrases, prompt_words

if TYPE_CHECKING:
    from .guider import SemanticGuider

__version__ = "0.1.0"

__all__ = [
    "CFG",
    "METHODS",
    "Dose",
    "Guidance",
    "GuidanceInputs",
    "GuiderConfig",
    "Interval",
    "Placebo",
    "Pointwise",
    "Run",
    "ScfgError",
    "SemanticCFG",
    "SemanticGuider",
    "Step",
    "Word",
    "WordMaps",
    "__version__",
    "attach",
    "attach_config",
    "make_guidance",
    "place_of",
    "prompt_phrases",
    "prompt_words",
    "read_config",
    "to_config",
]


def __getattr__(name: str) -> Any:
    """`SemanticGuider` comes when it is asked for: its base class is in diffusers, which takes seconds to import."""
    if name == "SemanticGuider":
        from .guider import SemanticGuider

        return SemanticGuider
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

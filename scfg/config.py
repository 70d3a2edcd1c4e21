"""`guider_config.json`: the guidance an adapter ships with, as a file that both `attach` and Modular Diffusers read.

    {"_class_name": "SemanticGuider", "method": "semantic", "guidance_scale": 7.5, "guidance_rescale": 0.0, ...}

The rest are the fields of `SemanticCFG`, except that its window is called `semantic_start`, `semantic_stop`: `start`
and `stop` are diffusers' own words for "no guidance outside".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .arms import METHODS, make_guidance
from .errors import ScfgError
from .guidance import Guidance
from .pipelines import PipelineView
from .run import Run
from .semantic import SemanticCFG

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["CLASS_NAME", "GuiderConfig", "attach_config", "read_config", "to_config"]

CLASS_NAME = "SemanticGuider"
_WINDOW = {"start": "semantic_start", "stop": "semantic_stop"}
_OWN_FIELDS = {_WINDOW.get(field.name, field.name) for field in fields(SemanticCFG)}
_DIFFUSERS_FIELDS = {"start": 0.0, "stop": 1.0, "enabled": True}
_OTHER_FIELDS = {"_class_name", "_diffusers_version", "method", "guidance_scale", "guidance_rescale"}


@dataclass(frozen=True, kw_only=True)
class GuiderConfig:
    """What a file says.

    Attributes:
        guidance: the method with its settings.
        guidance_scale: the scale it was made for.
        guidance_rescale: the rescaling factor it was made for (0: none).
    """

    guidance: Guidance
    guidance_scale: float
    guidance_rescale: float = 0.0


def to_config(settings: Guidance, *, guidance_scale: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
    """The file's content, ready for `json.dump`.

    Args:
        settings: the method with its settings.
        guidance_scale: the scale it was made for.
        guidance_rescale: the rescaling factor it was made for (0: none).
    """
    own = {_WINDOW.get(name, name): value for name, value in asdict(settings).items()}
    return {
        "_class_name": CLASS_NAME,
        "method": settings.method,
        "guidance_scale": float(guidance_scale),
        "guidance_rescale": float(guidance_rescale),
        **own,
    }


def read_config(config: Mapping[str, Any]) -> GuiderConfig:
    """Check and understand a file's content.

    Raises:
        ScfgError: another class's file, an unknown field or method, or a value out of range.
    """
    name = config.get("_class_name")
    if name != CLASS_NAME:
        raise ScfgError(f"_class_name={name!r}: this is not a file of {CLASS_NAME}; load it with the class it names")
    unknown = sorted(set(config) - _OWN_FIELDS - set(_DIFFUSERS_FIELDS) - _OTHER_FIELDS)
    if unknown:
        raise ScfgError(f"unknown fields {', '.join(unknown)} in the guider's file; is it from a newer version?")
    back = {theirs: ours for ours, theirs in _WINDOW.items()}
    own = {back.get(field, field): config[field] for field in _OWN_FIELDS if field in config}
    scale, rescale = config.get("guidance_scale"), config.get("guidance_rescale", 0.0)
    if not isinstance(scale, (int, float)) or scale < 0:
        raise ScfgError(f"guidance_scale={scale!r} in the guider's file; it must be a number >= 0")
    if not isinstance(rescale, (int, float)) or not 0 <= rescale <= 1:
        raise ScfgError(f"guidance_rescale={rescale!r} in the guider's file; it must be a number from 0 to 1")
    method = config.get("method", SemanticCFG.method)
    if method not in METHODS:
        raise ScfgError(f"method={method!r} in the guider's file; choose one of {sorted(METHODS)}")
    return GuiderConfig(
        guidance=make_guidance(method, **own), guidance_scale=float(scale), guidance_rescale=float(rescale)
    )


def attach_config(pipe: DiffusionPipeline, config: Mapping[str, Any], *, record: Collection[str] | None = None) -> Run:
    """Attach a file's guidance: `with attach_config(pipe, config) as run: pipe(prompt, **run.call_kwargs)`.

    A pipeline's scale is an argument of its call, which is why `run.call_kwargs` must be passed on; a call with another
    scale warns.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel`.
        config: the content of `guider_config.json`.
        record: maps to keep in `run.trace`.

    Returns:
        The run, attached; as a context manager it detaches on leaving.

    Raises:
        ScfgError: the file is not understood, or says what this pipeline cannot do.
    """
    read = read_config(config)
    for name, default in _DIFFUSERS_FIELDS.items():
        if config.get(name, default) != default:
            raise ScfgError(
                f"{name}={config[name]!r} in the guider's file is for Modular Diffusers and cannot be attached to "
                f"{type(pipe).__name__}; use method 'interval' for guidance in some steps only"
            )
    takes_rescale = PipelineView(pipe, read.guidance_scale).takes_rescale
    if read.guidance_rescale and not takes_rescale:
        raise ScfgError(
            f"guidance_rescale={read.guidance_rescale} in the guider's file, but {type(pipe).__name__} has no such "
            f"argument; set it to 0 or use another pipeline"
        )
    return Run(
        pipe,
        read.guidance,
        guidance_scale=read.guidance_scale,
        guidance_rescale=read.guidance_rescale if takes_rescale else None,
        record=record,
    )

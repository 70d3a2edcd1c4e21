"""From guidance settings to a guidance on a pipeline, and what a pipeline is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import TYPE_CHECKING, Any

from recipes.common.base import painted, size_of
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.config import require

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from scfg.run import Run

__all__ = [
    "EFFECTIVE",
    "arguments_of",
    "check_guided",
    "effective_scales",
    "guidance_of",
    "guided",
    "guider_of",
    "method_title",
]

EFFECTIVE = "effective scale"
"""What the table calls the guidance scale that an image was pushed by on average."""


def method_title(method: str) -> str:
    """What a method is called on a page."""
    return {"cfg": "CFG", "semantic": "S-CFG"}.get(method, method)


def arguments_of(pipe: DiffusionPipeline, guidance: GuidanceSettings, sampling: SamplingSettings) -> dict[str, Any]:
    """What every call of the pipeline is given besides its scale; raises for a rescale that it does not take."""
    taken = signature(pipe.__call__).parameters
    arguments: dict[str, Any] = painted(pipe, sampling)
    if "clean_caption" in taken:  # DeepFloyd IF cleans prompts only where Beautiful Soup is installed
        arguments["clean_caption"] = False
    if guidance.rescale is not None:
        require("guidance_rescale" in taken, f"rescale {guidance.rescale}: {type(pipe).__name__} has none; set null")
        arguments["guidance_rescale"] = guidance.rescale
    return arguments


def guidance_of(settings: GuidanceSettings) -> Any:
    """The guidance that the settings describe."""
    import scfg

    start = None if settings.preset == "default" else getattr(scfg.SemanticCFG, settings.preset)()
    return scfg.make_guidance(settings.method, start, **settings.options)


def guider_of(settings: GuidanceSettings, identifier: str = "", noun: str = "") -> dict[str, Any]:
    """The same as an adapter ships it: what `guider_config.json` holds, with the adapter's scope under `scope`.

    Args:
        settings: method, scale, rescale and scope.
        identifier: the subject's word, for a scope that looks for the subject.
        noun: the subject's class, for a scope that looks for it.

    Raises:
        TrainingError: a scope with `where`, and no subject.
    """
    import adapters
    import scfg
    from adapters.scope import Subject

    config = scfg.to_config(
        guidance_of(settings), guidance_scale=settings.guidance_scale, guidance_rescale=settings.rescale or 0.0
    )
    scope = settings.scope
    if scope is None:
        return config
    require(
        scope.where in (None, "subject"),
        f"scope.where: {scope.where} is a control of a comparison and does not ship; set subject or null",
    )
    require(scope.where is None or bool(identifier), "scope.where: subject: no subject is given; set measure.subjects")
    where = Subject(identifier=identifier, noun=noun).to_config(scope.where_stop)
    reach = adapters.Scope(**scope.steps()).to_config()
    return config | {"scope": reach if scope.where is None else reach | {"where": where}}


def guided(
    pipe: DiffusionPipeline, settings: GuidanceSettings, *, record: Sequence[str] = ()
) -> Callable[[], AbstractContextManager[Any]]:
    """Enters the guidance on the pipeline; plain CFG is the pipeline as it is.

    Args:
        pipe: which the guidance is attached to.
        settings: method, preset, options and scale.
        record: maps to keep in the trace, see `scfg.attach`.

    Returns:
        A function that makes the context manager; it may be called again for every batch.
    """
    import scfg

    guidance = guidance_of(settings)
    if settings.method == "cfg":
        return nullcontext
    return lambda: scfg.attach(pipe, guidance, guidance_scale=settings.guidance_scale, record=record)


def check_guided(
    pipe: DiffusionPipeline, settings: GuidanceSettings, sampling: SamplingSettings, *, record: Sequence[str] = ()
) -> None:
    """What a guidance would find wrong while pictures are drawn, from the pipeline's configs alone.

    Args:
        pipe: which will draw.
        settings: method, preset, options and rescale.
        sampling: size and negative prompt.
        record: maps that will be asked for, see `scfg.attach`.

    Raises:
        TrainingError: the pipeline takes no rescale, or a picture to paint into cannot be read.
        ScfgError: the guidance does not fit the pipeline, the size or the scheduler.
    """
    arguments_of(pipe, settings, sampling)
    width, height = size_of(pipe, sampling)
    factor = pipe.vae_scale_factor if getattr(pipe, "vae", None) is not None else 1
    with guided(pipe, settings, record=record)() as run:
        if run is not None:
            run.check(height // factor, width // factor, negative_prompt=sampling.negative_prompt)


def effective_scales(run: Run) -> list[dict[str, float]]:
    """Per image of the latest batch, the mean of s * sum ||gamma delta|| / sum ||delta|| over the steps."""
    import torch

    steps = [step.guidance_scale * step.effective_scale.float().cpu() for step in run.trace]
    return [{EFFECTIVE: value} for value in torch.stack(steps).mean(0).tolist()]

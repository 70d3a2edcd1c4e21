"""How the rooms are joined: a base by name, its pipeline, an adapter and a guidance on it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.config import BaseSettings, parse, require
from training.errors import TrainingError, exit_on_error

__all__ = [
    "adapted",
    "arguments_of",
    "base_folder",
    "effective_scales",
    "explained",
    "guidance_of",
    "guided",
    "guider_of",
    "launch",
    "load_parts",
    "pipeline",
    "quiet",
    "say",
    "size_of",
    "without_control",
]

POCKET = "pocket"
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
SettingsT = TypeVar("SettingsT")


def launch(kind: type[SettingsT], run: Callable[[SettingsT], Any]) -> None:
    """A recipe's main: settings from the command line, and every explained error as one line on stderr."""
    with exit_on_error(explained):
        if not {"-h", "--help", "--print_config"} & set(sys.argv[1:]):
            quiet()
        run(_settings(kind))


def _settings(kind: type[SettingsT]) -> SettingsT:
    """What the command line and its configs say; what is wrong with it is one line."""
    try:
        return parse(kind)
    except TrainingError as error:
        raise TrainingError(" ".join(str(error).split())) from error


def explained() -> tuple[type[Exception], ...]:
    import adapters
    import scfg
    from training.pocket import PocketError

    return adapters.AdapterError, scfg.ScfgError, PocketError


def quiet() -> None:
    """Loading takes a second: no bars for it, and no word on image processors that nothing here uses."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def say(line: str) -> None:
    """Print on the main process only."""
    from training.ranks import state

    if state().is_main_process:
        print(line, flush=True)


# ---------------------------------------------------------------------------------------------- models


def base_folder(base: BaseSettings) -> str | Path:
    """Folder or hub id of a base; `pocket` is the embedded one, checked against its manifest."""
    from training.pocket import base_path

    return base_path() if base.path == POCKET else base.path


def load_parts(base: BaseSettings) -> Any:
    """The base's parts for training."""
    from training import models

    return models.load(base_folder(base), revision=base.revision, variant=base.variant)


def pipeline(base: BaseSettings, sampling: SamplingSettings, *, controlnet: str | None = None) -> Any:
    """A diffusers pipeline of the base for sampling, on this process's device; with a ControlNet if one is named."""
    import diffusers
    import torch

    from training.pocket import controlnet_path
    from training.ranks import state

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[sampling.precision]
    folder = base_folder(base)
    options: dict[str, Any] = {"revision": base.revision, "variant": base.variant, "use_safetensors": True}
    half = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    try:
        index = diffusers.DiffusionPipeline.load_config(folder, revision=base.revision)
        absent = {name: None for name in ("safety_checker", "watermarker") if name in index}
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options, **half, **absent)
        if controlnet:
            place = (
                controlnet_path(controlnet.removeprefix("pocket-")) if controlnet.startswith("pocket-") else controlnet
            )
            found = diffusers.ControlNetModel.load_config(place).get("_class_name")
            require(found == "ControlNetModel", f"controlnet {controlnet} is a {found}, not a ControlNetModel")
            network = diffusers.ControlNetModel.from_pretrained(place, use_safetensors=True, **half)
            pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=network)
    except TrainingError:
        raise
    except (OSError, ValueError) as error:
        what = f"base {base.path}" + (f" with ControlNet {controlnet}" if controlnet else "")
        raise TrainingError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if sampling.scheduler != "base":
        kind = getattr(diffusers, SCHEDULERS[sampling.scheduler])
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    if state().device.type == "cpu":  # convolutions then read their inputs as they lie: a sixth less time
        for network in filter(None, (getattr(pipe, name, None) for name in ("unet", "vae", "controlnet"))):
            network.to(memory_format=torch.channels_last)
    return pipe.to(state().device)


def size_of(pipe: Any, sampling: SamplingSettings) -> tuple[int, int]:
    """(width, height) of what the pipeline draws."""
    own = pipe.unet.config.sample_size
    rows, columns = own if isinstance(own, list | tuple) else (own, own)
    factor = pipe.vae_scale_factor if getattr(pipe, "vae", None) is not None else 1
    return sampling.width or columns * factor, sampling.height or rows * factor


def arguments_of(pipe: Any, guidance: GuidanceSettings) -> dict[str, Any]:
    """What every call of the pipeline is given besides its scale; raises for a rescale that it does not take."""
    taken = signature(pipe.__call__).parameters
    arguments: dict[str, Any] = {}
    if "clean_caption" in taken:  # DeepFloyd IF cleans prompts only where Beautiful Soup is installed
        arguments["clean_caption"] = False
    if guidance.rescale is not None:
        require("guidance_rescale" in taken, f"rescale {guidance.rescale}: {type(pipe).__name__} has none; set null")
        arguments["guidance_rescale"] = guidance.rescale
    return arguments


def without_control(pipe: Any) -> Any:
    """The same parts as a plain text-to-image pipeline."""
    import diffusers

    if not hasattr(pipe, "controlnet"):
        return pipe
    bare = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=None)
    bare.set_progress_bar_config(disable=True)
    return bare


def adapted(pipe: Any, adapter: str | Path | None, weight: float = 1.0) -> AbstractContextManager[Any]:
    """The adapter on the pipeline for as long as the context lasts; a guidance it ships with is left to the recipe."""
    import torch

    import adapters

    if adapter is None:
        return nullcontext()
    # Half-precision weights would round a small change away.
    merged = pipe.unet.dtype == torch.float32
    return adapters.load(pipe, adapter, weight=weight, guidance=lambda _: nullcontext(), merged=merged)


def guidance_of(settings: GuidanceSettings) -> Any:
    """The guidance that the settings describe."""
    import scfg

    start = None if settings.preset == "default" else getattr(scfg.SemanticCFG, settings.preset)()
    return scfg.guidance(settings.method, start, **settings.options)


def guider_of(settings: GuidanceSettings) -> dict[str, Any]:
    """The same as an adapter ships it: what `guider_config.json` holds."""
    import scfg

    return scfg.to_config(
        guidance_of(settings), guidance_scale=settings.scale, guidance_rescale=settings.rescale or 0.0
    )


def guided(
    pipe: Any, settings: GuidanceSettings, *, record: Sequence[str] = ()
) -> Callable[[], AbstractContextManager[Any]]:
    """Enters the guidance on the pipeline; plain CFG is the pipeline as it is."""
    import scfg

    guidance = guidance_of(settings)
    if settings.method == "cfg":
        return nullcontext
    return lambda: scfg.attach(pipe, guidance, guidance_scale=settings.scale, record=record)


def effective_scales(run: Any) -> list[dict[str, float]]:
    """Per image of the latest batch, the mean of s * sum ||gamma delta|| / sum ||delta|| over the steps."""
    import torch

    steps = [step.guidance_scale * step.effective_scale.float().cpu() for step in run.trace]
    return [{"effective scale": value} for value in torch.stack(steps).mean(0).tolist()]

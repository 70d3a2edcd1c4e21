"""A base by name: its parts for training, its pipeline for sampling, and an adapter on that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.settings import SamplingSettings, ScopeSettings
from training.config import BaseSettings, require
from training.errors import TrainingError
from training.hub import offline_if_unreachable

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from training.models import Parts

__all__ = [
    "POCKET",
    "adapted",
    "around",
    "base_folder",
    "check_text",
    "controlnet_folder",
    "edges_of",
    "load_base",
    "painted",
    "paints_holes",
    "pipeline_arguments",
    "sampled_as",
    "sampling_pipeline",
    "size_of",
    "whole_pipeline",
    "without_control",
]

POCKET = "pocket"
GRAIN = 8  # pixels: what diffusers asks of every side
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def base_folder(base: BaseSettings) -> str | Path:
    """Folder, file or hub id of a base; `pocket` is the embedded one, checked against its manifest."""
    from training.pocket import base_path

    return base_path() if base.path == POCKET else base.path


def load_base(base: BaseSettings) -> Any:
    """The base's parts for training."""
    from training import models

    return models.load_parts(
        base_folder(base),
        revision=base.revision,
        variant=base.variant,
        config=base.config,
        prediction=base.prediction,
        zero_snr=base.zero_snr,
        rule=_rule(base),
    )


def _rule(base: BaseSettings) -> Any:
    """How the settings say that text is read."""
    from adapters.text import TextRule

    return TextRule(clip_skip=base.clip_skip, chunks=base.prompt_chunks or 1)


def _check_picture(pipe: DiffusionPipeline, base: BaseSettings, sampling: SamplingSettings) -> None:
    """What an inpainting model paints into is there, and other models are given nothing of the kind."""
    require(
        sampling.image is None or paints_holes(pipe),
        f"sampling.image {sampling.image} is for inpainting models, and base {base.path} is none; leave image and mask "
        "out",
    )
    painted(pipe, sampling)


def _follow(pipe: DiffusionPipeline, base: BaseSettings) -> None:
    """The pipeline reads text as the settings say."""
    from adapters import text
    from adapters.errors import AdapterError

    try:
        text.follow(pipe, _rule(base))
    except AdapterError as error:
        raise TrainingError(f"base.{error}") from error


def _single_file(base: BaseSettings) -> Any:
    """What is known of a base that is a single file; None where it is a folder or a hub id."""
    from training import single_file

    if not single_file.is_file(base.path):
        return None
    return single_file.inspect_file(base.path, config=base.config, prediction=base.prediction, zero_snr=base.zero_snr)


def sampling_pipeline(base: BaseSettings, sampling: SamplingSettings, *, controlnet: str | None = None) -> Any:
    """A diffusers pipeline of the base for sampling, on this process's device; with a ControlNet if one is named.

    Args:
        base: which model, revision and variant.
        sampling: scheduler, steps and precision.
        controlnet: folder or hub id; None: there is none.
    """
    import diffusers
    import torch

    from training.models import check_finite
    from training.ranks import state

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[_loaded_in(sampling)]
    half = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    with _loading(f"base {base.path}" + (f" with ControlNet {controlnet}" if controlnet else "")):
        pipe = _opened(base, dtype)
        require(
            not (controlnet and paints_holes(pipe)),
            f"base {base.path} is an inpainting model, with which a ControlNet is not sampled here; take the "
            "text-to-image model that it was made from",
        )
        if controlnet:
            place = controlnet_folder(controlnet)
            offline_if_unreachable(place)
            found = diffusers.ControlNetModel.load_config(place).get("_class_name")
            require(found == "ControlNetModel", f"controlnet {controlnet} is a {found}, not a ControlNetModel")
            network = diffusers.ControlNetModel.from_pretrained(place, use_safetensors=True, **half)
            pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=network)
        check_finite(base.path, {n: part for n, part in pipe.components.items() if isinstance(part, torch.nn.Module)})
        if paints_holes(pipe) and "mask_image" not in signature(pipe.__call__).parameters:
            pipe = diffusers.AutoPipelineForInpainting.from_pipe(pipe)
        _follow(pipe, base)
    sampled_as(pipe, base, sampling)
    pipe.set_progress_bar_config(disable=True)
    if state().device.type == "cpu":  # convolutions then read their inputs as they lie: a sixth less time
        for network in filter(None, (getattr(pipe, name, None) for name in ("unet", "vae", "controlnet"))):
            network.to(memory_format=torch.channels_last)
    if sampling.offload:
        pipe.enable_model_cpu_offload(device=state().device)
        return pipe
    return pipe.to(state().device)


def sampled_as(pipe: DiffusionPipeline, base: BaseSettings, sampling: SamplingSettings) -> None:
    """The pipeline gets the scheduler of the settings, after a look at whether it can draw as they say.

    Args:
        pipe: of the base.
        base: which it is, for the messages.
        sampling: scheduler, and the picture that is painted into.

    Raises:
        TrainingError: a picture to paint into that cannot be read or is of no use, or a scheduler that does not fit.
    """
    import diffusers

    _check_picture(pipe, base, sampling)
    width, height = size_of(pipe, sampling)
    require(
        getattr(pipe, "vae", None) is None or width % GRAIN == height % GRAIN == 0,
        f"sampling.width and sampling.height must be multiples of {GRAIN}, got {width} and {height}",
    )
    if sampling.scheduler != "base":
        require(
            sampling.scheduler != "pndm" or not pipe.scheduler.config.get("rescale_betas_zero_snr"),
            "sampling.scheduler pndm knows no noise schedule without signal at its end, as this base has; take another",
        )
        pipe.scheduler = getattr(diffusers, SCHEDULERS[sampling.scheduler]).from_config(pipe.scheduler.config)
    try:
        pipe.scheduler.set_timesteps(sampling.steps)
    except (ValueError, IndexError) as error:
        kind, said = type(pipe.scheduler).__name__, " ".join(str(error).split())[:200]
        raise TrainingError(f"sampling.steps {sampling.steps}: {kind} does not take so many ({said})") from error


def controlnet_folder(controlnet: str) -> str | Path:
    """Folder or hub id of a ControlNet; pocket-canny and pocket-segmentation are the embedded ones."""
    from training.pocket import controlnet_path

    return controlnet_path(controlnet.removeprefix("pocket-")) if controlnet.startswith("pocket-") else controlnet


def edges_of(controlnet: str) -> Any:
    """The Canny detector that a ControlNet was trained with (`adapters.edges.Canny`).

    One that was trained before ControlNets kept it has the settings of its training beside it.
    """
    import diffusers
    import yaml

    from adapters.edges import KEY, Canny
    from training.pocket.control import EDGES
    from training.text import read_text

    place = controlnet_folder(controlnet)
    with _loading(f"controlnet {controlnet}"):
        config = diffusers.ControlNetModel.load_config(place)
    if KEY not in config and (file := Path(place) / "settings.yaml").is_file():
        try:
            trained = yaml.safe_load(read_text(file))
        except (yaml.YAMLError, RecursionError) as error:
            raise TrainingError(f"{file} is no YAML ({' '.join(str(error).split())[:200]})") from error
        data = trained.get("data") if isinstance(trained, dict) else None
        if isinstance(data, dict) and data.get("source") in (POCKET, "pocket-fluent"):
            return EDGES
    return Canny.of(config)


def around(parts: Parts, base: BaseSettings) -> Any:
    """The pipeline that will draw, around parts that are loaded already; what it takes besides is loaded now.

    Args:
        parts: of the base.
        base: which it is.

    Raises:
        TrainingError: something that drawing needs and training does not is missing.
    """
    import torch

    from training import models, single_file

    if single_file.is_file(base.path):
        return models.live_pipeline(parts)
    given: dict[str, Any] = {"unet": parts.unet, "vae": parts.vae}
    for number, name in enumerate(("", "_2")[: len(parts.text_encoders)]):
        given |= {f"text_encoder{name}": parts.text_encoders[number], f"tokenizer{name}": parts.tokenizers[number]}
    with _loading(f"base {base.path}"):
        pipe = _opened(base, torch.float32, given)
    _follow(pipe, base)
    return pipe


def whole_pipeline(path: str) -> Any:
    """A base in float32, on the CPU: "pocket", a folder, a single-file checkpoint or a hub id.

    Args:
        path: as in `BaseSettings`.

    Raises:
        TrainingError: it cannot be loaded.
    """
    import torch

    with _loading(f"base {path}"):
        return _opened(BaseSettings(path=path), torch.float32)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """What diffusers raises of files that are missing or no model becomes one line that says whose they are."""
    try:
        yield
    except TrainingError:  # a ValueError too, and says it already
        raise
    except (OSError, ValueError) as error:
        raise TrainingError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _opened(base: BaseSettings, dtype: Any, given: Mapping[str, Any] | None = None) -> Any:
    """The base's own pipeline, on the CPU, with the noise schedule that the settings say it has; `given` is loaded."""
    import diffusers
    import torch

    from training import single_file

    if file := _single_file(base):
        return single_file.single_file_pipeline(file, dtype)
    folder = base_folder(base)
    options: dict[str, Any] = {"revision": base.revision, "variant": base.variant, "use_safetensors": True}
    half = {} if dtype == torch.float32 else {"torch_dtype": dtype}
    offline_if_unreachable(folder)
    index = diffusers.DiffusionPipeline.load_config(folder, revision=base.revision)
    absent = {name: None for name in ("safety_checker", "watermarker") if name in index}
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, **options, **half, **absent, **(given or {}))
    own = {"_class_name": type(pipe.scheduler).__name__} | dict(pipe.scheduler.config)
    said = single_file.scheduled(own, base.prediction, base.zero_snr)
    if said != own:
        pipe.scheduler = getattr(diffusers, said["_class_name"]).from_config(said)
    return pipe


def pipeline_arguments(base: BaseSettings, *, controlnet: str | None = None) -> tuple[str, set[str]]:
    """The class of a base's pipeline and what it takes when it is called; no weights are read."""
    import diffusers

    with _loading(f"base {base.path}"):
        file = _single_file(base)
        index = (
            file.index if file else diffusers.DiffusionPipeline.load_config(base_folder(base), revision=base.revision)
        )
    name = str(index.get("_class_name"))
    if controlnet:
        name = name.replace("Pipeline", "ControlNetPipeline")
    kind = getattr(diffusers, name, None)
    require(kind is not None, f"base {base.path}: diffusers has no {name}")
    assert kind is not None
    return name, set(signature(kind.__call__).parameters)


def paints_holes(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline's U-net is an inpainting one, which is always given a picture and a mask."""
    vae = getattr(pipe, "vae", None)
    return vae is not None and pipe.unet.config.in_channels == 2 * vae.config.latent_channels + 1


def painted(pipe: DiffusionPipeline, sampling: SamplingSettings) -> dict[str, Any]:
    """Picture and mask for an inpainting base: those of the settings, or a mask that is white all over.

    Raises:
        TrainingError: a picture that cannot be read.
    """
    from PIL import Image

    from training.data.pictures import decode, inspect, rgb
    from training.data.pictures import mask as grey
    from training.text import read_file

    if not paints_holes(pipe):
        return {}
    width, height = size_of(pipe, sampling)
    pieces = [Image.new("RGB", (width, height), "gray"), Image.new("L", (width, height), 255)]
    for number, (name, read) in enumerate((("image", rgb), ("mask", grey))):
        if (given := getattr(sampling, name)) is None:
            continue
        try:
            data = read_file(Path(given).expanduser())
        except OSError as error:
            raise TrainingError(f"sampling.{name}: {given} cannot be read: {error.strerror}") from error
        if problem := inspect(data, 1, "mask" if name == "mask" else "image").problem:
            raise TrainingError(f"sampling.{name}: {given} {problem}")
        pieces[number] = read(decode(data)).resize((width, height))
    return {"image": pieces[0], "mask_image": pieces[1], "strength": 1.0}


def size_of(pipe: DiffusionPipeline, sampling: SamplingSettings) -> tuple[int, int]:
    """(width, height) of what the pipeline draws."""
    own = pipe.unet.config.sample_size
    rows, columns = own if isinstance(own, list | tuple) else (own, own)
    factor = pipe.vae_scale_factor if getattr(pipe, "vae", None) is not None else 1
    return sampling.width or columns * factor, sampling.height or rows * factor


def without_control(pipe: DiffusionPipeline) -> Any:
    """The same parts as a plain text-to-image pipeline."""
    import diffusers

    from adapters import text

    if not hasattr(pipe, "controlnet"):
        return pipe
    bare = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=None)
    text.follow(bare, text.rule_of(pipe))
    bare.set_progress_bar_config(disable=True)
    return bare


def _loaded_in(sampling: SamplingSettings) -> str:
    """The precision that a pipeline is loaded in: on a CPU `auto` loads float32."""
    from training import precision
    from training.ranks import state

    if sampling.precision != precision.AUTO:
        return sampling.precision
    return precision.by_units(state().device) or "fp32"


def adapted(
    pipe: DiffusionPipeline,
    adapter: str | Path | None,
    weight: float = 1.0,
    *,
    scope: ScopeSettings | None = None,
    identifier: str = "",
    noun: str = "",
) -> AbstractContextManager[Any]:
    """The adapter on the pipeline for as long as the context lasts; a guidance it ships with is left to the recipe.

    Args:
        pipe: which the adapter is put on.
        adapter: folder, file or hub id; None: the base stays as it is.
        weight: scale of the adapter's change.
        scope: where, when and how strongly it acts; null: everywhere.
        identifier: the subject's word, for a scope that looks for the subject.
        noun: the subject's class, for a scope that looks for it.
    """
    import torch

    import adapters

    if adapter is None:
        return nullcontext()
    check_text(pipe, adapter)
    # Half-precision weights would round a small change away.
    merged = pipe.unet.dtype == torch.float32
    reach = adapters.Scope() if scope is None else _scope(pipe, scope, identifier, noun)
    return adapters.load(pipe, adapter, weight=weight, guidance=lambda _: nullcontext(), merged=merged, scope=reach)


def check_text(pipe: DiffusionPipeline, *adapters: str | Path | None) -> None:
    """Adapters are drawn with the rule for text that they were trained with, and so is the base beside them.

    Args:
        pipe: with the rule of the settings.
        *adapters: folders, files or hub ids; None: there is none.

    Raises:
        TrainingError: another rule, with the settings that make it this one.
    """
    from adapters import text

    own = text.rule_of(pipe)
    for adapter in adapters:
        trained = text.TextRule() if adapter is None else text.rule_in(adapter)
        require(
            trained.neutral or trained == own,
            f"adapter {adapter} was trained with {trained.said()}, and base says {own.said()}; set base.clip_skip "
            f"{'null' if trained.clip_skip is None else trained.clip_skip} and base.prompt_chunks {trained.chunks}",
        )


def _scope(pipe: DiffusionPipeline, settings: ScopeSettings, identifier: str, noun: str) -> Any:
    """The scope that the settings describe: outside of the subject the base is asked for its class."""
    import adapters
    import scfg
    from adapters.scope import Subject

    steps = settings.steps()
    if settings.where is None:
        return adapters.Scope(**steps)
    subject = Subject(identifier=identifier, noun=noun)

    def place(words: str) -> Any:
        found = scfg.place_of(pipe, words)
        change = CONTROLS.get(settings.where or "")
        return found if change is None else partial(_changed, found, change)

    return adapters.Scope.of_subject(place, subject, where_stop=settings.where_stop, **steps)


# Maps (B, 1, h, w) that cover as much as the subject's: evenly, or half a picture away.
CONTROLS: dict[str, Callable[[Any], Any]] = {
    "uniform": lambda place: place.mean((2, 3), keepdim=True).expand_as(place),
    "elsewhere": lambda place: place.roll((place.shape[2] // 2, place.shape[3] // 2), (2, 3)),
}


@contextmanager
def _changed(place: Any, change: Callable[[Any], Any], call: Any) -> Iterator[Callable[[], Any]]:
    """A subject's place, changed into a control of it."""
    with place(call) as found:
        yield lambda: change(found())

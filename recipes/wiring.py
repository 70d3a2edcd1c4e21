"""How the rooms are joined: a base by name, its pipeline, an adapter and a guidance on it, and what is to be drawn."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from glob import glob
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageOps

from training.config import BaseSettings, DataSettings, parse, require
from training.errors import TrainingError, exit_on_error

from .settings import GuidanceSettings, MeasureSettings, SamplingSettings

__all__ = [
    "Case",
    "adapted",
    "arguments_of",
    "base_folder",
    "cases",
    "class_prior",
    "data",
    "effective_scales",
    "explained",
    "guidance_of",
    "guided",
    "launch",
    "load_parts",
    "pipeline",
    "quiet",
    "say",
    "size_of",
    "texts",
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
    return pipe.to(state().device)


def size_of(pipe: Any, sampling: SamplingSettings) -> tuple[int, int]:
    """(width, height) of what the pipeline draws."""
    own = pipe.unet.config.sample_size
    rows, columns = own if isinstance(own, list | tuple) else (own, own)
    factor = pipe.vae_scale_factor if getattr(pipe, "vae", None) is not None else 1
    return sampling.width or columns * factor, sampling.height or rows * factor


def arguments_of(pipe: Any) -> dict[str, Any]:
    """What every call of the pipeline is given: DeepFloyd IF cleans prompts only where Beautiful Soup is installed."""
    return {"clean_caption": False} if "clean_caption" in signature(pipe.__call__).parameters else {}


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
    import adapters

    if adapter is None:
        return nullcontext()
    return adapters.load(pipe, adapter, weight=weight, guidance=lambda _: nullcontext())


def guidance_of(settings: GuidanceSettings) -> Any:
    """The guidance that the settings describe."""
    import scfg

    start = None if settings.preset == "default" else getattr(scfg.SemanticCFG, settings.preset)()
    return scfg.guidance(settings.method, start, **settings.options)


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


# ---------------------------------------------------------------------------------------------- data


def class_prior(parts: Any, settings: Any) -> Any:
    """The class images that a DreamBooth recipe's settings ask for, generated where they are missing."""
    from training import dreambooth

    if settings.train.dry_run:
        if settings.dreambooth.class_prompt:
            say(
                f"would generate up to {settings.dreambooth.class_images} pictures of the class; left out of this trial"
            )
        return None
    return dreambooth.prior(
        parts,
        settings.dreambooth,
        resolution=settings.data.resolution,
        folder=Path(settings.out) / "class_images",
        seed=settings.train.seed,
    )


def data(settings: DataSettings, *, parts: Any) -> Any:
    """Training views of the pictures; `pocket` and `pocket-fluent` are drawn scenes of the embedded world."""
    from training import images, views

    if settings.source not in (POCKET, "pocket-fluent"):
        return views.views(images.load(settings), settings, multiple=parts.multiple)
    from training.pocket.control import Scenes

    look = "fluent" if settings.source == "pocket-fluent" else "noto"
    scenes = Scenes(control=settings.annotator, count=settings.count or 6000, look=look)
    return views.views(scenes, settings, multiple=parts.multiple)


def texts(prompts: Sequence[str], file: str | None, *, name: str = "") -> list[str]:
    """Prompts from settings and a file with one a line; {} becomes `name` with its article."""
    lines = list(prompts)
    if file is not None:
        try:
            lines += [line.strip() for line in Path(file).read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"prompt_file {file} cannot be read: {error}") from error
    article = "an" if name[:1].lower() in tuple("aeiou") else "a"
    filled = [line.replace("a {}", f"{article} {{}}").replace("{}", name) if name else line for line in lines]
    for line in filled:
        require("{}" not in line, f"prompt {line!r} has a {{}} but no subject is given; set measure.subjects")
    return list(dict.fromkeys(filled))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is sampled with one adapter: a subject, or the whole of a task without subjects."""

    name: str = ""
    prompts: list[str]
    adapter: str | None = None
    folder: Path | None = None
    """The subject's pictures."""
    identifier: str = ""
    noun: str = ""
    """The subject's class."""
    conditions: Mapping[str, Image.Image] = field(default_factory=dict, repr=False)
    """Prompt -> what the ControlNet is given."""
    targets: Mapping[str, Image.Image] = field(default_factory=dict, repr=False)
    """Prompt -> the picture that the condition was made from."""

    @property
    def calls(self) -> str:
        """What the subject is called in prompts."""
        return f"{self.identifier} {self.noun}".strip()


def cases(settings: MeasureSettings, adapter: str | None, *, size: tuple[int, int] | None = None) -> list[Case]:
    """The units of a comparison, by subject; {subject} in the adapter's path becomes the subject's name.

    Args:
        size: (width, height) that targets and their conditions are cut to; null: each its own.
    """
    if settings.targets is not None:
        return [_controlled(settings, adapter, size)]
    if not settings.subjects:
        require(adapter is None or "{subject}" not in adapter, f"adapter {adapter} needs measure.subjects")
        prompts = texts(settings.prompts, settings.prompt_file)[: settings.limit]
        require(bool(prompts), "measure has no prompts; set measure.prompts, prompt_file, subjects or targets")
        return [Case(prompts=prompts, adapter=adapter)]
    return [_subject(Path(folder), settings, adapter) for folder in subject_folders(settings.subjects)]


def subject_folders(patterns: Sequence[str]) -> list[str]:
    """The folders that the patterns name, each once."""
    found = []
    for pattern in patterns:
        matches = [path for path in sorted(glob(pattern)) if Path(path).is_dir()]
        require(bool(matches), f"measure.subjects: {pattern} is no folder")
        found += matches
    return list(dict.fromkeys(found))


def _subject(folder: Path, settings: MeasureSettings, adapter: str | None) -> Case:
    file = folder / "subject.json"
    try:
        facts = json.loads(file.read_text("utf-8"))
        identifier, noun = facts["identifier"], facts["class"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f'{file} must be JSON with "identifier", "class" and "prompts" ({error!r}); recipes/new.py makes one'
        ) from error
    own = [] if settings.prompts or settings.prompt_file else facts.get("prompts", [])
    prompts = texts([*settings.prompts, *own], settings.prompt_file, name=f"{identifier} {noun}")[: settings.limit]
    require(bool(prompts), f"no prompts for {folder}: neither in {file} nor in measure.prompts or prompt_file")
    path = adapter.replace("{subject}", folder.name) if adapter else None
    return Case(name=folder.name, prompts=prompts, adapter=path, folder=folder, identifier=identifier, noun=noun)


def _controlled(settings: MeasureSettings, adapter: str | None, size: tuple[int, int] | None) -> Case:
    """Captions of the targets as prompts, each with the condition made from its picture."""
    from training import images
    from training.pocket.control import Scenes
    from training.pocket.scenes import HELD_OUT_SEED

    assert settings.targets is not None
    source: Any
    if settings.targets == POCKET:
        require(
            settings.control != "given", "measure.targets pocket draws its conditions: control canny or segmentation"
        )
        source = Scenes(control=settings.control, count=settings.limit or 64, seed=HELD_OUT_SEED, begin=0)
    else:
        require(settings.control != "segmentation", "control segmentation of your own pictures: set control given")
        place = Path(settings.targets)
        given = str(place / "conditioning") if settings.control == "given" else None
        source = images.load(DataSettings(source=str(place), conditioning=given))
    samples = [_cut(source[i], size, settings) for i in range(min(len(source), settings.limit or len(source)))]
    kept = {sample.caption: sample for sample in samples}
    if len(kept) < len(samples):
        say(f"{len(samples) - len(kept)} targets are left out: their captions repeat others, and a prompt is a unit")
    return Case(
        prompts=list(kept),
        adapter=adapter,
        conditions={caption: sample.conditioning for caption, sample in kept.items()},
        targets={caption: sample.image for caption, sample in kept.items()},
    )


def _cut(sample: Any, size: tuple[int, int] | None, settings: MeasureSettings) -> Any:
    """The middle of a target at the size that is drawn, and its condition: edges are found at that size."""
    from training import images

    image, condition = sample.image, sample.conditioning
    if size is not None and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
        condition = None if settings.control == "canny" else ImageOps.fit(condition, size, Image.Resampling.NEAREST)
    return replace(sample, image=image, conditioning=condition or images.canny(image))

"""DreamBooth (Ruiz et al. 2023): full fine-tuning on a few images of a subject, and prior preservation for any method.

Class images are generated once and kept with a manifest of what made them; another prompt, base or sampler is an error
rather than a silent reuse.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from PIL import Image

from adapters.errors import FileError
from adapters.files import read_json, write_file, write_json, write_tensors, write_text
from adapters.scope import renamed

from . import company, single_file
from .config import DreamBoothSettings, ObjectiveSettings, require
from .data import images
from .data.batches import seed_of
from .data.crops import Views
from .errors import TrainingError
from .method import Method, Weights, denoise_step
from .models import Parts, everywhere, live_pipeline
from .networks import DTYPES
from .objective import build_objective
from .precision import lowered
from .preserve import frozen_copy
from .progress import Progress
from .ranks import state
from .text import read_text

__all__ = ["MANIFEST", "Concept", "Prior", "class_caption", "class_images", "class_prompts", "prepare", "prior"]

MANIFEST = "manifest.json"
MANNER = ("batch_size", "precision")  # of drawing: what a class image shows does not depend on it, only its bits do
USUAL = {"text": None, "precision": "fp32"}  # what a manifest does not write


def prepare(
    parts: Parts,
    settings: DreamBoothSettings | None = None,
    objective: ObjectiveSettings | None = None,
) -> Method:
    """Trains the whole U-net, and if wanted the text encoders.

    Args:
        parts: the base; its networks train in place.
        settings: whether the text encoders train; None: the defaults.
        objective: loss and noise; None: the defaults.
    """
    settings = settings or DreamBoothSettings()
    models: dict[str, Any] = {"unet": parts.unet}
    if settings.text_encoder:
        models |= dict(zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False))
    for module in models.values():
        module.requires_grad_(True)
    bound = build_objective(parts.scheduler, objective)
    return Method(
        name="dreambooth",
        parts=parts,
        objective=bound,
        models=models,
        step=partial(denoise_step, parts=parts, objective=bound),
        save=partial(_save, parts=parts, models=models),
        trains_text=settings.text_encoder,
        whole=True,
        switch=lambda: frozen_copy(models),
    )


def _save(weights: Weights, folder: Path, metadata: dict[str, str], *, parts: Parts, models: dict[str, Any]) -> None:
    """A whole pipeline in diffusers' layout: the base's with the trained parts put in their places."""
    if parts.file is None:
        shutil.copytree(parts.folder, folder, dirs_exist_ok=True, ignore=_not_shipped(set(models)))
        write_json(folder / "model_index.json", parts.index)
        write_json(folder / "scheduler" / "scheduler_config.json", parts.scheduler)
    else:
        single_file.single_file_pipeline(parts.file, None).save_pretrained(folder)
    for name, module in models.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        state = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        file = "diffusion_pytorch_model.safetensors" if name == "unet" else "model.safetensors"
        write_tensors(place / file, state, metadata)
        (module.save_config if name == "unet" else module.config.save_pretrained)(place)


def _not_shipped(trained: set[str]) -> Any:
    """For copytree: leaves out weights that are replaced, pickles, hidden files and loose single-file weights."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        top = "model_index.json" in names
        return {
            name
            for name in names
            if name.startswith(".")
            or name.endswith((".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx"))
            or (top and (name.endswith(".safetensors") or name in trained))
        }

    return ignore


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Samples that keep the class as the base knows it, and what the base is asked of the subject's own."""

    views: Views
    to_base: bool = False
    """Whether `views` are trained towards the base's own prediction rather than their pictures."""
    own: Views | None = None
    """The subject's own pictures (with `company`, those with its cut-out) under their class captions, beside `views`;
    always towards the base's prediction."""
    own_share: float = 0.0
    """Their share of the class samples."""
    ratio: float = 1.0
    """Class samples per instance sample."""
    weight: float = 1.0
    """Weight of the mean class loss beside the mean instance loss."""
    class_caption: Callable[[str], str] | None = None
    """From a caption of the subject's pictures, what the base is asked outside the subject."""
    surroundings: bool = False
    """Whether the base is asked outside the subject in its own pictures."""
    placed: Views | None = None
    """The subject's cut-outs where the base drew its class."""
    placed_share: float = 0.0
    """Their share of the instance samples."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One of the subjects of a run."""

    name: str
    views: Views
    prior: Prior | None = None
    share: float = 1.0
    """Of the run's samples, its class samples included, relative to the other concepts."""


def prior(
    parts: Parts,
    settings: DreamBoothSettings,
    data: Views,
    *,
    folder: str | Path,
    words: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    precision: str = "fp32",
) -> Prior | None:
    """The prior that the settings ask for, with missing class images generated; None where nothing is preserved.

    Args:
        parts: the base, which draws the class images.
        settings: what is preserved, and how.
        data: the subject's views, which serve under their class captions where there is no class prompt.
        folder: of the class images, where the settings name none.
        words: new tokens, and the word of the class that stands for each in class captions.
        seed: of the class images.
        batch_size: class images drawn at once.
        precision: "fp32", "bf16" or "fp16", that they are drawn in, and looked at for `company`.

    Raises:
        TrainingError: see `check_prior`; or the class is found in none of the class images.
    """
    if not _preserves(settings):
        return None
    manner: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "precision": precision}
    check_prior(parts, settings, data, folder=folder, words=words, **manner)
    rename = partial(class_caption, identifier=settings.identifier, words=words or {})
    own = data.renamed(rename) if _named(settings, words) else None
    if settings.class_prompt is not None:
        views = _class_views(parts, settings, data, Path(settings.class_folder or folder), manner)
    else:
        assert own is not None  # see check
        views, own = own, None
    placed = None
    if settings.company:
        assert settings.identifier is not None
        with _drawing(parts, _manifest_precision(Path(settings.class_folder or folder))):
            lines = class_prompts(settings, "{}")
            placed = company.placed(parts, data, views, lines, identifier=settings.identifier)
        own = placed.renamed(rename)  # the same picture under both captions shows what the identifier is
    return Prior(
        views=views,
        to_base=settings.preserve == "base",
        own=own if settings.own_share else None,
        own_share=settings.own_share if own is not None else 0.0,
        ratio=settings.prior_ratio,
        weight=settings.prior_weight,
        class_caption=rename,
        surroundings=settings.surroundings == "base",
        placed=placed,
        placed_share=settings.company,
    )


def check_prior(
    parts: Parts,
    settings: DreamBoothSettings,
    data: Views,
    *,
    folder: str | Path,
    words: Mapping[str, str] | None = None,
    seed: int = 0,
    batch_size: int = 4,
    precision: str = "fp32",
) -> None:
    """What `prior` would find wrong, before a class image is drawn.

    Args:
        parts: see `prior`.
        settings: see `prior`.
        data: see `prior`.
        folder: see `prior`.
        words: see `prior`.
        seed: see `prior`.
        batch_size: see `prior`.
        precision: see `prior`.

    Raises:
        TrainingError: `preserve: base` without a class prompt or an identifier, captions without the identifier, class
            images of other settings, or pictures without masks where the settings look outside the subject.
    """
    if not _preserves(settings):
        return
    if parts.inpainting and settings.company:
        raise TrainingError(
            f"dreambooth.company {settings.company}: class images of inpainting models are not looked into; leave "
            "it out"
        )
    if settings.surroundings == "base" and data.source[0].mask is None:
        raise TrainingError("dreambooth.surroundings: base looks outside the subject: set data.masks")
    if _named(settings, words):
        data.renamed(partial(class_caption, identifier=settings.identifier, words=words or {}))
    elif settings.class_prompt is None:
        raise TrainingError(
            "dreambooth.preserve: base needs samples of the class: set dreambooth.class_prompt (class images), or "
            "dreambooth.identifier (the subject's own pictures, their captions without it); off trains without them"
        )
    if settings.company:
        assert settings.identifier is not None  # see the settings
        company.check_company(data, settings.identifier)
    if settings.class_prompt is None:
        return
    place, prompts = Path(settings.class_folder or folder), class_prompts(settings)
    if settings.class_folder is not None and _holds_own(place):
        _own_class(place, settings, say=_silent)
        return
    steps, scale = settings.steps, settings.guidance_scale
    wanted = _made_of(parts, prompts, data.resolution, steps, scale, seed, batch_size, precision)
    _check_manifest(place, _as_there(place, wanted, settings.class_images))


def _preserves(settings: DreamBoothSettings) -> bool:
    return settings.preserve == "base" or (settings.preserve == "pictures" and settings.class_prompt is not None)


def _named(settings: DreamBoothSettings, words: Mapping[str, str] | None) -> bool:
    """Whether class captions are those of the subject's pictures, renamed."""
    return settings.preserve == "base" and (settings.identifier is not None or bool(words))


def class_caption(caption: str, *, identifier: str | None, words: Mapping[str, str]) -> str:
    """What the base would call a picture: "a sks owl and a <rex>" becomes "an owl and a dog".

    Args:
        caption: of the subject's picture.
        identifier: the subject's word, which goes; None: there is none.
        words: new token -> the word of its class.

    Raises:
        TrainingError: a caption without the identifier and any of the words.
    """
    changed = renamed(caption, {**({identifier: ""} if identifier else {}), **words})
    if changed == caption:
        names = ", ".join([*([identifier] if identifier else []), *words])
        raise TrainingError(f"dreambooth.identifier: {names or None} is not in the caption {caption!r}")
    return changed


def _class_views(
    parts: Parts, settings: DreamBoothSettings, data: Views, folder: Path, manner: Mapping[str, Any]
) -> Views:
    """Class images at every size that the subject's pictures have, so that they can be beside each other in a step."""
    resolution, sizes = data.resolution, data.used()
    if settings.class_folder is not None and _holds_own(folder):
        return Views(_own_class(folder, settings, say=_once), resolution=resolution, multiple=1).at(sizes)
    class_images(
        parts,
        class_prompts(settings),
        settings.class_images,
        folder,
        resolution=resolution,
        steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        **manner,
    )
    source = images.folder(folder, otherwise=settings.class_prompt, minimum=1, say=_once)
    made = {f"{number:05d}.png" for number in range(settings.class_images)}
    chosen = [index for index, file in enumerate(source.files) if file.parent == folder and file.name in made]
    if len(chosen) < len(source):
        _once(
            f"{folder}: {len(source) - len(chosen)} pictures beyond dreambooth.class_images = {len(made)} are left out"
        )
    return Views(source.chosen(chosen), resolution=resolution, multiple=1).at(sizes)


def _holds_own(folder: Path) -> bool:
    """Whether pictures lie there that were not made here."""
    return folder.is_dir() and not (folder / MANIFEST).is_file() and bool(images.scan(folder).pictures)


def _own_class(folder: Path, settings: DreamBoothSettings, *, say: Callable[[str], None]) -> images.Folder:
    """The user's own pictures of the class; nothing is written among them."""
    require(
        not settings.company,
        f"dreambooth.company {settings.company} needs class images that are made here; class_folder {folder} holds "
        "pictures of your own",
    )
    source = images.folder(folder, otherwise=settings.class_prompt, minimum=1, say=say)
    used = min(settings.class_images, len(source))
    say(f"{folder}: {used} of your own {len(source)} class pictures are used, none are generated")
    return source.chosen(range(used))


def _once(line: str) -> None:
    if state().is_main_process:
        print(line, flush=True)


def class_prompts(settings: DreamBoothSettings, subject: str | None = None) -> list[str]:
    """What the class images are drawn of, in turn; with another `subject` in the place of the class prompt.

    Raises:
        TrainingError: a prompt file that cannot be read or has no lines.
    """
    assert settings.class_prompt is not None
    if settings.class_prompt_file is None:
        return [settings.class_prompt]
    file = settings.class_prompt_file
    lines = [line.strip() for line in read_text(file, "dreambooth.class_prompt_file").split("\n") if line.strip()]
    if not lines:
        raise TrainingError(f"dreambooth.class_prompt_file {file} is empty; give it a caption a line")
    return [line.replace("{}", subject or settings.class_prompt) for line in lines]


def class_images(
    parts: Parts,
    prompts: list[str],
    count: int,
    folder: Path,
    *,
    resolution: int,
    steps: int = 25,
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 4,
    precision: str = "fp32",
) -> None:
    """Fills `folder` up to `count` images of the prompts in turn, each process its share; image i has its own seed.

    What is there and cannot be read, or has no caption, is drawn again.

    Beside every image lies its prompt, as its caption. An image is always drawn in the same batch, which begins at a
    multiple of `batch_size` and is whole even where `count` ends within it: how a kernel rounds depends on the size of
    a batch, so only this way an image that is made again is the same to the bit. Where none is missing, batch and
    precision may be others than those of the manifest, which stays as it is.

    Args:
        parts: the base, which draws them.
        prompts: image i has prompt i, from the first again after the last.
        count: images in all.
        folder: where they and their captions lie.
        resolution: side in pixels.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance.
        seed: image i has a seed made from this one and i.
        batch_size: images drawn at once.
        precision: "fp32", "bf16" or "fp16", of the base's weights while it draws; afterwards they are as they were,
            and off the device if they were off it.

    Raises:
        TrainingError: the folder's manifest names other prompts, base, sampler or size, or images lack one.
    """
    wanted = _made_of(parts, prompts, resolution, steps, guidance_scale, seed, batch_size, precision)
    wanted = _as_there(folder, wanted, count)
    ranks = state()
    _check_manifest(folder, wanted)
    ranks.wait_for_everyone()  # all have looked before the first one writes
    folder.mkdir(parents=True, exist_ok=True)
    if ranks.is_main_process:
        write_json(folder / MANIFEST, wanted)
    missing = _missing(folder, count)
    ranks.wait_for_everyone()  # all have seen the same before the first one draws
    batches = sorted({number // wanted["batch_size"] for number in missing})
    if mine := batches[ranks.process_index :: ranks.num_processes]:
        say = print if ranks.is_main_process else _silent
        say(f"drawing class images: {len(missing)} of {count} are missing or damaged in {folder}")
        with _drawing(parts, wanted.get("precision", "fp32")):
            _generate(parts, wanted, folder, mine, missing, Progress("drawing class images", say))
    ranks.wait_for_everyone()


@contextlib.contextmanager
def _drawing(parts: Parts, precision: str) -> Iterator[None]:
    """Within the context the base is on the device, in this precision; afterwards it is where and as it was.

    So a GPU that cannot hold it beside what trains is free again, and training begins with the weights as loaded.
    """
    networks = [parts.unet, parts.vae, *parts.text_encoders]
    homes = [network.device for network in networks]
    try:
        with lowered(networks, DTYPES[precision], trained=True):  # which keeps the weights themselves where they are
            for network in networks:
                network.to(state().device)
            yield
    finally:
        for network, home in zip(networks, homes, strict=True):
            network.to(home)  # its buffers


def _missing(folder: Path, count: int) -> set[int]:
    """Numbers of the class images that are to be drawn."""
    return {number for number in range(count) if not _readable(folder / f"{number:05d}.png")}


def _as_there(folder: Path, wanted: dict[str, Any], count: int) -> dict[str, Any]:
    """`wanted` in the batches and the precision of what is there, where nothing is missing: they only shape drawing."""
    if _missing(folder, count):
        return wanted
    with contextlib.suppress(FileError):  # which `_check_manifest` says
        found = read_json(folder / MANIFEST)
        if isinstance(found, dict) and found.get("precision", "fp32") in list(DTYPES):
            kept = {name: value for name, value in wanted.items() if name not in MANNER}
            return kept | {name: found[name] for name in MANNER if name in found}
    return wanted


def _manifest_precision(folder: Path) -> str:
    """What the class images were drawn in: how they are looked at then follows no setting that may change later."""
    return str(read_json(folder / MANIFEST).get("precision", "fp32"))


def _made_of(
    parts: Parts,
    prompts: list[str],
    resolution: int,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    precision: str,
) -> dict[str, Any]:
    """What class images are made of, as their manifest keeps it."""
    return {
        "prompts": prompts,
        "base": parts.identity,
        "scheduler": parts.scheduler.get("_class_name", ""),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "resolution": resolution,
        "seed": seed,
        "batch_size": batch_size,
        **({} if precision == "fp32" else {"precision": precision}),
        **({} if parts.text.neutral else {"text": parts.text.to_config()}),
    }


def _readable(path: Path) -> bool:
    """Whether a picture is there, whole and with its caption; a PNG has checksums, so that a flipped bit shows."""
    caption = path.with_suffix(".txt")
    if not (path.is_file() and caption.is_file() and caption.stat().st_size):
        return False
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def _check_manifest(folder: Path, wanted: dict[str, Any]) -> None:
    there = sorted(folder.glob("*.png")) if folder.is_dir() else []
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):
        if there:
            raise TrainingError(f"dreambooth.class_folder {folder} has images but no {MANIFEST}; give an empty folder")
        return
    try:
        found = read_json(manifest)
        if not isinstance(found, dict):
            raise FileError(f"{manifest}: no table of what the images were made of")
    except FileError as error:
        if not there:
            return  # it says nothing about anything, and is written again
        raise TrainingError(
            f"{error}; without it nobody knows what the class images beside it were made of: delete {folder}, they "
            "are made again, or set dreambooth.class_folder"
        ) from error
    changed = [
        f"{key}: {shorten(str(found.get(key, USUAL.get(key))), 80)} -> {shorten(str(value), 80)}"
        for key, value in {**USUAL, **wanted}.items()
        if found.get(key, USUAL.get(key)) != value
    ]
    if changed and there:
        raise TrainingError(
            f"class images in {folder} were made with other settings ({'; '.join(changed)}); delete the folder or "
            "set dreambooth.class_folder"
        )


def _silent(line: str) -> None:
    pass


@torch.no_grad()
def _generate(
    parts: Parts, wanted: dict[str, Any], folder: Path, batches: list[int], missing: set[int], progress: Progress
) -> None:
    """Draw whole batches, and keep what is missing of them."""
    size, pipe = wanted["batch_size"], live_pipeline(parts)
    for place, batch in enumerate(batches, 1):
        chunk = range(batch * size, (batch + 1) * size)
        seeds = [seed_of(wanted["seed"], "class", number) for number in chunk]
        prompts = [wanted["prompts"][number % len(wanted["prompts"])] for number in chunk]
        made: list[Image.Image] = pipe(
            prompts,
            num_inference_steps=wanted["steps"],
            guidance_scale=wanted["guidance_scale"],
            height=wanted["resolution"],
            width=wanted["resolution"],
            **everywhere(parts, (wanted["resolution"], wanted["resolution"])),
            generator=[torch.Generator().manual_seed(item) for item in seeds],
        ).images
        for number, prompt, image in zip(chunk, prompts, made, strict=True):
            if number not in missing:
                continue
            write_text(folder / f"{number:05d}.txt", prompt + "\n")
            with write_file(folder / f"{number:05d}.png") as part:  # it comes last: an image has its caption
                image.save(part, format="PNG")
        progress(place * size, len(batches) * size)

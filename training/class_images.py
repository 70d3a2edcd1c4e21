"""Class images: what the base draws of a subject's class, made once and kept with a manifest of what made them.

Another prompt, base or sampler than the manifest's is an error rather than a silent reuse. A folder of the user's own
class pictures serves as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from PIL import Image
from torch import nn

from adapters.errors import FileError
from adapters.files import read_json, write_file, write_json, write_text

from .config import DreamBoothSettings, require
from .data import images
from .data.batches import seed_of
from .data.crops import Views
from .errors import TrainingError
from .models import Parts, everywhere, live_pipeline
from .networks import DTYPES
from .precision import lowered
from .progress import Progress
from .ranks import state
from .text import read_text

__all__ = [
    "base_drawing",
    "check_class_images",
    "class_images",
    "class_prompts",
    "class_views",
    "manifest_precision",
]

MANIFEST = "manifest.json"
MANNER = ("batch_size", "precision")  # of drawing: what a class image shows does not depend on it, only its bits do
USUAL = {"text": None, "precision": "fp32"}  # what a manifest does not write


def class_views(
    parts: Parts, settings: DreamBoothSettings, data: Views, folder: Path, manner: Mapping[str, Any]
) -> Views:
    """Class images at every size that the subject's pictures have, so that they can be beside each other in a step.

    Args:
        parts: the base, which draws those that are missing.
        settings: what they are of, and how many.
        data: the subject's views.
        folder: where they lie.
        manner: `seed`, `batch_size`, `precision` and `offload`, see `class_images`.

    Raises:
        TrainingError: see `class_images`.
    """
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


def check_class_images(
    parts: Parts, settings: DreamBoothSettings, data: Views, folder: Path, manner: Mapping[str, Any]
) -> None:
    """What `class_views` would find wrong, before a class image is drawn.

    Args:
        parts: see `class_views`.
        settings: see `class_views`.
        data: see `class_views`.
        folder: see `class_views`.
        manner: see `class_views`.

    Raises:
        TrainingError: class images of other settings, or settings that need images made here beside one's own.
    """
    prompts = class_prompts(settings)
    if settings.class_folder is not None and _holds_own(folder):
        _own_class(folder, settings, say=_silent)
        return
    steps, scale = settings.steps, settings.guidance_scale
    wanted = _made_of(parts, prompts, resolution=data.resolution, steps=steps, guidance_scale=scale, **manner)
    _check_manifest(folder, _as_there(folder, wanted, settings.class_images))


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
    offload: bool = False,
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
        offload: the parts of the base take turns on the device; the images are the same.

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
        with base_drawing(parts, wanted.get("precision", "fp32"), offload=offload):
            _generate(parts, wanted, folder, mine, missing, Progress("drawing class images", say))
    ranks.wait_for_everyone()


@contextlib.contextmanager
def base_drawing(parts: Parts, precision: str, *, offload: bool = False) -> Iterator[None]:
    """Within the context the base is on the device, in this precision; afterwards it is where and as it was.

    So a GPU that cannot hold it beside what trains is free again, and training begins with the weights as loaded.

    Args:
        parts: the base.
        precision: "fp32", "bf16" or "fp16".
        offload: its parts are in main memory, and each is on the device only while it computes.
    """
    networks = [*parts.text_encoders, parts.unet, parts.vae]
    homes = [network.device for network in networks]
    try:
        with lowered(networks, DTYPES[precision], trained=True):  # which keeps the weights themselves where they are
            if offload:
                with _taking_turns(networks):
                    yield
            else:
                for network in networks:
                    network.to(state().device)
                yield
    finally:
        for network, home in zip(networks, homes, strict=True):
            network.to(home)  # its buffers


@contextlib.contextmanager
def _taking_turns(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, each network gets to the device when it is called, and the one before it leaves."""
    before = None
    try:
        for network in networks:
            _, before = cpu_offload_with_hook(network, state().device, prev_module_hook=before)
        yield
    finally:
        for network in networks:
            remove_hook_from_module(network)
            vars(network).pop("forward", None)  # the class's own, which accelerate leaves on the network


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


def manifest_precision(folder: Path) -> str:
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

"""DreamBooth (Ruiz et al. 2023): full fine-tuning on a few images of a subject; prior preservation for any method."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adapters.files import write_json, write_tensors
from adapters.scope import renamed

from . import company, single_file
from .class_images import base_drawing, check_class_images, class_prompts, class_views, manifest_precision
from .config import DreamBoothSettings, ObjectiveSettings
from .data.crops import Views
from .errors import TrainingError
from .method import Method, Weights, denoise_step
from .models import Parts
from .objective import build_objective
from .preserve import frozen_copy

__all__ = ["Concept", "Prior", "check_prior", "class_caption", "prepare", "prior"]


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
    offload: bool = False,
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
        offload: the parts of the base take turns on the device for both.

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
        place = Path(settings.class_folder or folder)
        views = class_views(parts, settings, data, place, {**manner, "offload": offload})
    else:
        assert own is not None  # see check
        views, own = own, None
    placed = None
    if settings.company:
        assert settings.identifier is not None
        with base_drawing(parts, manifest_precision(Path(settings.class_folder or folder)), offload=offload):
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
    if settings.class_prompt is not None:
        manner: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "precision": precision}
        check_class_images(parts, settings, data, Path(settings.class_folder or folder), manner)


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

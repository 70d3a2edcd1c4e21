"""Control generation: conditions made from your pictures, an existing ControlNet, an adapter if you like, and S-CFG.

accelerate launch recipes/controlled.py --config recipes/configs/controlled/pocket_canny.yaml
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from recipes.common.base import adapted, pipeline, size_of
from recipes.common.cli import launch, say
from recipes.common.draw import draw, keep, sheet
from recipes.common.guidance import guided
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.config import BaseSettings, require

__all__ = ["Settings", "run"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draws pictures that follow conditions, made from pictures of your own."""

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    controlnet: str
    """ControlNet folder or hub id; pocket-canny and pocket-segmentation are the embedded ones."""
    adapter: str | None = None
    """An adapter on top; see recipes/sample.py."""
    weight: float = 1.0
    """Scale of the adapter's change."""
    pictures: str
    """Folder of captioned pictures. Each caption is the prompt."""
    prompt: str | None = None
    """One prompt for all pictures, instead of their captions."""
    annotator: Literal["canny", "lineart", "depth", "segmentation", "none"] = "canny"
    """How a condition is made from a picture. none: the pictures are conditions already."""
    annotator_model: str | None = None
    """Folder or hub id of the annotator's network (depth, segmentation)."""
    conditioning_scale: float = 1.0
    """Strength of the ControlNet."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds for every picture."""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """How pictures are guided. Plain CFG at the same scale is drawn for comparison."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    dry_run: bool = False
    """Loads and checks everything, and stops."""
    out: str
    """Folder for the pictures."""


def run(settings: Settings) -> Path | None:
    """Sample with plain CFG and with the guidance; returns the sheet, or None after a dry run."""
    from adapters import Shot
    from adapters.measuring.metrics import CannyF1
    from training.data import images
    from training.data.annotators import annotator
    from training.pocket.control import edges

    make = annotator(settings.annotator, settings.annotator_model) if settings.annotator != "none" else images.rgb
    if settings.annotator == "canny" and settings.controlnet == "pocket-canny":
        make = edges  # with the thresholds that it was trained on
    shown = settings.pictures if settings.annotator == "none" else None
    source = images.folder(settings.pictures, prompt=settings.prompt, conditioning=shown, minimum=1, say=say)
    if settings.prompt is not None:
        require(len(source) == 1, "prompt fits one picture; give several ones captions (.txt files)")
    pipe = pipeline(settings.base, settings.sampling, controlnet=settings.controlnet)
    size = size_of(pipe, settings.sampling)
    cut = Image.Resampling.NEAREST if settings.annotator == "none" else Image.Resampling.LANCZOS
    conditions: dict[str, Image.Image] = {}
    for index in range(len(source)):
        sample = source[index]
        conditions.setdefault(sample.caption, make(ImageOps.fit(sample.conditioning or sample.image, size, cut)))

    def condition(prompt: str, seed: int) -> dict[str, Any]:
        return {"image": conditions[prompt]}

    with adapted(pipe, settings.adapter, settings.weight):
        if settings.dry_run:
            with guided(pipe, settings.guidance)():
                say(f"would draw {2 * len(conditions) * len(settings.seeds)} pictures with {type(pipe).__name__}")
            return None
        plain = GuidanceSettings(method="cfg", scale=settings.guidance.scale, rescale=settings.guidance.rescale)
        arms = {"CFG": plain, settings.guidance.method: settings.guidance}
        common = {"controlnet_conditioning_scale": settings.conditioning_scale}
        weights = f"{settings.adapter} {settings.controlnet} {settings.conditioning_scale:g}"
        shots: dict[str, list[Any]] = {
            "condition": [Shot(prompt=text, seed=0, latents="", image=picture) for text, picture in conditions.items()]
        }
        for name, arm in arms.items():
            folder = Path(settings.out) / name
            shots[name] = draw(
                pipe,
                list(conditions),
                settings.seeds,
                arm,
                settings.sampling,
                folder,
                weights,
                arm=name,
                inputs=condition,
                common=common,
            )
            if settings.annotator == "canny":
                wanted = lambda shot: conditions[shot.prompt].resize(shot.image.size)  # noqa: E731
                again = lambda image: np.asarray(make(image).convert("L")) > 127  # noqa: E731
                scores = CannyF1(condition=wanted, edges=again)(shots[name])
                say(f"{name}: canny F1 {sum(scores) / len(scores):.3f} over {len(scores)} pictures")
    page = Path(settings.out) / "sheet.png"
    keep(sheet(shots), page)
    say(f"pictures in {settings.out}; side by side: {page}")
    return page


if __name__ == "__main__":
    launch(Settings, run)

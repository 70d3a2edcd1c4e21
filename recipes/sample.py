"""Sample a base, with an adapter and a guidance: pictures that do not depend on batch size or number of processes.

accelerate launch recipes/sample.py --config recipes/configs/sample/pocket_dog.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from recipes.common.base import adapted, arguments_of, effective_scales, guided, launch, pipeline, say
from recipes.common.settings import GuidanceSettings, SamplingSettings
from recipes.common.units import texts
from training.config import BaseSettings, require

__all__ = ["Settings", "draw", "keep", "run", "sheet"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Prompts and seeds to pictures."""

    base: BaseSettings
    """The base model; `path: pocket` is the embedded one."""
    adapter: str | None = None
    """Release folder, LoRA, ControlNet or U-net folder, hub id, or another trainer's .safetensors."""
    weight: float = 1.0
    """Scale of the adapter's change."""
    prompts: list[str] = field(default_factory=list)
    """What to draw."""
    prompt_file: str | None = None
    """Text file with a prompt a line, beside or instead of `prompts`."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds of every prompt."""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """The guidance."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    upscaler: BaseSettings | None = None
    """A second stage that enlarges the pictures (DeepFloyd IF stage II), guided alike."""
    upscaler_guidance: GuidanceSettings | None = None
    """The guidance of the second stage; null: that of the first."""
    dry_run: bool = False
    """Loads and checks everything, and stops."""
    out: str
    """Folder of the pictures."""


def run(settings: Settings) -> Path | None:
    """Sample; returns the sheet of all pictures, or None after a dry run."""
    prompts = texts(settings.prompts, settings.prompt_file)
    require(bool(prompts), "no prompts; set prompts or prompt_file")
    pipe = pipeline(settings.base, settings.sampling)
    with adapted(pipe, settings.adapter, settings.weight):
        if settings.dry_run:
            with guided(pipe, settings.guidance)():
                say(f"would draw {len(prompts) * len(settings.seeds)} pictures with {type(pipe).__name__}")
            return None
        folder = Path(settings.out) / "pictures"
        shots = draw(pipe, prompts, settings.seeds, settings.guidance, settings.sampling, folder, settings.adapter)
    if settings.upscaler is not None:
        second = pipeline(settings.upscaler, settings.sampling)
        small = {(shot.prompt, shot.seed): shot.image for shot in shots}
        guidance = settings.upscaler_guidance or settings.guidance
        folder, inputs = Path(settings.out) / "enlarged", lambda prompt, seed: {"image": small[prompt, seed]}
        shots = draw(second, prompts, settings.seeds, guidance, settings.sampling, folder, None, inputs=inputs)
    page = Path(settings.out) / "sheet.png"
    keep(sheet({settings.guidance.method: shots}), page)
    say(f"{len(shots)} pictures in {folder}; side by side: {page}")
    return page


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    folder: Path | None,
    weights: str | None,
    *,
    arm: str = "",
    inputs: Any = None,
    common: Mapping[str, Any] | None = None,
) -> list[Any]:
    """All shots, each process having sampled its share; what is in `folder` with equal settings is not sampled again.

    Args:
        weights: name or hash of the adapter on the pipeline, to tell its pictures from another's.
        arm: what the shots are called.
        inputs, common: see `adapters.measuring.sample.images`.
    """
    import adapters
    from training.ranks import state

    plain = guidance.method == "cfg"
    control = getattr(pipe, "controlnet", None)
    told = {
        "base": adapters.describe(pipe)["weights"],
        "controlnet": None if control is None else adapters.base.fingerprint({"controlnet": control}),
        "guidance": [guidance.method, guidance.preset, guidance.options],
        "weights": weights,
        "precision": sampling.precision,
        **({} if guidance.rescale is None else {"rescale": guidance.rescale}),
    }

    def share(rank: int, world: int) -> list[Any]:
        return adapters.measuring.sample.images(
            pipe,
            prompts,
            seeds,
            around=guided(pipe, guidance),
            record=None if plain else effective_scales,
            guidance_scale=guidance.scale,
            steps=sampling.steps,
            batch_size=sampling.batch_size,
            height=sampling.height,
            width=sampling.width,
            negative_prompt=sampling.negative_prompt,
            arm=arm,
            inputs=inputs,
            common={**arguments_of(pipe, guidance), **(common or {})},
            folder=folder,
            settings=told,
            rank=rank,
            world=world,
        )

    ranks = state()
    if ranks.num_processes > 1:
        share(ranks.process_index, ranks.num_processes)
        ranks.wait_for_everyone()
    return share(0, 1)  # with several processes: all are read back, in order


def sheet(shots: Mapping[str, Sequence[Any]], *, side: int = 128, rows: int = 24, title: str = "") -> Image.Image:
    """One column an arm, one row a prompt (its first seed)."""
    prompts = list(dict.fromkeys(shot.prompt for made in shots.values() for shot in made))[:rows]
    page = Image.new("RGB", (side * len(shots) + 420, side * len(prompts) + 20), "white")
    pen = ImageDraw.Draw(page)
    for column, (arm, made) in enumerate(shots.items()):
        pen.text((column * side + 4, 4), arm, fill="black")
        first = {shot.prompt: shot.image for shot in reversed(made)}
        for row, prompt in enumerate(prompts):
            picture = first[prompt].resize((side, side), Image.Resampling.LANCZOS)
            page.paste(picture, (column * side, 20 + row * side))
    pen.text((side * len(shots) + 8, 4), title, fill="black")
    for row, prompt in enumerate(prompts):
        pen.text((side * len(shots) + 8, 20 + row * side + side // 2), prompt, fill="black")
    return page


def keep(image: Image.Image, path: Path) -> None:
    """A picture that appears whole or not at all."""
    part = path.with_suffix(".part")
    try:
        image.save(part, format="PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    launch(Settings, run)

"""Pictures of prompts and seeds, each sampled once: shared over the processes, kept, and laid side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from recipes.common.base import painted
from recipes.common.cli import say
from recipes.common.guidance import arguments_of, effective_scales, guided
from recipes.common.precision import drawing_in, of_sampling
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.progress import Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["draw", "keep", "sheet"]


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    folder: Path | None,
    weights: str | None,
    *,
    arm: str = "",
    inputs: Callable[[str, int], Mapping[str, Any]] | None = None,
    common: Mapping[str, Any] | None = None,
) -> list[Any]:
    """All shots, each process having sampled its share; what is in `folder` with equal settings is not sampled again.

    Args:
        pipe: what samples.
        prompts: each with every seed.
        seeds: of the initial noise.
        guidance: method, scale and scope.
        sampling: steps, size, batch size and precision.
        folder: where pictures are kept; None: nowhere.
        weights: name or hash of the adapter on the pipeline, to tell its pictures from another's.
        arm: what the shots are called.
        inputs: further arguments of one picture, see `adapters.measuring.sample.images`.
        common: further arguments of every call, see `adapters.measuring.sample.images`.
    """
    import adapters
    from training.ranks import state

    plain = guidance.method == "cfg"
    chosen = of_sampling(pipe, sampling, say)
    made_with = _made_with(pipe, guidance, sampling, chosen, weights)

    def share(rank: int, world: int) -> list[Any]:
        return adapters.measuring.sample.images(
            pipe,
            prompts,
            seeds,
            around=drawing_in(pipe, chosen, guided(pipe, guidance)),
            record=None if plain or guidance.guidance_scale == 1 else effective_scales,  # at scale 1 nothing is guided
            guidance_scale=guidance.guidance_scale,
            steps=sampling.steps,
            batch_size=sampling.batch_size,
            height=sampling.height,
            width=sampling.width,
            negative_prompt=sampling.negative_prompt,
            arm=arm,
            inputs=inputs,
            common={**arguments_of(pipe, guidance, sampling), **(common or {})},
            folder=folder,
            settings=made_with,
            rank=rank,
            world=world,
            progress=Progress(f"drawing {arm}".strip(), say),
        )

    ranks = state()
    if ranks.num_processes > 1:
        share(ranks.process_index, ranks.num_processes)
        ranks.wait_for_everyone()
    return share(0, 1)  # with several processes: all are read back, in order


def _made_with(
    pipe: DiffusionPipeline, guidance: GuidanceSettings, sampling: SamplingSettings, precision: str, weights: str | None
) -> dict[str, Any]:
    """What a kept picture must have been made with to be taken for another of the same prompt and seed."""
    import adapters

    control = getattr(pipe, "controlnet", None)
    return {
        "base": adapters.describe(pipe)["weights"],
        "controlnet": None if control is None else adapters.base.fingerprint({"controlnet": control}),
        "guidance": [guidance.method, guidance.preset, guidance.options],
        "weights": weights,
        "precision": precision,
        **({} if guidance.rescale is None else {"rescale": guidance.rescale}),
        **({} if sampling.image is None else {"painted": _digest(pipe, sampling)}),
        **({} if (rule := adapters.text.rule_of(pipe)).neutral else {"text": rule.to_config()}),
    }


def _digest(pipe: DiffusionPipeline, sampling: SamplingSettings) -> str:
    """Of the picture that is painted into, and of its mask."""
    given = painted(pipe, sampling)
    return hashlib.sha256(given["image"].tobytes() + given["mask_image"].tobytes()).hexdigest()[:16]


def sheet(shots: Mapping[str, Sequence[Any]], *, side: int = 128, rows: int = 24, title: str = "") -> Image.Image:
    """One column an arm, one row a prompt of a subject (its first seed).

    Args:
        shots: arm -> its pictures.
        side: of a picture in pixels.
        rows: most prompts shown.
        title: in the corner.
    """
    prompts = list(dict.fromkeys((shot.subject, shot.prompt) for made in shots.values() for shot in made))[:rows]
    page = Image.new("RGB", (side * len(shots) + 420, side * len(prompts) + 20), "white")
    pen = ImageDraw.Draw(page)
    for column, (arm, made) in enumerate(shots.items()):
        pen.text((column * side + 4, 4), arm, fill="black")
        first = {(shot.subject, shot.prompt): shot.image for shot in reversed(made)}
        for row, prompt in enumerate(prompts):
            picture = first[prompt].resize((side, side), Image.Resampling.LANCZOS)
            page.paste(picture, (column * side, 20 + row * side))
    pen.text((side * len(shots) + 8, 4), title, fill="black")
    for row, (_, prompt) in enumerate(prompts):
        pen.text((side * len(shots) + 8, 20 + row * side + side // 2), prompt, fill="black")
    return page


def keep(image: Image.Image, path: Path) -> None:
    """A picture that appears whole or not at all; the main process writes it."""
    from adapters.files import write_file
    from training.ranks import state

    if not state().is_main_process:
        return
    with write_file(path) as part:
        image.save(part, format="PNG")

"""Pictures of prompts and seeds, each sampled once: shared over the processes, kept, and laid side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from recipes.common.base import painted
from recipes.common.cli import explained, say
from recipes.common.guidance import arguments_of, check_guided, effective_scales, guided
from recipes.common.precision import drawing_in, of_sampling
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.errors import TrainingError
from training.progress import Progress

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["OWN", "TUNED", "check_drawn", "draw_shots", "keep", "pace", "sheet_of_arms", "trial"]

OWN = ("weights", "controlnet")
"""What a run trains itself: pictures of what it trained before are out of date, and are drawn again."""
TUNED = ("guidance", "guidance_scale", "rescale")
"""The same of what a search finds."""
FEW = 4  # steps: some schedulers take no less


def draw_shots(
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
    renewed: Collection[str] = (),
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
        renewed: what was made again since pictures in `folder` were drawn, see `OWN`.
    """
    import adapters
    from training.ranks import state

    chosen = of_sampling(pipe, sampling, say)
    made_with = _made_with(pipe, guidance, sampling, chosen, weights)

    def share(rank: int, world: int) -> list[Any]:
        return adapters.measuring.sample.images(
            pipe,
            prompts,
            seeds,
            steps=sampling.steps,
            batch_size=sampling.batch_size,
            arm=arm,
            inputs=inputs,
            **_how(pipe, guidance, sampling, chosen, common),
            folder=folder,
            settings=made_with,
            renewed=renewed,
            rank=rank,
            world=world,
            progress=Progress(f"drawing {arm}".strip(), say),
        )

    ranks = state()
    if ranks.num_processes > 1:
        share(ranks.process_index, ranks.num_processes)
        ranks.wait_for_everyone()
    return share(0, 1)  # with several processes: all are read back, in order


def check_drawn(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    folder: Path,
    *,
    arm: str,
    unknown: Collection[str],
) -> None:
    """Pictures that `draw_shots` would find in its folder were drawn with these settings, as far as they are known yet.

    Args:
        pipe: see `draw_shots`.
        prompts: see `draw_shots`.
        seeds: see `draw_shots`.
        guidance: see `draw_shots`.
        sampling: see `draw_shots`.
        folder: see `draw_shots`.
        arm: see `draw_shots`.
        unknown: names of what is not known yet, or may differ, such as the weights of an adapter to be trained.

    Raises:
        AdapterError: pictures of other settings lie there.
    """
    import adapters

    if not any(folder.glob("*.png")):
        return
    facts = {
        **_made_with(pipe, guidance, sampling, sampling.precision, None),
        "steps": sampling.steps,
        "guidance_scale": guidance.guidance_scale,
        "negative_prompt": sampling.negative_prompt,
        "height": sampling.height,
        "width": sampling.width,
        "arm": arm,
        "scheduler": type(pipe.scheduler).__name__,
    }
    known = {name: value for name, value in facts.items() if name not in unknown}
    adapters.measuring.sample.check_kept(folder, product(prompts, seeds), known)


def trial(
    pipe: DiffusionPipeline,
    prompt: str,
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    *,
    inputs: Callable[[str, int], Mapping[str, Any]] | None = None,
    common: Mapping[str, Any] | None = None,
    record: Sequence[str] = (),
) -> None:
    """One step of one picture, which is not kept: what refuses to be drawn like this says so before anything is.

    Args:
        pipe: with the adapter that the pictures will have.
        prompt: of the picture.
        guidance: see `draw_shots`.
        sampling: see `draw_shots`.
        inputs: see `draw_shots`.
        common: see `draw_shots`.
        record: maps that will be asked for, see `scfg.attach`.

    Raises:
        TrainingError: the pipeline refuses the settings of sampling.
        AdapterError, ScfgError: a scope or the guidance does not fit.
    """
    import adapters

    check_guided(pipe, guidance, sampling, record=record)
    how = _how(pipe, guidance, sampling, of_sampling(pipe, sampling, say), common)
    try:
        with _calls(pipe, 1):
            adapters.measuring.sample.images(pipe, [prompt], [0], steps=sampling.steps, inputs=inputs, **how)
    except ValueError as error:
        if isinstance(error, (TrainingError, *explained())):
            raise
        said = " ".join(str(error).split())[:300]
        raise TrainingError(f"{type(pipe).__name__} cannot draw with these settings of sampling: {said}") from error


def pace(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    *,
    inputs: Callable[[str, int], Mapping[str, Any]] | None = None,
    common: Mapping[str, Any] | None = None,
) -> float:
    """Seconds of one picture, from a batch of a few steps that is not kept; it takes as much memory as a whole one.

    Args:
        pipe: with the adapter that the pictures will have.
        prompts: see `draw_shots`.
        seeds: see `draw_shots`.
        guidance: see `draw_shots`.
        sampling: see `draw_shots`.
        inputs: see `draw_shots`.
        common: see `draw_shots`.
    """
    import adapters
    from training.estimate import clock

    few, size = min(FEW, sampling.steps), sampling.batch_size
    prompts = prompts[:size]
    seeds = seeds[: max(1, size // len(prompts))]
    how = _how(pipe, guidance, sampling, of_sampling(pipe, sampling, say), common)
    began = clock()
    with _calls(pipe) as moments:
        shots = adapters.measuring.sample.images(pipe, prompts, seeds, steps=few, batch_size=size, inputs=inputs, **how)
    whole = clock() - began
    each = whole / few
    if len(moments) > 2:  # the first call warms up
        each = (moments[-1] - moments[1]) / (len(moments) - 2) * len(moments) / few
    return (whole + (sampling.steps - few) * each) / len(shots)


@contextmanager
def _calls(pipe: DiffusionPipeline, most: int | None = None) -> Iterator[list[float]]:
    """The moments at which the U-net is called by what is drawn inside, which is left when there are more than `most`.

    Fewer steps of sampling would not do: some schedulers take no less than four.
    """
    from training.estimate import clock

    moments: list[float] = []

    def called(*_: Any) -> None:
        moments.append(clock())
        if most is not None and len(moments) > most:
            raise _EnoughError

    handle = pipe.unet.register_forward_pre_hook(called)
    try:
        with suppress(_EnoughError):
            yield moments
    finally:
        handle.remove()


class _EnoughError(Exception):
    """A picture was drawn as far as it had to be."""


def _how(
    pipe: DiffusionPipeline,
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    chosen: str,
    common: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """How pictures are drawn, as `adapters.measuring.sample.images` is told it; `chosen` is the precision."""
    unguided = guidance.method == "cfg" or guidance.guidance_scale == 1
    return {
        "around": drawing_in(pipe, chosen, guided(pipe, guidance)),
        "record": None if unguided else effective_scales,
        "guidance_scale": guidance.guidance_scale,
        "height": sampling.height,
        "width": sampling.width,
        "negative_prompt": sampling.negative_prompt,
        "common": {**arguments_of(pipe, guidance, sampling), **(common or {})},
    }


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


def sheet_of_arms(
    shots: Mapping[str, Sequence[Any]], *, side: int = 128, rows: int = 24, title: str = ""
) -> Image.Image:
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

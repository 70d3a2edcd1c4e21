"""Images from prompts and seeds, the same ones however they are batched, sharded or interrupted.

The initial noise of an image is a function of its seed alone: drawn on the CPU in float32 from its own generator, which
then also feeds stochastic schedulers. Batching can therefore change an image only by the rounding of batched matrix
products (below one grey level in float32), never by its noise; `latents` is the hash that proves it.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import AdapterError, FileError
from ..files import opened, write_file

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Shot", "check_kept", "images", "initial_latents", "read", "shots_in", "write"]

METADATA_KEY = "adapters.settings"
Context = AbstractContextManager[Any] | Callable[[], AbstractContextManager[Any]]
Record = Callable[[Any], Sequence[Mapping[str, float]]]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One image and what it was made from."""

    prompt: str
    seed: int
    latents: str
    """First 16 hex digits of the SHA-256 of the initial latents (float32, before the scheduler scales them)."""
    image: Image.Image
    arm: str = ""
    seconds: float = 0.0
    """Sampling time of the batch divided by its size; 0 where unknown."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What `record` noted for this image, such as its effective guidance scale."""
    path: Path | None = None
    subject: str = ""
    """Whose picture it is, where several subjects are measured: two of one class may share their prompts."""

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What arms are joined on."""
        return self.subject, self.prompt, self.seed, self.latents


def images(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    around: Context = nullcontext(),  # noqa: B008  (stateless)
    batch_size: int = 4,
    steps: int = 25,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    arm: str = "",
    inputs: Callable[[str, int], Mapping[str, Any]] | None = None,
    common: Mapping[str, Any] | None = None,
    record: Record | None = None,
    settings: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    renewed: Collection[str] = (),
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Shot]:
    """Sample every prompt with every seed, prompts outermost.

    Args:
        pipe: a diffusers text-to-image pipeline with a U-net (latent diffusion; ControlNet too, with `inputs`).
        prompts: each sampled with every seed.
        seeds: of the initial noise.
        around: entered once around all sampling; a context manager, or a function that makes one.
        batch_size: most images of one call of the pipeline.
        steps: denoising steps.
        guidance_scale: of classifier-free guidance; 1: none.
        negative_prompt: of all images; None: the pipeline's default.
        height: of the images in pixels; None: the pipeline's default.
        width: of the images in pixels; None: the pipeline's default.
        arm: what the shots are called.
        inputs: further pipeline arguments of one image, such as ControlNet's `image`; passed on as lists.
        common: further pipeline arguments of every call, passed on as they are.
        record: called after each batch with what `around` yielded; returns one mapping of numbers per image.
        settings: anything that tells this arm apart (guidance, adapter hash); written to the PNGs, compared on resume.
        folder: where PNGs go. Images found there with equal settings are read, not sampled again (a batch that was cut
            short is made anew as a whole, so that a resumed run ends with the same bits); a PNG of other settings under
            the same name is an error.
        renewed: names of `settings` that stand for something which was made again since, such as an adapter that was
            trained once more: a PNG that differs in one of them is out of date, and is drawn again.
        rank: this process's number; it samples every `world`-th image, starting at `rank`.
        world: number of processes; `shots_in(folder)` collects the images of all.
        progress: called after each batch with the number of images drawn in this call, and of all that it draws.

    Returns:
        The shots of this rank, in order.

    Raises:
        AdapterError: a batch size or rank out of range, a PNG of other settings, another number of notes than images,
            or NaN instead of images.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise AdapterError(
            f"batch_size={batch_size}, rank={rank}, world={world}: need batch_size >= 1, 0 <= rank < world"
        )
    facts = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "arm": arm,
        "scheduler": type(pipe.scheduler).__name__,
        **(settings or {}),
    }
    units = list(product(prompts, seeds))[rank::world]
    done = {unit: shot for unit in units if (shot := _resume(folder, unit, facts, renewed)) is not None}
    batches = [units[start : start + batch_size] for start in range(0, len(units), batch_size)]
    todo = [batch for batch in batches if any(unit not in done for unit in batch)]
    if not todo:
        return [done[unit] for unit in units]
    with around if isinstance(around, AbstractContextManager) else around() as run:
        drawn, wanted = 0, sum(map(len, todo))
        for batch in todo:
            own = _arguments(negative_prompt, height, width, len(batch))
            arguments = {**own, **(common or {}), **_inputs(inputs, batch)}
            shots = _batch(pipe, batch, arm, steps=steps, guidance_scale=guidance_scale, arguments=arguments)
            for unit, shot, numbers in zip(batch, shots, _numbers(record, run, len(batch)), strict=True):
                done[unit] = _keep(folder, shot, dict(numbers), facts)
            drawn += len(batch)
            if progress is not None:
                progress(drawn, wanted)
    return [done[unit] for unit in units]


def initial_latents(
    pipe: DiffusionPipeline, seed: int, *, height: int | None = None, width: int | None = None
) -> tuple[Any, Any]:
    """(latents of shape (1, channels, h, w), the generator that drew them) of one seed; float32 on the CPU.

    Args:
        pipe: a latent or pixel-space (DeepFloyd IF) pipeline with a U-net.
        seed: of the generator.
        height: of the image in pixels; None: what the U-net was trained on.
        width: of the image in pixels; None: what the U-net was trained on.
    """
    config, vae = pipe.unet.config, getattr(pipe, "vae", None)
    factor = 1 if vae is None else pipe.vae_scale_factor
    sample = config.sample_size if isinstance(config.sample_size, list | tuple) else (config.sample_size,) * 2
    rows = height // factor if height else sample[0]
    columns = width // factor if width else sample[1]
    # Not the U-net's channels: inpainting U-nets take more. Pixel-space ones (DeepFloyd IF) make colors.
    channels = 3 if vae is None else vae.config.latent_channels
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, rows, columns), generator=generator), generator


def _arguments(negative_prompt: str | None, height: int | None, width: int | None, n: int) -> dict[str, Any]:
    size = {"height": height, "width": width}
    negative = {} if negative_prompt is None else {"negative_prompt": [negative_prompt] * n}
    return {**{name: value for name, value in size.items() if value is not None}, **negative}


def _inputs(inputs: Callable[[str, int], Mapping[str, Any]] | None, batch: Sequence[tuple[str, int]]) -> dict[str, Any]:
    if inputs is None:
        return {}
    rows = [inputs(prompt, seed) for prompt, seed in batch]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _numbers(record: Record | None, run: Any, count: int) -> Sequence[Mapping[str, float]]:
    """What `record` notes of a batch, a mapping for each of its `count` images."""
    noted = [{}] * count if record is None else record(run)
    if len(noted) != count:
        raise AdapterError(f"record returned {len(noted)} rows of numbers for {count} images")
    return noted


def _batch(
    pipe: DiffusionPipeline,
    batch: Sequence[tuple[str, int]],
    arm: str,
    *,
    steps: int,
    guidance_scale: float,
    arguments: dict[str, Any],
) -> list[Shot]:
    size = {name: arguments.get(name) for name in ("height", "width")}
    drawn = [initial_latents(pipe, seed, **size) for _, seed in batch]
    hashes = [hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16] for noise, _ in drawn]
    generators = [generator for _, generator in drawn]
    if "latents" in inspect.signature(pipe.__call__).parameters:
        latents = torch.cat([noise for noise, _ in drawn])
        arguments = {**arguments, "latents": latents.to(device=pipe.unet.device, dtype=pipe.unet.dtype)}
    else:  # DeepFloyd IF draws the same noise itself, from the same seeds
        generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in batch]
    start = time.perf_counter()
    result = pipe(
        prompt=[prompt for prompt, _ in batch],
        generator=generators,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="np",
        **arguments,
    ).images
    _check_finite(result, pipe.unet.dtype)
    seconds = (time.perf_counter() - start) / len(batch)
    return [
        Shot(prompt=prompt, seed=seed, latents=digest, image=image.convert("RGB"), arm=arm, seconds=seconds)
        for (prompt, seed), digest, image in zip(batch, hashes, pipe.numpy_to_pil(result), strict=True)
    ]


def _check_finite(pixels: np.ndarray, dtype: torch.dtype) -> None:
    """Refuses pictures (B, H, W, 3) with NaN, which would be black."""
    if np.isfinite(pixels).all():
        return
    if dtype == torch.float16:
        raise AdapterError(
            "the pictures are NaN: the base overflows in float16; set sampling.precision fp16 to fp32 (float32) or bf16"
        )
    raise AdapterError(
        f"the pictures are NaN, drawn in {str(dtype).removeprefix('torch.')}: the adapter or the base is damaged, or "
        "the adapter's weight or the guidance scale is too large"
    )


# ---------------------------------------------------------------------------------------------- PNG


def _name(prompt: str, seed: int) -> str:
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-{seed}.png"


def _keep(folder: Path | None, shot: Shot, numbers: dict[str, float], facts: Mapping[str, Any]) -> Shot:
    path = None if folder is None else folder / _name(shot.prompt, shot.seed)
    kept = replace(shot, numbers=numbers, path=path)
    if path is not None:
        write(path, kept, facts)
    return kept


def write(path: Path, shot: Shot, facts: Mapping[str, Any]) -> None:
    """A PNG whose text chunk holds the shot and its settings; it appears whole or not at all.

    Args:
        path: of the PNG file.
        shot: the picture and what it was made from.
        facts: the settings, which `images` compares before it takes the picture for its own.
    """
    record = {
        "prompt": shot.prompt,
        "seed": shot.seed,
        "latents": shot.latents,
        "arm": shot.arm,
        "seconds": shot.seconds,
        "numbers": dict(shot.numbers),
        "settings": dict(facts),
        "pixels": _digest(shot.image),
    }
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(record, sort_keys=True, default=str))
    with write_file(path, sync=False) as part:  # checked when it is read, and drawn again
        shot.image.save(part, format="PNG", pnginfo=info)


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()[:16]


def read(path: Path) -> tuple[Shot, dict[str, Any]]:
    """A shot and its settings from a PNG written by `write`."""
    try:
        with opened(path) as file, Image.open(file) as image:
            record = json.loads(image.text[METADATA_KEY])  # type: ignore[attr-defined]
            pixels = image.convert("RGB")
        settings, digest = record.pop("settings"), record.pop("pixels", None)
        if digest not in (None, _digest(pixels)):
            raise ValueError("other pixels than were written")
        return Shot(image=pixels, path=path, **record), settings
    except FileError:  # says itself what the file is
        raise
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        raise FileError(f"{path}: not a whole image written by adapters.sample ({error!r:.120})") from error


def check_kept(folder: Path, units: Iterable[tuple[str, int]], facts: Mapping[str, Any]) -> None:
    """Says before anything is drawn what `images` would find in its folder: pictures of other settings.

    Args:
        folder: of `images`.
        units: prompts and seeds.
        facts: settings that pictures must have been drawn with; others are not compared.

    Raises:
        AdapterError: a picture of other settings lies there.
    """
    for unit in units:
        try:
            with Image.open(folder / _name(*unit)) as image:  # its pixels are not read
                settings = json.loads(image.text[METADATA_KEY])["settings"]  # type: ignore[attr-defined]
        except (OSError, KeyError, ValueError, TypeError, AttributeError, SyntaxError):
            continue  # none is there, or it is drawn again
        _refuse_others(folder / _name(*unit), {name: settings.get(name) for name in facts}, facts)


def _refuse_others(path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(dict(facts), default=str))
    if settings != wanted:
        different = sorted(name for name in {*settings, *wanted} if settings.get(name) != wanted.get(name))
        raise AdapterError(
            f"{path} was sampled with other settings ({', '.join(different)}); use another folder or remove it"
        )


def _resume(
    folder: Path | None, unit: tuple[str, int], facts: Mapping[str, Any], renewed: Collection[str]
) -> Shot | None:
    if folder is None or not (path := folder / _name(*unit)).exists():
        return None
    try:
        shot, settings = read(path)
    except FileError as error:
        warnings.warn(f"{error}; it is drawn again", stacklevel=4)
        return None
    if any(settings.get(name) != facts.get(name) for name in renewed):
        return None
    _refuse_others(path, settings, facts)
    return shot


def shots_in(folder: Path) -> Iterator[Shot]:
    """Every shot under `folder`, in order of path: what all ranks wrote."""
    for path in sorted(folder.rglob("*.png")):
        yield read(path)[0]

"""What a run did, to look at: regions with a legend of words, gamma as a heat map, a strip and a GIF over the steps.

Everything is drawn from `run.trace`; attach with `record=["regions", "gamma", "prediction"]`. Pictures are PIL images;
`norm_curves` (the paper's Fig. 1) needs matplotlib, which comes with the `eval` extra.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from .errors import ScfgError
from .run import Run
from .semantic import SemanticCFG
from .trace import Step
from .words import Word, competitors

__all__ = [
    "gamma_heat_map",
    "latents_to_images",
    "norm_curves",
    "region_names",
    "region_overlay",
    "save_gif",
    "save_strip",
    "step_images",
    "strip",
]

NOTHING = "nothing to draw: attach with record=['regions', 'gamma', 'prediction'] and generate an image"
BEGIN, END, PAD = "[BOS]", "[EOS]", "[pad]"
WORDLESS = (BEGIN, END, PAD, "")  # names of regions that belong to no word of a prompt
SIDE = 256  # pixels of one picture's longer side
# Blue below 1 (weaker than plain CFG), white at 1, red above: three anchors of a diverging map.
_COLD, _NEUTRAL, _HOT = np.array([33, 102, 172]), np.array([247, 247, 247]), np.array([178, 24, 43])


def region_names(words: Sequence[Word] | None, count: int, *, grouped: bool, length: int) -> list[str]:
    """A name per region: words where words competed, else each token's word, "[BOS]", "[EOS]" or "[pad]".

    Args:
        words: the prompt's words, or phrases, with their token positions; None: unknown, positions are named.
        count: number of regions.
        grouped: whether these competed (`tokens="prompt"`, "phrases").
        length: tokens per chunk of the text encoder, BOS first.
    """
    if words is None:
        return [f"token {index}" for index in range(count)]
    if grouped:
        return [words[index].text if index < len(words) else "" for index in range(count)]
    names = {position: word.text for word in words for position in word.positions}
    last = max(names, default=0)
    special = {0: BEGIN, last + 1: END}
    return [names.get(i, special.get(i, BEGIN if i % length == 0 else PAD)) for i in range(count)]


def region_overlay(
    picture: Image.Image, index: Int[Tensor, "h w"], names: Sequence[str], *, opacity: float = 0.5
) -> Image.Image:
    """Regions painted over a picture, with a legend of their names, largest first.

    Regions of one name (a word's sub-tokens) share a color and a line of the legend; with the same `names` a word
    keeps its color from picture to picture. What belongs to no word is left unpainted and out of the legend.

    Args:
        picture: what the regions are painted on, first scaled to a longer side of `SIDE` pixels.
        index: the region of every position.
        names: of the regions, by their numbers in `index`.
        opacity: of the paint, 0 to 1.
    """
    owners = [names[int(i)] for i in index.flatten()]
    by_size = sorted(set(owners), key=lambda name: (-owners.count(name), name))
    known = [name for name in dict.fromkeys(names) if name not in WORDLESS]
    colors = {name: _color(place, len(known)) for place, name in enumerate(known)}
    pixels = np.array([colors.get(name, (0, 0, 0)) for name in owners], dtype=np.uint8).reshape(*index.shape, 3)
    opaque = np.array([255 * opacity * (name in colors) for name in owners], dtype=np.uint8).reshape(index.shape)
    base = _fit(picture)
    paint, cover = (Image.fromarray(a).resize(base.size, Image.Resampling.NEAREST) for a in (pixels, opaque))
    lines = [(colors[name], f"{name} {owners.count(name) / len(owners):.0%}") for name in by_size if name in colors]
    return _with_legend(Image.composite(paint, base, cover), lines)


def gamma_heat_map(gamma: Float[Tensor, "H W"], *, limits: tuple[float, float] | None = None) -> Image.Image:
    """gamma with a color bar: white is plain CFG (1), red stronger, blue weaker.

    Args:
        gamma: the map.
        limits: (low, high) of the colors, around 1; None: this map's own.
    """
    values = gamma.float().cpu().numpy()
    low, high = limits or (min(float(values.min()), 0.99), max(float(values.max()), 1.01))
    picture = _fit(Image.fromarray(_diverging(values, low, high)), Image.Resampling.NEAREST)
    bar = Image.fromarray(_diverging(np.linspace(high, low, picture.height)[:, None].repeat(14, axis=1), low, high))
    canvas = Image.new("RGB", (picture.width + 64, picture.height), "white")
    canvas.paste(picture, (0, 0))
    canvas.paste(bar, (picture.width + 8, 0))
    draw = ImageDraw.Draw(canvas)
    one = int((high - 1.0) / (high - low) * (picture.height - 1))
    for value, row in ((high, 0), (1.0, one), (low, picture.height - 1)):
        draw.text((picture.width + 26, min(max(row - 5, 0), picture.height - 11)), f"{value:.2f}", fill="black")
    return canvas


@torch.no_grad()
def latents_to_images(pipe: Any, latents: Float[Tensor, "B C H W"]) -> list[Image.Image]:
    """Predicted clean latents as pictures: by the pipeline's VAE, or as they are for pixel-space models."""
    vae = getattr(pipe, "vae", None)
    decoded = latents
    if vae is not None:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        scaled = latents / vae.config.scaling_factor + shift
        decoded = vae.decode(scaled.to(pipe._execution_device, vae.dtype)).sample
    pixels = ((decoded.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[..., :3]) for image in pixels]


def step_images(run: Run, pipe: Any, *, image: int = 0) -> list[list[Image.Image]]:
    """Per recorded step: [predicted clean image, regions over it, gamma].

    Args:
        run: a run attached with record=["regions", "gamma", "prediction"].
        pipe: its pipeline (for the VAE).
        image: which image of the batch.

    Raises:
        ScfgError: a map was not recorded, or there is no such image.
    """
    return _rows(run, pipe, image, _shown(run))


def _shown(run: Run) -> list[Step]:
    """The recorded steps."""
    steps = [step for step in run.trace if step.gamma is not None]
    if not steps:
        raise ScfgError(NOTHING)
    return steps


def _rows(run: Run, pipe: Any, image: int, chosen: Sequence[Step]) -> list[list[Image.Image]]:
    """See `step_images`, of chosen steps only, in the colors of all."""
    steps = _shown(run)
    if not 0 <= image < len(steps[0].effective_scale):
        raise ScfgError(f"image={image}: the batch has {len(steps[0].effective_scale)} images")
    maps = [_recorded(step.gamma)[image, 0] for step in steps]
    limits = (min(0.99, *(float(m.min()) for m in maps)), max(1.01, *(float(m.max()) for m in maps)))
    rows = []
    for step in chosen:
        clean = latents_to_images(pipe, _recorded(step.prediction)[image : image + 1])[0]
        overlay = region_overlay(clean, _recorded(step.regions)[image], _names(run, step, image))
        heat = gamma_heat_map(_recorded(step.gamma)[image, 0], limits=limits)
        rows.append([_fit(clean), overlay, heat])
    return rows


def strip(run: Run, pipe: Any, *, image: int = 0, columns: int = 6) -> Image.Image:
    """One picture: at most `columns` steps, evenly spaced; prediction of x0 / regions / gamma below each other.

    Args:
        run: an attached guidance after a call, with `record` of regions, gamma and prediction.
        pipe: the pipeline, whose VAE decodes the predictions.
        image: which image of the batch.
        columns: most steps shown.
    """
    steps = _shown(run)
    places = sorted({round(i) for i in np.linspace(0, len(steps) - 1, min(columns, len(steps)))})
    chosen = [steps[place] for place in places]
    rows = _rows(run, pipe, image, chosen)
    width = max(picture.width for row in rows for picture in row)
    heights = [max(row[kind].height for row in rows) for kind in range(3)]
    canvas = Image.new("RGB", (len(rows) * (width + 8), sum(heights) + 4 * 8 + 14), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (step, row) in enumerate(zip(chosen, rows, strict=True)):
        left, top = column * (width + 8), 18
        scale = float(step.effective_scale[image])
        draw.text((left, 2), f"step {step.index}, effective scale x{scale:.2f}", fill="black")
        for picture, height in zip(row, heights, strict=True):
            canvas.paste(picture, (left, top))
            top += height + 8
    return canvas


def save_strip(path: str | Path, run: Run, pipe: Any, *, image: int = 0, columns: int = 6) -> None:
    """`strip` as a PNG.

    Args:
        path: of the PNG file, whatever its suffix.
        run: an attached guidance after a call, see `strip`.
        pipe: the pipeline, whose VAE decodes the predictions.
        image: which image of the batch.
        columns: most steps shown.
    """
    strip(run, pipe, image=image, columns=columns).save(path, format="PNG")


def save_gif(path: str | Path, run: Run, pipe: Any, *, image: int = 0, milliseconds: int = 300) -> None:
    """A GIF over the steps: prediction, regions and gamma side by side.

    Args:
        path: of the GIF file, whatever its suffix.
        run: an attached guidance after a call, see `strip`.
        pipe: the pipeline, whose VAE decodes the predictions.
        image: which image of the batch.
        milliseconds: how long a step is shown.
    """
    frames = []
    for row in step_images(run, pipe, image=image):
        canvas = Image.new("RGB", (sum(p.width + 8 for p in row), max(p.height for p in row)), "white")
        left = 0
        for picture in row:
            canvas.paste(picture, (left, 0))
            left += picture.width + 8
        frames.append(canvas)
    size = max(f.width for f in frames), max(f.height for f in frames)
    padded = [Image.new("RGB", size, "white") for _ in frames]
    for canvas, frame in zip(padded, frames, strict=True):
        canvas.paste(frame, (0, 0))
    padded[0].save(path, format="GIF", save_all=True, append_images=padded[1:], duration=milliseconds, loop=0)


def norm_curves(run: Run, *, image: int = 0, names: Sequence[str] | None = None) -> Any:
    """||delta|| and ||u||, both over sigma_t, by region over the steps: the paper's Fig. 1, as a matplotlib figure.

    Args:
        run: a run of a method with regions; nothing needs to be recorded.
        image: which image of the batch.
        names: a name per region; None: from the run's prompt where it is known.
    """
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[float, float, float]]] = {}
    for step in run.trace:
        if step.norms is None:
            continue
        labels = names or _names(run, step, image)
        area = step.norms.area[image].tolist()
        delta, uncond = step.norms.delta[image].tolist(), step.norms.uncond[image].tolist()
        for name in dict.fromkeys(labels[region] for region, share in enumerate(area) if share > 0):
            parts = [region for region, label in enumerate(labels) if label == name and area[region] > 0]
            scale = sum(area[region] for region in parts) * (step.sigma or 1.0)  # regions of one name are one
            means = (sum(area[r] * norm[r] for r in parts) / scale for norm in (delta, uncond))
            curves.setdefault(name, []).append((step.index, *means))
    if not curves:
        raise ScfgError("no region norms in the trace: attach a method with regions and generate an image")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for column, title in ((1, "||c - u|| / sigma_t"), (2, "||u|| / sigma_t")):
        axes = figure.add_subplot(1, 2, column)
        for name, points in curves.items():
            axes.plot([p[0] for p in points], [p[column] for p in points], marker=".", label=name)
        axes.set(xlabel="step", title=title)
    axes.legend(fontsize="small")
    return figure


def _names(run: Run, step: Step, image: int) -> list[str]:
    """Region names of one image of the batch, from the run's prompts."""
    words, images = run.words, len(step.effective_scale)
    count = step.norms.area.shape[1] if step.norms is not None else int(_recorded(step.regions).max()) + 1
    tokens = run.guidance.tokens if isinstance(run.guidance, SemanticCFG) else "all"
    own = competitors(words[image * len(words) // images], tokens) if words else None
    return region_names(own, count, grouped=tokens != "all", length=run.text_length or count)


def _recorded(value: Tensor | None) -> Tensor:
    if value is None:
        raise ScfgError(NOTHING)
    return value


def _color(place: int, count: int) -> tuple[int, int, int]:
    hue = (place * 0.61803398875) % 1.0 if count > 8 else place / count  # golden ratio: neighbours stay apart
    red, green, blue = colorsys.hls_to_rgb(hue, 0.55, 0.75)
    return round(red * 255), round(green * 255), round(blue * 255)


def _diverging(values: np.ndarray, low: float, high: float) -> np.ndarray:
    above = np.clip((values - 1.0) / max(high - 1.0, 1e-6), 0, 1)[..., None]
    below = np.clip((1.0 - values) / max(1.0 - low, 1e-6), 0, 1)[..., None]
    pixels: np.ndarray = (_NEUTRAL + above * (_HOT - _NEUTRAL) + below * (_COLD - _NEUTRAL)).round().astype(np.uint8)
    return pixels


def _fit(picture: Image.Image, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    factor = SIDE / max(picture.size)
    return picture.convert("RGB").resize((round(picture.width * factor), round(picture.height * factor)), resample)


def _with_legend(picture: Image.Image, lines: Sequence[tuple[tuple[int, int, int], str]]) -> Image.Image:
    canvas = Image.new("RGB", (picture.width, picture.height + 6 + 14 * len(lines)), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for row, (color, text) in enumerate(lines):
        top = picture.height + 6 + 14 * row
        draw.rectangle((2, top, 12, top + 10), fill=color)
        draw.text((18, top - 1), text, fill="black")
    return canvas

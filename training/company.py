"""The subject in company: its cut-outs placed where the base drew its class, as further training pictures.

A few photographs show a subject in few surroundings. The base draws its class in any: "a dog to the left of a house".
There the subject's cut-out takes the place of what the base drew. The picture is trained as it is: asked for the class
beside the cut-out, the base would draw its class there once more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .batch import CaptionTensors, EntryTensors, tensors
from .data.crops import Views
from .data.images import Sample, rgb
from .errors import TrainingError
from .method import conditions_of
from .models import Parts, encode_images, encode_text, tokenize_captions
from .objective import add_noise, alpha_sigma, alphas_cumprod

__all__ = ["Spot", "check_company", "drawn_object", "find_spot", "paste_subject", "placed"]

FRACTIONS = (0.3, 0.45, 0.6)  # of the schedule, from clean to noise: where a word changes an object and little else
CHANGED = 0.4  # of the largest change: nine tenths of an object on average, see benchmarks/study/places.py
BLUR = 1 / 16  # of the map's side, to each side
SMALLEST, LARGEST = 0.03, 0.6  # share of the picture: regions beyond are not one object
COMPACT = 0.45  # of its extent: scattered regions are none either
# Than usual, a place's side and its aspect: then what stands beside the class changed with it, or the base drew the
# class twice, and a cut-out of that size would cover what else the caption names.
LARGER, LONGER = 1.5, 1.6
ALIKE = 1.35  # at most, of two sizes that pass for equal
RIM = 0.12  # of a spot's side, filled around it
FILLED = 64  # pixels of the larger side, at which a hole is filled
ROUNDS = 5  # of filling it from its edge, each with twice the reach
FAINT = 8  # of 255: less of a hole is none


class Spot(NamedTuple):
    """Where one object is, in pixels."""

    left: float
    top: float
    width: float
    height: float

    @property
    def side(self) -> float:
        """Of the square of equal area."""
        return math.sqrt(self.width * self.height)

    @property
    def aspect(self) -> float:
        return self.width / self.height


def find_spot(region: Tensor, size: tuple[int, int]) -> Spot | None:
    """What the region covers, strays left out; None where it is no single object.

    Args:
        region: (1, h, w), 1 where the base drew the class.
        size: of the picture in pixels, (width, height).
    """
    share = float(region.mean())
    if not SMALLEST <= share <= LARGEST:
        return None
    found = []
    for axis, pixels in ((2, size[0]), (1, size[1])):
        at = (region.nonzero()[:, axis].float() + 0.5) / region.shape[axis] * pixels
        # A uniform stretch of length l has deviation l / sqrt(12): strays count less so than in a bounding box.
        length = 12**0.5 * float(at.std())
        found.append((float(at.mean()) - length / 2, length))
    (left, width), (top, height) = found
    return Spot(left, top, width, height) if share * size[0] * size[1] >= COMPACT * width * height else None


@torch.no_grad()
def drawn_object(parts: Parts, entry: EntryTensors, caption: str, without: str) -> Tensor:
    """(1, h, w), 1 where the base's prediction changes with a word: the whole object that the word means.

    Attention sees only what tells an object apart, such as the hull of a boat. What changes without the word is its
    sails as well. See Couairon et al. 2022, DiffEdit, arXiv:2210.11427, section 3.2; here the words around it stay, so
    that what else they name does not change.

    Args:
        parts: the base.
        entry: latents of a picture of `caption`.
        caption: with the word.
        without: the same with a word in its place that means nothing to the base.
    """
    unet: Any = parts.unet
    text = tensors(encode_text(parts, tokenize_captions(parts, [caption, without])))
    # Where parts of the base take turns, they lie elsewhere between their passes.
    device = getattr(getattr(unet, "_hf_hook", None), "execution_device", unet.device)
    there = cast(CaptionTensors, {name: value.to(device) for name, value in text.items()})
    conditions = conditions_of(there, entry["frame"].to(device).expand(2, -1), unet.dtype)
    mean = entry["mean"][None].to(device)
    products = alphas_cumprod(parts.scheduler).to(mean)
    random = torch.Generator().manual_seed(0)
    change = torch.zeros(mean.shape[-2:])
    for fraction in FRACTIONS:
        timestep = torch.tensor([int(fraction * len(products))], device=device)
        noise = torch.randn(mean.shape, generator=random).to(mean)
        noisy = add_noise(mean, noise, *alpha_sigma(products, timestep)).expand(2, -1, -1, -1)
        said, unsaid = unet(noisy.to(unet.dtype), timestep, **conditions).sample
        change += (said - unsaid).abs().mean(0).float().cpu()
    reach = max(1, round(min(change.shape) * BLUR))
    smooth = F.avg_pool2d(change[None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False)
    return (smooth > CHANGED * smooth.max()).float()


def paste_subject(
    drawn: Image.Image, region: Tensor, spot: Spot, subject: Sample, caption: str, *, cell: int = 1
) -> Sample | None:
    """The subject's cut-out in the place of the class; None where its mask is empty.

    What the base drew there is filled from its surroundings first, or it would look out behind the subject. A cut-out
    that is nearly as large as the place keeps its size, and moves by whole cells of the U-net: its latents are then
    those of the subject's own picture, and it is learned as sharply.

    Args:
        drawn: what the base drew.
        region: (1, h, w), 1 where it drew the class.
        spot: the region's, see `find_spot`.
        subject: a picture of the subject with its mask.
        caption: of the new picture, with the trigger.
        cell: pixels of the U-net's coarsest position.

    Returns:
        The picture; its mask is the place of the class and the cut-out together.
    """
    assert subject.mask is not None
    mask = subject.mask.convert("L")
    box = mask.getbbox()
    if box is None:
        return None
    hole = _hole(drawn.size, region, spot)
    own, fit = _scales(box, min(subject.image.size), spot, drawn.size)
    kept = max(own / fit, fit / own) <= ALIKE
    scale = own if kept else fit
    size = (max(1, round((box[2] - box[0]) * scale)), max(1, round((box[3] - box[1]) * scale)))
    place = tuple(
        _corner(start + (length - side) / 2, whole - side, round(from_ * scale), cell if kept else 1)
        for start, length, side, whole, from_ in zip(
            (spot.left, spot.top), (spot.width, spot.height), size, drawn.size, box[:2], strict=True
        )
    )
    cut, shape = (item.crop(box).resize(size, Image.Resampling.LANCZOS) for item in (rgb(subject.image), mask))
    picture, where = _filled(rgb(drawn), hole), hole.copy()
    picture.paste(cut, (place[0], place[1]), shape)
    where.paste(255, (place[0], place[1], place[0] + size[0], place[1] + size[1]), shape)
    return Sample(image=picture, caption=caption, mask=where)


def _hole(size: tuple[int, int], region: Tensor, spot: Spot) -> Image.Image:
    """What is filled: the region and the whole spot with a rim."""
    wider = F.max_pool2d(region[None], 3, stride=1, padding=1)[0, 0]
    hole = Image.fromarray((wider.numpy() * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    rim = RIM * spot.side
    start = (max(0, round(spot.left - rim)), max(0, round(spot.top - rim)))
    end = (min(size[0], round(spot.left + spot.width + rim)), min(size[1], round(spot.top + spot.height + rim)))
    hole.paste(255, (*start, *end))
    return hole


def _scales(box: tuple[int, ...], short: int, spot: Spot, size: tuple[int, int]) -> tuple[float, float]:
    """A cut-out's scale as its own picture, of that shorter side, is trained; and that at which it fills the spot."""
    width, height = box[2] - box[0], box[3] - box[1]
    limit = min(size[0] / width, size[1] / height)
    return min(min(size) / short, limit), min(spot.side / math.sqrt(width * height), limit)


def _corner(wanted: float, most: int, origin: int, cell: int) -> int:
    """The place nearest to `wanted` in 0..`most`, whole cells from `origin` where there is such a one."""
    steps = range(origin % cell, most + 1, cell)
    return min(steps, key=lambda place: abs(place - wanted)) if steps else round(min(max(wanted, 0), most))


def _nearest(boxes: Mapping[int, tuple[tuple[int, ...], int]], spot: Spot, size: tuple[int, int], turn: int) -> int:
    """Which picture's cut-out has the size of the spot; in turn, if there are several.

    Args:
        boxes: the cut-out's box and the picture's shorter side, of each picture that shows the subject.
        spot: where it is to stand.
        size: of the picture there.
        turn: how many were placed before.
    """
    off = {}
    for number, (box, short) in boxes.items():
        own, fit = _scales(box, short, spot, size)
        off[number] = max(own / fit, fit / own)
    alike = [number for number, ratio in off.items() if ratio <= 1.1 * min(off.values())]
    return alike[turn % len(alike)]


def _boxes(data: Views) -> dict[int, tuple[tuple[int, ...], int]]:
    """See `_nearest`; each picture is read once."""
    found: dict[int, tuple[tuple[int, ...], int]] = {}
    for number in range(len(data.source)):
        sample = data.source[number]
        box = sample.mask.convert("L").getbbox() if sample.mask is not None else None
        if box is not None:
            found[number] = (box, min(sample.image.size))
    return found


def check_company(data: Views, identifier: str) -> None:
    """Whether the subject can be cut out and named, before anything is drawn.

    Raises:
        TrainingError: a picture without a mask, or a caption in which no word follows the identifier.
    """
    for number in range(len(data.source)):
        if data.source[number].mask is None:
            raise TrainingError("dreambooth.company cuts the subject out of its pictures: set data.masks")
        _noun(data.caption(number), identifier)


def _usual(spots: Sequence[tuple[int, Tensor, Spot]]) -> list[tuple[int, Tensor, Spot]]:
    """Those places that are about as large and as long as most."""
    if not spots:
        return []
    side, aspect = (median(getattr(spot, name) for *_, spot in spots) for name in ("side", "aspect"))
    return [
        (number, region, spot)
        for number, region, spot in spots
        if spot.side <= LARGER * side and 1 / LONGER <= spot.aspect / aspect <= LONGER
    ]


def _filled(picture: Image.Image, hole: Image.Image) -> Image.Image:
    """The picture with its hole filled from the edge inwards, by blurs that look at known pixels only.

    The filling is made at `FILLED` pixels: it has no detail to lose.
    """
    scale = min(1.0, FILLED / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    small, unknown = (item.resize(size, Image.Resampling.BOX) for item in (picture, hole))
    values = torch.from_numpy(np.asarray(small, np.float32)).permute(2, 0, 1)
    known = torch.from_numpy(np.asarray(unknown, np.float32) < FAINT).float()[None]
    for reach in (2**number for number in range(ROUNDS)):
        near, weight = (F.avg_pool2d(item, 2 * reach + 1, stride=1, padding=reach) for item in (values * known, known))
        new = (known == 0) & (weight > 0.02)
        values = torch.where(new, near / weight.clamp(min=1e-6), values)
        known = torch.where(new, 1.0, known)
    filling = Image.fromarray(values.permute(1, 2, 0).round().clamp(0, 255).byte().numpy())
    whole = filling.resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(whole, picture, hole.point(lambda value: 255 * (value >= FAINT)))


@torch.no_grad()
def placed(
    parts: Parts,
    data: Views,
    drawn: Views,
    lines: Sequence[str],
    *,
    identifier: str,
) -> Views:
    """The subject's cut-outs, in turn, in those drawn pictures whose line holds {}.

    Args:
        parts: the base, which is asked where the class is in what it drew.
        data: the subject's pictures with masks and captions such as "a sks dog on the grass".
        drawn: the class images, picture i of line i in turn.
        lines: prompts of the class images, {} where the class stands.
        identifier: the subject's word in its captions, which means nothing to the base.

    Raises:
        TrainingError: see `check_company`; or no picture in which the base shows the class.
    """
    check_company(data, identifier)
    noun = _noun(data.caption(0), identifier)
    spots: list[tuple[int, Tensor, Spot]] = []
    whole = drawn.at([(data.resolution, data.resolution)])  # as they were drawn
    for number in range(len(whole)):
        line = lines[number % len(lines)]
        if "{}" not in line:
            continue
        view = whole[number]
        mean, std = encode_images(parts.vae, view.pixels[None])
        entry: EntryTensors = {"mean": mean[0].float(), "std": std[0].float(), "frame": view.frame}
        found = drawn_object(parts, entry, view.caption, line.replace("{}", f"a {identifier}"))
        spot = find_spot(found, whole.source[number].image.size)
        spots += [(number, found, spot)] if spot is not None else []
    cell = parts.vae_scale_factor * 2 ** (len(parts.unet.config.block_out_channels) - 1)
    boxes = _boxes(data)
    samples: list[Sample] = []
    for number, found, spot in _usual(spots) if boxes else ():
        there = whole.source[number].image
        subject = data.source[_nearest(boxes, spot, there.size, len(samples))]
        caption = lines[number % len(lines)].replace("{}", f"a {identifier} {noun}")
        made = paste_subject(there, found, spot, subject, caption, cell=cell)
        samples += [made] if made else []
    if not samples:
        raise TrainingError(f"dreambooth.company: no {noun!r} is found in the base's class images; do they show one?")
    return Views(samples, resolution=data.resolution, multiple=1).at(data.used())


def _noun(caption: str, identifier: str) -> str:
    words = caption.split()
    if identifier not in words[:-1]:
        raise TrainingError(f"dreambooth.identifier: no word follows {identifier} in the caption {caption!r}")
    return words[words.index(identifier) + 1].strip(".,")

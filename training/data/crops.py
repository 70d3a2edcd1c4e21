"""Fixed views of a source: each image at its bucket's size, cropped and flipped, as tensors.

Crops and flips are enumerated, not drawn, so that every view can be cached: n images, k crops and flip are 2kn views,
at r resolutions 2knr.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import DataSettings, TagSettings
from ..errors import TrainingError
from . import tags
from .images import Sample, SampleSource, condition_as_rgb, mask, rgb

__all__ = ["View", "Views", "bucket_sizes", "views"]

WIDEST = 2.0  # aspect ratio of the outermost buckets


@dataclass(frozen=True, kw_only=True)
class View:
    """One training view."""

    pixels: Tensor
    """(3, H, W) float32 in [-1, 1]."""
    caption: str
    frame: Tensor
    """(6,) float32: original height and width, crop top and left, height and width (SDXL's size conditioning)."""
    mask: Tensor | None = None
    """(1, H, W) float32 in [0, 1]."""
    conditioning: Tensor | None = None
    """(3, H, W) uint8."""


def bucket_sizes(resolution: int, buckets: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of each bucket: about resolution² pixels, sides multiples of `multiple`, the square first.

    Args:
        resolution: side of the square in pixels.
        buckets: how many sizes at most; equal ones count once.
        multiple: pixels that every side is a multiple of.
    """
    sizes = [(resolution, resolution)]
    for index in range(1, buckets):
        ratio = WIDEST ** ((index + 1) // 2 / max(1, buckets // 2) * (1 if index % 2 else -1))
        height = max(multiple, round(resolution / math.sqrt(ratio) / multiple) * multiple)
        width = max(multiple, round(resolution * math.sqrt(ratio) / multiple) * multiple)
        if (height, width) not in sizes:
            sizes.append((height, width))
    return sizes


class Views:
    """All views of a source, indexed by integers.

    Args:
        source: pictures with captions.
        resolution: side of the square in pixels; other sizes have about the same area.
        multiple: pixels that every side is a multiple of, see `models.Parts.multiple`.
        buckets: image sizes of different shape, of which each picture gets the nearest one.
        further: resolutions at which every picture is shown too, each with its buckets.
        flip: whether every view comes mirrored too.
        crops: views of every picture, cut at different places.
        tags: how captions of tags are said.

    Raises:
        TrainingError: a resolution that the base cannot have, or an empty source.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        resolution: int,
        multiple: int = 8,
        buckets: int = 1,
        further: Sequence[int] = (),
        flip: bool = False,
        crops: int = 1,
        tags: TagSettings | None = None,
    ):
        resolutions = list(dict.fromkeys([resolution, *further]))
        for number, one in enumerate(resolutions):
            if one % multiple:
                name = "data.resolutions" if number else "data.resolution"
                raise TrainingError(
                    f"{name} must be a multiple of {multiple} for this base, got {one}; "
                    f"try {max(multiple, round(one / multiple) * multiple)}"
                )
        if not len(source):
            raise TrainingError("the data source has no samples")
        self.source, self.flip, self.crops, self.multiple = source, flip, crops, multiple
        self.tags = tags or TagSettings()
        self._rename: Callable[[str], str] | None = None
        self._rounds = [bucket_sizes(one, buckets, multiple) for one in resolutions]
        self.sizes = [size for choices in self._rounds for size in choices]

    @property
    def resolution(self) -> int:
        """Side in pixels of the largest square."""
        return max(choices[0][0] for choices in self._rounds)

    def used(self) -> list[tuple[int, int]]:
        """(height, width) of the sizes that views have, in the order of `sizes`."""
        there = {self.size(index) for index in range(len(self))}
        return [size for size in dict.fromkeys(self.sizes) if size in there]

    def at(self, sizes: Sequence[tuple[int, int]]) -> Views:
        """The same pictures, each once at every one of these sizes, whatever its shape.

        Args:
            sizes: (height, width).
        """
        other = copy.copy(self)
        other._rounds, other.sizes = [[size] for size in sizes], list(sizes)
        return other

    def smaller(self, times: int) -> Views:
        """The same views with sides that many times shorter, as near as the base can have them.

        Args:
            times: to divide by.
        """

        def side(pixels: int) -> int:
            return max(1, round(pixels / times / self.multiple)) * self.multiple

        other = copy.copy(self)
        other._rounds = [[(side(height), side(width)) for height, width in sizes] for sizes in self._rounds]
        other.sizes = [size for choices in other._rounds for size in choices]
        return other

    def __len__(self) -> int:
        return len(self.source) * len(self._rounds) * self.crops * (2 if self.flip else 1)

    def _place(self, index: int) -> tuple[int, int, bool, int]:
        """Sample, crop, flip and round of sizes of a view; the views of one sample lie `len(source)` apart."""
        rest, sample = divmod(index, len(self.source))
        rest, crop = divmod(rest, self.crops)
        number, flipped = divmod(rest, 2 if self.flip else 1)
        return sample, crop, bool(flipped), number

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a view: the bucket nearest to the image in log aspect ratio."""
        sample, _, _, number = self._place(index)
        choices = self._rounds[number]
        if len(choices) == 1:
            return choices[0]
        measure = getattr(self.source, "size", None)
        width, height = measure(sample) if measure else self.source[sample].image.size
        return min(choices, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))

    def caption(self, index: int) -> str:
        """The first caption, whole."""
        return self._known(tags.full(self._caption(index), self.tags))

    def captions(self, index: int) -> tuple[str, ...]:
        """All captions of a view, whole."""
        return tuple(self._known(tags.full(said, self.tags)) for said in self._captions(index))

    def draw(self, index: int, seed: int) -> str:
        """One of the captions, as the seed has it."""
        several = self._captions(index)
        return self._known(tags.vary_tags(several[seed % len(several)], self.tags, seed))

    def varies(self) -> bool:
        """Whether a view comes with one caption here and another there."""
        if self.tags.varies or not hasattr(self.source, "alternatives"):
            return self.tags.varies
        return any(len(self._captions(index)) > 1 for index in range(len(self.source)))

    def renamed(self, rename: Callable[[str], str]) -> Views:
        """The same views with captions changed by a function, after tags were drawn.

        Raises:
            TrainingError: the function's own, for what remains of a caption if all that may be dropped is.
        """
        for index in range(len(self.source)):
            for said in self._captions(index):
                rename(tags.least(said, self.tags))
        other = copy.copy(self)
        other._rename = rename
        return other

    def _known(self, caption: str) -> str:
        return self._rename(caption) if self._rename else caption

    def _caption(self, index: int) -> str:
        sample = self._place(index)[0]
        read = getattr(self.source, "caption", None)
        return read(sample) if read else self.source[sample].caption

    def _captions(self, index: int) -> tuple[str, ...]:
        """As the source has them."""
        read = getattr(self.source, "alternatives", None)
        said = read(self._place(index)[0]) if read else ()
        first = self._caption(index)
        # Where a source wraps another and gives its samples captions of its own, the inner one's are not theirs.
        return said if first in said else (first,)

    def key(self, index: int) -> str:
        """Names the view's content: the sample's, and how it is cut. Captions are cached by themselves."""
        sample, crop, flipped, _ = self._place(index)
        named = getattr(self.source, "key", None)
        content = named(sample) if named else _content(self.source[sample])
        return f"{content}-{self.size(index)}-{crop}/{self.crops}-{flipped}"

    def __getitem__(self, index: int) -> View:
        number, crop, flipped, _ = self._place(index)
        sample = self.source[number]
        height, width = self.size(index)
        image = rgb(sample.image)
        box = _Frame.cover(image.size, (height, width), crop, self.crops, flipped)
        masked = None if sample.mask is None else mask(sample.mask)
        shown = None if sample.conditioning is None else condition_as_rgb(sample.conditioning)
        return View(
            pixels=box.cut(image, Image.Resampling.LANCZOS).float().div_(127.5).sub_(1),
            caption=self._known(tags.full(sample.caption, self.tags)),
            frame=torch.tensor([image.height, image.width, box.top, box.left, height, width], dtype=torch.float32),
            mask=None if masked is None else box.cut(masked, Image.Resampling.BOX).float().div_(255),
            conditioning=None if shown is None else box.cut(shown, Image.Resampling.BILINEAR),
        )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """How an image is resized to cover a size, and which part is kept."""

    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    flipped: bool

    @classmethod
    def cover(cls, image: tuple[int, int], size: tuple[int, int], crop: int, crops: int, flipped: bool) -> _Frame:
        height, width = size
        scale = max(width / image[0], height / image[1])
        resized = (max(width, round(image[0] * scale)), max(height, round(image[1] * scale)))
        share = 0.5 if crops == 1 else crop / (crops - 1)
        left, top = round((resized[0] - width) * share), round((resized[1] - height) * share)
        return cls(resized=resized, top=top, left=left, height=height, width=width, flipped=flipped)

    def cut(self, image: Image.Image, resample: Image.Resampling) -> Tensor:
        """(C, H, W) uint8."""
        if image.size != self.resized:
            image = image.resize(self.resized, resample)
        if image.size != (self.width, self.height):
            image = image.crop((self.left, self.top, self.left + self.width, self.top + self.height))
        values = np.array(image)
        values = values[:, ::-1] if self.flipped else values
        values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
        return torch.from_numpy(np.ascontiguousarray(values))


def _content(sample: Sample) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for image in (sample.image, sample.mask, sample.conditioning):
        digest.update(b"-" if image is None else f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


def views(source: SampleSource, settings: DataSettings, *, multiple: int) -> Views:
    """The views that the settings describe; `multiple` is the base's (`models.Parts.multiple`).

    Args:
        source: pictures with captions.
        settings: resolutions, buckets, flip and crops.
        multiple: pixels that every side is a multiple of.
    """
    return Views(
        source,
        resolution=settings.resolution,
        multiple=multiple,
        buckets=settings.buckets,
        further=settings.resolutions,
        flip=settings.flip,
        crops=settings.crops,
        tags=settings.tags,
    )

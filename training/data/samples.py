"""What a source of training pictures is, and what its readers share: captions, partners' sizes, lists of problems."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from ..errors import TrainingError
from .pictures import Look, Role, condition_as_rgb, decode, mask, rgb

__all__ = ["Sample", "SampleSource", "Say", "captions_of", "digest", "make_sample", "refuse", "size_mismatch", "tell"]

NAMED_AT_MOST = 20  # problems listed before "and N more"
SHAPE = 0.02  # log ratio of aspects up to which two pictures have the same shape
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and what belongs to it."""

    image: Image.Image
    caption: str
    mask: Image.Image | None = None
    """White where the subject is."""
    conditioning: Image.Image | None = None


@runtime_checkable
class SampleSource(Protocol):
    """What training reads: a map from integers to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def make_sample(image: bytes, caption: str, masked: bytes | None, conditioning: bytes | None) -> Sample:
    """A sample of encoded files; mask and condition at the picture's size.

    Args:
        image: encoded file.
        caption: the sample's text.
        masked: encoded file of the mask; None: none.
        conditioning: encoded file of the condition; None: none.
    """
    picture = rgb(decode(image))
    pieces = [
        None if data is None else read(decode(data))
        for data, read in ((masked, mask), (conditioning, condition_as_rgb))
    ]
    fitted = [
        piece if piece is None or piece.size == picture.size else piece.resize(picture.size, Image.Resampling.BILINEAR)
        for piece in pieces
    ]
    return Sample(image=picture, caption=caption, mask=fitted[0], conditioning=fitted[1])


def captions_of(value: Any) -> tuple[tuple[str, ...], str | None]:
    """The captions in a cell, a text or a list of texts, and what is wrong with it."""
    several = value if isinstance(value, list | tuple) else [value]
    wrong = [item for item in several if not isinstance(item, str)]
    if wrong or not several:
        return (), f"is {str(value)[:60]!r} ({type(value).__name__}), neither text nor a list of texts"
    if not all(item.strip() for item in several):
        return (), "is empty"
    if any("\ud800" <= letter <= "\udfff" for item in several for letter in item):
        return (), "holds half of a surrogate pair (\\ud800 to \\udfff), which is no letter"
    return tuple(several), None


def size_mismatch(image: tuple[int, int], other: tuple[int, int]) -> str | None:
    """Why a mask or condition does not fit its image: another size is resized, another shape is none of that image."""
    if 0 in (*image, *other):  # one of them could not be read, which is said by itself
        return None
    if abs(math.log(other[0] / other[1] * image[1] / image[0])) <= SHAPE:
        return None
    return f"{image[0]}x{image[1]}; a pair needs one shape (width : height)"


def tell(say: Say, where: str, role: Role, looks: list[Look], sizes: list[tuple[int, int]]) -> None:
    """Says what is done to masks or conditions that are not quite what was expected.

    Args:
        say: receives the lines.
        where: folder or dataset, for the lines.
        role: "mask" or "conditioning".
        looks: of the masks or conditions.
        sizes: (width, height) of their pictures.
    """
    what = "masks" if role == "mask" else "conditions"
    other = sum(look.size != size for look, size in zip(looks, sizes, strict=True))
    if other:
        say(f"{where}: {other} of {len(looks)} {what} have another size than their picture and are resized to it")
    if full := sum(look.full for look in looks):
        say(f"{where}: {full} of {len(looks)} masks are of one value all over: their whole picture counts")
    if role == "conditioning" and (deep := sum(look.deep for look in looks)):
        say(f"{where}: {deep} of {len(looks)} conditions have more than 8 bits; each is scaled by its own range")


def refuse(where: str, problems: list[str]) -> None:
    """Raises `TrainingError` where there are problems: the first on its first line, the others below."""
    if problems:
        count = f" (the first of {len(problems)} problems)" if len(problems) > 1 else ""
        below = [f"\n  {problem}" for problem in problems[1:NAMED_AT_MOST]]
        more = f"\n  and {len(problems) - NAMED_AT_MOST} more" if len(problems) > NAMED_AT_MOST else ""
        raise TrainingError(f"{where}: {problems[0]}{count}{''.join(below)}{more}")


def digest(*pieces: bytes | str | None) -> str:
    """Hash of the pieces, with their limits."""
    found = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        found.update(b"-" if data is None else len(data).to_bytes(8, "little") + data)
    return found.hexdigest()

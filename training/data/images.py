"""Training samples: folders and `datasets` datasets of images with captions, masks and conditioning, checked first.

Any object with `__len__` and `__getitem__(int) -> Sample` is a source too. A source may also offer, to spare decoding:
`key(i) -> str`, a name of the sample's *content* (not its position); `caption(i) -> str`; `size(i) -> (width, height)`;
and `alternatives(i) -> tuple[str, ...]`, where a sample has several captions, of which one is drawn in each step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.edges import Canny

from ..config import DataSettings
from .annotators import annotator
from .folders import Folder, Scan, folder, scan
from .pictures import SUFFIXES, condition_as_rgb, mask, rgb
from .rows import Rows, dataset
from .samples import Sample, SampleSource, Say

SPLITS = ("train", "val", "valid", "validation", "test", "dev")

__all__ = [
    "SUFFIXES",
    "Folder",
    "Rows",
    "Sample",
    "SampleSource",
    "Scan",
    "condition_as_rgb",
    "dataset",
    "detector",
    "folder",
    "load_images",
    "mask",
    "rgb",
    "scan",
]


class Annotated:
    """A source whose conditioning is made from its images.

    Args:
        source: pictures with captions.
        annotate: picture -> conditioning image.
        name: of the annotator with its settings; part of the names of cached entries.
    """

    def __init__(self, source: SampleSource, annotate: Callable[[Image.Image], Image.Image], name: str):
        self.source, self.annotate, self.name = source, annotate, name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return Sample(
            image=sample.image, caption=sample.caption, mask=sample.mask, conditioning=self.annotate(sample.image)
        )

    def __getattr__(self, name: str) -> Any:
        if name not in ("key", "caption", "alternatives", "size"):
            raise AttributeError(name)
        method = getattr(self.source, name)
        return method if name != "key" else lambda index: f"{method(index)}-{self.name}"


def load_images(settings: DataSettings, *, edges: Canny | None = None, say: Say = print) -> SampleSource:
    """The source that the settings describe, checked.

    Args:
        settings: where they lie and how they are read.
        edges: the detector of the annotator canny; null: that of `data.canny`.
        say: is told what a user may not expect.
    """
    named = settings.caption_column if settings.caption_column != DataSettings.caption_column else None
    source: SampleSource
    if settings.kind == "folder" or (settings.kind == "auto" and _is_folder(settings.source)):
        source = folder(
            _split(Path(settings.source).expanduser(), settings.split),
            prompt=settings.prompt,
            caption=named,
            masks=settings.masks,
            conditioning=settings.conditioning,
            minimum=settings.minimum,
            say=say,
        )
    else:
        source = dataset(
            settings.source,
            split=settings.split,
            image=settings.image_column,
            caption=settings.caption_column,
            mask=settings.mask_column,
            conditioning=settings.conditioning_column,
            prompt=settings.prompt,
            minimum=settings.minimum,
            say=say,
        )
    if settings.annotator is None:
        return source
    edges = edges or detector(settings)
    made = annotator(settings.annotator, settings.annotator_model, edges=edges)
    own = f"{edges}" if settings.annotator == "canny" and edges != Canny() else settings.annotator_model or ""
    return Annotated(source, made, f"{settings.annotator} {own}".strip())


def detector(settings: DataSettings) -> Canny:
    """The Canny detector with the thresholds of `data.canny`, or the default one."""
    return Canny() if settings.canny is None else Canny(low=settings.canny[0], high=settings.canny[1])


def _is_folder(source: str) -> bool:
    """Whether a source is a folder of pictures, or is missing and was meant as a path, so that the error names that."""
    path = Path(source).expanduser()
    if not path.is_dir():
        return path.suffix != ".parquet" and (
            path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1
        )
    saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    return not saved and (bool(scan(path).pictures) or not any(path.rglob("*.parquet")))


def _split(root: Path, split: str) -> Path:
    """A folder that only holds the folders of its splits: the one asked for."""
    if not (root / split).is_dir():
        return root
    there = {item.name for item in root.iterdir() if not item.name.startswith(".")}
    return root / split if there <= {split, *SPLITS} else root

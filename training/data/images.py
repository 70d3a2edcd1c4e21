"""Training samples: folders and `datasets` datasets of images with captions, masks and conditioning, checked first.

Any object with `__len__` and `__getitem__(int) -> Sample` is a source too. A source may also offer, to spare decoding:
`key(i) -> str`, a name of the sample's *content* (not its position); `caption(i) -> str`; `size(i) -> (width, height)`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from ..config import DataSettings
from ..errors import TrainingError
from .annotators import annotator
from .pictures import canny, decode, inspect, rgb

__all__ = ["Folder", "Rows", "Sample", "Source", "canny", "dataset", "folder", "load", "rgb"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
CAPTION_KEYS = ("text", "caption", "prompt")
NAMED_AT_MOST = 20  # problems listed before "and N more"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image and what belongs to it."""

    image: Image.Image
    caption: str
    mask: Image.Image | None = None
    """White where the subject is."""
    conditioning: Image.Image | None = None


@runtime_checkable
class Source(Protocol):
    """What training reads: a map from integers to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        shown = "\n  ".join(problems[:NAMED_AT_MOST])
        more = f"\n  and {len(problems) - NAMED_AT_MOST} more" if len(problems) > NAMED_AT_MOST else ""
        raise TrainingError(f"{where}: {len(problems)} problem(s)\n  {shown}{more}")


def _digest(*pieces: bytes | str | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        data = piece.encode() if isinstance(piece, str) else piece
        digest.update(b"-" if data is None else len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


class Folder:
    """Images of one folder in name order; files are read when asked for and named by their bytes."""

    def __init__(
        self,
        files: list[Path],
        captions: list[str],
        sizes: list[tuple[int, int]],
        masks: list[Path] | None = None,
        conditioning: list[Path] | None = None,
    ):
        self.files, self.captions, self.sizes = files, captions, sizes
        self.masks, self.conditioning = masks, conditioning

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(
            image=rgb(decode(self.files[index].read_bytes())),
            caption=self.captions[index],
            mask=decode(self.masks[index].read_bytes()).convert("L") if self.masks else None,
            conditioning=rgb(decode(self.conditioning[index].read_bytes())) if self.conditioning else None,
        )

    def key(self, index: int) -> str:
        """Hash of the image, mask and conditioning files' bytes."""
        files = (self.files, self.masks, self.conditioning)
        return _digest(*(column[index].read_bytes() if column else None for column in files))

    def caption(self, index: int) -> str:
        return self.captions[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]


def folder(
    path: str | Path,
    *,
    prompt: str | None = None,
    masks: str | Path | None = None,
    conditioning: str | Path | None = None,
    minimum: int = 64,
) -> Folder:
    """Reads and checks a folder of images.

    Args:
        path: folder; captions come from `metadata.jsonl`, else from `.txt` files named like the images.
        prompt: one caption for all images; captions in the folder are then left alone.
        masks: folder with a mask of the same name (any suffix) and size for every image.
        conditioning: the same for conditioning images.
        minimum: shortest allowed side in pixels.

    Raises:
        TrainingError: naming the folder, or every file that is unreadable, animated, too small, without caption or
            without partner.
    """
    root = _existing(path, "data.source")
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not files:
        there = ", ".join(sorted(item.name for item in root.iterdir())[:10]) or "nothing"
        raise TrainingError(f"no images found in {root}: looked for {', '.join(SUFFIXES)}; there is {there}")
    with ThreadPoolExecutor() as pool:
        checked = list(pool.map(lambda file: inspect(file.read_bytes(), minimum), files))
    problems = [f"{file.name} {problem}" for file, (problem, _) in zip(files, checked, strict=True) if problem]
    captions = [prompt] * len(files) if prompt is not None else _captions(root, files, problems)
    partners = {
        name: _partners(Path(where), name, files, checked, problems) if where else None
        for name, where in (("masks", masks), ("conditioning", conditioning))
    }
    _refuse(str(root), problems)
    return Folder(files, captions, [size for _, size in checked], partners["masks"], partners["conditioning"])


def _existing(path: str | Path, setting: str) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise TrainingError(f"{setting}: folder {root} does not exist (looked from {Path.cwd()})")
    return root


def _captions(root: Path, files: list[Path], problems: list[str]) -> list[str]:
    listed: dict[str, str] = {}
    metadata = root / "metadata.jsonl"
    if metadata.is_file():
        listed = _metadata(metadata, problems)
    names = {file.name for file in files}
    stems = {file.stem for file in files}
    problems += [
        f"{metadata.name} has a caption for {name}, which is not there" for name in listed if name not in names
    ]
    strays = [file.name for file in sorted(root.glob("*.txt")) if file.stem not in stems]
    problems += [f"{name} is a caption without image" for name in strays]
    captions = []
    for file in files:
        beside = file.with_suffix(".txt")
        if file.name in listed:
            captions.append(listed[file.name])
        elif beside.is_file():
            captions.append(" ".join(beside.read_text(encoding="utf-8").split()))
        else:
            captions.append("")
            problems.append(f"{file.name} has no caption: give data.prompt, {beside.name} or a line in metadata.jsonl")
    return captions


def _metadata(path: Path, problems: list[str]) -> dict[str, str]:
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            caption = next(row[key] for key in CAPTION_KEYS if key in row)
            listed[str(row["file_name"])] = str(caption)
        except (json.JSONDecodeError, KeyError, StopIteration, TypeError):
            problems.append(
                f"{path.name} line {number} needs file_name and one of {', '.join(CAPTION_KEYS)}: {line[:80]}"
            )
    return listed


def _partners(
    root: Path, name: str, files: list[Path], checked: list[tuple[str | None, tuple[int, int]]], problems: list[str]
) -> list[Path]:
    root = _existing(root, f"data.{name}")
    by_stem = {file.stem: file for file in sorted(root.iterdir()) if file.suffix.lower() in SUFFIXES}
    found = []
    for file, (_, size) in zip(files, checked, strict=True):
        partner = by_stem.get(file.stem)
        if partner is None:
            problems.append(f"{file.name} has no partner in data.{name} = {root}")
            continue
        problem, partner_size = inspect(partner.read_bytes(), 1)
        if problem:
            problems.append(f"{root.name}/{partner.name} {problem}")
        elif size != (0, 0) and partner_size != size:
            problems.append(f"{root.name}/{partner.name} is {partner_size[0]}x{partner_size[1]}, {file.name} is "
                            f"{size[0]}x{size[1]}; a pair needs one size")  # fmt: skip
        found.append(partner)
    return found


class Rows:
    """A `datasets` dataset as a source; images stay encoded until asked for."""

    def __init__(self, rows: Any, columns: dict[str, str], prompt: str | None, minimum: int):
        self.rows, self.columns, self.prompt = rows, columns, prompt
        self.sizes: list[tuple[int, int]] = []
        problems = []
        for index in range(len(rows)):
            problem, size = inspect(self._bytes(index, "image") or b"", minimum)
            self.sizes.append(size)
            if problem:
                problems.append(f"row {index} {problem}")
        _refuse("dataset", problems)

    def _bytes(self, index: int, role: str) -> bytes | None:
        column = self.columns.get(role)
        if column is None:
            return None
        cell = self.rows[index][column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        mask, conditioning = self._bytes(index, "mask"), self._bytes(index, "conditioning")
        return Sample(
            image=rgb(decode(self._bytes(index, "image") or b"")),
            caption=self.caption(index),
            mask=decode(mask).convert("L") if mask else None,
            conditioning=rgb(decode(conditioning)) if conditioning else None,
        )

    def key(self, index: int) -> str:
        return _digest(*(self._bytes(index, role) for role in ("image", "mask", "conditioning")))

    def caption(self, index: int) -> str:
        return self.prompt if self.prompt is not None else str(self.rows[index][self.columns["caption"]])

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]


def dataset(
    name: str | Path,
    *,
    split: str = "train",
    image: str = "image",
    caption: str = "text",
    mask: str | None = None,
    conditioning: str | None = None,
    prompt: str | None = None,
    minimum: int = 64,
) -> Rows:
    """Opens a `datasets` dataset: one saved with `save_to_disk`, a parquet file, an image folder or a hub id.

    Raises:
        TrainingError: it cannot be opened, a column is missing (those there are listed), or an image is refused.
    """
    import datasets

    where = Path(name)
    try:
        if where.suffix == ".parquet":
            rows = datasets.load_dataset("parquet", data_files=str(where), split=split)
        elif (where / "dataset_info.json").is_file() or (where / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(where))
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        elif where.is_dir():
            rows = datasets.load_dataset("imagefolder", data_dir=str(where), split=split)
        else:
            rows = datasets.load_dataset(str(name), split=split)
    except Exception as error:  # datasets raises many unrelated kinds
        raise TrainingError(f"data.source {name} is no folder with images and no dataset: {error}") from error
    columns = {"image": image, "mask": mask, "conditioning": conditioning, "caption": None if prompt else caption}
    wanted = {role: column for role, column in columns.items() if column}
    missing = sorted(column for column in wanted.values() if column not in rows.column_names)
    if missing:
        raise TrainingError(
            f"dataset {name} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}; "
            "set data.image_column, data.caption_column or data.prompt"
        )
    for role in ("image", "mask", "conditioning"):
        if role in wanted:
            rows = rows.cast_column(wanted[role], datasets.Image(decode=False))
    return Rows(rows, wanted, prompt, minimum)


class Annotated:
    """A source whose conditioning is made from its images."""

    def __init__(self, source: Source, annotate: Callable[[Image.Image], Image.Image], name: str):
        self.source, self.annotate, self.name = source, annotate, name

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return Sample(
            image=sample.image, caption=sample.caption, mask=sample.mask, conditioning=self.annotate(sample.image)
        )

    def __getattr__(self, name: str) -> Any:
        if name not in ("key", "caption", "size"):
            raise AttributeError(name)
        method = getattr(self.source, name)
        return method if name != "key" else lambda index: f"{method(index)}-{self.name}"


def load(settings: DataSettings) -> Source:
    """The source that the settings describe, checked."""
    path = Path(settings.source).expanduser()
    is_folder = path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.iterdir())
    source: Source
    if settings.kind == "folder" or (settings.kind == "auto" and (is_folder or _looks_local(settings.source))):
        source = folder(
            path,
            prompt=settings.prompt,
            masks=settings.masks,
            conditioning=settings.conditioning,
            minimum=settings.minimum,
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
        )
    if settings.annotator is None:
        return source
    made = annotator(settings.annotator, settings.annotator_model)
    return Annotated(source, made, f"{settings.annotator} {settings.annotator_model or ''}".strip())


def _looks_local(source: str) -> bool:
    """Whether a missing or imageless source was meant as a folder, so that the error can say what is wrong with it."""
    path = Path(source).expanduser()
    if path.is_dir():
        return not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")) and not any(
            item.is_dir() for item in path.iterdir()
        )
    return path.suffix != ".parquet" and (path.is_absolute() or source.startswith(".") or source.count("/") != 1)

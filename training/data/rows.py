"""`datasets` datasets as sources: opened, and every cell checked before training."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TrainingError
from ..text import read_file
from .pictures import Look, Role, inspect
from .samples import Sample, Say, captions_of, digest, make_sample, refuse, size_mismatch, tell

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Rows", "dataset"]

PICTURES: tuple[Role, ...] = ("image", "mask", "conditioning")


class Rows:
    """A `datasets` dataset as a source; images stay encoded until asked for.

    Args:
        rows: the dataset.
        columns: role (image, caption, mask, conditioning) -> column.
        prompt: one caption for all rows; None: the caption's column.
        minimum: shortest allowed side in pixels.
        say: receives lines about masks and conditions that are resized.
        name: of the dataset, for messages.

    Raises:
        TrainingError: naming every row that cannot be used.
    """

    def __init__(
        self,
        rows: Dataset,
        columns: dict[str, str],
        prompt: str | None,
        minimum: int,
        say: Say = print,
        name: str = "dataset",
    ):
        self.columns = {role: rows.select_columns([column]) for role, column in columns.items()}
        self.names, self.length = columns, len(rows)
        problems: list[str] = []
        self._captions = [(prompt,)] * len(rows) if prompt is not None else self._read_captions(problems)
        images = self._looks("image", minimum, problems)
        self.sizes = [look.size for look in images]
        for role in PICTURES[1:]:
            if role not in columns:
                continue
            looks = self._looks(role, 1, problems)
            for index, (size, look) in enumerate(zip(self.sizes, looks, strict=True)):
                if not look.problem and (trouble := size_mismatch(size, look.size)):
                    cell = f"row {index}: {columns[role]}"
                    problems.append(f"{cell} is {look.size[0]}x{look.size[1]}, {columns['image']} is {trouble}")
            if not problems:
                tell(say, f"{name}, column {columns[role]}", role, looks, self.sizes)
        refuse(name, problems)

    def _read_captions(self, problems: list[str]) -> list[tuple[str, ...]]:
        found, column = [], self.names["caption"]
        for index, cell in enumerate(self.columns["caption"][column]):
            captions, problem = captions_of(cell)
            if problem:
                problems.append(f"row {index}: {column} {problem}")
            found.append(captions or ("",))
        return found

    def _looks(self, role: Role, minimum: int, problems: list[str]) -> list[Look]:
        found = []
        for index in range(self.length):
            try:
                data = self._bytes(index, role)
                look = inspect(data, minimum, role) if data else Look(problem="is empty")
            except OSError as error:
                look = Look(problem=f"cannot be read ({error})")
            if look.problem:
                problems.append(f"row {index}{'' if role == 'image' else f': {self.names[role]}'} {look.problem}")
            found.append(look)
        return found

    def _bytes(self, index: int, role: str) -> bytes | None:
        if role not in self.columns:
            return None
        cell = self.columns[role][index][self.names[role]]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            return None
        return cell["bytes"] if cell["bytes"] is not None else read_file(Path(cell["path"]))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        image, mask, conditioning = (self._bytes(index, role) for role in PICTURES)
        return make_sample(image or b"", self.caption(index), mask, conditioning)

    def key(self, index: int) -> str:
        return digest(*(self._bytes(index, role) for role in PICTURES))

    def caption(self, index: int) -> str:
        return self._captions[index][0]

    def alternatives(self, index: int) -> tuple[str, ...]:
        """All captions of an image."""
        return self._captions[index]

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
    say: Say = print,
) -> Rows:
    """Opens a `datasets` dataset: one saved with `save_to_disk`, parquet, an image folder or a hub id.

    Args:
        name: folder, file or hub id.
        split: which of its splits.
        image: column of the images.
        caption: column of the captions; a cell holds a text, or a list of several captions.
        mask: column of the masks.
        conditioning: column of the conditioning images.
        prompt: one caption for all images.
        minimum: shortest allowed side in pixels.
        say: told once what is resized or scaled.

    Raises:
        TrainingError: it cannot be opened, a column is missing (those there are listed), or a cell is refused.
    """
    try:
        rows = _opened(name, split)
    except Exception as error:  # datasets raises many unrelated kinds
        raise TrainingError(
            f"data.source {name} is no folder with images and no dataset: {' '.join(str(error).split())}"
        ) from error
    columns = {"image": image, "mask": mask, "conditioning": conditioning}
    wanted = {role: column for role, column in columns.items() if column}
    wanted |= {} if prompt is not None else {"caption": caption}
    missing = sorted(column for column in wanted.values() if column not in rows.column_names)
    if missing:
        raise TrainingError(
            f"dataset {name} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}; "
            "set data.image_column, data.caption_column or data.prompt"
        )
    return Rows(_encoded(rows, wanted, name), wanted, prompt, minimum, say, f"dataset {name}")


def _opened(name: str | Path, split: str) -> Any:
    import datasets

    where = Path(name).expanduser()
    whole = glob.escape(str(where))  # brackets in a path are no pattern
    if where.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=whole, split=split)
    if (where / "dataset_info.json").is_file() or (where / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(where))
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    if where.is_dir():
        parquet = any(where.rglob("*.parquet"))
        return datasets.load_dataset("parquet" if parquet else "imagefolder", data_dir=whole, split=split)
    return datasets.load_dataset(str(name), split=split)


def _encoded(rows: Dataset, columns: dict[str, str], name: str | Path) -> Any:
    """The rows with their pictures as bytes or paths."""
    import datasets

    for role in PICTURES:
        if role not in columns:
            continue
        column = columns[role]
        try:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow and datasets have many kinds
            raise TrainingError(
                f"dataset {name}: column {column} holds {rows.features[column]} and no images; set data.{role}_column"
            ) from error
    return rows

"""Folders of pictures as users have them: subfolders, kohya's repeats, captions beside, masks, conditions, litter."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from ..text import read_file, read_text
from .pictures import ADVICE, SUFFIXES, Look, Role, inspect
from .samples import Sample, Say, captions_of, digest, make_sample, refuse, size_mismatch, tell

__all__ = ["Folder", "Scan", "folder", "scan"]

LEAST = 3  # readable pictures, with which those that cannot be read are left out
CAPTION_KEYS = ("text", "caption", "prompt")
CAPTION_FILES = (".txt", ".caption")
NOT_PICTURES = ("masks", "mask", "conditioning", "__MACOSX", "@eaDir")  # subfolders with another meaning
KNOWN = (".json", ".jsonl", ".yaml", ".yml", ".toml", ".npz", ".ini", ".db")  # settings and caches, not data
NOTES = ("readme", "license", "licence", "notice", "credits")
REPEATS = re.compile(r"(\d{1,3})_(.*)")  # kohya: "10_sks dog"; four digits are a year


@dataclass(kw_only=True)
class Scan:
    """What a folder holds, by what it is for; each list in path order."""

    pictures: list[Path] = field(default_factory=list)
    captions: dict[Path, Path] = field(default_factory=dict)
    """Path without suffix -> caption file."""
    metadata: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    """What is left out: files that are neither pictures nor known to belong to them."""


def scan(root: Path, leave: tuple[Path, ...] = ()) -> Scan:
    """Looks through a folder and its subfolders, but for hidden ones, those in `leave`, masks and conditions."""
    found, seen, waiting = Scan(), {path.resolve() for path in leave if path.resolve() != root.resolve()}, [root]
    while waiting:
        place = waiting.pop()
        if place.resolve() in seen:
            continue
        seen.add(place.resolve())
        for item in sorted(place.iterdir(), reverse=True):
            if item.name.startswith("."):
                continue
            if item.is_dir():
                if item.name not in NOT_PICTURES:
                    waiting.append(item)
            else:
                _sort_in(found, item)
    for items in (found.pictures, found.metadata, found.others):
        items.sort()
    return found


def _sort_in(found: Scan, item: Path) -> None:
    suffix = item.suffix.lower()
    if suffix in SUFFIXES:
        found.pictures.append(item)
    elif suffix in CAPTION_FILES and item.stem.lower() not in NOTES:
        if suffix == ".txt" or item.with_suffix("") not in found.captions:
            found.captions[item.with_suffix("")] = item
    elif item.name == "metadata.jsonl":
        found.metadata.append(item)
    elif suffix not in (*KNOWN, *CAPTION_FILES) and not item.name.endswith(":Zone.Identifier"):
        found.others.append(item)


class Folder:
    """Images of a folder in name order; files are read when asked for and named by their bytes.

    Args:
        files: the images; all lists are in their order.
        captions: one or more of every image.
        sizes: (width, height) of every image in pixels.
        masks: files of the masks; None: there are none.
        conditioning: files of the conditioning images; None: there are none.
    """

    def __init__(
        self,
        files: list[Path],
        captions: list[tuple[str, ...]],
        sizes: list[tuple[int, int]],
        masks: list[Path] | None = None,
        conditioning: list[Path] | None = None,
    ):
        self.files, self.sizes, self.masks, self.conditioning = files, sizes, masks, conditioning
        self._captions = captions
        self._keys: dict[Path, str] = {}

    @property
    def captions(self) -> list[str]:
        """The first caption of each image."""
        return [captions[0] for captions in self._captions]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        image, mask, conditioning = self._bytes(index)
        assert image is not None
        return make_sample(image, self.caption(index), mask, conditioning)

    def _bytes(self, index: int) -> list[bytes | None]:
        return [read_file(column[index]) if column else None for column in (self.files, self.masks, self.conditioning)]

    def key(self, index: int) -> str:
        """Hash of the image, mask and conditioning files' bytes."""
        file = self.files[index]
        if file not in self._keys:  # a repeated picture is read once
            self._keys[file] = digest(*self._bytes(index))
        return self._keys[file]

    def caption(self, index: int) -> str:
        return self._captions[index][0]

    def alternatives(self, index: int) -> tuple[str, ...]:
        """All captions of an image."""
        return self._captions[index]

    def size(self, index: int) -> tuple[int, int]:
        return self.sizes[index]

    def chosen(self, order: Iterable[int]) -> Folder:
        """The images with these numbers, which may repeat."""
        order = list(order)

        def pick(column: list[Any] | None) -> Any:
            return None if column is None else [column[index] for index in order]

        return Folder(*map(pick, (self.files, self._captions, self.sizes, self.masks, self.conditioning)))


def folder(
    path: str | Path,
    *,
    prompt: str | None = None,
    otherwise: str | None = None,
    caption: str | None = None,
    masks: str | Path | None = None,
    conditioning: str | Path | None = None,
    minimum: int = 64,
    say: Say = print,
    setting: str = "data.source",
) -> Folder:
    """Reads and checks a folder of images and its subfolders.

    Pictures of subfolders that are called like `10_sks dog` come so many times, as kohya's scripts have it; the rest of
    the name is their caption where none lies beside them.

    Args:
        path: folder; captions come from `metadata.jsonl`, else from `.txt` or `.caption` files named like the images.
        prompt: one caption for all images; captions in the folder are then left alone.
        otherwise: the caption of images that have none.
        caption: key of the caption in `metadata.jsonl`; default: text, caption or prompt.
        masks: folder with a mask of the same name (any suffix) and shape for every image.
        conditioning: the same for conditioning images.
        minimum: shortest allowed side in pixels.
        say: told once what is left out, as unreadable pictures are, and what is repeated, resized or scaled.
        setting: what named the folder, for errors.

    Raises:
        TrainingError: naming the folder, or every file that is animated, too small, without caption or without
            partner; also every unreadable one, where fewer than three others remain.
    """
    root = _existing(path, setting)
    given: dict[Role, str | Path | None] = {"mask": masks, "conditioning": conditioning}
    places = {
        role: _existing(where, f"data.{'masks' if role == 'mask' else role}") for role, where in given.items() if where
    }
    found = scan(root, leave=tuple(places.values()))
    files = found.pictures
    if not files:
        raise TrainingError(_nothing(root, found))
    looks = _looks(files, minimum, "image")
    seen = [(f"{file.relative_to(root)} {look.problem}", look) for file, look in zip(files, looks, strict=True)]
    broken = [line for line, look in seen if look.broken]
    spare = len(files) - len(broken) >= LEAST
    problems = [line for line, look in seen if look.problem and not (spare and look.broken)]
    captions: list[tuple[str, ...]] = [(prompt or "",)] * len(files)
    if prompt is None:
        captions = _captions(root, found, caption, otherwise, problems)
    sizes = [look.size for look in looks]
    partners = {role: _partners(place, role, root, files, sizes, problems, say) for role, place in places.items()}
    refuse(str(root), problems)
    if spare and broken:
        say(f"{root}: {len(broken)} picture(s) left out: {_some(broken)}")
    times = [0 if look.broken else _repeats(file.parent, root)[0] for file, look in zip(files, looks, strict=True)]
    _announce(root, found, times, say)
    once = Folder(files, captions, sizes, partners.get("mask"), partners.get("conditioning"))
    return once.chosen(index for index, count in enumerate(times) for _ in range(count))


def _existing(path: str | Path, setting: str) -> Path:
    root = Path(path).expanduser()
    if root.is_file():
        raise TrainingError(f"{setting}: {root} is a file; give the folder that it lies in")
    if not root.is_dir():
        raise TrainingError(f"{setting}: folder {root} does not exist (looked from {Path.cwd()})")
    return root


def _nothing(root: Path, found: Scan) -> str:
    there = ", ".join(sorted(item.name for item in root.iterdir())[:10]) or "nothing"
    advice = sorted({ADVICE[item.suffix.lower()] for item in found.others if item.suffix.lower() in ADVICE})
    return "; ".join([f"no images found in {root}: looked for {', '.join(SUFFIXES)}; there is {there}", *advice])


def _looks(files: list[Path], minimum: int, role: Role) -> list[Look]:
    def look(file: Path) -> Look:
        if file.is_symlink() and not file.exists():
            return Look(problem=f"is a link to {os.readlink(file)}, which is not there")
        try:
            return inspect(read_file(file), minimum, role)
        except OSError as error:
            return Look(problem=f"cannot be read ({error.strerror})", broken=True)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(look, files))


def _repeats(place: Path, root: Path) -> tuple[int, str]:
    """How often the pictures of a subfolder come, and their caption, by its name."""
    named = REPEATS.fullmatch(place.name) if place != root else None
    return (max(1, int(named[1])), named[2].strip()) if named else (1, "")


def _announce(root: Path, found: Scan, times: list[int], say: Say) -> None:
    below = Counter(file.parent for file in found.pictures if file.parent != root)
    if below:
        listed = [
            f"{place.relative_to(root)} ({count}{f', {repeats} times each' if repeats > 1 else ''})"
            for place, count in below.items()
            for repeats in [_repeats(place, root)[0]]
        ]
        say(f"{root}: {sum(below.values())} of {len(times)} pictures lie in subfolders: {_some(listed)}")
    if found.others:
        advice = sorted({ADVICE[item.suffix.lower()] for item in found.others if item.suffix.lower() in ADVICE})
        names = _some([str(item.relative_to(root)) for item in found.others])
        say("; ".join([f"{root}: {len(found.others)} file(s) are not read and left out: {names}", *advice]))


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _captions(
    root: Path, found: Scan, key: str | None, otherwise: str | None, problems: list[str]
) -> list[tuple[str, ...]]:
    if key is not None and not found.metadata:
        problems.append(f"data.caption_column {key} names a key of metadata.jsonl, which is not there")
    listed: dict[Path, tuple[str, ...]] = {}
    for metadata in found.metadata:
        for file, captions in _metadata(metadata, (key,) if key else CAPTION_KEYS, problems):
            listed[file] = listed.get(file, ()) + captions
    names, stems = set(found.pictures), {file.with_suffix("") for file in found.pictures}
    problems += [
        f"metadata.jsonl has a caption for {os.path.relpath(file, root)}, which is not there"
        for file in listed
        if file not in names
    ]
    problems += [
        f"{item.relative_to(root)} is a caption without image"
        for stem, item in found.captions.items()
        if stem not in stems
    ]
    every: list[tuple[str, ...]] = []
    for file in found.pictures:
        beside = found.captions.get(file.with_suffix(""))
        instead = _repeats(file.parent, root)[1] or otherwise
        if file in listed:
            every.append(listed[file])
        elif beside is not None:
            every.append(_beside(beside, root, problems))
        elif instead:
            every.append((instead,))
        else:
            every.append(("",))
            problems.append(f"{file.relative_to(root)} has no caption: give data.prompt, {file.stem}.txt or a line in "
                            "metadata.jsonl")  # fmt: skip
    return every


def _beside(file: Path, root: Path, problems: list[str]) -> tuple[str, ...]:
    try:
        text = " ".join(read_text(file).split())
    except TrainingError as error:
        problems.append(str(error))
        return ("",)
    if not text:
        problems.append(f"{file.relative_to(root)} is empty: write a caption, or give data.prompt for all images")
    return (text,)


def _metadata(path: Path, keys: tuple[str, ...], problems: list[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """(file, captions) of every line; a file may have several lines."""
    found = []
    try:
        lines = read_text(path).split("\n")
    except TrainingError as error:
        problems.append(str(error))
        lines = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # no JSON, a number of 5000 digits, 100,000 brackets
            problems.append(f"{where} is no JSON ({error}): {line[:80]}")
            continue
        key = next((key for key in keys if key in row), None) if isinstance(row, dict) else None
        if key is None or not isinstance(name := row.get("file_name"), str):
            problems.append(f"{where} needs file_name (a text) and one of {', '.join(keys)}: {line[:80]}")
            continue
        captions, problem = captions_of(row[key])
        if problem:
            problems.append(f"{where}: {key} of {name} {problem}")
        file = Path(os.path.normpath(path.parent / name.replace("\\", "/")))
        found.append((file, captions or ("",)))
    return found


def _partners(
    place: Path,
    role: Role,
    root: Path,
    files: list[Path],
    sizes: list[tuple[int, int]],
    problems: list[str],
    say: Say,
) -> list[Path]:
    """The mask or condition of every image: of the same name in the same subfolder, else of that name anywhere."""
    there = scan(place).pictures
    setting = "data.masks" if role == "mask" else "data.conditioning"
    by_path = {str(file.relative_to(place).with_suffix("")): file for file in there}
    alone = Counter(file.stem for file in there)
    by_name = {file.stem: file for file in there if alone[file.stem] == 1}
    wanted = [by_path.get(str(file.relative_to(root).with_suffix(""))) or by_name.get(file.stem) for file in files]
    pairs = [(file, size, partner) for file, size, partner in zip(files, sizes, wanted, strict=True) if partner]
    looks = _looks([partner for _, _, partner in pairs], 1, role)
    for (file, size, partner), look in zip(pairs, looks, strict=True):
        name = f"{place.name}/{partner.relative_to(place)}"
        if look.problem:
            problems.append(f"{name} {look.problem}")
        elif trouble := size_mismatch(size, look.size):
            problems.append(f"{name} is {look.size[0]}x{look.size[1]}, {file.relative_to(root)} is {trouble}")
    problems += [
        f"{file.relative_to(root)} has no partner in {setting} = {place}"
        for file, partner in zip(files, wanted, strict=True)
        if partner is None
    ]
    if not problems:
        tell(say, str(place), role, looks, sizes)
    return [partner for _, _, partner in pairs]

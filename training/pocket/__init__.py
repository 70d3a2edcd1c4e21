"""The embedded base model: a real, small Stable-Diffusion-class pipeline folder, its ControlNets and its judge.

    StableDiffusionPipeline.from_pretrained(training.pocket.base_path())

Importing this loads neither torch nor diffusers. Every weight file is checked against ``data/manifest.json`` before its
path is handed out: once a process, by size and sha256. The ControlNets ship compressed; they are unpacked into the
user's cache when their path is first asked for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PocketError
from .world import CONTROLS

if TYPE_CHECKING:
    from .judging import Judge

__all__ = ["VERSION", "PocketError", "base_hash", "base_path", "controlnet_path", "judge", "manifest"]

VERSION = "pocket-2"
DATA = Path(__file__).parent / "data"
_REMEDY = (
    "restore it with `git checkout training/pocket/data` or reinstall, or rebuild it with `python recipes/pocket.py`"
)


@lru_cache(maxsize=1)
def manifest() -> dict[str, Any]:
    """``{"version", "files": {path: {"bytes", "sha256"}}}`` of what ships, paths relative to the data folder.

    Raises:
        PocketError: no manifest, or one that is not JSON.
    """
    from adapters.files import FileError, read_object  # not above: they bring torch

    path = DATA / "manifest.json"
    try:
        return read_object(path)
    except FileError as error:
        raise PocketError(f"the pocket base has no readable manifest at {path} ({error}); {_REMEDY}") from error


def base_path() -> Path:
    """Folder of the base model, for ``StableDiffusionPipeline.from_pretrained``.

    Raises:
        PocketError: a file is missing or differs from the manifest; the message names it.
    """
    return _checked(VERSION)


def controlnet_path(control: str) -> Path:
    """Folder of the ControlNet for ``control`` ("canny" or "segmentation"), for ``ControlNetModel.from_pretrained``.

    Raises:
        PocketError: another control, damaged weights, or a cache that cannot be written.
    """
    if control not in CONTROLS:
        raise PocketError(f"unknown pocket ControlNet {control!r}; there are {', '.join(CONTROLS)}")
    return _unpacked(f"controlnet-{control}")


@lru_cache(maxsize=1)
def judge() -> Judge:
    """The judge, ready to look (on the CPU, eval mode). See ``training.pocket.judging``."""
    from safetensors.torch import load

    from .judging import Judge

    network = Judge()
    weights = load(_decompressed(_checked("judge") / "judge.safetensors.xz"))
    network.load_state_dict({key.replace("colours.", "colors."): value for key, value in weights.items()})
    return network.float().eval().requires_grad_(False)


def base_hash() -> str:
    """One hash over every file of the base; it goes into whatever is made on it."""
    return _hash(VERSION)


def _hash(folder: str) -> str:
    files = {name: entry["sha256"] for name, entry in manifest()["files"].items() if name.startswith(f"{folder}/")}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


@lru_cache
def _unpacked(folder: str) -> Path:
    """A copy of the data folder in the user's cache, its ``.xz`` files unpacked; made anew where it has changed."""
    from adapters import files

    from ..environment import user_cache

    packed = _checked(folder)
    place = user_cache("pocket") / f"{folder}-{_hash(folder)[:12]}"
    try:
        files.verify_folder(place)
        return place
    except (files.FileError, OSError):
        pass  # not there yet, or damaged
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.write_folder(place) as fresh:
            for file in packed.iterdir():
                if file.suffix == ".xz":
                    (fresh / file.stem).write_bytes(_decompressed(file))
                else:
                    shutil.copyfile(file, fresh / file.name)
            files.write_manifest(fresh, {})
    except OSError as error:
        raise PocketError(
            f"{folder} cannot be unpacked into {place} ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from error
    return place


def _decompressed(file: Path) -> bytes:
    import lzma

    return lzma.decompress(file.read_bytes())


@lru_cache
def _checked(folder: str) -> Path:
    """The data folder ``folder``, its files compared with the manifest."""
    from adapters.files import sha256

    entries = {name: entry for name, entry in manifest()["files"].items() if name.startswith(f"{folder}/")}
    if not entries:
        raise PocketError(f"the manifest of {manifest()['version']} lists no files under {folder!r}; {_REMEDY}")
    for name, entry in entries.items():
        path = DATA / name
        if not path.is_file():
            raise PocketError(f"{path} is missing; {_REMEDY}")
        if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
            raise PocketError(f"{path} is damaged (size or sha256 differs from the manifest); {_REMEDY}")
    return DATA / folder

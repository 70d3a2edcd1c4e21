"""Files of strangers, read without trust: only regular ones, of bounded size, safetensors checked before they are read.

How files and folders are written is in `adapters.whole`, whose functions are found here too.

The safetensors layout is 8 bytes little-endian header length, a JSON header, one data buffer
(https://huggingface.co/docs/safetensors). Everything the header claims is checked against the size of the file before
anything is allocated, so memory stays bounded by the file and the two limits below.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import AdapterError, FileError
from .machine import exhausted
from .whole import append_line, recover, sweep, write_bytes, write_file, write_folder, write_text

__all__ = [
    "MANIFEST",
    "SIGNATURE",
    "append_line",
    "check_name",
    "opened",
    "read_bytes",
    "read_header",
    "read_json",
    "read_manifest",
    "read_object",
    "read_tensors",
    "recover",
    "sha256",
    "sweep",
    "understood",
    "unnamed",
    "verify_folder",
    "write_bytes",
    "write_file",
    "write_folder",
    "write_json",
    "write_manifest",
    "write_tensors",
    "write_text",
]

MANIFEST = "manifest.json"
SIGNATURE = f"{MANIFEST}.sig"  # beside it, and in no manifest: see adapters.signing
MAX_HEADER = 16 * 2**20  # an SDXL checkpoint's header is below 1 MiB
MAX_JSON = 64 * 2**20
MAX_TENSORS = 50_000  # a LoKr of SDXL with text encoders has 7,000; each costs time, however small it is
MAX_DEPTH, MAX_FILES = 16, 100_000
_LOADED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}
_SETTINGS = {"guider_config.json", "adapter_config.json", "config.json"}  # objects, wherever they lie
_RESULTS = {"gains.json", "per_image.csv", "tuned.json", *_SETTINGS}
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}


@contextlib.contextmanager
def understood(what: object) -> Iterator[None]:
    """Around the reading of a stranger's file or folder: whatever is raised there is an `AdapterError` that names it.

    Every value is checked where it is used; this is for the combinations that nobody thought of. Memory or disk that
    ran out is not the file's fault and stays what it is.
    """
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:
        if exhausted(error):
            raise
        raise FileError(f"{what}: cannot be understood ({type(error).__name__}: {_brief(error)})") from error


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file, open for reading. A FIFO or a device is refused without waiting for it or reading from it.

    Raises `FileError`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path}: not a regular file; only those are read")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def read_bytes(path: Path, limit: int) -> bytes:
    """A whole regular file, or a `FileError` where it is larger than `limit` bytes."""
    with opened(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise FileError(f"{path}: larger than {limit} bytes")
    return data


def sha256(path: Path) -> str:
    """Hex digest of a regular file, read in blocks."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------- safetensors, reading


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of a safetensors file: tensor name -> {dtype, shape, data_offsets}, and `__metadata__`.

    Raises `FileError` for anything but a complete, consistent file; pickles are named as such.
    """
    size, raw = _header_bytes(path)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FileError(
            f"{path}: the safetensors header is not valid JSON ({_brief(error)}); get the file again"
        ) from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: the safetensors header is a {type(header).__name__}, not an object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileError(f"{path}: __metadata__ in the header must map text to text")
    _check_layout(path, header, size - 8 - len(raw))
    return header


def _header_bytes(path: Path) -> tuple[int, bytes]:
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        fits = length <= min(MAX_HEADER, size - 8)
        # One header in 32 has a length that begins as a pickle does; a pickle's would be longer than the file.
        if (prefix[:2] == b"PK" or prefix[:1] == b"\x80") and not fits:
            raise FileError(
                f"{path}: a pickled checkpoint, which can run code when read; only .safetensors is accepted, "
                "convert it where you trust it"
            )
        if len(prefix) < 8:
            raise FileError(f"{path}: {size} bytes is too short for a safetensors file")
        if not fits:
            raise FileError(
                f"{path}: the header claims {length} bytes, the file has {size} and at most {MAX_HEADER} are allowed; "
                "the file is truncated or not safetensors"
            )
        return size, file.read(length)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _brief(error: BaseException) -> str:
    return str(error)[:120] or type(error).__name__


def _check_layout(path: Path, header: Mapping[str, Any], data_size: int) -> None:
    """Offsets must tile the data buffer exactly, and every size follow from dtype and shape."""
    if len(header) > MAX_TENSORS:
        raise FileError(f"{path}: {len(header)} tensors; at most {MAX_TENSORS} are read")
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise FileError(f"{path}: tensor {name[:80]!r} lacks dtype, shape or data_offsets") from error
        bits = _ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
        if bits is None:
            raise FileError(
                f"{path}: tensor {name[:80]!r} has dtype {str(dtype)[:40]!r}; known are {sorted(_ITEM_BITS)}"
            )
        if not (isinstance(shape, list) and len(shape) <= 8 and all(_is_count(n) for n in [*shape, begin, end])):
            raise FileError(f"{path}: tensor {name[:80]!r} has an impossible shape or offset")
        if end - begin != math.prod(shape) * bits // 8:
            raise FileError(f"{path}: tensor {name[:80]!r}: {end - begin} bytes do not hold shape {shape} of {dtype}")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise FileError(f"{path}: tensor {name[:80]!r} starts at {begin}, expected {position}")
        position = end
    if position != data_size:
        raise FileError(f"{path}: the header describes {position} bytes of data, the file holds {data_size}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header metadata of a safetensors file, on the CPU, in their stored dtypes."""
    header = read_header(path)
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise FileError(f"{path}: {_brief(error)}") from error
    return tensors, header.get("__metadata__", {})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and metadata in sorted order, so that equal weights make equal files.

    Args:
        path: of the safetensors file.
        tensors: name -> values, on any device; written contiguous.
        metadata: text of the header, beside "format".
    """
    ordered = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    with write_file(path) as part:
        save_file(ordered, part, metadata={"format": "pt", **(metadata or {})})
        _sort_metadata(part)
        part.chmod(0o666 & ~_umask())  # safetensors keeps its files to their owner; these are to be shared


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sort_metadata(path: Path) -> None:
    """safetensors hashes the metadata, so their order changes from one save to the next: put them in order."""
    _, raw = _header_bytes(path)
    header = json.loads(raw)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with path.open("r+b") as file:
        file.seek(8)
        file.write(ordered.ljust(len(raw)))


def read_json(path: Path) -> Any:
    """A JSON file of bounded size, in which no key appears twice; an editor's byte order mark may come first."""
    try:
        return json.loads(read_bytes(path, MAX_JSON).decode("utf-8-sig"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: not valid JSON ({_brief(error)})") from error


def read_object(path: Path) -> dict[str, Any]:
    """As `read_json`, of a file that must hold an object: a list or a lone value is a `FileError`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """A JSON file, whole or not at all.

    Args:
        path: of the file.
        value: what JSON can hold.
        indent: spaces a level; None: all in one line.
    """
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------- manifest


def check_name(name: object) -> str:
    """A relative POSIX path that stays inside its folder; anything else is a `FileError`."""
    ok = isinstance(name, str) and 0 < len(name) <= 512 and not re.search(r"[\\\x00-\x1f\ud800-\udfff]", name)
    if ok:
        path = PurePosixPath(str(name))
        ok = (
            not path.is_absolute()
            and ".." not in path.parts
            and path.as_posix() == name != "."
            and ":" not in str(name)
            and max(len(part.encode()) for part in path.parts) <= 255
            and len(path.parts) <= MAX_DEPTH
        )
    if not ok:
        raise FileError(f"manifest entry {ascii(name)[:120]} is not a plain relative path inside the folder")
    return str(name)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """`manifest.json`: sha256 and size of every file in `folder`, and `facts` (kind, base identity, versions)."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [name for name in names if name not in (MANIFEST, SIGNATURE)]
    files = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    write_text(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=2, sort_keys=True) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, its names checked; not yet the files it names."""
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise FileError(f"{folder / MANIFEST}: no table of files in it")
    for name, entry in manifest["files"].items():
        check_name(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str) or not _is_count(entry.get("size")):
            raise FileError(f"{folder / MANIFEST}: entry {name!r} needs sha256 and size")
    return manifest


def verify_folder(folder: Path, *, links_into: Path | None = None) -> dict[str, Any]:
    """Check every file the manifest names and that no unnamed weights or results lie beside them; returns the manifest.

    `links_into`: where symbolic links may lead (the Hub's cache keeps its files as links); by default nowhere.
    """
    with understood(folder):
        manifest = read_manifest(folder)
        for name, entry in manifest["files"].items():
            path = folder / name
            _check_place(folder, path, links_into)
            if not path.is_file():
                raise FileError(f"{folder}: {name} is in the manifest but not in the folder")
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                raise FileError(f"{folder}: {name} is not the file the manifest was written for; get the folder again")
            if path.name in _SETTINGS:
                read_object(path)
        for name in unnamed(folder, manifest):
            if Path(name).suffix in _LOADED or name in _RESULTS:
                raise FileError(f"{folder}: {name} is not in the manifest; remove it")
    return manifest


def unnamed(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What lies in the folder and is not in its manifest; `FileError` for a tree too deep or large to be a release."""
    found, places, seen = [], [(folder, 0)], 0
    while places:
        place, depth = places.pop()
        with os.scandir(place) as entries:
            for entry in entries:
                path, seen = Path(entry.path), seen + 1
                if depth >= MAX_DEPTH or seen > MAX_FILES:
                    raise FileError(f"{folder}: deeper than {MAX_DEPTH} folders, or more than {MAX_FILES} files")
                if entry.is_dir(follow_symlinks=False):
                    places.append((path, depth + 1))
                elif (name := path.relative_to(folder).as_posix()) not in (*manifest["files"], MANIFEST, SIGNATURE):
                    found.append(name)
    return sorted(found)


def _check_place(folder: Path, path: Path, links_into: Path | None) -> None:
    home = path.parent.resolve() / path.name if not path.is_symlink() else path.resolve()
    allowed = [folder.resolve()] if not path.is_symlink() else []
    allowed += [links_into.resolve()] if links_into is not None else []
    if not any(home.is_relative_to(root) for root in allowed):
        raise FileError(f"{folder}: {path.relative_to(folder)} is, or lies behind, a link out of the folder")

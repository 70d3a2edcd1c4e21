"""Files in and out without trust: safetensors checked before they are read, folders written whole or not at all.

The safetensors layout is 8 bytes little-endian header length, a JSON header, one data buffer
(https://huggingface.co/docs/safetensors). Everything the header claims is checked against the size of the file before
anything is allocated, so memory stays bounded by the file and the two limits below.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import FileError

__all__ = [
    "MANIFEST",
    "check_name",
    "read_header",
    "read_json",
    "read_manifest",
    "read_tensors",
    "recover",
    "sha256",
    "verify_folder",
    "write_folder",
    "write_manifest",
    "write_tensors",
]

MANIFEST = "manifest.json"
MAX_HEADER = 16 * 2**20  # an SDXL checkpoint's header is below 1 MiB
MAX_JSON = 64 * 2**20
_ITEM_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64"), 64),
}
_RENAME_EXCHANGE = 2


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
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
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
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
    """Write tensors and metadata in sorted order, so that equal weights make equal files."""
    ordered = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    save_file(ordered, path, metadata={"format": "pt", **(metadata or {})})
    _sort_metadata(path)
    path.chmod(0o666 & ~_umask())  # safetensors keeps its files to their owner; these are to be shared


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
    """A JSON file of bounded size."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise FileError(f"{path}: larger than {MAX_JSON} bytes")
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: not valid JSON ({_brief(error)})") from error


# ---------------------------------------------------------------------------------------------- manifest


def check_name(name: object) -> str:
    """A relative POSIX path that stays inside its folder; anything else is a `FileError`."""
    ok = isinstance(name, str) and 0 < len(name) <= 512 and not re.search(r"[\\\x00-\x1f]", name)
    if ok:
        path = PurePosixPath(str(name))
        ok = (
            not path.is_absolute()
            and ".." not in path.parts
            and path.as_posix() == name != "."
            and ":" not in str(name)
        )
    if not ok:
        raise FileError(f"manifest entry {str(name)[:120]!r} is not a plain relative path inside the folder")
    return str(name)


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """`manifest.json`: sha256 and size of every file in `folder`, and `facts` (kind, base identity, versions)."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2, sort_keys=True) + "\n", "utf-8")


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
    """Check every file the manifest names and that no unnamed weights lie beside them; returns the manifest.

    `links_into`: where symbolic links may lead (the Hub's cache keeps its files as links); by default nowhere.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        _check_place(folder, path, links_into)
        if not path.is_file():
            raise FileError(f"{folder}: {name} is in the manifest but not in the folder")
        if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
            raise FileError(f"{folder}: {name} is not the file the manifest was written for; get the folder again")
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if (
            path.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}
            and name not in manifest["files"]
        ):
            raise FileError(f"{folder}: {name} is not in the manifest; remove it")
    return manifest


def _check_place(folder: Path, path: Path, links_into: Path | None) -> None:
    home = path.parent.resolve() / path.name if not path.is_symlink() else path.resolve()
    allowed = [folder.resolve()] if not path.is_symlink() else []
    allowed += [links_into.resolve()] if links_into is not None else []
    if not any(home.is_relative_to(root) for root in allowed):
        raise FileError(f"{folder}: {path.relative_to(folder)} is, or lies behind, a link out of the folder")


# ---------------------------------------------------------------------------------------------- folders, whole or not


@contextlib.contextmanager
def write_folder(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder; on success it takes `target`'s place in one step, on error it vanishes.

    An existing `target` is exchanged atomically (`renameat2(RENAME_EXCHANGE)`, Linux), so a reader, or a kill at any
    moment, finds the old folder or the new one. Where the file system cannot exchange, the old folder is moved aside
    first; if the machine dies between those two renames, the next write (or `recover`) puts it back.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-{os.getpid()}-", dir=target.parent))
    try:
        stage.chmod(0o755)
        yield stage
        _sync_tree(stage)
        _take_place(stage, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def recover(target: Path) -> None:
    """Put back a folder that a dead process had moved aside, and remove unfinished ones."""
    for aside in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(aside, target)
    for stage in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
        pid = stage.name.removeprefix(f".{target.name}.new-").split("-")[0]
        if not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(stage, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and is someone else's
    return True


def _take_place(stage: Path, target: Path) -> None:
    if not target.exists():
        os.rename(stage, target)
        return
    if _exchange(stage, target):
        return  # `stage` now holds the old folder, and is removed by the caller
    aside = target.parent / f".{target.name}.old-{os.getpid()}"
    os.rename(target, aside)
    os.rename(stage, target)
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically; False where kernel, C library or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd = -100
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

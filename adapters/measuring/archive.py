"""A folder of results as one small file: the same bytes for the same folder, unpacked without trust."""

from __future__ import annotations

import bz2
import contextlib
import copy
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..errors import AdapterError, FileError
from ..machine import exhausted

__all__ = ["pack", "unpacked"]

MAX_BYTES, MAX_ENTRIES = 256 * 2**20, 10_000
PIECE = 2**16
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
_DAMAGED = (
    *(OSError, EOFError, ValueError, LookupError, NotImplementedError, RuntimeError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can say: a file's own would make equal folders unequal


def pack(folder: Path, archive: Path) -> None:
    """Write the files of `folder` to a zip `archive`, whole or not at all."""
    with files.write_file(archive) as part, zipfile.ZipFile(part, "w") as zipped:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _LONG_AGO)
            entry.external_attr = 0o644 << 16
            zipped.writestr(entry, path.read_bytes(), zipfile.ZIP_BZIP2)  # smallest for such tables


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder `path`, or a temporary one with what the zip `path` holds.

    Raises `FileError` for what is no zip, a name that leads out of the folder, or more than 256 MiB.
    """
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory() as home:
        try:
            _unpack(path, Path(home))
            yield Path(home)
        except AdapterError as error:  # where the reader has it, not where it lay for a moment
            raise type(error)(str(error).replace(home, str(path))) from error


def _unpack(path: Path, home: Path) -> None:
    try:
        with files.opened(path) as file, zipfile.ZipFile(file) as zipped:
            entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
            names = {files.check_name(entry.filename) for entry in entries}
            if len(names) < len(entries) or len(entries) > MAX_ENTRIES:
                raise FileError(f"{path}: {len(entries)} files, {len(names)} names; at most {MAX_ENTRIES}, each once")
            left = MAX_BYTES
            for entry in entries:
                if entry.compress_type not in _METHODS:
                    raise FileError(
                        f"{path}: {entry.filename} is packed by method {entry.compress_type}; pack it again with "
                        "deflate or bzip2"
                    )
                left -= _extract(zipped, entry, home / entry.filename, left)
                if left < 0:
                    raise FileError(f"{path}: unpacks to more than {MAX_BYTES} bytes")
    except FileError:
        raise
    except _DAMAGED as error:
        if exhausted(error):
            raise
        raise FileError(f"{path}: neither a folder nor a whole zip of one ({error})") from error


def _extract(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, limit: int) -> int:
    """Unpack one file, not much further than `limit` bytes, whatever its header claims; returns its size."""
    size = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    pieces = _bunzipped(zipped, entry) if entry.compress_type == zipfile.ZIP_BZIP2 else _pieces(zipped, entry)
    with target.open("wb") as out:
        for data in pieces:
            size += out.write(data)
            if size > limit:
                break
    return size


def _pieces(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    with zipped.open(entry) as source:
        while data := source.read(PIECE):
            yield data


def _bunzipped(zipped: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """As `_pieces`, in pieces of bounded size: zipfile unpacks bzip2 a million times larger than it was at once."""
    raw = copy.copy(entry)
    raw.compress_type, raw.file_size = zipfile.ZIP_STORED, raw.compress_size
    del raw.CRC  # it is of what comes out
    unpack, digest, size = bz2.BZ2Decompressor(), 0, 0
    with zipped.open(raw) as source:
        while not unpack.eof:
            packed = source.read(PIECE) if unpack.needs_input else b""
            if unpack.needs_input and not packed:
                raise EOFError(f"{entry.filename} is cut off")
            data = unpack.decompress(packed, PIECE)
            digest, size = zlib.crc32(data, digest), size + len(data)
            yield data
    if (digest, size) != (entry.CRC, entry.file_size):
        raise zipfile.BadZipFile(f"{entry.filename} is not what was packed")

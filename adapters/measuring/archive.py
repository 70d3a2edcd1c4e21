"""A folder of results as one small file: the same bytes for the same folder, unpacked without trust."""

from __future__ import annotations

import contextlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..errors import AdapterError, FileError

__all__ = ["pack", "unpacked"]

MAX_BYTES = 256 * 2**20
_DAMAGED = (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
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
        with zipfile.ZipFile(path) as zipped:
            left = MAX_BYTES
            for entry in zipped.infolist():
                if entry.is_dir():
                    continue
                target = home / files.check_name(entry.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(entry) as source:
                    data = source.read(left + 1)  # whatever the header claims
                left -= len(data)
                if left < 0:
                    raise FileError(f"{path}: unpacks to more than {MAX_BYTES} bytes")
                target.write_bytes(data)
    except FileError:
        raise
    except _DAMAGED as error:
        raise FileError(f"{path}: neither a folder nor a whole zip of one ({error})") from error

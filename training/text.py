"""Files that users give: pictures, and text in UTF-8, with or without the byte order mark of Windows editors."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from .errors import TrainingError

__all__ = ["read_file", "read_text"]


MAX_TEXT = 2**26  # bytes
MAX_FILE = 2**30  # bytes; a photograph of 100 megapixels with 16 bits a channel has 600 MB


def read_file(path: Path, *, limit: int = MAX_FILE, pipe: bool = False) -> bytes:
    """A file's bytes. What else lies in folders (pipes, devices) may have no end, or none to wait for.

    `adapters.files.read_bytes` is for what this project wrote; this one is for what users give, and loads no torch.

    Args:
        path: of a regular file.
        limit: bytes that it may have.
        pipe: a pipe will do, and is waited for.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if pipe else os.O_NONBLOCK))
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or (pipe and stat.S_ISFIFO(mode))):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return data


def read_text(path: str | Path, called: str = "") -> str:
    """The whole text of a file.

    Args:
        path: of the file.
        called: the setting that names the file, for the message; such a file may be a pipe, as of a shell's `<(…)`.

    Raises:
        TrainingError: it cannot be read, or is in another encoding.
    """
    name = f"{called} {path}".strip()
    try:
        file = Path(path).expanduser()
        data = read_file(file, limit=MAX_TEXT, pipe=bool(called))
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise TrainingError(f"{name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        found = (
            "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"byte {error.start + 1} is {data[error.start]:#x}"
        )
        raise TrainingError(f"{name} is not UTF-8 text ({found}); save it as UTF-8") from error
    if "\0" in text:
        raise TrainingError(f"{name} is not UTF-8 text (it has zero bytes, as UTF-16 has); save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")

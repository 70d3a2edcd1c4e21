"""Text files that users write: UTF-8, with or without the byte order mark that Windows editors put first."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

from .errors import TrainingError

__all__ = ["read_bytes", "read_text"]


def read_bytes(path: Path) -> bytes:
    """A regular file's bytes; what else lies in folders (pipes, devices) may have no end, or none to wait for.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return path.read_bytes()


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
        data = file.read_bytes() if called else read_bytes(file)
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

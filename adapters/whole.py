"""Files and folders that appear whole or not at all, and what dead processes left of them.

What is being written lies hidden beside its target as `.NAME.new-HOST-PID-XXXXXXXX`, is flushed to the disk and takes
the target's place in one step. So a reader, or a kill at any moment, finds the old one or the new one. A target that is
a symbolic link is followed: what it leads to is replaced, and the link stays. A device is never replaced, nor anything
else at the end of a link but a file or a folder: the administrator could, and `/dev/null` would be an ordinary file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["append_line", "recover", "sweep", "write_bytes", "write_file", "write_folder", "write_text"]

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_LEFT = re.compile(r"\.(?P<name>.*)\.(?P<kind>new|old)-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-\w+")
_FORGOTTEN = 24 * 3600  # seconds after which what a process of another machine left is taken for dead
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def write_file(target: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a path to write to; on success it takes `target`'s place in one step, on error it vanishes.

    A folder may be made at the path as well, see `write_folder`.

    Args:
        target: its folder is made where it is missing.
        sync: flush to the disk first. False is for what is checked when it is read and can be made again.

    Raises:
        OSError: naming `target`, also where the failing call did not name a file.
    """
    target = _followed(target)
    part = _beside(target, "new")
    try:
        with _placed(part, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield part
            if sync:
                for path in [*part.rglob("*"), part]:  # of a file there is nothing below
                    _sync(path)
            _take_place(part, target)
            if sync:
                _sync(target.parent)
    finally:
        _remove(part)


def write_bytes(target: str | Path, data: bytes, *, sync: bool = True) -> None:
    """A whole file of these bytes, see `write_file`.

    Args:
        target: path of the file; its folder is made where it is missing.
        data: its whole content.
        sync: whether it must survive a loss of power, see `write_file`.
    """
    with write_file(target, sync=sync) as part:
        part.write_bytes(data)


def write_text(target: str | Path, text: str) -> None:
    """A whole UTF-8 file, its line ends as they are, see `write_file`."""
    write_bytes(target, text.encode())


def append_line(target: Path, line: str) -> None:
    """Add a line to a log, with nothing kept back in memory; a full disk is an `OSError` that names the file."""
    with _placed(target, target), target.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


@contextlib.contextmanager
def write_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty sibling folder; on success it takes `target`'s place in one step, on error it vanishes.

    An existing `target` is exchanged atomically (`renameat2(RENAME_EXCHANGE)`, Linux). Where the file system cannot
    exchange, the old folder is moved aside first; if the machine dies between those two renames, the next write (or
    `recover`) puts it back.

    Raises:
        OSError: naming `target`, also where the failing call did not name a file.
    """
    with write_file(target) as stage:
        recover(_followed(target))
        stage.mkdir()
        yield stage


def _followed(target: str | Path) -> Path:
    path = Path(os.path.abspath(target))
    linked = path.is_symlink()
    if linked:
        path = Path(os.path.realpath(path))
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there yet, or what follows will say it better
        return path
    device, usual = stat.S_ISCHR(mode) or stat.S_ISBLK(mode), stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    if device or (linked and not usual):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    return path


def _beside(target: Path, kind: str) -> Path:
    """A free hidden name that says whose it is; a long name is cut, as the file system allows 255 bytes."""
    name = os.fsdecode(os.fsencode(target.name)[:180])
    return target.with_name(f".{name}.{kind}-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _placed(part: Path, target: Path) -> Iterator[None]:
    """Errors of the disk name the target: write(2) and safetensors do not say where they failed."""
    try:
        yield
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error
    except OSError as error:
        if error.errno is None:
            raise
        where = str(target if error.filename is None else error.filename).replace(str(part), str(target))
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), where) from error


# ---------------------------------------------------------------------------------------------- after a kill


def recover(target: Path) -> None:
    """Put back a folder that a dead process had moved aside, and remove what it left unfinished."""
    for path, found in _left(target.parent):
        if found["name"] != os.fsdecode(os.fsencode(target.name)[:180]):
            continue
        if found["kind"] == "old" and not target.exists():
            os.rename(path, target)
        else:
            _remove(path)


def sweep(folder: Path) -> None:
    """Remove what dead processes left unfinished anywhere under `folder`; what they had moved aside is put back."""
    for place, folders, _ in os.walk(folder):
        for path, found in _left(Path(place)):
            target = path.with_name(found["name"])
            if found["kind"] == "old" and not target.exists():
                os.rename(path, target)
            else:
                _remove(path)
        folders[:] = [name for name in folders if not _LEFT.fullmatch(name)]


def _left(folder: Path) -> list[tuple[Path, re.Match[str]]]:
    """What lies in `folder` under the hidden names of processes that are gone."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [(folder / name, match) for name in names if (match := _LEFT.fullmatch(name))]
    return [(path, match) for path, match in found if _gone(path, match)]


def _gone(path: Path, found: re.Match[str]) -> bool:
    if found["host"] == _HOST:
        return not _alive(int(found["pid"]))
    try:
        return time.time() - path.lstat().st_mtime > _FORGOTTEN
    except OSError:
        return False  # removed meanwhile


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives, and is someone else's
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


# ---------------------------------------------------------------------------------------------- the last step


def _take_place(stage: Path, target: Path) -> None:
    if not stage.is_dir() or not target.exists():
        os.replace(stage, target)
        return
    if not target.is_dir():  # somebody's file, not an older version of what was made
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if _exchange(stage, target):
        return  # `stage` now holds the old folder, and is removed by the caller
    aside = _beside(target, "old")
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


def _sync(path: Path) -> None:
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

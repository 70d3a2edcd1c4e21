"""One run at a time in a folder: the second one is told who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from adapters import files

from .errors import TrainingError

__all__ = ["LOCK", "held"]

LOCK = ".lock"
TRIES = 100
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_SELF = secrets.token_hex(8)  # a process number alone may be another machine's or container's


@contextlib.contextmanager
def held(out: str | Path) -> Iterator[None]:
    """Holds `out/.lock` while in the context; `out` is made where it is missing, and goes again if it stayed empty.

    The lock is the kernel's (`flock`), so it ends with the process, however that ends: a file that a dead process left
    is taken over. Within one process it may be taken again: the stages of a recipe, and training inside them. What dead
    processes left unfinished under `out` is removed.

    Raises:
        TrainingError: another process holds it, with its number, host and time; or `out` cannot be written.
    """
    out = Path(os.path.realpath(out))
    made = [place for place in (out, *out.parents) if not place.exists()]
    descriptor = None
    try:
        descriptor = _taken(out)
        if descriptor is not None:
            files.sweep(out)
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # `out` may be gone
                (out / LOCK).unlink()
            os.close(descriptor)
        for place in made:
            with contextlib.suppress(OSError):  # something was put there
                place.rmdir()


def _taken(out: Path) -> int | None:
    """The open lock; None where this very process has it already."""
    path = out / LOCK
    try:
        for _ in range(TRIES):
            out.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(path, _FLAGS, 0o644)
            except FileNotFoundError:
                continue  # a run that left nothing in it removed the folder just now
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    os.close(descriptor)
                    warnings.warn(
                        f"{path}: this file system has no locks, so keep other runs out yourself", stacklevel=5
                    )
                    return None
                if not isinstance(error, BlockingIOError):
                    raise
                holder = _holder(descriptor)
                os.close(descriptor)
                if holder.get("run") == _SELF and holder.get("pid") == os.getpid():
                    return None
                raise TrainingError(_busy(out, holder)) from None
            if _still_there(path, descriptor):
                _sign(out, descriptor)
                return descriptor
            os.close(descriptor)  # its holder removed it just now
        raise TrainingError(f"out {out}: other runs come and go there all the time; change out")
    except OSError as error:
        raise TrainingError(f"out {out} cannot be written ({error.strerror}); change out or its permissions") from error


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(out: Path, descriptor: int) -> None:
    """Writes who holds the lock. What another machine left is not ours to take: it may not share our kernel's locks."""
    holder, host = _holder(descriptor), socket.gethostname()
    if holder.get("host", host) != host:
        os.close(descriptor)
        raise TrainingError(f"{_busy(out, holder)}. If that process is gone, delete {out / LOCK}")
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    data = json.dumps({"pid": os.getpid(), "host": host, "since": since, "run": _SELF}).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, data, 0)


def _holder(descriptor: int) -> dict[str, object]:
    """Who signed the lock; empty where nobody has yet."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _busy(out: Path, holder: dict[str, object]) -> str:
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}, since {holder.get('since', 'just now')}"
    return f"out {out} is in use by another run ({who}); wait for it, stop it, or change out"

"""Errors of the machine rather than of the code or its input: memory, disks, names. One line each, with the remedy."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import sys
from pathlib import Path

__all__ = ["exhausted", "explain"]

_WRITE_ELSEWHERE = "free space, or write elsewhere"
_ADVICE = {
    errno.ENOSPC: _WRITE_ELSEWHERE,
    errno.EDQUOT: _WRITE_ELSEWHERE,
    errno.EFBIG: "the file system or a limit (`ulimit -f`) allows no file as large: raise it, or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOTDIR: "a file is where a folder is needed: move it, or name another place",
    errno.EISDIR: "a folder is where a file is needed: move it, or name another place",
    errno.EEXIST: "something else has this name: move it, or name another place",
    errno.ENOTEMPTY: "something else has this name: move it, or name another place",
    errno.ENOENT: "was it, or its folder, moved or deleted meanwhile? Start again",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ELOOP: "its symbolic links lead in a circle: mend them",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.EIO: "the disk or its connection failed: check it before you go on",
    errno.ESTALE: "the network share was lost: connect it again",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXHAUSTED = (*_FULL, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)
# torch's CPU allocator, oneDNN, CUDA and its libraries, C++, numpy, the loader of shared libraries, threads.
_MEMORY = re.compile(
    r"(can(no|')t allocate memory|out of memory|could not create a (primitive|memory)|bad_alloc|ALLOC_FAILED|"
    r"unable to allocate|failed to map segment|can't start new thread)",
    re.IGNORECASE,
)
_LESS = (
    "lower train.batch_size, sampling.batch_size or data.resolution, or turn on train.gradient_checkpointing; "
    "what was saved before is intact"
)


def explain(error: BaseException) -> str | None:
    """What the machine could not do, where, how much was free, and what to change; None for any other error."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return _memory(error)
    if isinstance(error, OSError) and error.errno in _ADVICE:
        return _disk(error)
    if found := re.search(r"os error (\d+)", str(error)):  # Rust's, of safetensors and tokenizers
        return explain(OSError(int(found[1]), os.strerror(int(found[1]))))
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if short or (isinstance(error, RuntimeError | ImportError) and _MEMORY.search(str(error))):
        return _memory(error)
    if isinstance(error, UnicodeEncodeError) and re.search("[\ud800-\udfff]", error.object):
        return f"the name {error.object[:200]!r} is not UTF-8; rename the file or folder"
    return None


def exhausted(error: BaseException) -> bool:
    """Whether memory, disk or descriptors ran out, which says nothing about the file that was being read."""
    if isinstance(error, OSError):
        return error.errno in _EXHAUSTED
    return explain(error) is not None and not isinstance(error, UnicodeError)


def _disk(error: OSError) -> str:
    said = error.strerror or os.strerror(error.errno or 0)
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    free = _free(Path(where)) if where and error.errno in _FULL else ""
    kept = "; what was saved before is intact" if error.errno in _FULL else ""
    return f"{said}{free}{f': {_shown(where)!r}' if where else ''}; {_ADVICE[error.errno or 0]}{kept}"


def _shown(path: str) -> str:
    return path if len(path) <= 300 else f"{path[:120]}…{path[-120:]}"


def _free(path: Path) -> str:
    """What is left on the file system that a path lies on, or would."""
    for place in (path, *path.absolute().parents):
        try:
            return f" ({shutil.disk_usage(place).free / 2**20:.1f} MiB free)"
        except OSError:
            continue
    return ""


def _memory(error: BaseException) -> str:
    said = " ".join(str(error).split())[:300] or "an allocation failed"
    torch = sys.modules.get("torch")
    if "CUDA" in said and torch is not None and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        left = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU free"
    else:
        left = _available()
    return f"out of memory ({left}): {said}; {_LESS}"


def _available() -> str:
    """The main memory that is free, and the process's own limit where it has one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    own = "" if limit == resource.RLIM_INFINITY else f", the process is limited to {limit / 2**30:.1f} GiB"
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return f"how much is free is not known{own}"
    return f"{kib / 2**20:.1f} GiB free{own}"

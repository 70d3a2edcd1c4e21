"""A whole pipeline on a tiny base that costs two seconds: a server imports everything once and forks its runs.

Each run is a process of its own that runs the command line, from photos to release, in its own folder. It can be
killed from outside, can send itself a signal at its n-th change of a file, and can be short of memory or disk.
"""

from __future__ import annotations

import csv
import ctypes
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ARMS = {"CFG": {"method": "cfg", "guidance_scale": 4.0}, "S-CFG": {"guidance_scale": 4.0}}
PATIENCE = 600  # seconds after which a run of seconds counts as hanging, also on a machine that does much else
PLENTY = 64 * 2**20  # bytes of disk that a whole run does not need
# What differs between two runs of the same command.
PASSING = ("seconds", "peak memory of the process, MiB", "mean seconds")
NUMBERS = re.compile(r"[\d.]+")
CONTEXT = multiprocessing.get_context("forkserver")


def serve() -> None:
    """Start the server; it must not have more threads than one, or its children could not be trusted."""
    path = os.pathsep.join(filter(None, (str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": path}
    CONTEXT.set_forkserver_preload(["fault_imports"])


def command(base: Path, photos: Path) -> list[str]:
    """From photos to release: class images, disk cache, checkpoints, snapshots, tuning, measuring, shipping."""
    settings: dict[str, Any] = {
        "base.path": base,
        "data.source": photos,
        "data.resolution": 32,
        "data.cache": "disk",
        "data.cache_folder": "run/cache",
        "lora.rank": 2,
        "lora.dropout": 0.2,
        "dreambooth.class_prompt": "a dog",
        "dreambooth.class_images": 3,
        "dreambooth.steps": 2,
        "train.steps": 12,
        "train.batch_size": 2,
        "train.learning_rate": 1e-2,
        "train.ema": 0.9,
        "train.log_every": 1,
        "train.save_every": 4,
        "train.snapshot_every": 6,
        "train.trackers": [],
        "train.validation.prompts": ["a dog"],
        "train.validation.every": 6,
        "train.validation.steps": 2,
        "sampling.steps": 2,
        "tune.prompts": ["a fox", "a big box"],
        "tune.seeds": [101],
        "tune.guidance_scales": [2.0, 4.0],
        "measure.arms": ARMS,
        "measure.prompts": ["a red dog", "a cat in a box"],
        "measure.seeds": [1, 2],
        "measure.metrics": ["saturation", "contrast"],
        "measure.overlays": 0,
        "ship.title": "x",
        "out": "run",
    }
    words = [f"--{name}={json.dumps(v) if isinstance(v, list | dict) else v}" for name, v in settings.items()]
    return ["train", "--recipe=dreambooth_lora", *words]


@dataclass(frozen=True)
class Said:
    """How a run ended; the code is minus the signal's number where a signal ended it."""

    code: int
    out: str
    err: str
    seconds: float
    changes: int = 0  # of files

    @property
    def error(self) -> str:
        """The one line of a run that was refused, and below it the list of problems in a folder, if it has one."""
        before, line, after = self.err.partition("error: ")
        assert self.code == 2, (self.code, self.err)
        assert line, self.err
        assert not before or before.endswith("\n"), self.err
        assert "error: " not in after, self.err
        assert all(one.startswith("  ") for one in after.splitlines()[1:]), self.err
        assert "Traceback" not in self.err, self.err
        return line + after


class Run:
    """One start of the command line in `folder`."""

    def __init__(self, folder: Path, words: list[str], **short: Any) -> None:
        self._said = Path(tempfile.mkdtemp(prefix="said-", dir=folder.parent))
        self._began = time.perf_counter()
        self.process: ForkServerProcess = CONTEXT.Process(target=_run, args=(folder, words, self._said), kwargs=short)
        self.process.start()

    def send(self, number: int, after: float, *, unless: Path) -> bool:
        """Send a signal so many seconds after the start; False where that path was there before, or the run gone."""
        self.process.join(after)
        if self.process.exitcode is not None or unless.exists():
            return False
        os.kill(self.process.pid, number)
        return True

    def stopped(self) -> None:
        """Wait until a SIGSTOP has reached it."""
        while self.process.exitcode is None:
            state = Path(f"/proc/{self.process.pid}/stat").read_text("utf-8").rpartition(")")[2].split()[0]
            if state == "T":
                return
            time.sleep(0.02)
        raise AssertionError("it ended before it was stopped")

    def ended(self) -> Said:
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"a run hangs: {self._said}")
        out, err, changes = (
            path.read_text("utf-8") if (path := self._said / name).exists() else ""
            for name in ("out", "err", "changes")
        )
        return Said(code, out, err, time.perf_counter() - self._began, int(changes or 0))


def run(folder: Path, words: list[str], **short: Any) -> Said:
    """Start the command line, and wait for its end."""
    return Run(folder, words, **short).ended()


def _run(
    folder: Path, words: list[str], said: Path, *, change: tuple[int, int] | None = None, memory: int | None = None
) -> None:
    """In the forked process.

    Args:
        folder: where it runs.
        words: the command line.
        said: folder that receives what it prints.
        change: (n, signal): at its n-th change of a file the process sends itself the signal.
        memory: bytes of address space beyond what the process has already.
    """
    _alone(folder, said)
    changes = _watched(*(change or (0, 0)))
    if memory is not None:
        now = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory,) * 2)
    code = _main(words)
    (said / "changes").write_text(str(next(changes) - 1))
    sys.exit(code)


def _alone(folder: Path, said: Path) -> None:
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _main(words: list[str]) -> int:
    from recipes.__main__ import main

    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def _watched(nth: int, number: int) -> Iterator[int]:
    """Counts changes of files, and sends this process a signal at the n-th: before that change is made."""
    changes = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
    count = itertools.count(1)
    writing = os.O_WRONLY | os.O_RDWR

    def hook(event: str, args: tuple[Any, ...]) -> None:
        changing = event in changes or (event == "open" and isinstance(args[2], int) and bool(args[2] & writing))
        if changing and next(count) == nth:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return count


# ---------------------------------------------------------------------------------------------- a small disk


def short_of_disk(folder: Path, words: list[str], size: int) -> tuple[Said, Said]:
    """The command line on a file system of `size` bytes, then once more with room; what it made ends up in `folder`.

    Raises `PermissionError` where a small file system cannot be mounted.
    """
    said = [Path(tempfile.mkdtemp(prefix="said-", dir=folder.parent)) for _ in range(2)]
    process = CONTEXT.Process(target=_short_of_disk, args=(folder, words, size, said))
    process.start()
    process.join(2 * PATIENCE)
    if process.exitcode == 77:
        raise PermissionError("a small file system cannot be mounted")
    assert process.exitcode == 0, process.exitcode
    return tuple(  # type: ignore[return-value]
        Said(
            int((place / "code").read_text("utf-8")),
            (place / "out").read_text("utf-8"),
            (place / "err").read_text("utf-8"),
            0.0,
        )
        for place in said
    )


def _short_of_disk(folder: Path, words: list[str], size: int, said: list[Path]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mount, remount = 0x10000000, 0x00020000, 32
    user, group = os.getuid(), os.getgid()
    small = folder / "small"
    small.mkdir()
    flags = new_mount if user == 0 else new_mount | new_user
    if libc.unshare(flags):
        os._exit(77)
    if user:
        Path("/proc/self/setgroups").write_text("deny", "utf-8")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", "utf-8")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", "utf-8")
    libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)  # what is mounted here stays here
    for room, place, flag in ((size, said[0], 0), (PLENTY, said[1], remount)):
        if libc.mount(b"tmpfs", os.fsencode(small), b"tmpfs", flag, f"size={room}".encode()):
            os._exit(77)
        child = os.fork()
        if child == 0:
            _alone(small, place)
            code = _main(words)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        (place / "code").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
    subprocess.run(["cp", "-r", str(small / "run"), str(folder / "kept")], check=False)


# ---------------------------------------------------------------------------------------------- what is compared


def release(out: Path) -> dict[str, object]:
    """All that a release holds, by name, but for the time it took: two of these are equal, or a promise is broken."""
    return {path.relative_to(out).as_posix(): _content(path) for path in sorted(out.rglob("*")) if path.is_file()}


def _content(path: Path) -> object:
    if path.suffix == ".png":
        return Image.open(path).tobytes()
    if path.name == "gains.json":
        return _lasting(json.loads(path.read_text("utf-8")))
    if path.suffix == ".csv":
        rows = csv.DictReader(path.open(encoding="utf-8"))
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    if path.name in ("report.html", "README.md"):
        return NUMBERS.sub("", path.read_text("utf-8"))  # some are seconds; gains.json has the others
    if path.name == "manifest.json":
        return None  # digests of the others
    return path.read_bytes()


def _lasting(value: object) -> object:
    if isinstance(value, dict):
        return {name: _lasting(item) for name, item in value.items() if name not in PASSING}
    return [_lasting(item) for item in value] if isinstance(value, list) else value

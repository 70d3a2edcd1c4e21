"""Kills, full disks, too little memory, twins and damage over the whole pipeline: nothing lost, nothing silent.

Each case draws its moment from its number, so that it can be run again alone. `FAULTS=200` runs 200 of each kind that
has no number of its own; `--last-failed` goes on with those that failed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fault_runs
import pytest
from fault_runs import Run, Said, run

pytestmark = pytest.mark.slow
FAULTS = int(os.environ.get("FAULTS", "12"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
DISKS, TWINS = 20, 20
MEMORY = (4, 16, 32, 48, 64, 96, 128, 256)  # MiB beyond what a process has before it starts


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to."""

    out: Path
    words: list[str]
    said: Said

    def check(self, out: Path, *, log: bool = True) -> None:
        """The same release, the same losses and pictures, the same files and nothing else."""
        there, here = fault_runs.release(self.out / "release"), fault_runs.release(out / "release")
        assert there.keys() == here.keys()
        for name, content in there.items():
            assert here[name] == content, name
        assert files(out) == files(self.out)
        assert not log or losses(out) == losses(self.out)


def files(out: Path) -> set[str]:
    """Which checkpoints are kept depends on where a run was stopped."""
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    return {name for name in names if not name.startswith("checkpoints/")}


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def whole(models: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    fault_runs.serve()
    words = fault_runs.command(models / "sd15", photos / "dreambooth" / "rex")
    for name in ("first", "second"):  # the first one waits for the server's imports
        folder = tmp_path_factory.mktemp(name)
        said = run(folder, words)
        assert said.code == 0, said.err
    assert said.changes > 100
    return Whole(folder / "run", words, said)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "case").mkdir()
    return tmp_path / "case"


def killed(folder: Path, whole: Whole, number: int, *, at: float, change: bool) -> Said:
    """A run that a signal met after a fraction of its time, or of its changes of files."""
    if change:
        return run(folder, whole.words, change=(1 + int(at * whole.said.changes), number))
    while True:
        started = Run(folder, whole.words)
        # A run that has shipped is at its end, and may be gone before the signal comes.
        if started.send(number, at * whole.said.seconds, unless=folder / "run" / "release"):
            return started.ended()
        started.ended()
        shutil.rmtree(folder / "run")
        at *= 0.9


@pytest.mark.parametrize("case", range(FAULTS))
def test_after_a_kill_the_same_command_ends_as_if_it_had_not_come(case: int, whole: Whole, folder: Path) -> None:
    number, at = SIGNALS[case % 3], random.Random(case).random()
    said = killed(folder, whole, number, at=at, change=bool(case % 2))
    print(number.name, f"{at:.2f}", said.code, said.err[-300:])
    if number == signal.SIGINT:
        assert said.code == 130, said.err
        assert "Traceback" not in said.err
    else:
        assert said.code in (-number, 130), said.err
    again = run(folder, whole.words)
    assert again.code == 0, again.err
    whole.check(folder / "run")


@pytest.mark.parametrize("case", range(DISKS))
def test_a_full_disk_is_one_line_and_with_room_the_run_goes_on(case: int, whole: Whole, folder: Path) -> None:
    blocks = sum(path.lstat().st_blocks * 512 for path in whole.out.rglob("*"))
    size = 4096 + blocks * case // DISKS
    try:
        full, again = fault_runs.short_of_disk(folder, whole.words, size)
    except PermissionError as error:
        pytest.skip(str(error))
    print(size, full.code, full.err[-300:])
    if full.code:
        assert "No space left on device" in full.error
    else:
        assert case > DISKS // 2, "that disk was too small for a whole run"
    assert again.code == 0, again.err
    whole.check(folder / "kept")


@pytest.mark.parametrize("mebibytes", MEMORY)
def test_too_little_memory_is_one_line_and_leaves_what_was_there(mebibytes: int, whole: Whole, folder: Path) -> None:
    killed(folder, whole, signal.SIGKILL, at=0.5, change=True)
    kept = {path: path.read_bytes() for path in (folder / "run" / "checkpoints").rglob("*") if path.is_file()}
    assert kept
    said = run(folder, whole.words, memory=mebibytes * 2**20)
    print(mebibytes, said.code, said.err[-300:])
    if said.code:
        assert "out of memory" in said.error
        assert all(path.read_bytes() == data for path, data in kept.items() if path.parent.exists())
    again = run(folder, whole.words)
    assert again.code == 0, again.err
    whole.check(folder / "run")


@pytest.mark.parametrize("case", range(TWINS))
def test_of_two_starts_at_once_one_runs(case: int, whole: Whole, folder: Path) -> None:
    if case % 2:
        killed(folder, whole, signal.SIGKILL, at=random.Random(case).random(), change=True)
    said = [started.ended() for started in [Run(folder, whole.words) for _ in range(2)]]
    assert sorted(one.code for one in said) == [0, 2], [one.err for one in said]
    refused = next(one for one in said if one.code)
    assert "in use by another run (process " in refused.error
    whole.check(folder / "run")


@pytest.mark.parametrize("at", [0.1, 0.3, 0.45, 0.6, 0.75, 0.98])
def test_a_folder_that_is_deleted_under_a_run_is_one_line(at: float, whole: Whole, folder: Path) -> None:
    """A run that can do without what was deleted goes on; in any case the same command makes all of it anew."""
    started = Run(folder, whole.words, change=(1 + int(at * whole.said.changes), signal.SIGSTOP))
    started.stopped()
    shutil.rmtree(folder / "run")
    os.kill(started.process.pid, signal.SIGCONT)
    said = started.ended()
    print(at, said.code, said.err[-300:])
    assert said.code == 0 or "run" in said.error
    shutil.rmtree(folder / "run", ignore_errors=True)
    again = run(folder, whole.words)
    assert again.code == 0, again.err
    whole.check(folder / "run")


# ---------------------------------------------------------------------------------------------- damage


def flipped(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


def emptied(path: Path, chance: random.Random) -> None:
    os.truncate(path, 0)


def overwritten(path: Path, chance: random.Random) -> None:
    path.write_bytes(chance.choice([b"[]", b"\xff\xfe", b"null", b"{}\n", b"PK\x03\x04", b"[" * 5000]))


def exchanged(path: Path, chance: random.Random) -> None:
    """With another file of its kind."""
    out = next(place for place in path.parents if place.name == "run")
    others = [other for other in sorted(out.rglob(f"*{path.suffix}")) if other.is_file() and other != path]
    if others:
        shutil.copyfile(chance.choice(others), path)


def removed(path: Path, chance: random.Random) -> None:
    path.unlink()


def a_fifo(path: Path, chance: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path, random.Random], None]] = [
    flipped,
    flipped,
    cut,
    emptied,
    overwritten,
    exchanged,
    removed,
    a_fifo,
    a_folder,
]


@pytest.fixture(scope="module")
def stopped(whole: Whole, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What lies there after a kill in training, and after one while measuring."""
    made = {}
    for name, at in (("training", 0.45), ("measuring", 0.85)):
        made[name] = tmp_path_factory.mktemp(name)
        killed(made[name], whole, signal.SIGKILL, at=at, change=True)
    return made


@pytest.mark.parametrize("case", range(FAULTS))
@pytest.mark.parametrize("stage", ["training", "measuring"])
def test_damage_is_healed_or_named_and_never_other_weights(
    case: int, stage: str, whole: Whole, stopped: dict[str, Path], folder: Path
) -> None:
    shutil.copytree(stopped[stage] / "run", folder / "run", symlinks=True)
    chance = random.Random(case)
    damage, paths = DAMAGES[case % len(DAMAGES)], sorted(path for path in (folder / "run").rglob("*") if path.is_file())
    path = chance.choice(paths)
    print(damage.__name__, path)
    damage(path, chance)
    said = run(folder, whole.words)
    print(said.code, said.err[-300:])
    if said.code == 0:
        whole.check(folder / "run", log=path.name != "log.jsonl")  # what is cut off there is lost; it is only a log
    else:
        assert path.name in said.error or path.parent.name in said.error

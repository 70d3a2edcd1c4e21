"""One run at a time in a folder, whoever dies, and however many start at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from training import lock
from training.errors import TrainingError

FORK = multiprocessing.get_context("fork")


def hold(out: Path, ready: Any, seconds: float = 60) -> None:
    lock._SELF = "another run"  # a forked process is one, though it has its parent's number for a run
    with lock.held(out):
        (out / f".half.new-{'0' * 8}-1-ab").write_text("of another machine")
        ready.set()
        time.sleep(seconds)


def test_a_living_holder_is_named_and_a_dead_one_is_followed(tmp_path: Path) -> None:
    out, ready = tmp_path / "a" / "out", FORK.Event()
    process = FORK.Process(target=hold, args=(out, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    with pytest.raises(
        TrainingError, match=rf"in use by another run \(process {process.pid} on .*, since 2.*change out"
    ):
        lock.held(out).__enter__()
    process.kill()
    process.join()
    assert (out / lock.LOCK).exists()
    with lock.held(out):
        assert json.loads((out / lock.LOCK).read_text())["pid"] == os.getpid()
    assert not (out / lock.LOCK).exists()
    assert len(list(out.iterdir())) == 1  # another machine's process may live


def test_stages_of_one_process_nest_and_nothing_is_left(tmp_path: Path) -> None:
    with lock.held(tmp_path / "a" / "out"):
        with lock.held(tmp_path / "a" / "out"):
            pass
        assert (tmp_path / "a" / "out" / lock.LOCK).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to("real")
    with lock.held(tmp_path / "link"), lock.held(tmp_path / "real"):
        (tmp_path / "real" / "result").write_text("x")
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["result"]


def test_a_folder_that_is_deleted_meanwhile_is_no_error_of_the_lock(tmp_path: Path) -> None:
    with lock.held(tmp_path / "out"):
        (tmp_path / "out" / lock.LOCK).unlink()
        (tmp_path / "out").rmdir()


def test_a_lock_of_another_machine_is_left_to_the_user(tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).write_text('{"pid": 7, "host": "elsewhere", "since": "2026-01-01 00:00:00"}')
    with pytest.raises(TrainingError, match=r"process 7 on elsewhere.*If that process is gone, delete .*\.lock"):
        lock.held(tmp_path).__enter__()
    (tmp_path / lock.LOCK).write_text("")  # of a full disk
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("strange", [b"\xff[", b"[]", b"x" * 5000])
def test_a_lock_file_of_no_use_is_taken(strange: bytes, tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).write_bytes(strange)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()


def rush(out: Path, start: Any, counts: Any, overlaps: Any) -> None:
    lock._SELF = f"run {os.getpid()}"
    start.wait(30)
    for _ in range(30):
        try:
            with lock.held(out):
                with counts.get_lock():
                    counts[0] += 1
                mark = os.open(out.parent / "inside", os.O_CREAT | os.O_EXCL)  # fails where another is inside
                os.close(mark)
                time.sleep(0.001)
                os.unlink(out.parent / "inside")
        except TrainingError:
            with counts.get_lock():
                counts[1] += 1
        except FileExistsError:
            overlaps.set()


def test_of_many_that_start_at_once_one_runs(tmp_path: Path) -> None:
    start, overlaps, counts = FORK.Event(), FORK.Event(), FORK.Array("i", 2)
    processes = [FORK.Process(target=rush, args=(tmp_path / "out", start, counts, overlaps)) for _ in range(6)]
    for process in processes:
        process.start()
    start.set()
    for process in processes:
        process.join(60)
    assert not overlaps.is_set()
    assert counts[0] + counts[1] == 180
    assert counts[0] > 0
    assert counts[1] > 0
    assert not (tmp_path / "out" / lock.LOCK).exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match=r"out .*file/out cannot be written"):
        lock.held(tmp_path / "file" / "out").__enter__()

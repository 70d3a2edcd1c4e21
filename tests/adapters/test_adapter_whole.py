"""Files and folders appear whole or not at all: on a full disk, after a kill, through links, under long names."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from adapters import files


@contextmanager
def room(size: int) -> Iterator[None]:
    """Within, no file can grow beyond `size` bytes: the kernel then fails the write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tensors(path: Path, data: bytes) -> None:
    files.write_tensors(path, {"a": torch.frombuffer(bytearray(data), dtype=torch.uint8)})


def into_folder(target: Path, data: bytes) -> None:
    with files.write_folder(target) as stage:
        (stage / "a").write_bytes(data)


WRITERS: dict[str, Callable[[Path, bytes], object]] = {
    "bytes": files.write_bytes,
    "text": lambda path, data: files.write_text(path, data.decode()),
    "json": lambda path, data: files.write_json(path, data.decode()),
    "tensors": tensors,
    "folder": into_folder,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_no_room_leaves_the_old_one_and_names_the_target(kind: str, tmp_path: Path) -> None:
    write, target = WRITERS[kind], tmp_path / "target"
    write(target, b"old")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(OSError, match="target") as refused, room(5000):
        write(target, b"n" * 20_000)
    assert refused.value.errno == errno.EFBIG
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write(target, b"n" * 20_000)  # room again
    assert os.listdir(tmp_path) == ["target"]


def test_a_line_that_does_not_fit_names_the_log(tmp_path: Path) -> None:
    files.append_line(tmp_path / "log.jsonl", "one")
    with pytest.raises(OSError, match=r"log\.jsonl"), room(4):
        files.append_line(tmp_path / "log.jsonl", "two")
    assert (tmp_path / "log.jsonl").read_text() == "one\n"


def test_a_link_is_followed(tmp_path: Path) -> None:
    into_folder(tmp_path / "real", b"old")
    (tmp_path / "link").symlink_to("real")
    into_folder(tmp_path / "link", b"new")
    files.write_text(tmp_path / "file", "old")
    (tmp_path / "other").symlink_to("file")
    files.write_text(tmp_path / "other", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other").is_symlink()
    assert (tmp_path / "real" / "a").read_bytes() == b"new"
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "other", "real"]


def test_a_folder_never_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "release").write_text("a user's notes")
    with pytest.raises(FileExistsError, match="release"):
        into_folder(tmp_path / "release", b"new")
    assert (tmp_path / "release").read_text() == "a user's notes"
    assert os.listdir(tmp_path) == ["release"]


@pytest.mark.parametrize("kind", WRITERS)
def test_devices_and_what_links_lead_to_are_not_replaced(kind: str, tmp_path: Path) -> None:
    """A terminal of our own is the device: whoever replaces it harms nobody."""
    leader, follower = os.openpty()
    device = Path(os.ttyname(follower))
    os.mkfifo(tmp_path / "fifo")
    for name, goal in (("to a device", device), ("to a FIFO", tmp_path / "fifo"), ("loop", tmp_path / "loop")):
        (tmp_path / name).symlink_to(goal)
    for target in (device, *(tmp_path / name for name in ("to a device", "to a FIFO", "loop"))):
        with pytest.raises(FileExistsError):
            WRITERS[kind](target, b"x")
    assert device.is_char_device()
    assert (tmp_path / "fifo").is_fifo()
    assert sorted(os.listdir(tmp_path)) == ["fifo", "loop", "to a FIFO", "to a device"]
    os.close(leader)
    os.close(follower)


def test_a_name_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    files.write_text(tmp_path / ("n" * 255), "x")
    into_folder(tmp_path / ("ü" * 127), b"x")
    assert len(os.listdir(tmp_path)) == 2


def dies_within(folder: Path) -> None:
    with files.write_file(folder / "sub" / "file") as part, files.write_folder(folder / "folder") as stage:
        part.write_text("half")
        (stage / "a").write_text("half")
        os._exit(1)


def test_what_the_dead_left_is_swept_and_the_living_are_let_be(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=dies_within, args=(tmp_path,))
    process.start()
    process.join()
    assert len(list(tmp_path.rglob(".*"))) == 2
    (tmp_path / ".mine.new-notes").write_text("a user's")
    with files.write_file(tmp_path / "living") as part:
        part.write_text("x")
        files.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mine.new-notes", "living", "sub"]
    assert not os.listdir(tmp_path / "sub")


def test_a_folder_that_a_dead_process_moved_aside_is_put_back(tmp_path: Path) -> None:
    into_folder(tmp_path / "a", b"old")
    process = multiprocessing.get_context("fork").Process(target=dies_between_renames, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert not (tmp_path / "a").exists()
    files.sweep(tmp_path)
    assert (tmp_path / "a" / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def dies_between_renames(target: Path) -> None:
    from adapters import whole

    whole._exchange = lambda a, b: False
    rename, calls = os.rename, []

    def once(a: Path, b: Path) -> None:
        if calls:
            os._exit(1)
        calls.append(rename(a, b))

    os.rename = once
    into_folder(target, b"new")

"""What the machine cannot do is one line: what, where, how much was free, what to change. The errors here are real."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_adapter_whole import room

from adapters import __main__ as command
from adapters import keys
from adapters.files import append_line
from adapters.machine import explain
from adapters.ship import ship


def error_of(act: Callable[[], object]) -> BaseException:
    try:
        act()
    except BaseException as error:
        return error
    raise AssertionError("it went well")


def fill(path: Path) -> None:
    with room(1000):
        save_file({"a": torch.zeros(10_000)}, path)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: torch.empty(2**50), r"out of memory \(.* GiB free.*allocate 4503599627370496 bytes.*train.batch_size"),
        (lambda: np.empty(2**50), r"out of memory \(.*[Uu]nable to allocate.*before is intact"),
        (lambda: bytearray(2**62), r"out of memory \(.* GiB free"),
        (lambda: append_line(Path("/dev/full"), "x"), r"No space left on device \(.* MiB free\).*write elsewhere"),
        (
            lambda: Path("/dev/null/x").write_text("x", encoding="utf-8"),
            r"Not a directory: '/dev/null/x'; a file is where a folder",
        ),
        (
            lambda: Path("/tmp", "n" * 300).write_text("x", encoding="utf-8"),
            r"name too long: '/tmp/nnn.*…nnn.*'; use shorter names",
        ),
        (lambda: Path("/tmp").mkdir(), r"File exists: '/tmp'; something else has this name"),
        (
            lambda: Path("/tmp/gone/x").write_text("x", encoding="utf-8"),
            r"No such file or directory: '/tmp/gone/x'.*deleted meanwhile",
        ),
        (lambda: "caf\udce9.png".encode(), r"the name 'caf\\udce9.png' is not UTF-8; rename"),
    ],
)
def test_the_machine_s_errors(act: Callable[[], object], said: str) -> None:
    line = explain(error_of(act))
    assert line is not None
    assert "\n" not in line

    assert re.search(said, line), line


def test_the_error_of_safetensors_has_no_number_and_is_understood(tmp_path: Path) -> None:
    line = explain(error_of(lambda: fill(tmp_path / "x")))
    assert line is not None
    assert line.startswith("File too large; ")


@pytest.mark.parametrize(
    "words",
    ["could not create a primitive", "CUDA out of memory. Tried 2.00 GiB", "CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_other_libraries_out_of_memory(words: str) -> None:
    assert "out of memory" in str(explain(RuntimeError(words)))


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("x"), KeyError("memory"), OSError("x")])
def test_bugs_are_not_explained_away(error: Exception) -> None:
    assert explain(error) is None


def test_a_command_and_a_release_without_room_leave_nothing(make_adapter, tmp_path: Path, capsys) -> None:
    from adapters.card import Card

    adapter = make_adapter("lora")
    tensors, header = keys.to_diffusers(adapter)
    save_file(tensors, tmp_path / "in.safetensors", header)
    for spelling, out in (("kohya", tmp_path / "out.safetensors"), ("peft", tmp_path / "out")):
        with room(3000):
            assert command.main(["convert", "--to", spelling, str(tmp_path / "in.safetensors"), str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: File too large: ")
        assert said.count("\n") == 1
        assert str(out) in said
    with pytest.raises(OSError, match="release"), room(3000):
        ship(tmp_path / "release", weights=adapter, base={}, card=Card(title="x", base_model="a base"))
    assert os.listdir(tmp_path) == ["in.safetensors"]

"""`log.jsonl` is only a log: whatever is in it, a run goes on; whatever happens while it is rewritten, it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_adapter_whole import room

from training.errors import TrainingError
from training.log import Log


def reopened(path: Path, step: int) -> Log:
    return Log(path, Accelerator(cpu=True), lambda line: None, step=step, steps=10, per_step=1)


def line(step: int) -> bytes:
    return json.dumps({"step": step, "loss": 0.5}).encode() + b"\n"


@pytest.mark.parametrize(
    "strange",
    [
        b'{"step": 3, "lo',
        b'{"step": 1, "note": "caf\xe9"}\n',
        b'{"loss": 1}\n{"step": "2"}\n{"step": 1e400}\n{"step": null}\n',
        "\n".join(['{"step": 1}', '{"step": 2}']).encode("utf-16"),
        b"\0" * 5000,
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}\n",
    ],
    ids=["half a line", "latin-1", "fields missing", "utf-16", "zeros", "deep", "a long number"],
)
def test_strange_lines_never_stop_a_run(strange: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(line(1) + line(2) + strange)
    log = reopened(path, 2)
    log.note(3, {"loss": 0.5})
    rows = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_log_that_cannot_be_rewritten_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    whole = b"".join(map(line, range(1, 9)))
    path.write_bytes(whole)
    with pytest.raises(TrainingError, match=r"cannot write .*log\.jsonl"), room(20):
        reopened(path, 5)
    assert path.read_bytes() == whole
    reopened(path, 5)
    assert path.read_bytes() == b"".join(map(line, range(1, 6)))


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize(("end", "told"), [(0.29, False), (0.6, True)])
def test_a_loss_that_grows_is_said_once_also_after_an_interruption(
    every: int, end: float, told: bool, tmp_path: Path
) -> None:
    """It doubles and falls in between, as the losses of single steps do."""
    said: list[str] = []
    path, step = tmp_path / "log.jsonl", 0
    for stop in (70, 200):  # the second part begins where the loss has grown already
        log = Log(path, Accelerator(cpu=True), said.append, step=step, steps=200, per_step=1)
        while step < stop:
            step += 1
            usual = 0.1 if step <= 20 else end
            log.add(torch.tensor(usual * (1.5 if step % 2 else 0.5)))
            if step % every == 0:
                log.write(step, 1e-3, None)
        log.close()
    notes = [line for line in said if line.startswith("note: ")]
    assert len(notes) == (2 if told else 0)  # once for each time that it is started
    for note in notes:
        assert "over the last 50 steps, and was 0.1" in note
        assert note.endswith("The training diverges: stop it, and lower train.learning_rate, now 0.001")

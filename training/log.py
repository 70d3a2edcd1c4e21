"""Loss and speed: lines, a bar, `log.jsonl`, trackers; the loss is read from the device only when it is written."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from PIL import Image
from torch import Tensor

from adapters import files, machine
from adapters.errors import FileError

from .errors import TrainingError

__all__ = ["Log"]

MAX_LOG = 2**30
BEGAN, RECENT = 10, 50  # steps over which the loss is averaged at the beginning and now; single steps scatter much
GROWN = 3.0  # times the loss at the beginning: no training that learns gets there


class Log:
    """What a run says about itself.

    Args:
        path: of `log.jsonl`; written by the main process.
        accelerator: whose trackers are told too.
        say: receives progress lines.
        step: where the run starts; a file's lines of later steps, which will be trained again, are dropped.
        steps: where it ends.
        per_step: samples in an optimizer step, over all processes.
    """

    def __init__(
        self, path: Path, accelerator: Accelerator, say: Callable[[str], None], *, step: int, steps: int, per_step: int
    ):
        self.accelerator, self.say, self.steps, self.per_step = accelerator, say, steps, per_step
        self.losses: list[float] = []
        self._sum: Tensor | None = None
        self._count, self._since = 0, time.perf_counter()
        self._path = path if accelerator.is_main_process else None
        self.validated = False
        """Whether the file has the validation loss of `step`; the main process knows."""
        self._history: list[tuple[int, float]] = []  # steps and their mean loss
        self._told = False
        if self._path is not None:
            rows = _reopened(path, step)
            self.validated = any(row["step"] == step and "validation_loss" in row for row in rows)
            self._history = _history(rows)
        # Into a file or pipe the lines say it all; a bar would fill it with itself.
        self._bar = tqdm(total=steps, initial=step, unit="step", leave=False, disable=not sys.stderr.isatty())

    def add(self, loss: Tensor) -> None:
        """Takes a step's loss () on the device."""
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1
        self._bar.update()

    def write(self, step: int, rate: float, saved: Path | None) -> None:
        """Writes the mean loss since the last time.

        Args:
            step: the number of steps made.
            rate: learning rate of the first group.
            saved: the last good checkpoint; None: there is none.

        Raises:
            TrainingError: it is not finite; `saved` is the last good checkpoint.
        """
        if self._sum is None:
            return
        loss = float(self.accelerator.reduce(self._sum / self._count, "mean"))
        if not math.isfinite(loss):
            kept = f"the last good checkpoint is {saved}" if saved else "there is no checkpoint yet"
            raise TrainingError(
                f"the loss became {loss} between steps {step - self._count + 1} and {step}; {kept}. "
                "Lower train.learning_rate, or use train.precision fp32 or bf16"
            )
        self.losses.append(loss)
        self._history.append((self._count, loss))
        seconds = (time.perf_counter() - self._since) / self._count
        speed = self.per_step / seconds
        self.note(step, {"loss": loss, "images_per_second": speed, "learning_rate": rate})
        memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
        left = (self.steps - step) * seconds / 60
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        with self._bar.external_write_mode():
            self.say(f"step {step}/{self.steps}  loss {loss:.4f}  {speed:.1f} images/s  {left:.1f} min left{memory}")
            self._tell_growth(rate)
        self._sum, self._count, self._since = None, 0, time.perf_counter()

    def _tell_growth(self, rate: float) -> None:
        """Says once that the loss is far above what it began with: finite, so nothing stops such a training."""
        began, now = _mean(self._history, BEGAN), _mean(reversed(self._history), RECENT)
        if self._told or began is None or now is None or now <= GROWN * began:
            return
        self._told = True
        self.say(
            f"note: the loss is {now:.3f} over the last {RECENT} steps, and was {began:.3f} over the first {BEGAN}. "
            f"The training diverges: stop it, and lower train.learning_rate, now {rate:.3g}"
        )

    def note(self, step: int, values: dict[str, float]) -> None:
        """Writes values of a step to the file and the trackers."""
        if self._path is not None:
            files.append_line(self._path, json.dumps({"step": step, **values}))
        if self.accelerator.trackers:
            self.accelerator.log(values, step=step)

    def pictures(self, step: int, files: list[Path]) -> None:
        """Shows samples of a step to those trackers that take pictures; on the main process.

        Args:
            step: the number of steps made.
            files: the samples, of one size.
        """
        takers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        if not takers or not files:
            return
        shown = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        for tracker in takers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.stack(shown)}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"samples": shown}, step=step)

    def close(self) -> None:
        self._bar.close()


def _reopened(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines up to `step`, and return them. A line that cannot be read is dropped: it is only a log."""
    try:
        lines = files.read_bytes(path, MAX_LOG).decode(errors="replace").splitlines() if step else []
    except FileError:
        lines = []  # none yet, or not one of ours
    rows = [(line, row) for line in lines if (row := _row(line)) is not None and row["step"] <= step]
    try:
        files.write_text(path, "".join(f"{line}\n" for line, _ in rows))
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {machine.explain(error) or error}") from error
    return [row for _, row in rows]


def _history(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Steps and their mean loss, from a file's lines."""
    found, before = [], 0
    for row in rows:
        if type(row.get("loss")) is float and row["step"] > before:
            found.append((row["step"] - before, row["loss"]))
            before = row["step"]
    return found


def _mean(history: Iterable[tuple[int, float]], steps: int) -> float | None:
    """Mean loss of the first so many steps at least; None where there are fewer."""
    total, count = 0.0, 0
    for some, loss in history:
        total, count = total + some * loss, count + some
        if count >= steps:
            return total / count
    return None


def _row(line: str) -> dict[str, Any] | None:
    """What a line of the file says about a step; None where it does not."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None

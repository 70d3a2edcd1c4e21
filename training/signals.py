"""Stopping on request: the first SIGTERM or SIGINT is noted for the loop to see, the second goes the ordinary way."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["Signals"]

AGREE_EVERY = 8  # steps between the looks of several processes at each other's signals; each look waits for all


class Signals:
    """Notes SIGTERM and SIGINT while in the context; a second one goes the ordinary way."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._before[number])

    def agreed(self, accelerator: Accelerator, step: int) -> bool:
        """Whether to stop after `step`; all processes stop at the same one, whichever of them was signalled."""
        if accelerator.num_processes == 1:
            return bool(self.number)
        if step % AGREE_EVERY:
            return False
        flag = torch.tensor(float(self.number), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

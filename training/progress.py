"""How far long work is: one line at most every ten seconds, on a terminal and in a log alike."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Progress", "duration"]

EVERY = 10.0  # seconds between lines


class Progress:
    """Says `WHAT n/N, TIME left`; called with how much is done, and how much there is.

    Args:
        what: what is done, as in "caching".
        say: receives the lines.
        every: least seconds between two lines.
    """

    def __init__(self, what: str, say: Callable[[str], None] = print, *, every: float = EVERY):
        self.what, self.say, self.every = what, say, every
        self.began = self.said = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done < total and now - self.said >= self.every:
            self.said = now
            self.say(f"{self.what} {done}/{total}, {duration((now - self.began) / done * (total - done))} left")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""The room's one error class, and how a recipe turns it into a line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Stopped", "TrainingError", "exit_on_error"]


class TrainingError(ValueError):
    """A setting, file or state that training cannot go on with; the message names it and says what to do."""


class Stopped(Exception):
    """Training was asked to stop (SIGTERM, SIGINT) and has saved; the message says how to resume."""


@contextmanager
def exit_on_error(*kinds: type[Exception]) -> Iterator[None]:
    """Runs a recipe's body; a `TrainingError` (or one of `kinds`) becomes `error: ...` on stderr and exit code 2.

    So does what `training.environment` finds wrong with the installation, before the body starts.
    `Stopped` becomes its message on stderr and exit code 130, the shell's code for an interrupted command.
    Any other exception is a bug of ours and keeps its traceback.
    """
    from . import environment  # which takes its error from here

    reported: tuple[type[Exception], ...] = (TrainingError, *kinds)
    try:
        environment.check()
        yield
    except reported as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except Stopped as stop:
        print(stop, file=sys.stderr, flush=True)
        raise SystemExit(130) from stop

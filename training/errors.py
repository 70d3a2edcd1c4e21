"""The room's one error class, and how a recipe turns it into a line on stderr and exit code 2."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from . import environment

__all__ = ["Stopped", "TrainingError", "exit_on_error"]


class TrainingError(ValueError):
    """A setting, file or state that training cannot go on with; the message names it and says what to do."""


class Stopped(Exception):
    """Training was asked to stop (SIGTERM, SIGINT) and has saved; the message says how to resume."""


def _any_letter() -> None:
    """A letter that the terminal's encoding lacks is printed as its number; otherwise it would stop a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def exit_on_error(others: Callable[[], tuple[type[Exception], ...]] = tuple) -> Iterator[None]:
    """Runs a recipe's body; a `TrainingError` or one of `others()` becomes `error: ...` on stderr and exit code 2.

    So does what the machine cannot do (`adapters.machine`: memory, disks, names), and what `training.environment` finds
    wrong with the installation before the body starts; it also tells torch's threads to wait briefly. `Stopped` and
    Ctrl-C become a line on stderr and exit code 130, the shell's code for an interrupted command. Any other exception
    is a bug of ours and keeps its traceback.

    Args:
        others: asked only once something went wrong, so that a recipe need not import its rooms to say `--help`.
    """
    _any_letter()
    environment.wait_briefly()
    try:
        if (problem := environment.problem()) is not None:
            raise TrainingError(problem)
        yield
    except Stopped as stop:
        print(stop, file=sys.stderr, flush=True)
        raise SystemExit(130) from stop
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        raise SystemExit(130) from stop
    except TrainingError as error:
        _end(str(error), error)
    except Exception as error:
        from adapters.machine import explain  # with torch, which may not load before `problem` has looked

        line = explain(error) or (str(error) if isinstance(error, others()) else None)
        if line is None:
            raise
        _end(line, error)


def _end(line: str, error: Exception) -> NoReturn:
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(2) from error

"""A recipe as a command: its settings, its errors as one line, and what it prints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from training.config import parse
from training.errors import TrainingError, exit_on_error

__all__ = ["explained", "launch", "quiet", "say"]

SettingsT = TypeVar("SettingsT")


def launch(kind: type[SettingsT], run: Callable[[SettingsT], Any]) -> None:
    """A recipe's main: settings from the command line, and every explained error as one line on stderr."""
    with exit_on_error(explained):
        if not {"-h", "--help", "--print_config"} & set(sys.argv[1:]):
            quiet()
        run(_settings(kind))


def _settings(kind: type[SettingsT]) -> SettingsT:
    """What the command line and its configs say; what is wrong with it is one line."""
    try:
        return parse(kind)
    except TrainingError as error:
        raise TrainingError(" ".join(str(error).split())) from error


def explained() -> tuple[type[Exception], ...]:
    import adapters
    import scfg
    from training.pocket import PocketError

    return adapters.AdapterError, scfg.ScfgError, PocketError


def quiet() -> None:
    """Loading takes a second: no bars for it, and no word on image processors that nothing here uses."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def say(line: str) -> None:
    """Print on the main process only."""
    from training.ranks import state

    if state().is_main_process:
        print(line, flush=True)

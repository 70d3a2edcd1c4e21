"""A recipe in several processes, through accelerate's own launcher, without its remarks and its traceback."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from training.config import require
from training.errors import TrainingError

__all__ = ["launch_processes"]


def launch_processes(module: str, words: Sequence[str], *, processes: int, config: str | None = None) -> int:
    """Run `python -m MODULE WORDS` in several processes of this machine; returns the exit code of what failed.

    Args:
        module: a recipe's module.
        words: its command line.
        processes: how many, where `config` does not say it.
        config: a config file of accelerate, or the name of one that ships, such as two_gpus_fsdp.

    Raises:
        TrainingError: no such config, or fewer GPUs than processes.
    """
    import torch
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    told = ["--config_file", _config(config)] if config else _options(processes, torch.cuda.device_count())
    parsed = launch.launch_command_parser().parse_args([*told, "--module", module, *words])
    logging.disable(logging.ERROR)  # of the launcher alone: the process that failed has said what is wrong
    try:
        launch.launch_command(parsed)
    except ChildFailedError as error:
        codes = (failed.exitcode for failed in error.failures.values())
        return max((code for code in codes if code > 0), default=1)  # one that was ended by a signal has a negative one
    except (SignalException, KeyboardInterrupt):
        print("stopped; the same command goes on where it was", file=sys.stderr, flush=True)
        return 130
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _options(processes: int, gpus: int) -> list[str]:
    """All that accelerate would otherwise choose, and remark on."""
    require(not gpus or processes <= gpus, f"--processes {processes}: this machine has {gpus} GPU(s)")
    chosen = {"num_processes": processes, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    return ["--multi_gpu", *(word for name, value in chosen.items() for word in (f"--{name}", str(value)))]


def _config(name: str) -> str:
    from recipes.common.cli import CONFIGS

    for path in (name, CONFIGS / "accelerate" / f"{name}.yaml"):
        if os.path.isfile(path):
            return str(path)
    there = ", ".join(sorted(path.stem for path in (CONFIGS / "accelerate").glob("*.yaml")))
    raise TrainingError(f"--launcher {name}: no such file, and no launcher config that ships; there are {there}")

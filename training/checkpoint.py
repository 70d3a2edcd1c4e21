"""Checkpoints: folders `step-000250` that exist whole or not at all, in safetensors and JSON, never pickles.

A checkpoint is written to a hidden sibling, flushed to the disk and renamed; a crash leaves at most the sibling, which
the next save removes. Order, noise and dropout are functions of the step, so the step says all about position.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import config
from .errors import TrainingError
from .sharding import like

__all__ = [
    "State",
    "atomic_folder",
    "differences",
    "find",
    "load",
    "make_folder",
    "refuse_changes",
    "restore_optimizer",
    "save",
]

PREFIX = "step-"
# Settings that may differ between a checkpoint and the run that goes on from it: they do not change the weights.
FREE = (
    "out",
    "train.resume",
    "train.dry_run",
    "train.save_every",
    "train.save_precision",
    "train.keep",
    "train.log_every",
    "train.trackers",
    "train.workers",
    "train.validation",
    "train.snapshot_every",
    "data.cache",
    "data.cache_folder",
)


@dataclass(kw_only=True)
class State:
    """All that training needs to go on."""

    step: int
    """Optimizer steps done."""
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    """`optimizer.state_dict()`."""
    ema: dict[str, Tensor] | None = None
    ema_updates: int = 0
    scaler: dict[str, Any] | None = None
    facts: dict[str, Any]
    """What must be the same when going on: samples per step, data and resolved settings."""


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Gives a temporary sibling to write into, and renames it to `target` if all went well; removes it otherwise.

    Raises:
        TrainingError: the disk is full or not writable, naming the folder.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if target.exists():  # a folder cannot be renamed over another, so the old one steps aside first
            aside = target.with_name(f".{target.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(target, aside)
        os.rename(temporary, target)
        _flush(target.parent)
        shutil.rmtree(target.with_name(f".{target.name}.old"), ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot save {target}: {error}; what was saved before is intact, free space or change out"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(folder: Path, state: State, *, keep: int) -> Path:
    """Writes `folder/step-NNNNNN` and removes all but the last `keep`."""
    target = folder / f"{PREFIX}{state.step:06d}"
    tensors, plain = _split(state.optimizer)
    with atomic_folder(target) as place:
        save_file(_dense(state.weights), place / "weights.safetensors")
        save_file(_dense(tensors), place / "optimizer.safetensors")
        if state.ema is not None:
            save_file(_dense(state.ema), place / "ema.safetensors")
        values = {"step": state.step, "optimizer": plain, "ema_updates": state.ema_updates, "scaler": state.scaler}
        (place / "state.json").write_text(json.dumps({**values, "facts": state.facts}, indent=1))
        config.write(state.facts.get("settings", {}), place / "settings.yaml")
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for left in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def _all(folder: Path) -> list[Path]:
    """Complete checkpoints by step; `state.json` is looked for so that a stray folder is none."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def find(resume: str, folder: Path) -> Path | None:
    """The checkpoint that `train.resume` names: `latest` in `folder` (None when there is none), or a path.

    Raises:
        TrainingError: the path is no checkpoint.
    """
    if resume == "latest":
        return _all(folder)[-1] if _all(folder) else None
    path = Path(resume)
    if not (path / "state.json").is_file():
        there = ", ".join(item.name for item in _all(folder)) or "none"
        raise TrainingError(f"train.resume {resume} is no checkpoint; in {folder} there is: {there}")
    return path


def load(path: Path) -> State:
    """Reads a checkpoint."""
    try:
        values = json.loads((path / "state.json").read_text())
        ema = path / "ema.safetensors"
        return State(
            step=values["step"],
            weights=load_file(path / "weights.safetensors"),
            optimizer=_join(load_file(path / "optimizer.safetensors"), values["optimizer"]),
            ema=load_file(ema) if ema.is_file() else None,
            ema_updates=values["ema_updates"],
            scaler=values["scaler"],
            facts=values["facts"],
        )
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read ({error}); resume from another one") from error


def make_folder(out: Path) -> None:
    """Raises `TrainingError` where `out` cannot be made, or not be written into."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"out {out} cannot be made a folder ({error.strerror}); change out") from error
    if not os.access(out, os.W_OK):
        raise TrainingError(f"out {out} is not writable; change its permissions or out")


def refuse_changes(path: Path, saved: State, facts: dict[str, Any], *, free: list[str]) -> None:
    """Compares what shapes the weights, but for `FREE` and `free`.

    How a step's samples are split is free as long as their number stays, which is a fact of its own.

    Raises:
        TrainingError: names everything that changed, with both values.
    """
    now = json.loads(json.dumps(facts))  # as it comes back from the file: tuples are lists there
    changed = differences(
        {**saved.facts["settings"], **saved.facts, "settings": None},
        {**now["settings"], **now, "settings": None},
        free=(*FREE, "train.batch_size", "train.accumulation", *free),
    )
    if changed:
        raise TrainingError(
            f"cannot resume from {path}, these have changed: {'; '.join(changed)}; take the old values "
            f"({path / 'settings.yaml'}) or start anew with another out"
        )


def differences(saved: dict[str, Any], now: dict[str, Any], *, free: tuple[str, ...] = FREE) -> list[str]:
    """`name: saved -> now` for every dotted value that differs, but for those named (or under a name) in `free`."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    found = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not any(
            name == item or name.startswith(f"{item}.") for item in free
        ):
            found.append(f"{name}: {before.get(name)} -> {after.get(name)}")
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `parameter.name` and the rest, which JSON can hold."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in _spread(values):
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                rest.setdefault(str(number), {})[name] = value
    return tensors, {"state": rest, "groups": [_json_group(group) for group in state["param_groups"]]}


def _spread(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(`name/inner`, value): 8-bit optimizers keep their state a level deeper."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _spread(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _json_group(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in group.items()}


def _join(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    values = {f"{number}.{name}": value for number, rest in plain["state"].items() for name, value in rest.items()}
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**values, **tensors}.items():
        number, _, path = key.partition(".")
        *above, name = path.split("/")
        place = state.setdefault(int(number), {})
        for outer in above:
            place = place.setdefault(outer, {})
        place[name] = value
    return {"state": state, "param_groups": plain["groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Loads a saved state; JSON made lists of the groups' tuples (such as betas), which take their old kind again."""
    now = optimizer.state_dict()["param_groups"]
    groups = [
        {key: tuple(value) if isinstance(mine.get(key), tuple) else value for key, value in group.items()}
        for mine, group in zip(now, saved["param_groups"], strict=True)
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        number: {
            key: like(value, parameters[number]) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            # Fused kernels read weight and moments in the order they lie in memory: moments take the weight's layout.
            if isinstance(value, Tensor) and value.shape == parameter.shape and not isinstance(value, DTensor):
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}

"""Checkpoints: folders `step-000250` that exist whole or not at all, in safetensors and JSON, never pickles.

`state.json` holds a SHA-256 of every file and of itself, so weights that were altered or damaged are never trained on.
Order, noise and dropout are functions of the step, so the step says all about position.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from adapters import files, machine
from adapters.errors import FileError

from . import config
from .errors import TrainingError
from .sharding import like

__all__ = [
    "State",
    "atomic_folder",
    "differences",
    "find",
    "folders",
    "load_checkpoint",
    "refuse_changes",
    "restore_optimizer",
    "save",
    "step_of",
]

PREFIX = "step-"
# Settings that may differ between a checkpoint and the run that goes on from it: they do not change the weights.
FREE = (
    "out",
    "train.resume",
    "train.if_damaged",
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

# Where base and data lie, by the fact that says what they hold; `*` is the name of any further subject.
PLACES = {
    "base model": ("base",),
    "content of the data": (
        *(f"data.{name}" for name in ("source", "kind", "split", "prompt", "masks", "conditioning", "minimum")),
        *(f"data.{name}_column" for name in ("image", "caption", "mask", "conditioning")),
        *(f"concepts.*.{name}" for name in ("source", "masks", "prompt")),
    ),
    "content of class_images": (
        *(f"dreambooth.{name}" for name in ("class_folder", "class_prompt_file", "class_images")),
        "concepts.*.class_folder",
    ),
}


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
    """Gives an empty folder to write into, which becomes `target` if all went well and vanishes otherwise.

    Raises:
        TrainingError: the disk is full or not writable, naming the folder.
    """
    try:
        with files.write_folder(target) as place:
            yield place
    except OSError as error:
        raise TrainingError(f"cannot save {target}: {machine.explain(error) or error}") from error


def save(folder: Path, state: State, *, keep: int) -> Path:
    """Writes `folder/step-NNNNNN` and removes all but the last `keep` up to it.

    Args:
        folder: of all checkpoints of the run.
        state: weights, optimizer and facts after a step.
        keep: how many of the latest checkpoints stay, this one among them.

    Returns:
        The checkpoint's folder.

    Raises:
        TrainingError: weights that are not finite, which are not worth keeping; or see `atomic_folder`.
    """
    broken = [name for name, value in state.weights.items() if not bool(value.isfinite().all())]
    if broken:
        raise TrainingError(
            f"{len(broken)} weights are no longer finite at step {state.step}, such as {broken[0]}, so they are not "
            "saved; lower train.learning_rate, or use train.precision fp32 or bf16"
        )
    target = folder / f"{PREFIX}{state.step:06d}"
    tensors, plain = _split(state.optimizer)
    parts = {"weights": state.weights, "optimizer": tensors, **({} if state.ema is None else {"ema": state.ema})}
    with atomic_folder(target) as place:
        for name, values in parts.items():
            save_file(_dense(values), place / f"{name}.safetensors")
        record = {"step": state.step, "optimizer": plain, "ema_updates": state.ema_updates, "scaler": state.scaler}
        digests = {f"{name}.safetensors": files.sha256(place / f"{name}.safetensors") for name in parts}
        record |= {"facts": state.facts, "sha256": digests}
        (place / "state.json").write_text(json.dumps({**record, "own sha256": _own_digest(record)}, indent=1), "utf-8")
        config.write_settings(state.facts.get("settings", {}), place / "settings.yaml")
    # Those of later steps are left: they are damaged, or of a run that went further, and are written over in time.
    for old in [path for path in folders(folder) if step_of(path) <= state.step][:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _own_digest(record: dict[str, Any]) -> str:
    """Of `state.json` itself: a number in it shapes the weights as much as a tensor does."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def folders(folder: Path) -> list[Path]:
    """Checkpoints by step, whole or not."""
    return sorted((path for path in folder.glob(f"{PREFIX}*") if path.is_dir() and step_of(path) >= 0), key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name says; -1 for another name."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isascii() and number.isdigit() else -1


def find(
    resume: str, folder: Path, say: Callable[[str], None] = print, *, stop_if_damaged: bool = False
) -> tuple[Path, State] | None:
    """The checkpoint that `train.resume` names: a path, or `latest` in `folder` (None when there is none).

    A damaged latest one is said, and the one before it is taken.

    Args:
        resume: a checkpoint's folder, or "latest".
        folder: of the run's checkpoints.
        say: receives a line about each damaged checkpoint.
        stop_if_damaged: a damaged latest one is an error instead.

    Raises:
        TrainingError: the path is no checkpoint, or a damaged one; or all in `folder` are damaged.
    """
    there = folders(folder)
    if resume != "latest":
        path = Path(resume)
        if not (path / "state.json").exists():
            names = ", ".join(item.name for item in there) or "none"
            raise TrainingError(f"train.resume {resume} is no checkpoint; in {folder} there is: {names}")
        return path, load_checkpoint(path)
    for path in reversed(there):
        try:
            return path, load_checkpoint(path)
        except TrainingError as error:
            if stop_if_damaged:
                raise TrainingError(
                    f"{error}, delete it, or set train.if_damaged to earlier, which takes the one before it"
                ) from error
            say(f"{error}: it is left alone, and the one before it is tried")
    if there:
        raise TrainingError(f"all checkpoints in {folder} are damaged; delete them to start from the beginning")
    return None


def load_checkpoint(path: Path) -> State:
    """Reads a checkpoint, after checking every file of it.

    Raises:
        TrainingError: it is damaged, or was altered; the message says how.
    """
    try:
        return _load(path)
    except (FileError, SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = error if isinstance(error, FileError) else f"{path}: {error!r:.200}"
        raise TrainingError(f"checkpoint {path} is damaged ({said}); resume from another one") from error


def _load(path: Path) -> State:
    record = files.read_json(path / "state.json")
    if not isinstance(record, dict) or record.pop("own sha256", None) != _own_digest(record):
        raise FileError(f"{path / 'state.json'} is not as it was written")
    if step_of(path) not in (-1, record["step"]):
        raise FileError(f"its name says another step than the {record['step']} inside")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, digest in record["sha256"].items():
        if files.sha256(path / name) != digest:
            raise FileError(f"{path / name} is not as it was written")
        found = tensors[name.removesuffix(".safetensors")] = load_file(path / name)
        if name != "optimizer.safetensors":
            _check_finite(path / name, found)
    return State(
        step=record["step"],
        weights=tensors["weights"],
        optimizer=_join(tensors["optimizer"], record["optimizer"]),
        ema=tensors.get("ema"),
        ema_updates=record["ema_updates"],
        scaler=record["scaler"],
        facts=record["facts"],
    )


def _check_finite(file: Path, tensors: dict[str, Tensor]) -> None:
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        raise FileError(f"{file} holds NaN or infinite values, such as in {broken[0]}")


def refuse_changes(path: Path, saved: State, facts: dict[str, Any], *, free: list[str]) -> None:
    """Compares what shapes the weights, but for `FREE` and `free`.

    How a step's samples are split is free as long as their number stays, which is a fact of its own; so is where base
    and data lie, as long as they hold the same.

    Args:
        path: of the checkpoint, for the message.
        saved: its state.
        facts: those of the run that is to go on.
        free: dotted settings that may differ, beside `FREE`.

    Raises:
        TrainingError: names everything that changed, with both values.
    """
    now = json.loads(json.dumps(facts))  # as it comes back from the file: tuples are lists there
    before, after = ({**item["settings"], **item, "settings": None} for item in (saved.facts, now))
    for fact, places in PLACES.items():
        if before.get(fact) == after.get(fact):  # otherwise the place may tell why
            free = [*free, *places]
    changed = differences(before, after, free=(*FREE, "train.batch_size", "train.accumulation", *free))
    if changed:
        raise TrainingError(
            f"cannot resume from {path}, these have changed: {'; '.join(changed)}; take the old values "
            f"({path / 'settings.yaml'}) or start anew with another out"
        )


def differences(saved: dict[str, Any], now: dict[str, Any], *, free: tuple[str, ...] = FREE) -> list[str]:
    """`name: saved -> now` for every dotted value that differs, but for those named (or under a name) in `free`.

    Args:
        saved: facts of the checkpoint.
        now: facts of the run that is to go on.
        free: dotted names that may differ, with all below them; `*` stands for any text.
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    found = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not any(
            fnmatchcase(name, item) or name.startswith(f"{item}.") for item in free
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

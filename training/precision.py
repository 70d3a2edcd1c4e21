"""`precision: auto`: float32 or bfloat16, whichever this machine computes a network in faster, found by trying both.

The name of a processor does not tell: units for bfloat16 speed large products up, and lose on small ones. So a few
passes are timed in turns, once per machine, network and size. The answer is kept in the user's cache folder, because a
trial on a busy machine may end differently, and later runs should compute the same bits as earlier ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from adapters import files
from adapters.errors import FileError

from .batch import Batch, ids_of
from .config import TrainSettings
from .environment import user_cache
from .method import Method, Stepper
from .models import encode_text, tokenize_captions
from .networks import cast, configure_networks, kernels
from .ranks import state

__all__ = ["AUTO", "by_units", "decide_precision", "lowered", "network", "of_training", "remembered_in"]

AUTO = "auto"
# Share of float32's time that bfloat16 may take at most: a smaller gain is neither sure nor worth the rounding.
FASTER = 0.9
ROUNDS = 3
RATIO = "time of bf16 / fp32"
CLEAR = 1.5  # times as fast or as slow: one round is enough

Pass = Callable[[], object]


def decide_precision(
    what: str,
    facts: Mapping[str, Any],
    trial: Callable[[torch.dtype], AbstractContextManager[Pass]],
    *,
    device: torch.device,
    say: Callable[[str], None],
    again: bool = True,
) -> str:
    """Which is to be computed in, "fp32" or "bf16", the same in all processes.

    A GPU is asked whether it has units for bfloat16. On a CPU both are tried, unless the answer is remembered.

    Args:
        what: the setting, for the line that says what was chosen.
        facts: what the times depend on besides the machine, such as the network and its input; JSON values.
        trial: a context for each precision, which yields the pass to be timed.
        device: where the network runs.
        say: receives one line.
        again: whether an answer that is remembered is said too.
    """
    chosen = ["fp32"]
    if state().is_main_process:
        chosen = [_decided(what, facts, trial, device, say, again)]
    if state().num_processes > 1:
        broadcast_object_list(chosen)
    return chosen[0]


def by_units(device: torch.device) -> str | None:
    """What needs no trial: on a GPU bfloat16 where it has units for it. None: a CPU, where both are to be tried."""
    if device.type == "cpu":
        return None
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if cuda else "fp32"


def _decided(
    what: str,
    facts: Mapping[str, Any],
    trial: Callable[[torch.dtype], AbstractContextManager[Pass]],
    device: torch.device,
    say: Callable[[str], None],
    again: bool,
) -> str:
    if chosen := by_units(device):
        say(f"{what} auto: {chosen}, by the units of this {device.type}")
        return chosen
    place = remembered_in() / f"{_key(facts)}.json"
    known = ratio = _remembered(place)
    if ratio is None:
        ratio = _tried(trial)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(place, {RATIO: ratio, "facts": {**facts, **_machine()}})
        except (FileError, OSError):
            say(f"{what} auto: fp32; {place.parent} is not writable, so the next run might choose another one")
            return "fp32"
    chosen = "bf16" if ratio <= FASTER else "fp32"
    if known is None or again:
        say(f"{what} auto: {chosen}; bfloat16 takes {ratio:.2f} of float32's time here (remembered in {place})")
    return chosen


def remembered_in() -> Path:
    """The folder of the answers; each file may be deleted to try again."""
    return user_cache("precision")


def _remembered(place: Path) -> float | None:
    try:
        ratio = float(files.read_json(place)[RATIO])
    except (FileError, OSError, ValueError, KeyError, TypeError):  # none, or damaged: tried again
        return None
    return ratio if ratio > 0 else None


def _key(facts: Mapping[str, Any]) -> str:
    text = json.dumps([facts, _machine()], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _machine() -> dict[str, Any]:
    """What the speed of this machine depends on, as far as torch can be told to use it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")})
    limits = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
    return {
        "processor": hashlib.blake2b("\n".join([platform.processor(), *told]).encode(), digest_size=10).hexdigest(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: os.environ[name] for name in limits if name in os.environ},
    }


def _tried(trial: Callable[[torch.dtype], AbstractContextManager[Pass]]) -> float:
    """bfloat16's time over float32's: the shortest of each, since other work on the machine only adds."""
    best: dict[torch.dtype, float] = {}
    for _ in range(ROUNDS):
        for dtype in (torch.float32, torch.bfloat16):
            with trial(dtype) as one:
                one()  # warms up
                began = time.perf_counter()
                one()
                best[dtype] = min(best.get(dtype, float("inf")), time.perf_counter() - began)
        ratio = best[torch.bfloat16] / best[torch.float32]
        if not 1 / CLEAR < ratio < CLEAR:
            break
    return ratio


# Names of what peft puts beside weights; it brings their inputs to their own precision.
BESIDE = (".lora_", ".hada_", ".lokr_")


@contextlib.contextmanager
def lowered(modules: Iterable[nn.Module], dtype: torch.dtype, *, trained: bool = False) -> Iterator[None]:
    """Within the context, weights are of `dtype`, but for adapters; afterwards they hold what they held.

    Args:
        modules: whose weights are exchanged.
        dtype: of the weights within.
        trained: also those that may train, which is all of a pipeline that was only loaded.
    """
    kept = {
        one: one.data
        for module in modules
        for name, one in module.named_parameters()
        if one.is_floating_point() and (trained or not one.requires_grad) and not any(part in name for part in BESIDE)
    }
    try:
        for one, data in kept.items():
            one.data = data.to(dtype)
        yield
    finally:
        for one, data in kept.items():
            one.data = data


def of_training(
    method: Method, settings: TrainSettings, accelerator: Accelerator, size: tuple[int, int], say: Callable[[str], None]
) -> str:
    """The compute precision of a training step, forward and backward: "fp32" or "bf16".

    Args:
        method: what trains; its weights and layout stay as they were, but for the order in memory.
        settings: batch size, attention and kernels.
        accelerator: of the run.
        size: (height, width) of the pictures in pixels.
        say: receives one line.
    """
    device, parts = accelerator.device, method.parts
    if device.type == "cpu" and parts.inpainting:
        say("train.precision auto: fp32, since no trial is known for inpainting models")
        return "fp32"
    facts = {
        "step": method.name,
        "networks": [network(one) for one in method.networks()],
        "trained numbers": sum(one.numel() for one in method.trainable().values()),
        "batch": [settings.batch_size, *size],
        "kernels": [settings.attention, settings.fuse, settings.prepack, settings.gradient_checkpointing],
    }

    @contextlib.contextmanager
    def trial(dtype: torch.dtype) -> Iterator[Pass]:
        batch = _batch(method, settings.batch_size, size)
        tokens = size[0] * size[1] // parts.vae_scale_factor**2
        with lowered(method.networks(), dtype):
            cast(method, device, dtype)
            # What trains is laid out here too; compiling would take longer than what is to be decided.
            configure_networks(method, replace(settings, compile=False, offload=False), device, tokens=tokens)
            step = Stepper(method, dtype, device)
            with kernels(method, settings, accelerator), torch.random.fork_rng(devices=[]):
                yield lambda: step(batch).mean().backward()
        for parameter in method.trainable().values():
            parameter.grad = None

    return decide_precision("train.precision", facts, trial, device=device, say=say)


def network(one: Any) -> str:
    """A short name of a network's class and configuration."""
    config = {key: value for key, value in _config(one).items() if key[0] != "_" and not key.endswith("dtype")}
    text = json.dumps([type(one).__name__, config], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _config(one: Any) -> dict[str, Any]:
    config = getattr(one, "config", {})
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _batch(method: Method, count: int, size: tuple[int, int]) -> Batch:
    """Random samples of the form that a step takes, see `data.batches.Feed.batch`."""
    parts, random = method.parts, torch.Generator().manual_seed(0)
    height, width = size[0] // parts.vae_scale_factor, size[1] // parts.vae_scale_factor
    latents = torch.randn((count, parts.unet.config.in_channels, height, width), generator=random)
    batch: Batch = {
        "latents": latents,
        "noise": latents.flip(0, 2),
        "timesteps": torch.linspace(0, len(method.objective.products) - 1, count).long(),
        "frame": torch.zeros(count, 6),
    }
    ids = tokenize_captions(parts, [""] * count)
    if method.trains_text:
        batch |= ids_of(ids)
    else:
        with torch.no_grad():
            batch |= encode_text(parts, ids)
    if method.needs_conditioning:
        batch["conditioning"] = torch.rand((count, 3, *size), generator=random)
    if method.objective.settings.background < 1:
        batch["mask"] = torch.ones(count, 1, height, width)
    return batch

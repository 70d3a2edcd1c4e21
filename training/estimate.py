"""What a run will need, found by one trial micro-step: memory by kind, and time including caching."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .batch import Batch, tensors
from .config import TrainSettings
from .kernels.prepack import prepacked_bytes
from .memory import Peak
from .method import Method
from .offload import kept_numel, waiting_bytes
from .optim import state_bytes
from .quantize import scale_bytes, unrounded_numel
from .ranks import state
from .sharding import local

__all__ = ["Estimate", "clock", "estimate", "kept_bytes", "peak_bytes", "trained_table"]

STEPS, PATIENCE = 5, 3.0  # timed at most, and seconds after which no further one begins


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes and seconds."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    step_seconds: float
    caching_seconds: float = 0.0
    sample_seconds: float = 0.0
    """Of one sample through the network, without gradients: half a guided sampling step."""
    waiting: int = 0
    """Frozen weights in main memory, see `train.offload`; none of them is in `weights`."""
    untried: int = 0
    """Of the activations, those that the trial did not have, as its pictures were smaller than the run's."""

    @property
    def memory(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def lines(self, settings: TrainSettings) -> list[str]:
        """The estimate in words."""
        parts = ", ".join(
            f"{name} {_size(getattr(self, name))}"
            for name in ("weights", "gradients", "optimizer", "average", "activations")
            if getattr(self, name)
        )
        minutes = (self.caching_seconds + settings.steps * self.step_seconds) / 60
        waiting = f"; {_size(self.waiting)} of weights wait in main memory" if self.waiting else ""
        caching = f" ({self.caching_seconds / 60:.1f} of it caching)" if self.caching_seconds else ""
        return [
            f"tensors of a training step: {parts}{waiting}",
            f"time: about {minutes:.1f} min{caching}, {self.step_seconds:.3g} s per step",
        ]


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def trained_table(method: Method) -> list[str]:
    """How many parameters of each model train, and what patterns chose."""
    lines = []
    for name, module in method.models.items():
        trained = sum(item.numel() for item in module.parameters() if item.requires_grad)
        total = kept_numel(module) + sum(unrounded_numel(item) for item in module.parameters())
        lines.append(f"  {name:16} {trained:>13,} of {total:>13,} parameters train")
    return [*lines, *method.chosen]


def peak_bytes(method: Method, model: nn.Module, batch: Batch) -> int:
    """Runs forward and backward pass; returns the most bytes that live at once, without weights and gradients."""
    parts = method.parts
    modules = [model, *method.networks(), *parts.text_encoders, *([] if parts.vae is None else [parts.vae])]
    with torch.no_grad():
        there = [local(one) for module in modules for one in (*module.parameters(), *module.buffers())]
    seen = Peak([*there, *tensors(batch).values()])
    with seen:
        model(batch).mean().backward()
    with torch.no_grad():
        gradients = [local(one.grad) for one in method.trainable().values() if one.grad is not None]
    return seen.most - sum(one.numel() * one.element_size() for one in gradients)


def kept_bytes(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """Runs the forward pass; returns its losses and the bytes it keeps for the backward pass, weights left out."""
    with torch.no_grad():
        known = {local(item).untyped_storage().data_ptr() for item in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(batch)
    return losses, sum(kept.values())


def clock() -> float:
    """Seconds of a clock, read once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
    return time.perf_counter()


def _since(began: float) -> float:
    return clock() - began


def _step_seconds(model: nn.Module, batch: Batch) -> float:
    """The median of several steps, forward and backward: one alone may meet other work on the machine."""
    times: list[float] = []
    several = state().num_processes == 1  # several processes must take equally many, or they wait for each other
    while len(times) < (STEPS if several and sum(times) < PATIENCE else 1):
        began = clock()
        model(batch).mean().backward()
        times.append(_since(began))
    return statistics.median(times)


def _base_seconds(method: Method, batch: Batch, dtype: torch.dtype) -> float:
    """Of the base's own prediction of a whole micro-batch."""
    if method.base is None:
        return 0.0
    began = time.perf_counter()
    with torch.no_grad(), method.base.models() as models:
        method.step(models, batch, dtype)
    return _since(began)


def estimate(
    method: Method,
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    *,
    dtype: torch.dtype = torch.float32,
    asked: float = 0.0,
    caching_seconds: float = 0.0,
    area: float = 1.0,
) -> Estimate:
    """Tries one micro-batch: forward and backward (the first warms up), once forward; leaves no gradient behind.

    Args:
        method: what trains.
        model: the method's step, without the wrapper for several processes.
        batch: one micro-batch on the device.
        settings: batch size, steps, optimizer and precision.
        dtype: compute precision.
        asked: share of samples for which the base predicts too, which any one micro-batch may hold more or fewer of.
        caching_seconds: time that caching will take beside the steps.
        area: of a picture of the run, in pictures of this batch; time and activations grow with it.
    """
    batch = batch.copy()
    batch.pop("preserved", None)
    with torch.no_grad():
        numbers = sum(local(item).numel() for item in method.trainable().values())
    if settings.compile:  # nothing can look into what is compiled
        losses, activations = kept_bytes(model, batch)
        losses.mean().backward()
    else:
        activations = peak_bytes(method, model, batch)
    seconds = _step_seconds(model, batch) + asked * _base_seconds(method, batch, dtype)
    began = time.perf_counter()
    with torch.no_grad():
        model(batch)
    sample_seconds = _since(began) / len(batch["latents"])
    for parameter in method.trainable().values():
        parameter.grad = None
    held = {id(item): item for module in method.networks() for item in module.parameters()}.values()
    with torch.no_grad():
        weights = sum(local(item).numel() * item.element_size() for item in held)
    return Estimate(
        weights=weights + scale_bytes(method.networks()) + prepacked_bytes(method.networks()),
        gradients=4 * numbers,
        optimizer=state_bytes(settings) * numbers,
        average=4 * numbers if settings.ema else 0,
        activations=round(area * activations),
        step_seconds=area * seconds * settings.accumulation,
        caching_seconds=caching_seconds,
        sample_seconds=area * sample_seconds,
        waiting=sum(waiting_bytes(module) for module in method.networks()),
        untried=round((area - 1) * activations),
    )

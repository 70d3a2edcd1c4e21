"""Optimizers by name, the learning rate as a function of the step, and the moving average."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainSettings
from .errors import TrainingError
from .sharding import like, local

__all__ = ["Ema", "build", "rate"]


def build(trainable: dict[str, nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer over named parameters, text encoders with their own learning rate.

    Raises:
        TrainingError: an optimizer that is not installed or not found, or arguments it does not take.
    """
    text = [parameter for name, parameter in trainable.items() if name.startswith("text_encoder")]
    image = [parameter for name, parameter in trainable.items() if not name.startswith("text_encoder")]
    text_rate = settings.text_learning_rate or settings.learning_rate
    groups = [
        {"params": params, "lr": lr, "peak": lr}
        for params, lr in ((image, settings.learning_rate), (text, text_rate))
        if params
    ]
    name, options = settings.optimizer, dict(settings.optimizer_args)
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])
    if name == "adamw":
        options.setdefault("fused", True)
    kind = _kind(name)
    try:
        return kind(groups, **options)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"train.optimizer_args do not fit train.optimizer = {name}: {error}") from error


def _kind(name: str) -> Any:
    known = {"adamw": "torch.optim:AdamW", "adamw8bit": "bitsandbytes.optim:AdamW8bit", "prodigy": "prodigyopt:Prodigy"}
    module, _, attribute = known.get(name, name).partition(":")
    if not attribute:
        raise TrainingError(f"train.optimizer {name!r} is not known; allowed: {', '.join(known)} or module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        package = module.split(".")[0]
        raise TrainingError(f"train.optimizer {name} needs the package {package}: pip install {package}") from error
    except AttributeError as error:
        raise TrainingError(f"train.optimizer {name}: {module} has no {attribute}") from error


def rate(step: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate at a step (from 0); a function of the step, so there is nothing to resume."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.schedule == "linear":
        return max(0.0, 1 - progress)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return 1.0


class Ema:
    """Exponential moving average of parameters, in float32 on their device.

    The decay grows as (1+n)/(10+n) up to its value, so that short runs do not remember their start.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [local(average) for average in self.average]
        torch._foreach_lerp_(averages, [local(parameter) for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges averages and weights; twice is none, bit for bit."""
        for average, parameter in zip(map(local, self.average), map(local, self.parameters), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def load(self, average: list[Tensor], updates: int) -> None:
        self.updates = updates
        for mine, saved in zip(self.average, average, strict=True):
            local(mine).copy_(local(like(saved, mine)))

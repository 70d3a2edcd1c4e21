"""Optimizers by name, the learning rate as a function of the step, and the moving average."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import patterns
from .config import TrainSettings
from .errors import TrainingError
from .sharding import like, local

__all__ = [
    "KNOWN",
    "Known",
    "WeightAverage",
    "averages",
    "build_optimizer",
    "check_optimizer",
    "evaluated",
    "frozen",
    "rate",
    "rates_table",
    "state_bytes",
]


@dataclass(frozen=True, kw_only=True)
class Known:
    """An optimizer with a short name."""

    where: str
    """`module:Class`."""
    package: str
    """What pip installs."""
    rate: float = 1e-4
    """Peak learning rate where none is set, for a LoRA."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that differ from the class's own defaults."""
    state_bytes: int = 8
    """Of state per trained number: Adam keeps two float32."""


FACTORED = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # the rate is `rate(step)` here too
# Prodigy's authors advise these for diffusion models: https://github.com/konstmish/prodigy
PRODIGY = {"safeguard_warmup": True, "use_bias_correction": True, "weight_decay": 0.01}
KNOWN = {
    "adamw": Known(where="torch.optim:AdamW", package="torch", options={"fused": True}),
    "adafactor": Known(
        where="transformers.optimization:Adafactor", package="transformers", options=FACTORED, state_bytes=1
    ),
    # A third to a tenth of Adam's rate (Chen et al. 2023), since every number moves by the whole rate in every step.
    "lion": Known(where="pytorch_optimizer:Lion", package="pytorch-optimizer", rate=3e-5, state_bytes=4),
    "came": Known(where="pytorch_optimizer:CAME", package="pytorch-optimizer", state_bytes=5),
    "prodigy": Known(where="prodigyopt:Prodigy", package="prodigyopt", rate=1.0, options=PRODIGY, state_bytes=16),
    # One to ten times a schedule's rate (Defazio et al. 2024).
    "schedulefree": Known(where="schedulefree:AdamWScheduleFree", package="schedulefree", rate=3e-4),
    "adamw8bit": Known(where="bitsandbytes.optim:AdamW8bit", package="bitsandbytes", state_bytes=2),
    "lion8bit": Known(where="bitsandbytes.optim:Lion8bit", package="bitsandbytes", rate=3e-5, state_bytes=1),
    "torch.optim:SGD": Known(where="torch.optim:SGD", package="torch", state_bytes=0),
}


def check_optimizer(settings: TrainSettings) -> None:
    """Makes the optimizer over a number, so that what is wrong with it is known before anything else is done.

    Raises:
        TrainingError: an optimizer that is not installed or not found, arguments it does not take, or settings that
            do not go with it.
    """
    build_optimizer({"unet.none": nn.Parameter(torch.zeros(1))}, dataclasses.replace(settings, rates={}))


def build_optimizer(
    trainable: Mapping[str, nn.Parameter], settings: TrainSettings, factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over named parameters, in groups of one learning rate; what `train.rates` freezes is left out.

    Args:
        trainable: parameters by `model.parameter` name.
        settings: optimizer, its arguments, and learning rates.
        factors: of the learning rate by pattern, which come on top of `train.rates` (LoRA+).

    Raises:
        TrainingError: see `check_optimizer`; or a pattern that catches nothing.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, peak in _peaks(trainable, settings, factors or {}).items():
        if peak > 0:
            groups.setdefault(peak, []).append(trainable[name])
    if not groups:
        raise TrainingError("train.rates: nothing trains, every factor is 0")
    _refuse(settings, len(groups))
    options = {**(KNOWN[settings.optimizer].options if settings.optimizer in KNOWN else {}), **settings.optimizer_args}
    if isinstance(options.get("betas"), list):
        options["betas"] = tuple(options["betas"])
    kind = _kind(settings.optimizer)
    try:
        optimizer: torch.optim.Optimizer = kind(
            [{"params": some, "lr": peak, "peak": peak} for peak, some in groups.items()], **options
        )
    except (TypeError, ValueError) as error:
        raise TrainingError(
            f"train.optimizer_args do not fit train.optimizer = {settings.optimizer}: {error}"
        ) from error
    if averages(optimizer):
        if settings.ema is not None or settings.schedule != "constant":
            raise TrainingError(
                f"train.optimizer {settings.optimizer} averages by itself and needs no schedule: set train.ema null "
                "and train.schedule constant (train.warmup may stay)"
            )
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _peaks(
    trainable: Mapping[str, nn.Parameter], settings: TrainSettings, factors: Mapping[str, float]
) -> dict[str, float]:
    """Parameter -> its peak learning rate, parameters of the U-net first."""
    default = KNOWN[settings.optimizer].rate if settings.optimizer in KNOWN else KNOWN["adamw"].rate
    usual = settings.learning_rate or default
    peaks = {name: usual for name in trainable if not _of_text(name)}
    peaks |= {name: settings.text_learning_rate or usual for name in trainable if _of_text(name)}
    for setting, some in (("train.rates", settings.rates), ("lora.plus_ratio", factors)):
        for name, factor in patterns.by_name(some, patterns.caught(setting, some, trainable)).items():
            peaks[name] *= factor
    return peaks


def _of_text(name: str) -> bool:
    return name.startswith("text_encoder")


def _refuse(settings: TrainSettings, rates: int) -> None:
    """Raises `TrainingError` where Prodigy, which finds one rate for all, is given several."""
    if settings.optimizer == "prodigy" and rates > 1:
        raise TrainingError(
            "train.optimizer prodigy finds one learning rate for all that trains: it takes no "
            "train.text_learning_rate, no factors in train.rates but 0 and 1, and no lora.plus_ratio"
        )


def frozen(trainable: Mapping[str, nn.Parameter], settings: TrainSettings) -> list[str]:
    """Names of the parameters that `train.rates` freezes."""
    found = patterns.caught("train.rates", settings.rates, trainable)
    return [name for name, factor in patterns.by_name(settings.rates, found).items() if factor == 0]


def rates_table(
    trainable: Mapping[str, nn.Parameter], settings: TrainSettings, factors: Mapping[str, float] | None = None
) -> list[str]:
    """What each pattern of `train.rates` caught, and at which rates it trains.

    Args:
        trainable: parameters by `model.parameter` name.
        settings: optimizer and learning rates.
        factors: of the learning rate by pattern, as for `build_optimizer`.

    Returns:
        Lines; none where `train.rates` is empty.
    """
    peaks = _peaks(trainable, settings, factors or {})

    def said(names: list[str]) -> str:
        rates = sorted({peaks[name] for name in names})
        count = sum(trainable[name].numel() for name in names)
        rate = "not trained" if rates == [0] else f"rate {' and '.join(f'{rate:g}' for rate in rates)}"
        return f"tensors, {count:,} numbers, {rate}"

    return patterns.caught_table(
        "train.rates", patterns.caught("train.rates", settings.rates, trainable), trainable, said
    )


def state_bytes(settings: TrainSettings) -> int:
    """Bytes of optimizer state per trained number; an unknown one is taken for Adam."""
    return KNOWN[settings.optimizer].state_bytes if settings.optimizer in KNOWN else KNOWN["adamw"].state_bytes


def _kind(name: str) -> Any:
    known = KNOWN.get(name)
    module, _, attribute = (known.where if known else name).partition(":")
    if not attribute:
        names = [short for short in KNOWN if ":" not in short]
        raise TrainingError(f"train.optimizer {name!r} is not known; allowed: {', '.join(names)} or module:Class")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        package = known.package if known else module.split(".")[0]
        raise TrainingError(f"train.optimizer {name} needs the package {package}: pip install {package}") from error
    except AttributeError as error:
        raise TrainingError(f"train.optimizer {name}: {module} has no {attribute}") from error


def averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is schedule-free: gradients are taken beside the average, which is the result."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


@contextlib.contextmanager
def evaluated(optimizer: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the context, parameters of a schedule-free optimizer hold the average; afterwards what they held, to the
    bit, which the optimizer's own way back would not give."""
    if not averages(optimizer):
        yield
        return
    with torch.no_grad():
        kept = [local(parameter).clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                local(parameter).copy_(value)


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


class WeightAverage:
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

"""The base's own prediction as the target of samples of the class: what the base knows is kept, what it drew is not.

Prior preservation towards pictures (Ruiz et al. 2023) teaches the pictures that the base drew, with their faults. Here
the target of a sample is what the base predicts for the same noisy latent, timestep and caption:

    L = || f(x_t, t, c) - f_base(x_t, t, c) ||²

It is zero until training moves the sample's prediction, and any latent will do. Trainers call it differential output
preservation.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from adapters.seat import switched_off

__all__ = ["BasePrediction", "adapter_off", "frozen_copy"]

Models = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class BasePrediction:
    """How a method predicts as its base does."""

    models: Callable[[], AbstractContextManager[Models]]
    """Within the context, the models by name, as they were before training."""
    networks: list[Any] = field(default_factory=list)
    """What is kept for it beside the networks that train."""


def adapter_off(models: Models) -> BasePrediction:
    """The models that train, with their adapters switched off for as long as the context lasts."""
    layers = [layer for model in models.values() for layer in model.modules() if isinstance(layer, BaseTunerLayer)]

    @contextlib.contextmanager
    def off() -> Iterator[Models]:
        with switched_off(layers):
            yield models

    return BasePrediction(models=off)


def frozen_copy(models: Models) -> BasePrediction:
    """A copy of the models as they are now, for methods that train whole networks: their memory once more."""
    kept = {name: copy.deepcopy(model).requires_grad_(False) for name, model in models.items()}
    return BasePrediction(models=lambda: contextlib.nullcontext(kept), networks=list(kept.values()))

"""LoRA starts that begin with a part of the base's weight, PiSSA and OLoRA, and how their results become plain LoRAs.

PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948) and OLoRA (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775)
take a product `s B0 A0` out of a layer's weight W and train it: the layer computes `(W - s B0 A0) + s B A`, which is W
at the start. On the base as it is, the result is a LoRA of twice the rank:

    W + s (B A - B0 A0) = W + s [B - B0, B0] [A; A - A0]

The factors are differences where they can be, so that little is lost when they are rounded to half precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TrainingError
from .preserve import BasePrediction, Models

__all__ = ["TAKEN", "at_start", "check_start", "subtract_start"]

TAKEN = ("pissa", "olora")
"""Starts that change the base's weights."""


def check_start(start: str, network: nn.Module, ranks: Mapping[str, int]) -> None:
    """Looks whether a start can be computed for these layers, which peft would find out half-way.

    Args:
        start: see `LoraSettings.start`.
        network: which the LoRA is for.
        ranks: path of a layer -> its rank.

    Raises:
        TrainingError: a convolution, or a rank that the layer's weight does not have. With eva, which leaves
            convolutions as they are, only a rank above the layer's number of inputs.
    """
    for name, rank in ranks.items():
        layer = network.get_submodule(name)
        if start == "eva":
            if isinstance(layer, nn.Linear) and rank > layer.in_features:
                raise TrainingError(
                    f"lora.start: eva takes directions of a layer's inputs: {name} has {layer.in_features}, fewer than "
                    f"its rank {rank}; lower lora.rank, or set lora.ranks for it"
                )
            continue
        if not isinstance(layer, nn.Linear):
            raise TrainingError(f"lora.start: {start} is for linear layers, {name} is a convolution; see lora.targets")
        if start in TAKEN and rank > min(layer.in_features, layer.out_features):
            raise TrainingError(
                f"lora.start: {start} takes the rank out of the weight: {name} ({layer.out_features}, "
                f"{layer.in_features}) has no rank {rank}"
            )
        if start == "orthogonal" and rank % 2:
            raise TrainingError(f"lora.start: orthogonal needs even ranks, {name} has {rank}")


def subtract_start(start: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    """A function from trained weights to those of the LoRA on the base as it is.

    Args:
        start: the weights A0 (r, in) and B0 (out, r) of every layer, as they were before training.
    """

    def changed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(weights)
        for name, before in start.items():
            now = weights[name]
            moved = now - before.to(now)
            up = ".lora_B." in name
            found[name] = torch.cat([moved, before.to(now)], 1) if up else torch.cat([now, moved])
        return found

    return changed


def at_start(models: Models, start: Mapping[str, Tensor]) -> BasePrediction:
    """The models with their adapters as they were before training, which is the base up to rounding."""
    parameters: dict[str, Any] = {
        f"{name}.{key}": parameter
        for name, model in models.items()
        for key, parameter in model.named_parameters()
        if f"{name}.{key}" in start
    }

    @contextlib.contextmanager
    def before() -> Iterator[Models]:
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = start[name].to(parameter.device)
            yield models
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]

    return BasePrediction(models=before)

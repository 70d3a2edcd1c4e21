"""Optimizers by name, the learning rate's course, the average, and the estimate's arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from training import checkpoint, estimate, optim
from training.config import TrainSettings
from training.errors import TrainingError


def build(**changes: object) -> torch.optim.Optimizer:
    trainable = {"unet.a": nn.Parameter(torch.ones(2)), "text_encoder.b": nn.Parameter(torch.ones(3))}
    return optim.build(trainable, TrainSettings(**{"learning_rate": 0.1, **changes}))  # type: ignore[arg-type]


def test_adamw_is_fused_and_text_encoders_have_their_own_rate() -> None:
    optimizer = build(text_learning_rate=0.01, optimizer_args={"betas": [0.9, 0.99], "weight_decay": 0.5})
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert all(group["fused"] and group["betas"] == (0.9, 0.99) for group in optimizer.param_groups)


def test_any_class_can_be_the_optimizer() -> None:
    assert isinstance(build(optimizer="torch.optim:SGD", optimizer_args={"momentum": 0.9}), torch.optim.SGD)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamv"}, r"train.optimizer 'adamv' is not known; allowed: adamw, adamw8bit, prodigy or module"),
        ({"optimizer": "no_such_package:Adam"}, r"needs the package no_such_package: pip install"),
        ({"optimizer": "torch.optim:Adamm"}, r"torch.optim has no Adamm"),
        ({"optimizer_args": {"momentum": 1}}, r"train.optimizer_args do not fit train.optimizer = adamw.*momentum"),
    ],
)
def test_a_wrong_optimizer_is_named(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        build(**changes)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("adamw", "torch"),
        ("torch.optim:SGD", "torch"),
        ("torch.optim:RMSprop", "torch"),
        ("prodigy", "prodigyopt"),
        ("adamw8bit", "bitsandbytes"),
    ],
)
def test_any_optimizer_goes_on_from_its_checkpoint_to_the_bit(name: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    settings = TrainSettings(optimizer=name, learning_rate=1.0 if name == "prodigy" else 1e-2)
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    target = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))

    def advance(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (weight - target).square().mean().backward()
            optimizer.step()

    weight = nn.Parameter(start.clone())
    optimizer = optim.build({"unet.a": weight}, settings)
    advance(weight, optimizer, 4)
    state = checkpoint.State(step=4, weights={"a": weight}, optimizer=optimizer.state_dict(), facts={"settings": {}})
    saved = checkpoint.load(checkpoint.save(tmp_path, state, keep=1))
    advance(weight, optimizer, 4)

    again = nn.Parameter(saved.weights["a"].clone())
    resumed = optim.build({"unet.a": again}, settings)
    checkpoint.restore_optimizer(resumed, saved.optimizer)
    advance(again, resumed, 4)
    assert (weight - target).norm() < (start - target).norm()
    assert torch.equal(weight, again)


def test_the_rate_is_a_function_of_the_step() -> None:
    linear = TrainSettings(steps=12, warmup=2, schedule="linear")
    assert [optim.rate(step, linear) for step in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = TrainSettings(steps=8, schedule="cosine")
    assert optim.rate(2, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert {optim.rate(step, TrainSettings(steps=8)) for step in range(8)} == {1.0}


def test_the_average_follows_by_hand_and_swapping_twice_is_nothing() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = optim.Ema([weight], 0.9)
    weight.data.fill_(11.0)
    average.update()  # early decay (1 + 1) / (10 + 1): 11 * (1 - 2/11) = 9
    assert average.average[0].item() == pytest.approx(9.0)
    before = weight.detach().clone(), average.average[0].clone()
    average.swap()
    assert weight.item() == before[1].item()
    average.swap()
    assert torch.equal(weight, before[0])
    assert torch.equal(average.average[0], before[1])


def test_activations_are_what_autograd_keeps() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inputs = torch.ones(32, 8)
    losses, kept = estimate.activation_bytes(model, inputs)  # type: ignore[arg-type]
    losses.sum().backward()
    assert kept == 4 * 32 * (8 + 16)  # the input of each layer; tanh keeps its output, which is the next one's input

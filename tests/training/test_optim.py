"""Optimizers by name, the learning rate's course, the average, and the estimate's arithmetic."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_preserve import batch_of
from torch import nn

from training import checkpoint, config, estimate, lora, models, networks, optim
from training.config import TrainSettings
from training.errors import TrainingError
from training.method import Stepper


def build(**changes: object) -> torch.optim.Optimizer:
    trainable = {"unet.a": nn.Parameter(torch.ones(2)), "text_encoder.b": nn.Parameter(torch.ones(3))}
    return optim.build_optimizer(trainable, TrainSettings(**{"learning_rate": 0.1, **changes}))  # type: ignore[arg-type]


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
        (
            {"optimizer": "adamv"},
            r"train.optimizer 'adamv' is not known; allowed: adamw, adafactor, .* or module:Class",
        ),
        ({"optimizer": "no_such_package:Adam"}, r"needs the package no_such_package: pip install"),
        ({"optimizer": "torch.optim:Adamm"}, r"torch.optim has no Adamm"),
        ({"text_learning_rate": 0.2, "optimizer": "prodigy"}, r"prodigy finds one learning rate for all that trains"),
        ({"rates": {"a": 0, "b": 0}}, r"train.rates: nothing trains, every factor is 0"),
        ({"rates": {"zz": 2}}, r"train.rates: 'zz' is in none of the 2 names, such as unet.a"),
        ({"rates": {"": 2, "b": 1}}, r"train.rates: all that 'b' finds is caught by patterns before it"),
        ({"optimizer_args": {"momentum": 1}}, r"train.optimizer_args do not fit train.optimizer = adamw.*momentum"),
    ],
)
def test_a_wrong_optimizer_is_named(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        build(**changes)


@pytest.mark.parametrize("name", [*optim.KNOWN, "torch.optim:RMSprop"])
def test_any_optimizer_goes_on_from_its_checkpoint_to_the_bit(name: str, tmp_path: Path) -> None:
    if name in optim.KNOWN:
        pytest.importorskip(optim.KNOWN[name].where.partition(":")[0])
    settings = TrainSettings(optimizer=name, learning_rate=None if name == "prodigy" else 1e-2)
    start = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    target = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))

    def advance(weight: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (weight - target).square().mean().backward()
            optimizer.step()

    weight = nn.Parameter(start.clone())
    optimizer = optim.build_optimizer({"unet.a": weight}, settings)
    advance(weight, optimizer, 4)
    state = checkpoint.State(step=4, weights={"a": weight}, optimizer=optimizer.state_dict(), facts={"settings": {}})
    saved = checkpoint.load_checkpoint(checkpoint.save(tmp_path, state, keep=1))
    advance(weight, optimizer, 4)

    again = nn.Parameter(saved.weights["a"].clone())
    resumed = optim.build_optimizer({"unet.a": again}, settings)
    checkpoint.restore_optimizer(resumed, saved.optimizer)
    advance(again, resumed, 4)
    assert (weight - target).norm() < (start - target).norm()
    assert torch.equal(weight, again)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("lion", "pytorch-optimizer"),
        ("came", "pytorch-optimizer"),
        ("prodigy", "prodigyopt"),
        ("schedulefree", "schedulefree"),
        ("adamw8bit", "bitsandbytes"),
        ("lion8bit", "bitsandbytes"),
    ],
)
def test_a_package_that_is_absent_is_one_line(name: str, install: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, optim.KNOWN[name].where.partition(":")[0], None)  # what an absent one looks like
    with pytest.raises(
        TrainingError, match=rf"^train.optimizer {name} needs the package {install}: pip install {install}$"
    ):
        optim.check_optimizer(TrainSettings(optimizer=name))


def test_each_optimizer_has_its_own_rate_unless_one_is_set() -> None:
    assert build(learning_rate=None).param_groups[0]["lr"] == 1e-4
    assert build(learning_rate=None, optimizer="adafactor").param_groups[0]["relative_step"] is False
    assert build(optimizer="adafactor", optimizer_args={"scale_parameter": True}).param_groups[0]["scale_parameter"]
    assert optim.KNOWN["prodigy"].rate == 1
    for name, known in optim.KNOWN.items():
        if importlib.util.find_spec(known.where.partition(":")[0].partition(".")[0]):
            assert build(learning_rate=None, optimizer=name).param_groups[0]["lr"] == known.rate


def test_factors_by_pattern_come_on_top_of_the_rates_and_0_is_left_out() -> None:
    names = ["unet.down.a", "unet.down.b", "unet.up.a", "unet.up.b", "text_encoder.b"]
    trainable = {name: nn.Parameter(torch.zeros(number + 1)) for number, name in enumerate(names)}
    settings = TrainSettings(learning_rate=0.1, text_learning_rate=0.01, rates={r"up\.a": 0, "up": 0.5, r"a$": 3})
    optimizer = optim.build_optimizer(trainable, settings, {r"b$": 2})
    peaks = {len(item): group["peak"] for group in optimizer.param_groups for item in group["params"]}
    assert peaks == pytest.approx({1: 0.3, 2: 0.2, 4: 0.1, 5: 0.02})
    assert optim.frozen(trainable, settings) == ["unet.up.a"]
    assert [" ".join(line.split()) for line in optim.rates_table(trainable, settings, {r"b$": 2})] == [
        "train.rates",
        r"up\.a 1 tensors, 3 numbers, not trained",
        "up 1 tensors, 4 numbers, rate 0.1",
        "a$ 1 tensors, 1 numbers, rate 0.3",
        "the rest 2 tensors, 7 numbers, rate 0.02 and 0.2",
    ]


def test_a_schedule_free_optimizer_shows_its_average_and_goes_on_with_the_bits_it_had() -> None:
    pytest.importorskip("schedulefree")
    weight = nn.Parameter(torch.zeros(64))
    optimizer = optim.build_optimizer({"unet.a": weight}, TrainSettings(optimizer="schedulefree", learning_rate=0.1))
    points = []  # z, of which the result is the mean: every step has the same rate
    for step in range(5):
        weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        points.append(optimizer.state[weight]["z"].clone())
        before = weight.detach().clone()
        with optim.evaluated(optimizer, [weight]):
            torch.testing.assert_close(weight.detach(), torch.stack(points).mean(0), rtol=1e-4, atol=1e-5)
        assert torch.equal(weight, before)
        assert all(group["train_mode"] for group in optimizer.param_groups)
    for changes in ({"ema": 0.9}, {"schedule": "cosine"}):
        with pytest.raises(TrainingError, match=r"train.optimizer schedulefree averages by itself"):
            optim.check_optimizer(TrainSettings(optimizer="schedulefree", **changes))  # type: ignore[arg-type]


def test_the_rate_is_a_function_of_the_step() -> None:
    linear = TrainSettings(steps=12, warmup=2, schedule="linear")
    assert [optim.rate(step, linear) for step in (0, 1, 2, 7, 12)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = TrainSettings(steps=8, schedule="cosine")
    assert optim.rate(2, cosine) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert {optim.rate(step, TrainSettings(steps=8)) for step in range(8)} == {1.0}


def test_the_average_follows_by_hand_and_swapping_twice_is_nothing() -> None:
    weight = nn.Parameter(torch.zeros(1))
    average = optim.WeightAverage([weight], 0.9)
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
    losses, kept = estimate.kept_bytes(model, inputs)  # type: ignore[arg-type]
    losses.sum().backward()
    assert kept == 4 * 32 * (8 + 16)  # the input of each layer; tanh keeps its output, which is the next one's input


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_is_the_allocator_s_peak(checkpointing: bool, base: Path) -> None:
    cpu = torch.device("cpu")
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    settings = TrainSettings(gradient_checkpointing=checkpointing, prepack=False)
    networks.cast(method, cpu, torch.float32)
    networks.configure_networks(method, settings, cpu, tokens=64)
    model = Stepper(method, torch.float32, cpu)
    drawn = batch_of(parts, ["a d"] * 2, ["d"] * 2)
    batch: Any = {key: one for key, one in drawn.items() if not key.startswith(("base", "preserved"))}
    found = estimate.estimate(method, model, batch, settings)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        model(batch).mean().backward()
    results: Any = seen.profiler.kineto_results  # type: ignore[union-attr]
    made = sorted((one for one in results.events() if one.name() == "[memory]"), key=lambda one: one.start_ns())
    peak = max(itertools.accumulate(one.nbytes() for one in made))
    assert found.activations + found.gradients == pytest.approx(peak, rel=0.25)  # what kernels take within is not seen

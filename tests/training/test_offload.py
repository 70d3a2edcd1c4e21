"""Frozen blocks in main memory: training with them is training without, and no more than two are on the device."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import training_driver
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_methods import predict, train
from test_preserve import KINDS, batch_of, moved

from training import config, controlnet, dreambooth, lora, models, networks, offload, precision, quantize
from training.errors import TrainingError
from training.estimate import estimate, trained_table
from training.method import Method, Stepper

CPU = torch.device("cpu")
FP32 = torch.float32
DEVICES = [
    CPU,
    pytest.param(torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def prepared(method: Method, device: torch.device, *, waits: bool, bits: str | None = None) -> Stepper:
    """The method's step, its blocks in main memory or recomputed where they are."""
    if bits:
        quantize.quantize_networks(method.networks(), bits, FP32, CPU if waits else device)
    networks.cast(method, device, FP32, move=not waits)
    for network in method.networks() if waits else ():
        offload.keep_blocks(network, device)
    if not waits:
        method.parts.unet.enable_gradient_checkpointing()
    moved(method)
    return Stepper(method, FP32, device)


def learned(method: Method, stepper: Stepper, device: torch.device) -> list[torch.Tensor]:
    """Losses and gradients of two steps of both captions, each with dropout of its own."""
    batch = {key: value.to(device) for key, value in batch_of(method.parts, ["a d", "d"], ["a d", "d"]).items()}
    for encoder in method.parts.text_encoders:
        encoder.to(device)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses = stepper({key: value for key, value in batch.items() if key[:4] != "base" and key != "preserved"})
        losses.sum().backward()
        found.append(losses.detach())
    return [*found, *(one.grad for one in method.trainable().values() if one.grad is not None)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "pissa", "text", "tokens", "int8"])
def test_losses_and_gradients_are_those_of_blocks_on_the_device(
    kind: str, family: str, device: torch.device, base: Path, sdxl_base: Path
) -> None:
    found = []
    for waits in (False, True):
        parts = models.load_parts({"sd": base, "sdxl": sdxl_base}[family])
        method = KINDS["lora" if kind == "int8" else kind](parts)
        stepper = prepared(method, device, waits=waits, bits="int8" if kind == "int8" else None)
        assert bool(offload.kept_numel(parts.unet)) == waits
        found.append(learned(method, stepper, device))
    assert len(found[0]) > 2
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_two_blocks_are_on_the_device_at_most(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over forward and backward passes, whatever the passes leave to be collected."""
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
    stepper = prepared(method, CPU, waits=True)
    sizes = [sum(value.numel() for *_, value in block.kept) for block in offload._blocks(method.parts.unet)]
    live: dict[int, int] = {}
    peaks = [0]
    send = offload._Belt._send

    def watched(belt: Any, block: Any) -> list[torch.Tensor]:
        brought = send(belt, block)
        for value in brought:
            live[id(value)] = value.numel()
            weakref.finalize(value, live.pop, id(value))
        peaks.append(sum(live.values()))
        return brought

    monkeypatch.setattr(offload._Belt, "_send", watched)
    learned(method, stepper, CPU)
    assert len(peaks) > 3 * len(sizes)  # a block came for each of two steps' passes, but for the first, backward
    assert max(peaks) <= sum(sorted(sizes)[-2:])


def test_between_passes_and_after_an_error_the_blocks_hold_nothing(base: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
    before = {name for name, _ in method.parts.unet.named_parameters()}
    stepper = prepared(method, CPU, waits=True)
    held = [(owner, name) for block in offload._blocks(method.parts.unet) for owner, name, _ in block.kept]
    after = {name for name, _ in method.parts.unet.named_parameters()}
    assert len(before - after) == len(held)
    assert all("lora_" not in name for name in before - after)
    learned(method, stepper, CPU)
    assert all(owner._parameters[name] is None for owner, name in held)
    with pytest.raises(RuntimeError):
        predict(method.parts.unet, width=7)
    assert all(owner._parameters[name] is None for owner, name in held)


@pytest.mark.parametrize("method", ["lora", "lokr", "pissa", "eva", "drops", "dora", "text", "controlnet"])
def test_all_that_trains_beside_a_base_does_so_beside_a_waiting_one(
    method: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"base": str(base), "pictures": str(pictures), "method": method}
    found = {}
    for waits in (False, True):
        options = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "offload": waits}
        result = training_driver.train({**asked, "out": tmp_path / str(waits), "train": options}, say=lambda line: None)
        assert result is not None
        found[waits] = result.losses
    torch.testing.assert_close(torch.tensor(found[True]), torch.tensor(found[False]), rtol=1e-4, atol=1e-5)


def test_what_trains_whole_is_recomputed_where_that_is_asked_for(base: Path) -> None:
    method = controlnet.prepare(models.load_parts(base), config.ControlNetSettings())
    settings = config.TrainSettings(offload=True, gradient_checkpointing=True)
    networks.cast(method, CPU, FP32, move=False)
    networks.configure_networks(method, settings, CPU, tokens=64)
    assert offload.kept_numel(method.parts.unet)
    assert not method.parts.unet.is_gradient_checkpointing
    assert not offload.kept_numel(method.controlnet)
    assert method.controlnet.is_gradient_checkpointing


def test_the_result_loads_into_a_plain_pipeline(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Drawing samples in between changes nothing."""
    ends = []
    for name, every in (("blind", 100), ("seen", 2)):
        chosen = config.ValidationSettings(every=every, loss_samples=2, prompts=["a d"] if name == "seen" else [])
        parts = models.load_parts(base)
        method = lora.prepare(parts, config.LoraSettings(rank=2))
        result = train(method, pictures, tmp_path / name, steps=5, offload=True, validation=chosen)
        ends.append(load_file(result.folder / lora.WEIGHTS_NAME))
        pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        pipe.load_lora_weights(result.folder)
        torch.testing.assert_close(predict(pipe.unet), predict(parts.unet), rtol=1e-4, atol=1e-5)
    assert ends[0]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_trial_of_precisions_leaves_the_blocks_where_they_are(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lays the network out twice, in two precisions, before the run itself does."""
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
    before = {name for name, _ in method.parts.unet.named_parameters()}
    tried: list[torch.dtype] = []

    def decide(what: str, facts: object, trial: Any, **more: object) -> str:
        for dtype in (FP32, torch.bfloat16):
            with trial(dtype) as one:
                one()
            tried.append(dtype)
        return "fp32"

    monkeypatch.setattr(precision, "decide_precision", decide)
    settings = config.TrainSettings(precision="auto", offload=True)
    precision.of_training(method, settings, Accelerator(cpu=True), (32, 32), print)
    assert len(tried) == 2
    assert not offload.kept_numel(method.parts.unet)
    assert before == {name for name, _ in method.parts.unet.named_parameters()}


@pytest.mark.parametrize("bits", [None, "int8"])
def test_the_estimate_tells_what_waits_from_what_is_on_the_device(bits: str | None, base: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
    table = trained_table(method)
    stepper = prepared(method, CPU, waits=True, bits=bits)
    assert trained_table(method) == table
    batch = {key: value for key, value in batch_of(method.parts, ["a d"], ["a d"]).items() if key[:4] != "base"}
    settings = config.TrainSettings(prepack=False, offload=True)
    found = estimate(method, stepper, batch, settings)
    blocks = offload._blocks(method.parts.unet)
    assert found.waiting == sum(value.nbytes for block in blocks for *_, value in block.kept)
    scales = quantize.scale_bytes(method.networks())
    assert found.weights == scales + sum(one.nbytes for one in method.parts.unet.parameters())
    assert found.waiting > found.weights / 2
    assert found.lines(settings)[0].endswith(" of weights wait in main memory")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True}, r"^train.offload does not go with train.compile; set one of them to false$"),
        ({"quantize": "nf4"}, r"^train.offload does not go with train.quantize nf4; use int8"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    offload.check_offload(config.TrainSettings(**changes))  # without it, this is nobody's business here
    with pytest.raises(TrainingError, match=message):
        offload.check_offload(config.TrainSettings(**changes, offload=True))


def test_whole_and_divided_networks_are_refused(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match=r"^train.offload: the U-net itself trains here, and only frozen weights"):
        train(dreambooth.prepare(models.load_parts(base)), pictures, tmp_path, offload=True)
    monkeypatch.setattr(offload.sharding, "asked", lambda state: True)
    with pytest.raises(TrainingError, match=r"^train.offload does not go with --use_fsdp; use --multi_gpu"):
        offload.check_offload(config.TrainSettings(offload=True))

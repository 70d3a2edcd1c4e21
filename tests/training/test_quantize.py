"""Frozen layers in 8 or 4 bits: what they take, and that training beside them is what it is beside whole ones."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training_driver
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from test_methods import predict, train
from test_preserve import KINDS, batch_of, moved
from torch import nn

from training import config, dreambooth, lora, models, networks, quantize
from training.errors import TrainingError
from training.estimate import estimate, trained_table
from training.method import Stepper, base_prediction

INSTALLED = importlib.util.find_spec(quantize.PACKAGE) is not None
BITS = [
    "int8",
    pytest.param("nf4", marks=pytest.mark.skipif(not INSTALLED, reason="4 bits are layers of bitsandbytes")),
]
REFUSED = {("dora", "int8"), ("loha", "nf4"), ("lokr", "nf4")}
CPU = torch.device("cpu")
# Of the U-net's prediction, relative, on these bases of random weights.
CLOSE = {"int8": 0.02, "nf4": 0.15}


def linear(network: nn.Module) -> dict[str, nn.Module]:
    """Frozen linear layers."""
    return {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and not any(one.requires_grad for one in layer.parameters())
    }


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_take_their_bits_and_the_rest_stays(kind: str, dtype: torch.dtype, base: Path) -> None:
    parts = models.load_parts(base)
    before, plain = predict(parts.unet), linear(parts.unet)
    shapes = {name: layer.weight.shape for name, layer in plain.items()}
    method = lora.prepare(parts, config.LoraSettings(rank=2, targets="conv"))
    assert quantize.quantize_networks(method.networks(), kind, dtype, CPU) == len(shapes)
    networks.cast(method, CPU, dtype)
    held = linear(parts.unet)
    assert {name.replace(".base_layer", "") for name in held} == set(shapes)
    weights = [layer.weight for layer in held.values()]
    assert {weight.dtype for weight in weights} == {{"int8": torch.int8, "nf4": torch.uint8}[kind]}
    rest = [one for one in parts.unet.parameters() if one.is_floating_point() and not one.requires_grad]
    assert {one.dtype for one in rest} == {dtype}
    assert {one.dtype for one in method.trainable().values()} == {torch.float32}
    # What is counted from shapes is what is held.
    held_bytes = sum(one.numel() for one in weights) + quantize.scale_bytes([parts.unet])
    assert held_bytes == sum(quantize.linear_bytes(kind, *shape) for shape in shapes.values())
    if dtype == torch.float32:
        assert 0 < off(predict(parts.unet), before) < CLOSE[kind]


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_lora_learns_and_loads_into_a_plain_pipeline(
    kind: str, family: str, base: Path, sdxl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    folder = {"sd": base, "sdxl": sdxl_base}[family]
    files = {}
    for bits in (None, kind):
        method = lora.prepare(models.load_parts(folder), config.LoraSettings(rank=2))
        result = train(method, pictures, tmp_path / str(bits), steps=12, quantize=bits, gradient_checkpointing=True)
        files[bits] = load_file(result.folder / lora.WEIGHTS_NAME)
        assert sum(result.losses[-3:]) < sum(result.losses[:3])
    assert {key: (value.shape, value.dtype) for key, value in files[kind].items()} == {
        key: (value.shape, value.dtype) for key, value in files[None].items()
    }
    kinds = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
    more = {"safety_checker": None} if family == "sd" else {}
    pipe = kinds[family].from_pretrained(folder, **more)
    pipe.load_lora_weights(result.folder)
    assert {one.dtype for one in pipe.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "pissa", "text", "controlnet"])
def test_all_that_trains_beside_a_base_does_so_beside_a_quantized_one(
    method: str, kind: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    if (method, kind) in REFUSED:
        pytest.skip("refused, see below")
    asked: dict[str, Any] = {"base": str(base), "pictures": str(pictures), "method": method}
    found = {}
    for bits in (None, kind):
        options = {"steps": 3, "batch_size": 2, "learning_rate": 1e-3, "quantize": bits}
        result = training_driver.train({**asked, "out": tmp_path / str(bits), "train": options}, say=lambda line: None)
        assert result is not None
        found[bits] = result.losses
    torch.testing.assert_close(torch.tensor(found[kind]), torch.tensor(found[None]), rtol=CLOSE[kind], atol=1e-3)


@pytest.mark.parametrize("kind", BITS)
@pytest.mark.parametrize("way", ["lora", "dora", "loha", "pissa", "text"])
def test_without_its_adapter_the_base_is_the_quantized_one(way: str, kind: str, base: Path) -> None:
    if (way, kind) in REFUSED:
        pytest.skip("refused, see below")
    parts = models.load_parts(base)
    method = KINDS[way](parts)
    quantize.quantize_networks(method.networks(), kind, torch.float32, CPU)
    networks.cast(method, CPU, torch.float32)
    assert method.switch is not None
    method.base = method.switch()
    batch = batch_of(parts, ["a d", "d"], ["a d", "d"])
    parts.unet.eval()
    before = base_prediction(method, batch, torch.float32)
    moved(method)
    assert torch.equal(base_prediction(method, batch, torch.float32), before)


@pytest.mark.parametrize("kind", BITS)
def test_drawing_in_between_changes_nothing(kind: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    """Of the layers, above all: some have another form for drawing, through which nothing learns."""
    ends = []
    for name, every in (("blind", 100), ("seen", 2)):
        chosen = config.ValidationSettings(every=every, loss_samples=2, prompts=["a d"] if name == "seen" else [])
        method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
        result = train(method, pictures, tmp_path / name, steps=5, quantize=kind, validation=chosen)
        ends.append(load_file(result.folder / lora.WEIGHTS_NAME))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("kind", BITS)
def test_the_estimate_counts_bits(kind: str, base: Path) -> None:
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    trained = sum(4 * one.numel() for one in method.trainable().values())
    table = trained_table(method)
    wanted = trained + sum(quantize.linear_bytes(kind, *layer.weight.shape) for layer in linear(parts.unet).values())
    wanted += sum(4 * one.numel() for one in parts.unet.parameters() if not one.requires_grad)
    wanted -= sum(4 * layer.weight.numel() for layer in linear(parts.unet).values())
    quantize.quantize_networks(method.networks(), kind, torch.float32, CPU)
    networks.cast(method, CPU, torch.float32)
    assert trained_table(method) == table
    model = Stepper(method, torch.float32, CPU)
    batch = {key: value for key, value in batch_of(parts, ["a d"], ["a d"]).items() if key[:4] != "base"}
    found = estimate(method, model, batch, config.TrainSettings(prepack=False))
    assert found.weights == wanted


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("nf4", {"kind": "loha"}, r"^train.quantize nf4 does not go with lora.kind loha in peft; use int8$"),
        ("nf4", {"kind": "lokr"}, r"^train.quantize nf4 does not go with lora.kind lokr in peft; use int8$"),
        ("int8", {"dora": True}, r"^train.quantize int8 does not go with lora.dora in peft; use nf4$"),
    ],
)
def test_adapters_that_peft_cannot_put_on_such_layers_are_refused(
    kind: str, changes: dict, message: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2, **changes))
    with pytest.raises(TrainingError, match=message):
        train(method, pictures, tmp_path, quantize=kind)


def test_a_whole_network_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=r"^train.quantize nf4: the U-net itself trains here, and rounded weights cannot"
    ):
        train(dreambooth.prepare(models.load_parts(base)), pictures, tmp_path, quantize="nf4")


def test_a_divided_base_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize.sharding, "asked", lambda state: True)
    with pytest.raises(TrainingError, match=r"^train.quantize int8 does not go with --use_fsdp; use --multi_gpu"):
        quantize.check_quantization("int8")


def test_without_the_package_a_run_ends_in_one_line(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, quantize.PACKAGE, None)  # what an absent one looks like
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
    with pytest.raises(TrainingError, match=r"^train.quantize nf4 needs the package bitsandbytes: pip install bits"):
        train(method, pictures, tmp_path, quantize="nf4")

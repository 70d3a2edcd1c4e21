"""The LoRA start from what the training pictures send through the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_methods import predict, train
from torch import Tensor, nn

from training import config, eva, lora, models
from training.errors import TrainingError
from training.method import Method
from training.preserve import adapter_off

RANK = 4


@pytest.fixture
def seen(base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Method, dict, dict]:
    """A training of a step: its method, what each layer got before that step, and how A began."""
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=RANK, start="eva", targets="all-linear"))
    unet, got, began = method.parts.unet, {}, {}
    layers = {
        name: layer
        for name, layer in unet.named_modules()
        if hasattr(layer, "lora_A") and isinstance(layer.base_layer, nn.Linear)
    }
    begin = method.begin
    assert begin is not None

    def recorded(batches: Iterator[Any], step: Callable[[Any], Tensor]) -> str:
        for name, layer in layers.items():
            got[name] = []
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: got[name].append(inputs[0].detach().flatten(0, -2).clone())
            )
        line = begin(batches, step)
        for name, layer in layers.items():
            layer._forward_pre_hooks.clear()
            began[name] = layer.lora_A["default"].weight.detach().clone()
        return line

    method.begin = recorded
    train(method, pictures, tmp_path, steps=24, learning_rate=1e-30)
    return method, got, began


def test_a_spans_the_leading_components_of_the_layer_s_inputs(seen: tuple[Method, dict, dict]) -> None:
    _, got, began = seen
    compared, chance = 0, []
    for name, down in began.items():
        inputs = torch.cat(got[name]).double()
        _, sizes, directions = torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)
        kept = int((sizes > 1e-4 * sizes[0]).sum())
        if kept < RANK:  # such as a text of few tokens
            continue
        own = down.double()
        torch.testing.assert_close(own @ own.T, torch.eye(RANK).double(), rtol=0, atol=1e-4)
        best = sizes[:RANK].square().sum()
        held = ((inputs - inputs.mean(0)) @ own.T).square().sum()
        assert held > 0.93 * best, name  # random directions hold two thirds of it, see below
        random = torch.linalg.qr(torch.randn(own.shape[1], RANK, generator=torch.Generator().manual_seed(0)).double())
        chance.append(((inputs - inputs.mean(0)) @ random.Q).square().sum() / best)
        if sizes[RANK] < 0.75 * sizes[RANK - 1]:  # the leading directions are told from the others
            assert (own @ directions[:RANK].T).square().sum() > 0.97 * RANK, name
            compared += 1
    assert compared >= 8
    assert sum(chance) / len(chance) < 0.67


def test_it_begins_as_the_base_to_the_bit_and_ships_a_plain_lora(base: Path, pictures: Path, tmp_path: Path) -> None:
    plain = predict(models.load_parts(base).unet)
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=RANK, start="eva"))
    unet, begin = method.parts.unet, method.begin
    assert begin is not None
    before = {name: value.detach().clone() for name, value in unet.named_parameters()}
    begin([{}] * 4, lambda _: predict(unet))  # type: ignore[arg-type, list-item]
    assert torch.equal(predict(unet), plain)
    downs = {name for name in before if ".lora_A." in name}
    assert downs == {name for name, value in unet.named_parameters() if not torch.equal(value, before[name])}
    assert not any(value.any() for name, value in unet.named_parameters() if ".lora_B." in name)

    found = {}

    def looked(batches: Iterator[Any], step: Callable[[Any], Tensor]) -> str:
        line = begin(batches, step)
        found["on"] = predict(unet)
        with adapter_off({"unet": unet}).models():
            found["off"] = predict(unet)
        return line

    method.begin = looked
    result = train(method, pictures, tmp_path)
    assert torch.equal(found["on"], found["off"])
    ranks = {len(value) for key, value in load_file(result.folder / lora.WEIGHTS_NAME).items() if "lora_A" in key}
    assert ranks == {RANK}


def test_nothing_is_encoded_for_it(base: Path, pictures: Path, tmp_path: Path) -> None:
    """The encoders have been released, so the pass can only read the cache."""
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=RANK, start="eva"))
    begin, encoders = method.begin, []
    assert begin is not None

    def looked(batches: Iterator[Any], step: Callable[[Any], Tensor]) -> str:
        encoders.append((method.parts.vae, list(method.parts.text_encoders)))
        return begin(batches, step)

    method.begin = looked
    train(method, pictures, tmp_path)
    assert encoders == [(None, [])]


class Net(nn.Module):
    """Two layers of one input, and one with a single input a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = lora_layers()

    def forward(self, x: Tensor) -> None:
        self.unet["wide"](x)
        self.unet["narrow"](x)
        self.unet["pooled"](x.mean(1))


def lora_layers() -> nn.ModuleDict:
    """With ranks 6, 2 and 6."""
    layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("wide", "narrow", "pooled")})
    sizes = {name: lora.Size(rank=rank, alpha=1) for name, rank in (("wide", 6), ("narrow", 2), ("pooled", 6))}
    lora._inject(layers, lora._config(config.LoraSettings(rank=6, start="eva"), sizes))
    return layers


def batch(number: int, values: int = 16) -> Any:
    """(2, 300, 16), more positions than are taken of a sample; of `values` directions with sizes that halve."""
    random = torch.Generator().manual_seed(number)
    return torch.randn(2, 300, 16, generator=random) * (0.5 ** torch.arange(16)) * (torch.arange(16) < values)


def test_layers_of_other_ranks_and_of_one_input_a_sample_keep_their_ranks() -> None:
    """peft's own loop would exchange the ranks of layers that share their inputs, and never end at the last layer."""
    net = Net()
    line = eva.begin_with_inputs({"unet": net.unet}, "default", map(batch, range(1000)), net)
    assert line.startswith("lora.start eva: from the inputs of 3 linear layers in ")
    for name, rank in (("wide", 6), ("narrow", 2), ("pooled", 6)):
        down = net.unet[name].lora_A["default"].weight.detach()
        assert down.shape == (rank, 16)
        leading = down.square()[:, :rank].sum() / rank  # the directions are the axes, by size
        assert leading > 0.97, (name, leading)


def test_too_few_inputs_and_components_of_rounding_leave_the_default_start() -> None:
    net = Net()
    before = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in net.unet.items()}
    line = eva.begin_with_inputs({"unet": net.unet}, "default", [batch(0, values=4)], net)
    assert line.endswith("3 linear layers in 1 batches; 1 with fewer inputs than ranks keep the default start")
    after = {name: layer.lora_A["default"].weight.detach() for name, layer in net.unet.items()}
    assert torch.equal(after["pooled"], before["pooled"])
    assert torch.equal(after["wide"][4:], before["wide"][4:])  # nothing of the inputs lies there
    assert after["wide"][:4, :4].square().sum() > 3.99
    assert not net.unet["wide"]._forward_pre_hooks


def test_convolutions_have_the_default_start_and_a_line_says_so(base: Path, pictures: Path, tmp_path: Path) -> None:
    settings = config.LoraSettings(rank=2, start="eva", targets=["to_q", "conv1"])
    method = lora.prepare(models.load_parts(base), settings, seed=3)
    plain = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2, targets=["to_q", "conv1"]), seed=3)
    (line,) = method.chosen
    count = sum("conv1.lora_A" in name for name in method.trainable())
    assert line == f"lora.start: eva is for linear layers; {count} convolutions have the default start"
    train(method, pictures, tmp_path, learning_rate=1e-30)
    for name, value in plain.trainable().items():
        if ".lora_A." in name:
            assert torch.allclose(value, method.trainable()[name].cpu(), atol=1e-6) == ("conv1" in name), name


def test_a_rank_above_the_inputs_is_refused(base: Path) -> None:
    with pytest.raises(TrainingError, match=r"lora.start: eva takes directions of a layer's inputs: .* has \d+, fewer"):
        lora.prepare(models.load_parts(base), config.LoraSettings(start="eva", rank=512))


@pytest.mark.parametrize(
    "changes", [{"dora": True}, {"text_encoder": True, "rslora": True}, {"max_norm": 1.0}], ids=str
)
def test_it_goes_with_other_kinds(changes: dict, base: Path, pictures: Path, tmp_path: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2, start="eva", **changes))
    before = {name: value.detach().clone() for name, value in method.trainable().items() if ".lora_A." in name}
    train(method, pictures, tmp_path, learning_rate=1e-30)
    turned = [name for name, value in before.items() if not torch.allclose(value, method.trainable()[name])]
    assert len(turned) == len(before)

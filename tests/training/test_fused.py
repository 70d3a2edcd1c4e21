"""LoRA layers in one operation against peft's."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from training.kernels.fused import fused


def layers(*, bias: bool = True, **settings) -> nn.Sequential:
    """Two layers with adapters that do something."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Linear(20, 8, bias=bias)).requires_grad_(False)
    made = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1"], **settings), made)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made.double()


def everything(made: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    out = made(x)
    wanted = {name: value for name, value in made.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(out, [x, *wanted.values()], torch.sin(out.detach()))
    return {"out": out.detach(), **dict(zip(["x", *wanted], found, strict=True))}


def touched(made: nn.Module) -> int:
    return sum("forward" in module.__dict__ for module in made.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 12), (2, 5, 12), (2, 3, 4, 12)])
def test_output_and_gradients_are_pefts(shape: tuple[int, ...], bias: bool) -> None:
    made, x = layers(bias=bias, use_rslora=bias), torch.randn(shape, dtype=torch.float64)
    wanted = everything(made, x)
    assert len(wanted) == 6
    with fused([made]):
        assert touched(made) == 2
        torch.testing.assert_close(everything(made, x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(made(x), wanted["out"])
    assert touched(made) == 0


def test_an_input_that_is_not_contiguous_and_one_without_gradient() -> None:
    made, x = layers(), torch.randn(12, 5, 2, dtype=torch.float64).permute(2, 1, 0)
    wanted = everything(made, x)
    with fused([made]):
        torch.testing.assert_close(everything(made, x), wanted)
        made(x).sum().backward()
    assert all(value.grad is not None for value in made.parameters() if value.requires_grad)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_stays_with_peft(settings: dict) -> None:
    made = layers(**settings)
    with fused([made]):
        assert touched(made) == 0


def test_other_types_and_weights_that_train_stay_with_peft() -> None:
    low, trains = layers(), layers()
    for name, parameter in low.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    trains[0].base_layer.weight.requires_grad_(True)
    with fused([low, trains]):
        assert touched(low) == 0
        assert touched(trains) == 1


def test_disabled_and_merged_adapters_and_autocast() -> None:
    made, x = layers(), torch.randn(3, 12, dtype=torch.float64)
    active, base = made(x), made[1].base_layer(made[0].base_layer(x))
    with fused([made]):
        for layer in made:
            layer.enable_adapters(False)
        assert torch.equal(made(x), base)
        for layer in made:
            layer.enable_adapters(True)
            layer.merge()
        torch.testing.assert_close(made(x), active)
        for layer in made:
            layer.unmerge()
        with torch.autocast("cpu", torch.bfloat16):
            assert made.float()(x.float()).dtype == torch.bfloat16


def test_a_deep_copy_has_its_own_weights() -> None:
    made, x = layers(), torch.randn(3, 12, dtype=torch.float64)
    with fused([made]):
        before = made(x)
        twin = copy.deepcopy(made)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(x).any()
        assert torch.equal(made(x), before)


def test_an_exception_restores_peft() -> None:
    made = layers()
    with pytest.raises(KeyError), fused([made]):
        raise KeyError
    assert touched(made) == 0


def convolutions(**settings) -> nn.Sequential:
    """A plain, a strided and a 1 x 1 convolution with adapters that do something, channels-last as in a U-net."""
    torch.manual_seed(0)
    kinds = [nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 10, 3, stride=2, padding=1, bias=False), nn.Conv2d(10, 4, 1)]
    made = nn.Sequential(*kinds).requires_grad_(False)
    made = inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["0", "1", "2"], **settings), made)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return made.double().to(memory_format=torch.channels_last)


def latents(*, channels_last: bool = True) -> Tensor:
    random = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 6, 8, 7, dtype=torch.float64, generator=random)
    return drawn.to(memory_format=torch.channels_last) if channels_last else drawn


@pytest.mark.parametrize("rslora", [True, False])
def test_of_convolutions_too(rslora: bool) -> None:
    made, x = convolutions(use_rslora=rslora), latents()
    wanted = everything(made, x)
    assert len(wanted) == 8
    with fused([made]):
        assert touched(made) == 3
        torch.testing.assert_close(everything(made, x), wanted)
        with torch.no_grad():
            torch.testing.assert_close(made(x), wanted["out"])
        made.requires_grad_(False)
        torch.testing.assert_close(made(x), wanted["out"])  # nothing needs a gradient
    assert touched(made) == 0


def test_latents_in_another_order_and_without_gradient() -> None:
    made = convolutions()
    wanted = everything(made, latents())
    with fused([made]):
        torch.testing.assert_close(everything(made, latents(channels_last=False)), wanted)
        made(latents()).sum().backward()
        assert all(value.grad is not None for value in made.parameters() if value.requires_grad)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_convolutions_that_are_not_plain_stay_with_peft(settings: dict) -> None:
    made = convolutions(**settings)
    with fused([made]):
        assert touched(made) == 0


def test_a_convolution_that_is_disabled_merged_or_watched_is_peft_s() -> None:
    made, x = convolutions(), latents()
    plain = nn.Sequential(*(layer.base_layer for layer in made))
    with fused([made]):
        for layer in made:
            layer.enable_adapters(False)
        assert torch.equal(made(x), plain(x))
        for layer in made:
            layer.enable_adapters(True)
        wanted = made(x)
        for layer in made:
            layer.merge()
        torch.testing.assert_close(made(x), wanted)
    watched = convolutions()
    watched[1].base_layer.register_forward_hook(lambda *_: None)  # would keep what is written into
    with fused([watched]):
        assert touched(watched) == 2

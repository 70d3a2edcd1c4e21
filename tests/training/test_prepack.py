"""Frozen convolutions with reordered weights against plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from training.kernels import prepack
from training.kernels.prepack import prepacked, prepacked_bytes

pytestmark = pytest.mark.skipif(not prepack.possible(), reason="this build of torch has no oneDNN operators")


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepack, "SMALLEST", 0)


def convolution(kernel: int = 3, padding: int = 1, **settings) -> nn.Conv2d:
    torch.manual_seed(0)
    made = nn.Conv2d(16, 24, kernel, padding=padding, **settings)
    return made.to(memory_format=torch.channels_last).requires_grad_(False)


def both(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the gradient of the input."""
    x = x.clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out, x, torch.sin(out.detach()))
    return out.detach(), gradient


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("kernel", "padding", "side"), [(3, 1, 8), (1, 0, 8), (3, 0, 9), (5, 1, 12)])
def test_output_and_gradient_are_the_plain_convolutions(kernel: int, padding: int, side: int, batch: int) -> None:
    module, x = convolution(kernel, padding), torch.randn(batch, 16, side, side)
    wanted = both(module, x)
    with prepacked([module]):
        torch.testing.assert_close(both(module, x), wanted, rtol=1e-4, atol=1e-5)
        assert prepacked_bytes([module]) == 2 * module.weight.nbytes
        other = torch.randn(2, 16, 20, 12)  # not the size that the copies were made for
        torch.testing.assert_close(
            module(other), conv2d(other, module.weight, module.bias, padding=padding), rtol=1e-4, atol=1e-5
        )
    assert prepacked_bytes([module]) == 0
    assert all(torch.equal(a, b) for a, b in zip(both(module, x), wanted, strict=True))


def test_changed_weights_are_noticed() -> None:
    module, x = convolution(), torch.randn(2, 16, 8, 8)
    with prepacked([module]):
        before = both(module, x)
        module.weight.mul_(2)
        module.bias.mul_(2)
        torch.testing.assert_close(module(x), 2 * before[0], rtol=1e-4, atol=1e-5)
        module.load_state_dict(convolution().state_dict())
        torch.testing.assert_close(module(x), before[0])
        module.weight.data = torch.zeros_like(module.weight)
        torch.testing.assert_close(module(x), module.bias[:, None, None].expand(2, 24, 8, 8))


def test_a_deep_copy_has_its_own_weights() -> None:
    module, x = convolution(), torch.randn(2, 16, 8, 8)
    with prepacked([module]):
        before = both(module, x)
        twin = copy.deepcopy(module)
        twin.weight.zero_()
        twin.bias.zero_()
        assert not twin(x).any()
        assert all(torch.equal(a, b) for a, b in zip(both(module, x), before, strict=True))


def test_only_frozen_plain_convolutions_are_touched() -> None:
    trains, strided, grouped = convolution(), convolution(stride=2), convolution(groups=2)
    trains.weight.requires_grad_(True)
    low, wraps = convolution().to(torch.bfloat16), convolution(padding_mode="circular")
    for module in (trains, strided, grouped, low, wraps, convolution(1, 1)):
        with prepacked([module]):
            assert "forward" not in module.__dict__


def test_a_weight_that_begins_to_train_gets_its_gradient() -> None:
    module, x = convolution(), torch.randn(2, 16, 8, 8)
    with prepacked([module]):
        module(x)
        module.weight.requires_grad_(True)
        module(x).sum().backward()
    assert module.weight.grad is not None


def test_small_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = convolution()
    monkeypatch.setattr(prepack, "SMALLEST", module.weight.numel() + 1)
    with prepacked([module]):
        assert "forward" not in module.__dict__


def test_an_exception_restores_the_plain_convolution() -> None:
    module = convolution()
    with pytest.raises(KeyError), prepacked([module]):
        raise KeyError
    assert "forward" not in module.__dict__

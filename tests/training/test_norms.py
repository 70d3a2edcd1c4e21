"""The bound on each layer's update, which kohya calls scale_weight_norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_methods import train

from training import config, lora, models, norms
from training.errors import TrainingError

TARGETS = ["to_q", "conv1"]


def made(base: Path, **changes: object) -> lora.Method:
    settings = config.LoraSettings(rank=2, alpha=3.0, targets=TARGETS, **changes)  # type: ignore[arg-type]
    return lora.prepare(models.load_parts(base), settings)


def updates(method: lora.Method) -> list[torch.Tensor]:
    """What peft says that each layer adds."""
    layers = [module for module in method.models["unet"].modules() if hasattr(module, "lora_A")]
    return [layer.get_delta_weight("default").detach() for layer in layers]


def test_norms_are_those_of_the_updates_and_large_ones_are_scaled_to_the_bound(base: Path) -> None:
    method = made(base, max_norm=0.5)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for number, parameter in enumerate(method.trainable().values()):
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02 * (1 + number % 7))
    before = updates(method)
    expected = torch.stack([one.norm() for one in before])
    torch.testing.assert_close(norms.norms(method.models, "default"), expected)
    assert (expected > 0.5).any()
    assert (expected < 0.5).any()
    assert method.after_step is not None
    method.after_step()
    for was, now, norm in zip(before, updates(method), expected, strict=True):
        wanted = was if norm <= 0.5 else was * (0.5 / norm)
        torch.testing.assert_close(now, wanted, rtol=1e-5, atol=1e-7)
        assert norm > 0.5 or torch.equal(now, was)  # small ones keep their bits


def test_a_training_stays_within_the_bound_that_it_would_leave(base: Path, pictures: Path, tmp_path: Path) -> None:
    free, held = made(base), made(base, max_norm=0.02)
    assert free.after_step is None
    for name, method in (("free", free), ("held", held)):
        train(method, pictures, tmp_path / name, learning_rate=1e-2, steps=12)
    assert norms.norms(free.models, "default").max() > 0.04
    assert norms.norms(held.models, "default").max() <= 0.02 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_norm": 0.0}, r"lora.max_norm must be > 0 or null, got 0.0"),
        ({"max_norm": 1.0, "kind": "loha"}, r"lora.max_norm is for plain LoRAs"),
        ({"max_norm": 1.0, "dora": True}, r"lora.max_norm is for plain LoRAs"),
        ({"max_norm": 1.0, "start": "pissa"}, r"lora.max_norm is for plain LoRAs"),
    ],
)
def test_a_bound_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        config.LoraSettings(**changes)

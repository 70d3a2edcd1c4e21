"""How LoRAs start, and what is left out while they train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from test_methods import predict, train
from torch import nn

from training import config, lora, models
from training.dropout import drop
from training.errors import TrainingError
from training.kernels import fused


@pytest.mark.parametrize("start", ["default", "gaussian", "orthogonal", "eva", "pissa", "olora"])
def test_every_start_begins_as_the_base(start: str, base: Path) -> None:
    parts = models.load_parts(base)
    before = predict(parts.unet)
    lora.prepare(parts, config.LoraSettings(rank=2, start=start, alpha=3.0))  # type: ignore[arg-type]
    torch.testing.assert_close(predict(parts.unet), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("changes", [{}, {"alpha": 3.0, "rslora": True, "ranks": {"attn2": 1}}], ids=str)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_took_from_the_base_is_saved_as_a_plain_lora_of_it(
    start: str, changes: dict, precision: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    parts = models.load_parts(base)
    settings = config.LoraSettings(rank=2, start=start, text_encoder=True, **changes)
    result = train(lora.prepare(parts, settings), pictures, tmp_path, save_precision=precision)
    state = load_file(result.folder / lora.WEIGHTS_NAME)
    ranks = {len(value) for key, value in state.items() if "lora_A" in key}
    assert ranks == ({4, 2} if "ranks" in changes else {4})
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain = predict(pipe.unet)
    pipe.load_lora_weights(result.folder)
    wanted, found = predict(parts.unet), predict(pipe.unet)
    moved = float((wanted - plain).abs().max())
    assert moved > 1e-4
    # Half precision rounds the change and not the part of the weight that was taken, which is far larger.
    assert float((found - wanted).abs().max()) < {"fp32": 1e-5, "fp16": 0.02 * moved + 1e-5}[precision]
    ids = models.tokenize_captions(parts, ["a d"])
    torch.testing.assert_close(
        pipe.text_encoder(ids[0])[0],
        parts.text_encoders[0](ids[0])[0],
        rtol=1e-2 if precision == "fp16" else 1e-4,
        atol=1e-3,
    )


def test_pissa_takes_the_largest_part_of_the_weight(base: Path) -> None:
    parts = models.load_parts(base)
    weights = {name: value.detach().clone() for name, value in parts.unet.named_parameters()}
    lora.prepare(parts, config.LoraSettings(rank=2, start="pissa", alpha=6.0))
    layers = {name: module for name, module in parts.unet.named_modules() if hasattr(module, "lora_A")}
    for name, layer in list(layers.items())[:6]:
        taken = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        u, s, vh = torch.linalg.svd(weights[f"{name}.weight"], full_matrices=False)
        torch.testing.assert_close(taken, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(layer.base_layer.weight + taken, weights[f"{name}.weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "pissa", "targets": "conv"}, r"lora.start: pissa is for linear layers, .* is a convolution"),
        ({"start": "olora", "rank": 64}, r"lora.start: olora takes the rank out of the weight: .* has no rank 64"),
        ({"start": "orthogonal", "rank": 3}, r"lora.start: orthogonal needs even ranks, .* has 3"),
        ({"start": "pissa", "dora": True}, r"lora.start: pissa does not go with lora.dora"),
        ({"start": "pissa", "kind": "lokr"}, r"lora.start: pissa belongs to lora.kind: lora, not lokr"),
        ({"start": "olora", "rank_dropout": 0.1}, r"lora.start: olora trains a part of the base's weight.*dropout"),
        ({"dropout": 0.1, "kind": "loha"}, r"lora.dropout belongs to lora.kind: lora; loha has rank_dropout and"),
        ({"module_dropout": 0.1, "dora": True}, r"lora.rank_dropout and lora.module_dropout do not go with lora.dora"),
        ({"module_dropout": 1.0}, r"lora.module_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_what_does_not_go_together_is_one_error(changes: dict, message: str, base: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        lora.prepare(models.load_parts(base), config.LoraSettings(**changes))


class Layer(nn.Module):
    """A down projection where peft has it."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": down})


@pytest.mark.parametrize(
    "down", [nn.Linear(3, 400, bias=False), nn.Conv2d(3, 400, 1, bias=False)], ids=["linear", "conv"]
)
def test_ranks_are_left_out_per_sample_and_the_rest_counts_more(down: nn.Module) -> None:
    network = Layer(down)
    inputs = torch.rand(5, 7, 3) if isinstance(down, nn.Linear) else torch.rand(5, 3, 2, 2)
    plain = down(inputs)
    drop(network, "default", ranks=0.25, modules=0.0)
    torch.manual_seed(0)
    found = down(inputs).detach()
    ratio = (found / plain.detach()).movedim(1, -1) if isinstance(down, nn.Conv2d) else found / plain.detach()
    ratio = ratio.flatten(1, -2)  # (B, places, r)
    assert torch.equal(ratio == 0, (ratio == 0)[:, :1].expand_as(ratio))  # a rank is left out of a whole sample
    torch.testing.assert_close(ratio[ratio != 0], torch.full_like(ratio[ratio != 0], 1 / 0.75))
    assert 0.2 < float((ratio == 0).float().mean()) < 0.3
    assert torch.equal(network.eval().lora_A["default"](inputs), plain)


def test_whole_updates_are_left_out_of_a_pass() -> None:
    network = Layer(nn.Linear(3, 4, bias=False))
    drop(network, "default", ranks=0.0, modules=0.4)
    torch.manual_seed(0)
    found = torch.stack([network.lora_A["default"](torch.ones(2, 3)) for _ in range(400)])
    gone = (found == 0).flatten(1).all(1)
    assert 0.33 < float(gone.float().mean()) < 0.47
    assert torch.equal(found[~gone], found[~gone][:1].expand_as(found[~gone]))


def test_layers_with_dropout_of_ranks_stay_with_peft(base: Path) -> None:
    parts = models.load_parts(base)
    lora.prepare(parts, config.LoraSettings(rank=2, rank_dropout=0.5))
    with fused.fused([parts.unet]):
        layers = [module for module in parts.unet.modules() if hasattr(module, "lora_A")]
        assert layers
        assert not any("forward" in layer.__dict__ for layer in layers)

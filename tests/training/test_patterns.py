"""Settings by pattern: ranks and alphas of layers, factors of the learning rate, LoRA+."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from test_methods import predict, train

from training import config, lora, models, optim
from training.errors import TrainingError


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_pattern_train_and_load(rslora: bool, base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    settings = config.LoraSettings(
        rank=2, ranks={"attn2.*to_k": 0, r"attn2\b": 3, "down_blocks": 1}, alphas={r"attn2.*to_v": 7.0}, rslora=rslora
    )
    method = lora.prepare(parts, settings)
    result = train(method, pictures, tmp_path)
    state = load_file(result.folder / lora.WEIGHTS_NAME)
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in state.items() if "lora_A" in key}
    assert not [name for name in ranks if "attn2.to_k" in name]
    assert {name: rank for name, rank in ranks.items() if "attn2" in name} == {
        name: 3 for name in ranks if "attn2" in name
    }
    assert {rank for name, rank in ranks.items() if "attn1" in name and "down_blocks" in name} == {1}
    assert {rank for name, rank in ranks.items() if "attn1" in name and "down_blocks" not in name} == {2}
    layers = {name: module for name, module in parts.unet.named_modules() if hasattr(module, "lora_A")}
    root = 0.5 if rslora else 1.0
    for name, layer in layers.items():
        rank = layer.r["default"]
        alpha = 7.0 if "attn2.to_v" in name else rank  # alpha follows the layer's own rank
        assert layer.scaling["default"] == pytest.approx(alpha / rank**root)
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(result.folder)
    torch.testing.assert_close(predict(pipe.unet), predict(parts.unet), rtol=1e-4, atol=1e-6)
    counts = [" ".join(line.split()) for line in method.chosen]
    tokens = len([name for name in layers if "attn2.to_v" in name])
    assert counts[0] == "lora.ranks"
    assert counts[1] == f"attn2.*to_k {tokens} layers, not adapted"
    assert counts[-2] == f"attn2.*to_v {tokens} layers, rank 3, alpha 7"


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_have_ranks_by_pattern_too(kind: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    settings = config.LoraSettings(rank=2, kind=kind, ranks={"attn1": 1, "attn2.*to_k": 0}, alphas={"to_v": 3})  # type: ignore[arg-type]
    result = train(lora.prepare(parts, settings), pictures, tmp_path)
    fresh = PeftModel.from_pretrained(models.load_parts(base).unet, result.folder / "unet")
    torch.testing.assert_close(predict(fresh), predict(parts.unet), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"middle": 2}}, r"lora.ranks: 'middle' is in none of the \d+ names, such as unet\."),
        ({"alphas": {"to_x": 2}}, r"lora.alphas: 'to_x' is in none of"),
        (
            {"ranks": {"attn1": 2, r"attn1\.to_k": 4}},
            r"lora.ranks: all that 'attn1.*' finds is caught by .*put it first",
        ),
        ({"ranks": {"": 0}}, r"lora.ranks: nothing of the U-net is adapted, every rank is 0"),
        ({"ranks": {"^unet": 0}, "text_encoder": True}, r"lora.ranks: nothing of the U-net is adapted"),
        ({"ranks": {"attn1": 0}, "alphas": {"attn1": 3}}, r"lora.alphas: 'attn1' is in none of"),
    ],
)
def test_a_pattern_that_catches_nothing_is_an_error(changes: dict, message: str, base: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        lora.prepare(models.load_parts(base), config.LoraSettings(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"(": 2}}, r"lora.ranks: '\(' is no regular expression"),
        ({"ranks": {"a": -2}}, r"lora.ranks: 'a' must not be negative, got -2"),
        ({"alphas": {"a": 0}}, r"lora.alphas: 'a' must be > 0, got 0"),
        ({"plus_ratio": 0}, r"lora.plus_ratio must be > 0"),
        ({"plus_ratio": 4, "kind": "loha"}, r"lora.plus_ratio belongs to lora.kind: lora"),
    ],
)
def test_a_bad_pattern_or_value_is_named(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        config.LoraSettings(**changes)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_has_the_rates_of_peft(dora: bool, base: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2, plus_ratio=16, dora=dora))
    ours = optim.build_optimizer(method.trainable(), config.TrainSettings(learning_rate=1e-3), method.factors)
    theirs = create_loraplus_optimizer(method.parts.unet, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = [
        {id(item): group["lr"] for group in optimizer.param_groups for item in group["params"]}
        for optimizer in (ours, theirs)
    ]
    assert rates[0] == rates[1]
    assert set(rates[0].values()) == {1e-3, 16e-3}


def test_dora_leaves_out_layers_whose_norm_it_cannot_divide_by(base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    names = [name for name, _ in parts.unet.named_modules() if name.endswith("attn2.to_v")]
    with torch.no_grad():
        parts.unet.get_submodule(names[0]).weight[1] = 0  # as half precision leaves rows of small numbers
    method = lora.prepare(parts, config.LoraSettings(rank=2, dora=True))
    assert any(f"no direction, so not adapted: unet.{names[0]}" in line for line in method.chosen)
    result = train(method, pictures, tmp_path)
    state = load_file(result.folder / lora.WEIGHTS_NAME)
    assert not [key for key in state if names[0] in key]
    assert [key for key in state if names[1] in key]
    assert all(value.isfinite().all() for value in state.values())


def test_what_a_factor_of_0_freezes_stays_and_is_still_saved(base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    before = {name: value.detach().clone() for name, value in method.trainable().items()}
    result = train(method, pictures, tmp_path, rates={"lora_A": 0}, optimizer_args={"weight_decay": 0.5})
    (kept,) = (tmp_path / "checkpoints").glob("step-*/weights.safetensors")
    after = load_file(kept)
    assert after.keys() == before.keys()
    assert {torch.equal(after[name], before[name]) for name in before if "lora_A" in name} == {True}
    assert {torch.equal(after[name], before[name]) for name in before if "lora_B" in name} == {False}
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(result.folder)
    torch.testing.assert_close(predict(pipe.unet), predict(parts.unet), rtol=1e-4, atol=1e-6)


def test_a_text_encoder_without_ranks_does_not_train(base: Path, pictures: Path, tmp_path: Path) -> None:
    method = lora.prepare(
        models.load_parts(base), config.LoraSettings(rank=2, text_encoder=True, ranks={"^text_encoder": 0, "attn2": 3})
    )
    assert list(method.models) == ["unet"]
    assert not method.trains_text
    state = load_file(train(method, pictures, tmp_path).folder / lora.WEIGHTS_NAME)
    assert {key.partition(".")[0] for key in state} == {"unet"}


def test_the_header_holds_the_patterns(base: Path, pictures: Path, tmp_path: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2, ranks={"attn2": 3}))
    result = train(method, pictures, tmp_path)
    from safetensors import safe_open

    with safe_open(result.folder / lora.WEIGHTS_NAME, framework="pt") as file:
        described = json.loads(file.metadata()["lora_adapter_metadata"])
    assert set(described["unet.rank_pattern"].values()) <= {2, 3}

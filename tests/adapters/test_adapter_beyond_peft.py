"""What peft has no layer for, such as DoRA on other kinds and trained norms: it is added to the weights, or refused."""

from __future__ import annotations

import pytest
import torch

import adapters
from adapters import compose, files, keys, source
from adapters.errors import AdapterError, BaseMismatchError, FormatError
from tests.adapters.test_adapter_keys import assert_same

BLOCK, CONV, NORM = "down_blocks.0.attentions.0", "down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.norm"
QUERY = f"{BLOCK}.transformer_blocks.0.attn1.to_q"
OUT = f"{BLOCK}.transformer_blocks.0.attn1.to_out.0"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.3


LOHA = {f"hada_w{n}_{s}": random(*((8, 2) if s == "a" else (2, 8)), seed=n) for n in (1, 2) for s in "ab"}
LOKR = {"lokr_w1": random(2, 4, seed=1), "lokr_w2": random(4, 2, seed=2)}
DOWN_UP = {"lora_down.weight": random(2, 8, seed=1), "lora_up.weight": random(8, 2, seed=2)}
HADAMARD = (LOHA["hada_w1_a"] @ LOHA["hada_w1_b"]) * (LOHA["hada_w2_a"] @ LOHA["hada_w2_b"])
KRONECKER = torch.kron(LOKR["lokr_w1"], LOKR["lokr_w2"])
LOW = DOWN_UP["lora_up.weight"] @ DOWN_UP["lora_down.weight"]
OUTPUTS, INPUTS = random(8, 1, seed=3).abs() + 0.5, random(1, 8, seed=4).abs() + 0.5


def rescaled(weight: torch.Tensor, change: torch.Tensor, magnitude: torch.Tensor, dim: int) -> torch.Tensor:
    changed = weight + change
    return changed / changed.norm(dim=dim, keepdim=True) * magnitude - weight


# What a file says of a layer -> what LyCORIS adds to its weight, and to its bias.
MERGED = {
    "doha": (QUERY, {**LOHA, "dora_scale": OUTPUTS}, lambda w: rescaled(w, HADAMARD, OUTPUTS, 1), None),
    "doha, inputs": (QUERY, {**LOHA, "dora_scale": INPUTS}, lambda w: rescaled(w, HADAMARD, INPUTS, 0), None),
    "dokr": (QUERY, {**LOKR, "dora_scale": OUTPUTS}, lambda w: rescaled(w, KRONECKER, OUTPUTS, 1), None),
    "dora, inputs": (QUERY, {**DOWN_UP, "dora_scale": INPUTS}, lambda w: rescaled(w, LOW, INPUTS, 0), None),
    "full": (CONV, {"diff": random(8, 8, 3, 3), "diff_b": random(8)}, lambda w: random(8, 8, 3, 3), random(8)),
    "norm": (NORM, {"w_norm": random(8), "b_norm": random(8, seed=1)}, lambda w: random(8), random(8, seed=1)),
    "difference of a norm": (NORM, {"diff": random(8)}, lambda w: random(8), None),
    "lora and bias": (OUT, {**DOWN_UP, "diff_b": random(8)}, lambda w: LOW, random(8)),
    "bias alone": (OUT, {"diff_b": random(8)}, None, random(8)),
}


def beyond(case: str) -> dict[str, torch.Tensor]:
    path, parts, *_ = MERGED[case]
    return {f"lora_unet_{path.replace('.', '_')}.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("case", MERGED)
def test_what_peft_has_no_layer_for_is_added_to_the_weights(pipe, tmp_path, case):
    """The pipeline's bits are the same afterwards (the fixture compares them)."""
    path, _, change, bias = MERGED[case]
    layer = pipe.unet.get_submodule(path)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    files.write_tensors(tmp_path / "x.safetensors", beyond(case))
    card, base = adapters.Card(title="x", base_model="y"), adapters.describe(pipe)
    release = adapters.ship.ship(tmp_path / "r", weights=tmp_path / "x.safetensors", base=base, card=card)
    assert "There is no peft folder" in (release / "README.md").read_text()
    for place, weight in ((tmp_path / "x.safetensors", 1.0), (release, 1.0), (release, -0.5)):
        with adapters.load(pipe, place, weight=weight):
            wanted = 0 if change is None else change(before["weight"]) * weight
            torch.testing.assert_close(layer.weight.detach(), before["weight"] + wanted, rtol=0, atol=1e-5)
            if "bias" in before:
                moved = before["bias"] + (0 if bias is None else bias * weight)
                torch.testing.assert_close(layer.bias.detach(), moved, rtol=0, atol=1e-5)
            assert adapters.describe(pipe) == base, "the base's identity is that of its own weights"
    adapter = source.read_adapter(source.open_source(tmp_path / "x.safetensors"))
    tensors, header = keys.to_kohya(adapter)
    assert_same(adapter, keys.from_any(tensors, header))
    with pytest.raises(FormatError, match="there is no layer in peft"):
        keys.to_peft(adapter)
    with pytest.raises(FormatError, match="there is no spelling of diffusers"):
        keys.to_diffusers(adapter)
    with pytest.raises(AdapterError, match="a scope needs it beside them"):
        adapters.load(pipe, release, scope=adapters.Scope(start=0.2))


def test_kinds_mixed_in_one_model_are_merged(pipe, tmp_path):
    """LyCORIS' presets give attention one kind and convolutions another; a LoRA beside a DoRA is the same case."""
    dora = {**DOWN_UP, "dora_scale": OUTPUTS}
    key = QUERY.replace("to_q", "to_k")
    for number, (other, change) in enumerate(
        [(LOKR, KRONECKER), (dora, rescaled(pipe.unet.get_submodule(QUERY).weight, LOW, OUTPUTS, 1))]
    ):
        parts = [(QUERY, other), (OUT, LOHA if number == 0 else DOWN_UP)]
        tensors = {f"lora_unet_{p.replace('.', '_')}.{n}": v for p, own in parts for n, v in own.items()}
        files.write_tensors(tmp_path / f"{number}.safetensors", tensors)
        before = {path: pipe.unet.get_submodule(path).weight.detach().clone() for path in (QUERY, OUT, key)}
        card = adapters.Card(title="x", base_model="y")
        release = adapters.ship.ship(
            tmp_path / f"r{number}", weights=tmp_path / f"{number}.safetensors", base=adapters.describe(pipe), card=card
        )
        with adapters.load(pipe, release):
            now = {path: pipe.unet.get_submodule(path).weight.detach() for path in before}
            torch.testing.assert_close(now[QUERY], before[QUERY] + change, rtol=0, atol=1e-5)
            added = HADAMARD if number == 0 else LOW
            torch.testing.assert_close(now[OUT], before[OUT] + added, rtol=0, atol=1e-5)
            assert torch.equal(now[key], before[key])


def test_the_nearest_lora_counts_what_it_cannot_do(pipe):
    """A LoRA of rank 8 is exact on an 8 x 8 layer; the bias and the norm beside it are missed."""
    adapter = keys.from_any({**beyond("doha"), **beyond("norm"), **beyond("lora and bias")})
    assert adapter.kinds == ["doha", "lora", "norm"]
    models = {"unet": pipe.unet}
    found = compose.to_lora(adapter, models, rank=8)
    weights = compose.deltas(adapter, models)
    missed = float(weights.pop(f"unet.{NORM}").norm() ** 2 + random(8, seed=1).norm() ** 2 + random(8).norm() ** 2)
    total = missed + float(sum(change.norm() ** 2 for change in weights.values()))
    assert found.error == pytest.approx((missed / total) ** 0.5, rel=1e-4)
    with pytest.raises(AdapterError, match="no LoRA can do"):
        compose.to_lora(keys.from_any(beyond("norm")), models, rank=2)
    with pytest.raises(FormatError, match="is a trained norm"):
        compose.weighted_sum([(keys.from_any(beyond("norm")), 1.0)])


@pytest.mark.parametrize(
    ("path", "parts", "message"),
    [
        (QUERY, {**LOHA, "bias_values": torch.ones(8)}, "a trained bias"),
        (QUERY, {"dora_scale": OUTPUTS}, "a dora_scale but no weights"),
        (QUERY, {"diff": random(8, 8), "dora_scale": OUTPUTS}, "mixes full and dora_scale"),
        (QUERY, {**DOWN_UP, "b_norm": random(8)}, "mixes lora and b_norm"),
        (QUERY, {"diff": random(8, 4)}, r"changes a weight of shape \(8, 4\), the base's is \(8, 8\)"),
        (QUERY, {"diff_b": random(8)}, "the base's layer has none"),
        (OUT, {"diff_b": random(4)}, "has 4 values, the base's has 8"),
        (QUERY, {**LOHA, "dora_scale": random(3, 1)}, r"dora_scale \(3, 1\) is neither one per output"),
        (NORM, {"w_norm": random(4)}, r"changes a weight of shape \(4,\)"),
        ("down_blocks.0.norm9", {"w_norm": random(8)}, "is no layer of an SD or SDXL model"),
    ],
)
def test_what_does_not_fit_says_so(pipe, tmp_path, path, parts, message):
    flat = f"lora_unet_{path.replace('.', '_')}"
    files.write_tensors(tmp_path / "x.safetensors", {f"{flat}.{name}": value for name, value in parts.items()})
    with pytest.raises((FormatError, BaseMismatchError), match=message):
        adapters.load(pipe, tmp_path / "x.safetensors")


def test_factors_that_make_another_shape_are_named(pipe, tmp_path):
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    lokr = {f"{flat}.lokr_w1": torch.ones(2, 2), f"{flat}.lokr_w2": torch.ones(4, 3)}
    files.write_tensors(tmp_path / "x.safetensors", lokr)
    with pytest.raises(BaseMismatchError, match=r"attn1\.to_q: the adapter changes"):
        adapters.load(pipe, tmp_path / "x.safetensors")

"""Deltas against peft's own, merging, sums, re-ranking, extraction."""

from __future__ import annotations

import copy

import pytest
import torch

from adapters import compose, files, keys, loading
from adapters.errors import AdapterError, FormatError

KINDS = ["lora", "rslora", "dora", "loha", "lokr"]


def models(pipe):
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def output(unet):
    torch.manual_seed(0)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8), 7, torch.randn(1, 16, 16)).sample


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_attached(pipe, make_adapter, tmp_path, kind):
    adapter = make_adapter(kind)
    tensors, config = keys.to_peft(adapter)
    files.write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(__import__("json").dumps(config))
    plain = output(pipe.unet)
    with loading.load(pipe, tmp_path):
        attached = output(pipe.unet)
    merged = compose.merge(adapter, models(pipe))
    torch.testing.assert_close(output(pipe.unet), attached, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(attached, plain, atol=1e-2)
    merged.unmerge()
    assert torch.equal(output(pipe.unet), plain)


def test_merging_twice_is_refused_and_order_is_kept(pipe, make_adapter):
    first, second, same = make_adapter("lora"), make_adapter("lora", seed=1), make_adapter("lora")
    merged = compose.merge(first, models(pipe))
    once = output(pipe.unet)
    with pytest.raises(AdapterError, match="already merged"):
        compose.merge(same, models(pipe), weight=0.5)
    assert torch.equal(output(pipe.unet), once)
    top = compose.merge(second, models(pipe))
    with pytest.raises(AdapterError, match="on top"):
        merged.unmerge()
    top.unmerge()
    assert torch.equal(output(pipe.unet), once)
    merged.unmerge()
    merged.unmerge()


def test_weighted_sum_is_the_sum_of_deltas(pipe, make_adapter):
    parts = [(make_adapter("lora", seed=0), 0.7), (make_adapter("rslora", seed=1, targets=["to_q"]), -0.4)]
    total = compose.deltas(compose.weighted_sum(parts), models(pipe))
    single = [compose.deltas(a, models(pipe), weight=w) for a, w in parts]
    for name, change in total.items():
        wanted = sum(s[name] for s in single if name in s)
        torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="dora"):
        compose.weighted_sum([(make_adapter("dora"), 1.0)])


def test_rerank_is_exact_at_full_rank_and_its_error_is_true(pipe, make_adapter):
    adapter = make_adapter("lora")
    wanted = compose.deltas(adapter, models(pipe))
    full = compose.rerank(adapter, 4)
    assert full.error < 1e-6
    low = compose.rerank(adapter, 1)
    got = compose.deltas(low.adapter, models(pipe))
    missed = sum((got[n] - wanted[n]).square().sum() for n in wanted)
    assert low.error == pytest.approx(float((missed / sum(w.square().sum() for w in wanted.values())).sqrt()), rel=1e-4)
    assert 0 < compose.rerank(adapter, 3).error < low.error < 1
    assert all(m.rank == 1 for m in low.adapter.modules.values())
    with pytest.raises(AdapterError, match="rank=0"):
        compose.rerank(adapter, 0)


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_any_kind_as_a_lora_with_its_error(pipe, make_adapter, kind):
    adapter = make_adapter(kind)
    exact = compose.to_lora(adapter, models(pipe), rank=64)
    assert exact.error < 1e-5
    got, wanted = (compose.deltas(a, models(pipe)) for a in (exact.adapter, adapter))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5)
    tensors, _ = keys.to_diffusers(exact.adapter)
    assert tensors
    assert compose.to_lora(adapter, models(pipe), rank=1).error > 0.05


def test_extraction_finds_what_was_merged_in(pipe, make_adapter):
    adapter = make_adapter("lora")
    tuned = {"unet": copy.deepcopy(pipe.unet)}
    vars(tuned["unet"]).pop("_merged_adapters", None)
    compose.merge(adapter, tuned)
    found = compose.extract({"unet": pipe.unet}, tuned, rank=4)
    assert found.error < 1e-4
    assert found.adapter.modules.keys() == adapter.modules.keys()
    tuned["unet"].conv_out.bias.data += 1.0
    assert compose.extract({"unet": pipe.unet}, tuned, rank=4).error > 0.01  # a bias no LoRA can carry counts
    with pytest.raises(AdapterError, match="nothing to extract"):
        compose.extract({"unet": pipe.unet}, {"unet": copy.deepcopy(pipe.unet)}, rank=4)


def test_a_module_that_does_not_fit_is_named(pipe):
    module = keys.Module(
        kind="lora", tensors={"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(5, 2)}, rank=2, alpha=2.0
    )
    with pytest.raises(FormatError, match=r"time_embedding.linear_1"):
        compose.deltas(keys.Adapter(modules={"unet.time_embedding.linear_1": module}), models(pipe))
    with pytest.raises(AdapterError, match="no such layer"):
        compose.deltas(keys.Adapter(modules={"unet.nowhere": module}), models(pipe))

"""Guidance on a U-net that others have changed: adapters, fused and quantised layers, offload, compile, precisions."""

from __future__ import annotations

import functools

import accelerate
import pytest
import scfg_tiny as tiny
import torch
from peft import LoraConfig
from test_pitfalls import GUIDED, bare, run

from scfg import attach, visualize


@pytest.fixture
def pipe():
    return tiny.sd()


def test_an_image_prompt_adapter(pipe):
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter_weights(pipe.unet)], low_cpu_mem_usage=False)
    picture = torch.randn(2, 1, 6, generator=tiny.seeded())  # [negative, positive]
    with tiny.Spy(pipe) as spy:
        _, trace = run(pipe, ip_adapter_image_embeds=[picture])
    for step, raw, used in zip(trace, spy.raw, spy.used, strict=True):
        uncond, cond = raw.chunk(2)
        torch.testing.assert_close(used, uncond + 5.0 * step.gamma * (cond - uncond), rtol=1e-4, atol=1e-4)
    assert trace[0].norms.area.shape == (1, tiny.TEXT)  # text tokens only


def lora(pipe):
    torch.manual_seed(9)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def test_a_lora_loaded_after_attaching_is_seen():
    before = tiny.sd()
    lora(before)
    want, _ = run(before)
    after = tiny.sd()
    with attach(after, GUIDED):
        plain = bare(after)
        lora(after)
        got = bare(after)
    assert torch.equal(got, want)
    assert not torch.equal(got, plain)


def test_fused_projections(pipe):
    pipe.unet.double()  # one product instead of three is rounded differently, which could decide between two regions
    call = {name: value.double() for name, value in ({"latents": tiny.noise()} | tiny.embeddings()).items()}
    want, _ = run(pipe, **call)
    pipe.fuse_qkv_projections()
    got, trace = run(pipe, **call)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert any((step.gamma != 1).any() for step in trace)


@pytest.mark.parametrize("how", ["sequential", "model"])
def test_cpu_offload(how, pipe):
    """What diffusers' `enable_sequential_cpu_offload` and `enable_model_cpu_offload` do, from the CPU to the CPU."""
    want, trace = run(pipe, record=("gamma", "prediction"))
    drawn = visualize.latents_to_images(pipe, trace[-1].prediction)
    if how == "sequential":
        for part in (pipe.unet, pipe.vae):
            accelerate.cpu_offload(part, execution_device="cpu")
        assert next(pipe.unet.parameters()).device.type == "meta"
    else:
        _, hook = accelerate.cpu_offload_with_hook(pipe.unet, "cpu")
        accelerate.cpu_offload_with_hook(pipe.vae, "cpu", prev_module_hook=hook)
    got, trace = run(pipe, record=("gamma", "prediction"))
    assert torch.equal(got, want)
    assert visualize.latents_to_images(pipe, trace[-1].prediction) == drawn


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("used_before", [False, True])
def test_torch_compile(in_place, used_before, pipe):
    want, _ = run(pipe)
    plain = bare(pipe)
    if in_place:
        pipe.unet.compile(backend="eager")
    else:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    if used_before:
        torch.testing.assert_close(bare(pipe), plain)
    got, trace = run(pipe)
    torch.testing.assert_close(got, want)
    assert any((step.gamma != 1).any() for step in trace)
    torch.testing.assert_close(bare(pipe), plain)
    torch.compiler.reset()


@pytest.mark.usefixtures("bfloat16_attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype, pipe):
    pipe.to(dtype)
    half = {name: value.to(dtype) for name, value in tiny.embeddings().items()}
    latents, trace = run(pipe, latents=tiny.noise().to(dtype), **half)
    assert latents.dtype == dtype
    assert latents.isfinite().all()
    assert trace[0].gamma.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_projections(bits, pipe):
    """Projections held in 8 or 4 bits: no further from full precision than plain CFG on them is, or hardly."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = {8: functools.partial(bnb.nn.Linear8bitLt, has_fp16_weights=False), 4: bnb.nn.Linear4bit}[bits]
    (want, _), full_precision = run(pipe), bare(pipe)
    for module in [module for module in pipe.unet.modules() if hasattr(module, "to_k")]:
        for name in ("to_q", "to_k"):
            full = getattr(module, name)
            small = layer(full.in_features, full.out_features, bias=full.bias is not None)
            small.load_state_dict(full.state_dict())
            setattr(module, name, small.to("cpu"))  # moving is what quantises
    plain = bare(pipe)
    got, trace = run(pipe)
    assert 0 < (got - want).norm() < 1.5 * (plain - full_precision).norm()
    assert any((step.gamma != 1).any() for step in trace)
    assert torch.equal(bare(pipe), plain)


@pytest.mark.usefixtures("bfloat16_attention")
def test_autocast_is_off_inside(pipe):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, trace = run(pipe)
    assert trace[0].gamma.dtype == torch.float32
    assert all(step.gamma.isfinite().all() for step in trace)

"""Every supported pipeline: what reaches the scheduler is u + s * gamma * (c - u), and leaving is leaving."""

from __future__ import annotations

import functools

import pytest
import scfg_tiny as tiny
import torch
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

from scfg import SemanticCFG, attach


def adapter():
    torch.manual_seed(4)
    return T2IAdapter(
        in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )


def adapter_xl():
    torch.manual_seed(4)
    return T2IAdapter(
        in_channels=3, channels=[8, 16, 16, 16], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )


def sd_pipe(kind, *, controlnets=0, **parts):
    model = parts.pop("model", None) or tiny.unet()
    nets = [tiny.controlnet(model, seed) for seed in range(controlnets)]
    if nets:
        parts["controlnet"] = nets if controlnets > 1 else nets[0]
    return tiny.sd(kind, model=model, **parts)


def xl_pipe(kind, *, controlnets=0, **parts):
    model = tiny.unet(xl=True)
    if controlnets:
        parts["controlnet"] = tiny.controlnet(model)
    return tiny.xl(kind, model=model, **parts)


IMG2IMG = {"image": tiny.image(), "strength": 0.7}
INPAINT = {"image": tiny.image(), "mask_image": tiny.mask(), "strength": 1.0} | tiny.SIZE
CONTROL = {"image": tiny.image(seed=12)} | tiny.SIZE
CONTROLLED = {"image": tiny.image(), "control_image": tiny.image(seed=12), "strength": 0.7}
PIPELINES = {
    "sd": (functools.partial(sd_pipe, StableDiffusionPipeline), tiny.SIZE),
    "sd_img2img": (functools.partial(sd_pipe, StableDiffusionImg2ImgPipeline), IMG2IMG),
    "sd_inpaint": (functools.partial(sd_pipe, StableDiffusionInpaintPipeline), INPAINT),
    "sd_inpaint_9_channels": (
        lambda: sd_pipe(StableDiffusionInpaintPipeline, model=tiny.unet(in_channels=9)),
        INPAINT,
    ),
    "sd_controlnet": (functools.partial(sd_pipe, StableDiffusionControlNetPipeline, controlnets=1), CONTROL),
    "sd_two_controlnets": (
        functools.partial(sd_pipe, StableDiffusionControlNetPipeline, controlnets=2),
        CONTROL | {"image": [tiny.image(seed=12), tiny.image(seed=13)]},
    ),
    "sd_controlnet_guess_mode": (
        functools.partial(sd_pipe, StableDiffusionControlNetPipeline, controlnets=1),
        CONTROL | {"guess_mode": True},
    ),
    "sd_controlnet_img2img": (
        functools.partial(sd_pipe, StableDiffusionControlNetImg2ImgPipeline, controlnets=1),
        CONTROLLED,
    ),
    "sd_controlnet_inpaint": (
        functools.partial(sd_pipe, StableDiffusionControlNetInpaintPipeline, controlnets=1),
        CONTROLLED | {"mask_image": tiny.mask()} | tiny.SIZE,
    ),
    "sd_t2i_adapter": (
        lambda: sd_pipe(StableDiffusionAdapterPipeline, adapter=adapter()),
        {"image": tiny.image(seed=12)} | tiny.SIZE,
    ),
    "sd_pag": (
        lambda: sd_pipe(StableDiffusionPAGPipeline, pag_applied_layers=["mid"]),
        tiny.SIZE | {"pag_scale": 2.0},
    ),
    "xl": (functools.partial(xl_pipe, StableDiffusionXLPipeline), tiny.SIZE),
    "xl_img2img": (functools.partial(xl_pipe, StableDiffusionXLImg2ImgPipeline), IMG2IMG),
    "xl_inpaint": (functools.partial(xl_pipe, StableDiffusionXLInpaintPipeline), INPAINT | {"strength": 0.99}),
    "xl_controlnet": (functools.partial(xl_pipe, StableDiffusionXLControlNetPipeline, controlnets=1), CONTROL),
    "xl_controlnet_img2img": (
        functools.partial(xl_pipe, StableDiffusionXLControlNetImg2ImgPipeline, controlnets=1),
        CONTROLLED,
    ),
    "xl_controlnet_inpaint": (
        functools.partial(xl_pipe, StableDiffusionXLControlNetInpaintPipeline, controlnets=1),
        CONTROLLED | {"mask_image": tiny.mask()} | tiny.SIZE,
    ),
    "xl_t2i_adapter": (
        lambda: xl_pipe(StableDiffusionXLAdapterPipeline, adapter=adapter_xl()),
        {"image": tiny.image(seed=12)} | tiny.SIZE,
    ),
    "xl_pag": (
        lambda: xl_pipe(StableDiffusionXLPAGPipeline, pag_applied_layers=["mid"]),
        tiny.SIZE | {"pag_scale": 2.0},
    ),
}


def call_of(name, images=1):
    return PIPELINES[name][1] | tiny.embeddings(images, xl=name.startswith("xl")) | {"generator": tiny.seeded()}


def expected(pipe, raw, gamma, scale):
    """The formula on the U-net's own output, for two- and three-way batches."""
    parts = raw.chunk(3 if getattr(pipe, "do_perturbed_attention_guidance", False) else 2)
    uncond, cond = parts[:2]
    result = uncond + scale * gamma * (cond - uncond)
    return result + pipe.pag_scale * (cond - parts[2]) if len(parts) == 3 else result


@pytest.mark.parametrize("name", PIPELINES)
def test_the_scheduler_is_given_scfg_and_the_pipeline_is_left_as_it_was(name):
    pipe = PIPELINES[name][0]()
    bare = tiny.run_latents(pipe, **call_of(name))
    own_attributes = set(pipe.__dict__)
    with tiny.Spy(pipe) as spy, attach(pipe, SemanticCFG(), record=["gamma"]) as run:
        guided = tiny.run_latents(pipe, **call_of(name))
    assert len(run.trace) == len(spy.raw) == len(spy.used) > 0
    for step, raw, used in zip(run.trace, spy.raw, spy.used, strict=True):
        want = expected(pipe, raw, step.gamma, 5.0)
        torch.testing.assert_close(used, want, rtol=1e-4, atol=1e-4)
    assert any((step.gamma != 1).any() for step in run.trace)
    assert not torch.equal(bare, guided)
    assert guided.isfinite().all()
    # and afterwards nothing is left
    assert torch.equal(bare, tiny.run_latents(pipe, **call_of(name)))
    assert set(pipe.__dict__) == own_attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_cfg_and_guidance_off_are_bit_identical(name):
    pipe = PIPELINES[name][0]()
    bare = tiny.run_latents(pipe, **call_of(name))
    with attach(pipe, "cfg") as run:
        assert torch.equal(bare, tiny.run_latents(pipe, **call_of(name)))
    assert all((step.effective_scale == 1).all() for step in run.trace)
    bare = tiny.run_latents(pipe, **call_of(name), guidance_scale=1.0)
    with attach(pipe, SemanticCFG()) as run:
        assert torch.equal(bare, tiny.run_latents(pipe, **call_of(name), guidance_scale=1.0))
    assert run.trace == []

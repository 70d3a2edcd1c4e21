"""DeepFloyd IF: the published implementation's recorded runs of both stages."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, UNet2DConditionModel

from scfg import ScfgError, SemanticCFG, attach

PARTS = {
    "tokenizer": None,
    "text_encoder": None,
    "safety_checker": None,
    "feature_extractor": None,
    "watermarker": None,
    "requires_safety_checker": False,
}


@pytest.fixture(scope="module")
def ddpm(golden):
    return DDPMScheduler.from_pretrained(golden / "tiny-if" / "scheduler")


def stage1(golden, scheduler):
    pipe = IFPipeline(
        unet=UNet2DConditionModel.from_pretrained(golden / "tiny-if" / "unet_stage1"), scheduler=scheduler, **PARTS
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample1(pipe, reference):
    return pipe(
        prompt_embeds=reference["prompt_embeds"],
        negative_prompt_embeds=reference["negative_prompt_embeds"],
        num_inference_steps=8,
        guidance_scale=7.0,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
    ).images


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize(("kind", "tolerance"), [("ddpm", 1e-3), ("ddim", 2e-2)])
def test_stage_1(kind, tolerance, golden, ddpm, if_reference):
    # A fixed variance is what makes the stock pipeline drop the learned one under DDIM.
    ddim = DDIMScheduler.from_config({**ddpm.config, "variance_type": "fixed_small"})
    pipe = stage1(golden, ddpm if kind == "ddpm" else ddim)
    with attach(pipe, SemanticCFG.published_if_stage1(), guidance_scale=7.0):
        images = sample1(pipe, if_reference)
    assert relative_error(images, if_reference[f"stage1_scfg_{kind}"]) < tolerance


def test_stage_2(golden, ddpm, if_reference):
    pipe = IFSuperResolutionPipeline(
        unet=UNet2DConditionModel.from_pretrained(golden / "tiny-if" / "unet_stage2"),
        scheduler=ddpm,
        image_noising_scheduler=ddpm,
        **PARTS,
    )
    pipe.set_progress_bar_config(disable=True)

    def sample():
        return pipe(
            image=if_reference["stage2_image"],
            prompt_embeds=if_reference["prompt_embeds"],
            negative_prompt_embeds=if_reference["negative_prompt_embeds"],
            num_inference_steps=8,
            guidance_scale=4.0,
            noise_level=100,
            generator=torch.Generator().manual_seed(4),
            output_type="pt",
        ).images

    with attach(pipe, SemanticCFG.published_if_stage2(), guidance_scale=4.0):
        assert relative_error(sample(), if_reference["stage2_scfg"]) < 1e-3
    with attach(pipe, "cfg", guidance_scale=4.0):
        assert relative_error(sample(), if_reference["stage2_cfg"]) < 1e-3


def test_the_scale_must_be_said(golden, ddpm):
    with pytest.raises(ScfgError, match=r"guidance_scale=\.\.\."):
        attach(stage1(golden, ddpm), SemanticCFG.published_if_stage1())


def test_guidance_off_is_read_from_the_pipelines_own_call(golden, ddpm, if_reference):
    """With scale 1 the pipeline runs the conditional half alone; its batch of two must not be taken for two halves."""
    pipe = stage1(golden, ddpm)

    def sample():
        return pipe(
            prompt_embeds=if_reference["prompt_embeds"],
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images

    bare = sample()
    with attach(pipe, SemanticCFG.published_if_stage1(), guidance_scale=7.0) as run:
        assert torch.equal(bare, sample())
    assert run.trace == []

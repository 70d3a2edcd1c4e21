"""Half-precision weights on a real model: the masks of one step beside float32's."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

from scfg import SemanticCFG, attach
from training.pocket import base_path, tokenizer
from training.pocket.making.fitting import image_batch
from training.pocket.scenes import HELD_OUT_SEED, sample

TIMESTEP = 500
SCENES = 16


@torch.no_grad()
def one_step(dtype, tokens):
    """Regions and foreground of one guided step on noised held-out scenes, the same ones in every precision."""
    pipe = StableDiffusionPipeline.from_pretrained(base_path(), dtype=dtype)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # takes `timesteps`
    pipe.set_progress_bar_config(disable=True)
    scenes = [sample(HELD_OUT_SEED, index) for index in range(SCENES)]
    vae = AutoencoderKL.from_pretrained(base_path() / "vae")
    clean = vae.encode(image_batch(scene.image for scene in scenes)).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipe.scheduler.add_noise(clean, noise, torch.tensor([TIMESTEP]))
    with attach(pipe, SemanticCFG(tokens=tokens), record=["regions"]) as run:
        pipe(
            [scene.caption for scene in scenes],
            latents=noisy.to(dtype),
            timesteps=[TIMESTEP],
            guidance_scale=4.0,
            output_type="latent",
        )
    return run.trace[0].regions, run.trace[0].foreground


@pytest.mark.usefixtures("bfloat16_attention")
@pytest.mark.parametrize("tokens", ["all", "prompt"])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.99), (torch.bfloat16, 0.95)])
def test_half_precision_weights_give_nearly_float32s_masks(dtype, share, tokens):
    """The end token and the padding after it say the same and tie up to rounding: here they count as one."""
    want, want_foreground = one_step(torch.float32, tokens)
    got, foreground = one_step(dtype, tokens)
    words = tokenizer.build_tokenizer()
    ends = torch.tensor([len(words(sample(HELD_OUT_SEED, index).caption).input_ids) - 1 for index in range(SCENES)])
    if tokens == "all":
        got, want = (torch.minimum(regions, ends[:, None, None]) for regions in (got, want))
    assert len(want.unique()) > 5  # real regions, not one token everywhere
    assert 0.05 < want_foreground.float().mean() < 0.95
    assert (got == want).float().mean() >= share
    assert (foreground == want_foreground).float().mean() >= (0.99 if dtype == torch.float16 else 0.97)

"""What other implementations fell over: each works, is an exact no-op, or is refused in clear words."""

from __future__ import annotations

import pytest
import scfg_tiny as tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from scfg import METHODS, ScfgError, SemanticCFG, attach, make_guidance

GUIDED = SemanticCFG()


@pytest.fixture
def pipe():
    return tiny.sd()


def run(pipe, settings=GUIDED, *, record=("gamma", "regions"), images=1, **call):
    """(latents, trace) of a short guided run."""
    call = tiny.SIZE | {"latents": tiny.noise(images)} | tiny.embeddings(images) | call
    with attach(pipe, settings, record=record) as attached:
        return tiny.run_latents(pipe, **call), attached.trace


def bare(pipe, images=1, **call):
    return tiny.run_latents(pipe, **(tiny.SIZE | {"latents": tiny.noise(images)} | tiny.embeddings(images) | call))


# -- batches and sizes


# A batch is compared with another of the same size: kernels round by the size of a batch, and where two regions are
# nearly tied, one last bit decides which of them a position belongs to.


def test_every_image_of_a_batch_has_its_own_masks(pipe):
    embeds, start = tiny.embeddings(2), tiny.noise(2)
    together, _ = run(pipe, images=2)
    for image in range(2):
        twice = {name: value[[image, image]] for name, value in embeds.items()}
        alone, _ = run(pipe, latents=start[[image, image]], **twice)
        assert torch.equal(together[image], alone[image])
    assert not torch.equal(together[0], alone[0])


def test_several_images_per_prompt(pipe):
    start = tiny.noise(2)
    together, _ = run(pipe, latents=start, num_images_per_prompt=2)
    for image in range(2):
        alone, _ = run(pipe, latents=start[[image, image]], num_images_per_prompt=2)
        assert torch.equal(together[image], alone[image])
    assert not torch.equal(together[0], alone[0])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_control_arm_depends_on_the_batch(method, pipe):
    embeds, start = tiny.embeddings(2), tiny.noise(2)
    together, _ = run(pipe, make_guidance(method), images=2)
    last = {name: value[[1, 1]] for name, value in embeds.items()}
    alone, _ = run(pipe, make_guidance(method), latents=start[[1, 1]], **last)
    assert torch.equal(together[1], alone[1])


@pytest.mark.parametrize("size", [(8, 12), (12, 8), (9, 9), (10, 7), (16, 16)])
@pytest.mark.parametrize("ratio", [1, 2])
def test_the_grid_follows_the_prediction_not_the_configured_size(size, ratio, pipe):
    height, width = size
    pipe.vae_scale_factor = 8  # pipelines take multiples of eight, and odd latents come from that
    call = {"latents": tiny.noise(size=size), "height": 8 * height, "width": 8 * width}
    _, trace = run(pipe, SemanticCFG(latent_ratio=ratio), **call)
    assert trace[0].regions.shape == (1, -(-height // ratio), -(-width // ratio))
    assert trace[0].gamma.shape == (1, 1, height, width)


def test_a_ratio_without_attention_says_which_there_are(pipe):
    with pytest.raises(ScfgError, match=r"latent_ratio=8.*\[1, 2\]"):
        run(pipe, SemanticCFG(latent_ratio=8))


def test_a_grid_too_small_for_regions_is_refused():
    pipe = tiny.sd()
    pipe.vae_scale_factor = 8
    with pytest.raises(ScfgError, match="1x1"):
        run(pipe, SemanticCFG(latent_ratio=2), latents=tiny.noise(size=(2, 2)), height=16, width=16)


def test_a_model_without_attention_at_full_size_works():
    pipe = tiny.xl()
    latents, trace = run(pipe, SemanticCFG(), latents=tiny.noise(), **tiny.embeddings(xl=True), record=("regions",))
    assert trace[0].regions.shape == (1, 4, 4)
    assert latents.isfinite().all()


# -- which half is which


@pytest.mark.parametrize("rescale", [0.3, 0.7])
def test_rescaling_is_to_the_original_conditional_prediction(rescale, pipe):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    with tiny.Spy(pipe) as spy:
        _, trace = run(pipe, guidance_rescale=rescale)
    for step, raw, used in zip(trace, spy.raw, spy.used, strict=True):
        uncond, cond = raw.chunk(2)
        guided = uncond + 5.0 * step.gamma * (cond - uncond)
        torch.testing.assert_close(used, rescale_noise_cfg(guided, cond, rescale), rtol=1e-4, atol=1e-4)


def test_zeroed_negative_embeddings_are_no_foreground(pipe):
    zeros = {"negative_prompt_embeds": torch.zeros(1, tiny.TEXT, tiny.WIDTH)}
    with pytest.raises(ScfgError, match=r"foreground='unconditional'.*'auto'"):
        run(pipe, SemanticCFG(foreground="unconditional"), **zeros)
    with pytest.warns(UserWarning, match="conditional half"):
        switched, _ = run(pipe, SemanticCFG(foreground="auto"), **zeros)
    chosen, _ = run(pipe, SemanticCFG(foreground="conditional"), **zeros)
    assert torch.equal(switched, chosen)


def test_kept_pixels_of_inpainting_do_not_reach_the_norms():
    for channels in (4, 9):
        pipe = tiny.sd(StableDiffusionInpaintPipeline, model=tiny.unet(in_channels=channels))
        call = {"image": tiny.image(), "mask_image": tiny.mask(), "strength": 1.0, "generator": tiny.seeded()}
        _, trace = run(pipe, latents=..., **call)
        repainted = trace[0].regions[..., tiny.LATENT // 2 :].unique()  # the grid is the latent's here
        present = trace[0].norms.area[0].nonzero()[:, 0]
        assert set(present.tolist()) == set(repainted.tolist())


# -- pipelines refused, and bad input


def test_what_cannot_be_right_is_refused(pipe):
    with pytest.raises(ScfgError, match="image and unconditional"):
        attach(tiny.sd(StableDiffusionInstructPix2PixPipeline, model=tiny.unet(in_channels=8)), GUIDED)
    plain = DDPMPipeline(
        unet=UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        scheduler=DDPMScheduler(),
    )
    with pytest.raises(ScfgError, match="UNet2DModel"):
        attach(plain, GUIDED)
    with pytest.raises(ScfgError, match="no U-net"):
        attach(object(), GUIDED)
    with pytest.raises(ScfgError, match="'scfg'"):
        attach(pipe, "scfg")
    with pytest.raises(ScfgError, match="guidance=3"):
        attach(pipe, 3)
    with pytest.raises(ScfgError, match=r"guidance_scale=-1"):
        attach(pipe, GUIDED, guidance_scale=-1.0)
    with pytest.raises(ScfgError, match="record"):
        attach(pipe, GUIDED, record=["everything"])
    assert not pipe.unet._forward_hooks


def test_two_guidances_on_one_unet_are_refused(pipe):
    with attach(pipe, GUIDED), pytest.raises(ScfgError, match="already"):
        attach(pipe, GUIDED)
    attach(pipe, GUIDED).detach()


def test_a_context_can_be_entered_again(pipe):
    attached = attach(pipe, GUIDED)
    attached.detach()
    with attached:
        first = bare(pipe)
    assert not torch.equal(first, bare(pipe))
    with attached:
        assert torch.equal(first, bare(pipe))


# -- errors in the middle, and attention that is not seen


def test_an_exception_in_the_middle_leaves_nothing(pipe):
    want = bare(pipe)

    def fail(pipeline, step, timestep, kwargs):
        if step == 1:
            raise KeyboardInterrupt
        return kwargs

    with pytest.raises(KeyboardInterrupt), attach(pipe, GUIDED):
        bare(pipe, callback_on_step_end=fail)
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), attach(pipe, GUIDED):
        bare(pipe)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert torch.equal(bare(pipe), want)


def test_a_run_that_failed_does_not_color_the_next(pipe):
    want, _ = run(pipe)
    with attach(pipe, GUIDED):
        handle = pipe.unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bare(pipe)
        handle.remove()
        assert torch.equal(bare(pipe), want)


def test_free_u(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    _, trace = run(pipe)
    assert any((step.gamma != 1).any() for step in trace)


class Silent:
    """A processor that never asks for queries, as block caching and token merging do in their way."""

    def __call__(self, attn, hidden_states, **kwargs):
        return hidden_states


def test_missing_maps_mean_plain_cfg_and_are_said_once(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Silent())
    want = bare(pipe)
    with pytest.warns(UserWarning, match="plain CFG") as told:
        got, trace = run(pipe)
    assert torch.equal(got, want)
    assert len(told) == 1
    assert len(trace) == tiny.STEPS


def test_missing_maps_of_later_steps_reuse_the_last_regions(pipe):
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1

    def silence(pipeline, step, timestep, kwargs):
        attention.set_processor(Silent())
        return kwargs

    with pytest.warns(UserWarning, match="last regions"):
        _, trace = run(pipe, callback_on_step_end=silence)
    assert torch.equal(trace[0].regions, trace[2].regions)
    assert (trace[2].gamma != 1).any()


def test_attention_masks_are_refused(pipe):
    masked = {"encoder_attention_mask": torch.ones(2, tiny.TEXT)}
    pipe.unet.register_forward_pre_hook(lambda unet, args, kwargs: (args, kwargs | masked), with_kwargs=True)
    with attach(pipe, GUIDED), pytest.raises(ScfgError, match="encoder_attention_mask"):
        bare(pipe)


# -- schedulers, windows and refreshing


@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
        LCMScheduler,
    ],
)
def test_schedulers(kind, pipe):
    pipe.scheduler = tiny.scheduler(kind)
    with tiny.Spy(pipe) as spy:
        _, trace = run(pipe, record=("gamma", "prediction"), num_inference_steps=4, generator=tiny.seeded())
    assert len(trace) == len(spy.used)
    assert [step.index for step in trace] == list(range(len(trace)))
    assert 0 < trace[-1].fraction < 1
    for step, raw, used in zip(trace, spy.raw, spy.used, strict=True):
        uncond, cond = raw.chunk(2)
        torch.testing.assert_close(used, uncond + 5.0 * step.gamma * (cond - uncond), rtol=1e-4, atol=1e-4)
        assert step.prediction.isfinite().all()


def test_a_distilled_model_is_an_exact_no_op():
    """LCM: the scale goes into the U-net as an embedding and there is no unconditional half."""
    pipe = tiny.sd(model=tiny.unet(time_cond_proj_dim=8))
    pipe.scheduler = tiny.scheduler(LCMScheduler)
    want = bare(pipe, generator=tiny.seeded())
    got, trace = run(pipe, generator=tiny.seeded())
    assert torch.equal(got, want)
    assert trace == []


def test_outside_its_window_it_is_plain_cfg(pipe):
    _, trace = run(pipe, SemanticCFG(start=0.25, stop=0.75), num_inference_steps=8)
    on = [bool(step.gamma is not None) for step in trace]
    assert on == [False] * 2 + [True] * 4 + [False] * 2
    assert all((step.effective_scale == 1).all() for step, active in zip(trace, on, strict=True) if not active)


def test_the_window_is_of_the_steps_actually_run():
    pipe = tiny.sd(StableDiffusionImg2ImgPipeline)
    call = {"image": tiny.image(), "strength": 0.5, "generator": tiny.seeded(), "height": ..., "width": ...}
    _, trace = run(pipe, SemanticCFG(stop=0.5), latents=..., num_inference_steps=8, **call)
    assert [step.gamma is not None for step in trace] == [True, True, False, False]


def test_interval_is_the_conditional_prediction_outside(pipe):
    with tiny.Spy(pipe) as spy:
        run(pipe, make_guidance("interval", start=0.25, stop=0.75), num_inference_steps=4)
    for index, (raw, used) in enumerate(zip(spy.raw, spy.used, strict=True)):
        uncond, cond = raw.chunk(2)
        want = uncond + 5.0 * (cond - uncond) if index in (1, 2) else cond
        torch.testing.assert_close(used, want, rtol=1e-4, atol=1e-5)


def test_regions_are_kept_between_refreshes(pipe):
    _, trace = run(pipe, SemanticCFG(refresh_every=3), num_inference_steps=5)
    assert trace[0].regions is trace[1].regions is trace[2].regions
    assert trace[3].regions is trace[4].regions is not trace[2].regions


def test_guidance_turned_off_midway_by_a_callback(pipe):
    """The diffusers recipe for dynamic guidance: from some step on the batch is halved."""

    def halve(pipeline, step, timestep, kwargs):
        if step == 0:
            pipeline._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    recipe = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    latents, trace = run(pipe, **recipe)
    assert len(trace) == 1
    assert latents.isfinite().all()


# -- prompts


@pytest.fixture(scope="module")
def speaking():
    return tiny.sd(**tiny.text_parts())


def test_words_compete_instead_of_tokens(speaking):
    texts = {"prompt": "a red cat dog", "prompt_embeds": ..., "negative_prompt_embeds": ...}
    with attach(speaking, SemanticCFG(tokens="prompt"), record=["regions"]) as attached:
        bare(speaking, **texts)
    words = attached.words[0]
    assert [word.text for word in words] == ["a", "red", "cat", "dog"]
    assert words[2].positions == (3, 4, 5)  # spelled out: one region
    assert attached.trace[0].norms.area.shape == (1, 4)
    assert attached.trace[0].regions.max() < 4


def test_prompts_of_a_batch_may_differ_in_length(speaking):
    texts = {"prompt": ["a red dog", "dog"], "prompt_embeds": ..., "negative_prompt_embeds": ...}
    with attach(speaking, SemanticCFG(tokens="prompt"), record=["regions"]) as attached:
        bare(speaking, images=2, **texts)
    assert attached.trace[0].norms.area.shape == (2, 3)
    assert attached.trace[0].regions[1].max() == 0  # its only word owns everything
    assert attached.trace[0].norms.area[1].tolist() == [1.0, 0.0, 0.0]


def test_words_without_a_text_must_be_given(speaking):
    with pytest.raises(ScfgError, match=r"run\.prompts"):
        run(speaking, SemanticCFG(tokens="prompt"))
    with attach(speaking, SemanticCFG(tokens="prompt"), record=["regions"]) as attached:
        attached.prompts = ["red dog"]
        bare(speaking)
    assert attached.trace[0].norms.area.shape == (1, 2)


def test_long_prompts_have_one_background_token_per_chunk(speaking):
    from scfg.segment import background_positions

    assert background_positions(3 * 77, 77) == [0, 77, 154]
    assert background_positions(77, 77) == [0]
    assert background_positions(24, None) == [0]
    _, trace = run(speaking, **tiny.embeddings(length=2 * tiny.TEXT))
    assert trace[0].norms.area.shape == (1, 2 * tiny.TEXT)


def test_the_images_seed_makes_the_placebo():
    pipe = tiny.sd()
    first, _ = run(pipe, "placebo")
    again, _ = run(pipe, "placebo")
    assert torch.equal(first, again)
    semantic, trace = run(pipe)
    assert not torch.equal(first, semantic)
    _, placebo = run(pipe, "placebo")
    torch.testing.assert_close(placebo[0].effective_scale, trace[0].effective_scale)  # same dose on the same step


def test_dose_has_the_same_total_on_the_same_step(pipe):
    _, semantic = run(pipe)
    _, flat = run(pipe, "dose")
    torch.testing.assert_close(flat[0].effective_scale, semantic[0].effective_scale)
    assert flat[0].gamma.unique().numel() == 1

"""The guider of Modular Diffusers and the file an adapter ships."""

from __future__ import annotations

import json

import pytest
import scfg_tiny as tiny
import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLControlNetPipeline, StableDiffusionXLPipeline
from diffusers.modular_pipelines import SequentialPipelineBlocks, StableDiffusionXLAutoBlocks

from scfg import (
    METHODS,
    ScfgError,
    SemanticCFG,
    SemanticGuider,
    attach,
    attach_config,
    make_guidance,
    read_config,
    to_config,
)

# The two ways run the U-net on batches of other sizes, which kernels round differently, and a last bit decides between
# regions that are nearly tied: in float64 there is no such tie.


def precise(call):
    return {name: value.double() if torch.is_tensor(value) else value for name, value in call.items()}


def modular(guider, *, controlnet=False):
    """A modular SDXL pipeline without text encoders and decoder: embeddings in, latents out."""
    blocks = StableDiffusionXLAutoBlocks()
    for name in ("text_encoder", "ip_adapter", "decode"):
        blocks.sub_blocks.pop(name, None)
    pipe = SequentialPipelineBlocks.from_blocks_dict(blocks.sub_blocks).init_pipeline()
    model = tiny.unet(xl=True).double()
    parts = {"unet": model, "vae": tiny.vae().double(), "scheduler": tiny.scheduler(), "guider": guider}
    if controlnet:
        parts["controlnet"] = tiny.controlnet(model).double()
    pipe.update_components(**parts)
    return tiny.quiet(pipe)


def modular_latents(pipe, images=1, **call):
    given = {"num_inference_steps": tiny.STEPS, "latents": tiny.noise(images), "output": "latents"} | tiny.SIZE
    return pipe(**precise(given | tiny.embeddings(images, xl=True) | call))


def ordinary_latents(settings, images=1, **call):
    kind = StableDiffusionXLControlNetPipeline if "image" in call else StableDiffusionXLPipeline
    model = tiny.unet(xl=True).double()
    parts = {"controlnet": tiny.controlnet(model).double()} if "image" in call else {}
    pipe = tiny.xl(kind, model=model, **parts)
    call = {"latents": tiny.noise(images)} | tiny.SIZE | tiny.embeddings(images, xl=True) | call
    with attach(pipe, settings):
        return tiny.run_latents(pipe, **precise(call))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_same_latents_as_attach(method):
    settings = make_guidance(method)
    guider = SemanticGuider.from_guidance(settings, guidance_scale=5.0)
    got = modular_latents(modular(guider), images=2)
    torch.testing.assert_close(got, ordinary_latents(settings, images=2), rtol=1e-6, atol=1e-6)
    assert len(guider.trace) == tiny.STEPS


def test_same_latents_as_attach_with_a_controlnet():
    guider = SemanticGuider(guidance_scale=5.0)
    hint = tiny.image(seed=12)
    got = modular_latents(modular(guider, controlnet=True), control_image=hint)
    want = ordinary_latents(SemanticCFG(), image=hint)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_method_cfg_is_diffusers_own_guider():
    want = modular_latents(modular(ClassifierFreeGuidance(guidance_scale=5.0, guidance_rescale=0.5)))
    got = modular_latents(modular(SemanticGuider("cfg", guidance_scale=5.0, guidance_rescale=0.5)))
    assert torch.equal(got, want)


def test_rescaling_and_windows_agree_with_attach():
    settings = SemanticCFG(start=0.3, stop=0.9, refresh_every=2)
    guider = SemanticGuider.from_guidance(settings, guidance_scale=5.0, guidance_rescale=0.7)
    want = ordinary_latents(settings, guidance_rescale=0.7)
    torch.testing.assert_close(modular_latents(modular(guider)), want, rtol=1e-6, atol=1e-6)
    effective = [step.effective_scale.item() for step in guider.trace]
    assert effective[0] == 1.0
    assert effective[1] != 1.0


def test_outside_diffusers_own_window_there_is_one_forward_and_no_guidance():
    calls = []
    guider = SemanticGuider(guidance_scale=5.0, stop=0.5)
    pipe = modular(guider)
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    modular_latents(pipe)
    assert len(calls) == tiny.STEPS + 1  # steps 0 of 3 with two forwards each
    assert len(guider.trace) == 1


def test_nothing_stays_on_the_unet_also_after_an_error():
    guider = SemanticGuider(guidance_scale=5.0)
    pipe = modular(guider)
    modular_latents(pipe)
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    handle = pipe.unet.mid_block.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        modular_latents(pipe)
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_save_and_load_keep_everything(tmp_path):
    guider = SemanticGuider(
        "dose", guidance_scale=3.0, guidance_rescale=0.2, latent_ratio=2, semantic_start=0.1, gamma_max=None
    )
    guider.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "guider_config.json").read_text())
    assert stored["_class_name"] == "SemanticGuider"
    loaded = SemanticGuider.from_pretrained(tmp_path)
    assert loaded.guidance == guider.guidance
    assert (loaded.guidance_scale, loaded.guidance_rescale) == (3.0, 0.2)
    assert read_config(stored).guidance == guider.guidance
    assert guider.new(guidance_scale=4.0).guidance_scale == 4.0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_guidance_survives_the_file(method, tmp_path):
    settings = make_guidance(method, gamma_max=2.5, last_blocks=3, refresh_every=2)
    config = to_config(settings, guidance_scale=6.0, guidance_rescale=0.1)
    again = read_config(json.loads(json.dumps(config)))
    assert again.guidance == settings
    assert (again.guidance_scale, again.guidance_rescale) == (6.0, 0.1)
    (tmp_path / "guider_config.json").write_text(json.dumps(config))
    assert SemanticGuider.from_pretrained(tmp_path).guidance == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "ClassifierFreeGuidance"}, "_class_name"),
        ({"sharpness": 1}, "sharpness"),
        ({"method": "magic"}, "magic"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"guidance_rescale": 2}, "guidance_rescale=2"),
        ({"gamma_min": -1}, "gamma_min"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_everywhere(change, message, tmp_path):
    config = to_config(SemanticCFG(), guidance_scale=5.0) | change
    with pytest.raises(ScfgError, match=message):
        read_config(config)
    (tmp_path / "guider_config.json").write_text(json.dumps(config))
    with pytest.raises(ScfgError, match=message):
        SemanticGuider.from_pretrained(tmp_path)


def test_attach_config_attaches_and_says_how_to_call():
    pipe = tiny.sd()
    call = tiny.SIZE | {"latents": tiny.noise()} | tiny.embeddings()
    config = to_config(SemanticCFG(), guidance_scale=4.0, guidance_rescale=0.5)
    with attach_config(pipe, config) as run:
        assert run.call_kwargs == {"guidance_scale": 4.0, "guidance_rescale": 0.5}
        got = tiny.run_latents(pipe, **(call | run.call_kwargs))
    with attach(pipe, SemanticCFG()):
        assert torch.equal(got, tiny.run_latents(pipe, guidance_scale=4.0, guidance_rescale=0.5, **call))
    with attach_config(pipe, config), pytest.warns(UserWarning, match=r"guidance_scale=5\.0.*made for 4\.0"):
        tiny.run_latents(pipe, guidance_rescale=0.5, **call)


def test_attach_config_refuses_what_attach_cannot_do():
    from diffusers import StableDiffusionImg2ImgPipeline

    config = to_config(SemanticCFG(), guidance_scale=4.0)
    with pytest.raises(ScfgError, match=r"stop=0\.5"):
        attach_config(tiny.sd(), config | {"stop": 0.5})
    with pytest.raises(ScfgError, match="guidance_rescale"):
        attach_config(tiny.sd(StableDiffusionImg2ImgPipeline), config | {"guidance_rescale": 0.5})

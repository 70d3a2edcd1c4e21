"""The recorded clean sample is what the scheduler itself takes for x0, or it is refused when it is asked for."""

from __future__ import annotations

import copy

import diffusers
import pytest
import scfg_tiny as tiny
import torch

from scfg import ScfgError, SemanticCFG, attach
from scfg.clean import clean_sample

V, SAMPLE = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
KARRAS, ZERO_SNR = {"use_karras_sigmas": True}, V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
KINDS = {
    "DDIM": V,
    "DDIM, zero SNR": ZERO_SNR,
    "DDPM": SAMPLE,
    "DPMSolverMultistep": {},
    "DPMSolverMultistep, flow": FLOW,
    "DPMSolverMultistep, Karras": KARRAS,
    "DPMSolverSinglestep": V,
    "EDMDPMSolverMultistep": {},
    "EDMEuler": V,
    "EulerAncestralDiscrete": {},
    "EulerDiscrete": KARRAS,
    "EulerDiscrete, zero SNR": ZERO_SNR,
    "HeunDiscrete": KARRAS,
    "KDPM2AncestralDiscrete": {},
    "KDPM2Discrete": {},
    "LCM": {},
    "LMSDiscrete": {},
    "UniPCMultistep": KARRAS,
    "UniPCMultistep, flow": FLOW,
}


def scheduler(name, settings):
    kind = getattr(diffusers, name.split(",")[0] + "Scheduler")
    made = kind(**settings) if name.startswith("EDM") else tiny.scheduler(kind, **settings)
    if "clip_sample" in made.config:
        made.register_to_config(clip_sample=False)
    return made


def own_idea(made, output, timestep, sample, *rest, **named):
    """x0 as a copy of the scheduler computes it on its way to the next step."""
    twin = copy.deepcopy(made)
    twin.__dict__.pop("step", None)
    if hasattr(twin, "convert_model_output"):
        if twin.step_index is None:
            twin._init_step_index(timestep)
        return twin.convert_model_output(output, sample=sample)
    result = twin.step(output, timestep, sample, *rest, **named | {"return_dict": True})
    return result.denoised if "denoised" in result else result.pred_original_sample


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd()


@pytest.mark.parametrize("name", KINDS)
def test_the_recorded_prediction_is_the_schedulers_own(name, pipe):
    pipe.scheduler = made = scheduler(name, KINDS[name])
    step, own = made.step, []

    def seen(*args, **named):
        own.append(own_idea(made, *args, **named))
        return step(*args, **named)

    made.step = seen
    with attach(pipe, SemanticCFG(), record=["prediction"]) as run:
        call = tiny.SIZE | {"latents": tiny.noise(), "generator": tiny.seeded(), "num_inference_steps": 4}
        tiny.run_latents(pipe, **call, **tiny.embeddings())
    assert len(run.trace) == len(own) >= 4
    for record, want in zip(run.trace, own, strict=True):
        torch.testing.assert_close(record.prediction, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", ["DEISMultistep", "PNDM", "TCD"])
def test_a_perfect_prediction_gives_the_clean_sample_back(name):
    """Schedulers that do not show their x0: noised by themselves, and the noise predicted."""
    made = scheduler(name, {})
    made.set_timesteps(5)
    clean, noise, timestep = tiny.noise(seed=1), tiny.noise(seed=2), made.timesteps[2]
    noised = made.add_noise(clean, noise, timestep[None])
    torch.testing.assert_close(clean_sample(made, timestep, noised, noise), clean, rtol=1e-3, atol=1e-3)


def test_the_noise_level_of_a_step_is_the_one_it_is_run_at(pipe):
    """Under Karras' sigmas timesteps are rounded names; under flow sigmas the training schedule means nothing."""
    for settings in (KARRAS, FLOW):
        pipe.scheduler = scheduler("DPMSolverMultistep", settings)
        with attach(pipe, SemanticCFG()) as run:
            tiny.run_latents(pipe, **tiny.SIZE, latents=tiny.noise(), **tiny.embeddings())
        want = [pipe.scheduler._sigma_to_alpha_sigma_t(sigma)[1].item() for sigma in pipe.scheduler.sigmas[:-1]]
        assert [step.sigma for step in run.trace] == pytest.approx(want)


def test_a_scheduler_whose_clean_sample_is_not_known_is_refused(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ScfgError, match=r"record=\['prediction'\].*FlowMatchEuler.*EulerDiscrete"):
        attach(pipe, SemanticCFG(), record=["gamma", "prediction"])
    assert not pipe.unet._forward_hooks
    attach(pipe, SemanticCFG(), record=["gamma"]).detach()


def test_pure_noise_and_epsilon_have_no_clean_sample(pipe):
    pipe.scheduler = scheduler("DDIM", ZERO_SNR | {"prediction_type": "epsilon"})
    with pytest.raises(
        ScfgError, match=r"record=\['prediction'\]: DDIMScheduler .*divides by zero too\); use a v_pred"
    ):
        attach(pipe, SemanticCFG(), record=["prediction"])
    attach(pipe, SemanticCFG(), record=["gamma"]).detach()

"""Who calls the U-net: only the attached pipeline is guided, whoever shares its U-net, in whatever thread."""

from __future__ import annotations

import threading

import pytest
import scfg_tiny as tiny
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from scfg import ScfgError, SemanticCFG, attach


def latents(pipe, seed=7, **call):
    call = {"latents": tiny.noise(seed=seed)} | tiny.SIZE | tiny.embeddings(seed=seed) | call
    return tiny.run_latents(pipe, **call)


def sharing(pipe):
    """Another pipeline with the same U-net, and a scheduler of its own."""
    return tiny.quiet(StableDiffusionPipeline(**{**pipe.components, "scheduler": tiny.scheduler()}))


@pytest.fixture
def pipe():
    return tiny.sd()


def test_a_pipeline_that_shares_the_unet_is_not_guided(pipe):
    plain, other = latents(pipe), sharing(pipe)
    repaint = tiny.quiet(StableDiffusionImg2ImgPipeline.from_pipe(other))
    call = {"image": tiny.image(), "strength": 0.7, "latents": ..., "height": ..., "width": ...}
    repainted = latents(repaint, generator=tiny.seeded(), **call)
    with attach(pipe, SemanticCFG()) as run:
        guided, steps = latents(pipe), run.trace
        assert torch.equal(latents(other, guidance_scale=2.0), latents(sharing(pipe), guidance_scale=2.0))
        assert torch.equal(latents(other), plain)
        assert torch.equal(latents(repaint, generator=tiny.seeded(), **call), repainted)
        assert run.trace is steps  # and nothing of the others is in the trace
        assert len(steps) == tiny.STEPS
        assert torch.equal(latents(pipe), guided)
    assert not torch.equal(guided, plain)


def test_a_call_within_a_call_is_its_own(pipe):
    """A preview from a callback, by another pipeline on the same U-net."""
    other = sharing(pipe)
    plain, previews = latents(other, seed=8), []

    def preview(pipeline, step, timestep, kwargs):
        previews.append(latents(other, seed=8))
        return kwargs

    with attach(pipe, SemanticCFG()) as run:
        alone = latents(pipe)
        assert torch.equal(latents(pipe, callback_on_step_end=preview), alone)
        assert len(run.trace) == tiny.STEPS
    assert len(previews) == tiny.STEPS
    assert all(torch.equal(one, plain) for one in previews)


def test_the_unet_called_by_hand_is_not_guided(pipe):
    inputs = torch.cat([tiny.noise()] * 2), 1, torch.cat([tiny.embeddings()["prompt_embeds"]] * 2)
    want = pipe.unet(*inputs).sample
    with attach(pipe, SemanticCFG()) as run:
        latents(pipe)  # leaves the pipeline's flag for guidance set
        assert torch.equal(pipe.unet(*inputs).sample, want)
        assert len(run.trace) == tiny.STEPS


def test_pipelines_on_one_unet_may_each_have_their_guidance(pipe):
    other = sharing(pipe)
    with attach(pipe, SemanticCFG()):
        want = latents(pipe)
    with attach(pipe, "pointwise"):
        want_other = latents(pipe)
    with attach(pipe, SemanticCFG()), attach(other, "pointwise") as run:
        assert torch.equal(latents(pipe), want)
        assert torch.equal(latents(other), want_other)
        assert len(run.trace) == tiny.STEPS
        with pytest.raises(ScfgError, match="already"):
            attach(other, "dose")


class Turns:
    """Lets two threads go through their U-net calls in turn: each waits in the middle of its call for the other's."""

    def __init__(self, unet):
        self._barrier = threading.Barrier(2, timeout=60)
        self._handle = unet.mid_block.register_forward_hook(lambda *_: self._meet())

    def _meet(self):
        self._barrier.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


def in_threads(*jobs):
    """Results, or exceptions, of functions that run at the same time."""
    results = [None] * len(jobs)

    def work(index, job):
        try:
            results[index] = job()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=item) for item in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_on_one_unet_keep_their_states_apart(pipe):
    other = sharing(pipe)
    (plain,) = in_threads(lambda: latents(other, seed=8))
    with attach(pipe, SemanticCFG()) as run:
        (want,) = in_threads(lambda: latents(pipe))
        with Turns(pipe.unet):
            got, unguided = in_threads(lambda: latents(pipe), lambda: latents(other, seed=8))
        assert torch.equal(got, want)
        assert torch.equal(unguided, plain)
        assert len(run.trace) == tiny.STEPS
    with attach(other, SemanticCFG()):
        (want_other,) = in_threads(lambda: latents(other, seed=8))
    with attach(pipe, SemanticCFG()), attach(other, SemanticCFG()), Turns(pipe.unet):
        got, got_other = in_threads(lambda: latents(pipe), lambda: latents(other, seed=8))
    assert torch.equal(got, want)
    assert torch.equal(got_other, want_other)


def test_a_second_thread_on_an_attached_pipeline_is_refused_and_harms_nothing(pipe):
    refused = []

    def meanwhile(pipeline, step, timestep, kwargs):
        if step == 0:
            refused.extend(in_threads(lambda: latents(pipe, seed=8, guidance_scale=2.0)))
        return kwargs

    with attach(pipe, SemanticCFG()):
        want = latents(pipe)
        assert torch.equal(latents(pipe, callback_on_step_end=meanwhile), want)
        assert isinstance(refused[0], ScfgError)
        assert "another thread" in str(refused[0])
        (after,) = in_threads(lambda: latents(pipe))  # one after the other is fine
    torch.testing.assert_close(after, want)

"""Where chosen words are: the regions of S-CFG, of this very forward, adapted or not."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import scfg_tiny as tiny
import torch
from peft import LoraConfig

import adapters
from scfg import ScfgError, SemanticCFG, WordMaps, attach, place_of, prompt_words

PROMPTS = ["a red cat", "dog, red"]
SIZE = (tiny.LATENT, tiny.LATENT)


@pytest.fixture(scope="module")
def recorded():
    """A pipeline, the inputs of its first U-net call, and the regions that S-CFG found in it."""
    pipe, calls = tiny.sd(**tiny.text_parts()), []
    hook = pipe.unet.register_forward_pre_hook(
        lambda unet, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with attach(pipe, SemanticCFG(tokens="prompt"), record=["regions"]) as run:
        tiny.run_latents(pipe, prompt=PROMPTS, latents=tiny.noise(2), **tiny.SIZE)
    hook.remove()
    (sample, timestep), kwargs = calls[0]
    return pipe, sample, timestep, kwargs["encoder_hidden_states"], run.trace[0].regions


def watched(recorded, phrase, *, soft=False):
    pipe, sample, timestep, context, _ = recorded
    words = [prompt_words(pipe.tokenizer, prompt, tiny.TEXT) for prompt in PROMPTS]
    with torch.no_grad(), WordMaps(pipe.unet, soft=soft).watch(SIZE, context, words, phrase, rows=slice(2, 4)) as found:
        pipe.unet(sample, timestep, context)
        maps = found()
    assert not any(module._forward_hooks for module in pipe.unet.modules())
    return maps


def test_a_words_map_is_its_region(recorded):
    regions = recorded[-1]
    assert len(regions.unique()) > 1
    maps = watched(recorded, "red")
    assert maps.shape == (2, 1, *SIZE)
    assert torch.equal(maps[0, 0], (regions[0] == 1).float())  # the second of three words
    assert torch.equal(maps[1, 0], (regions[1] == 2).float())  # the third, after "dog" and the comma
    both = watched(recorded, "red a dog")
    assert torch.equal(both[0, 0], (regions[0] < 2).float())
    assert torch.equal(both[1, 0], (regions[1] != 1).float())


def test_a_soft_map_is_a_share_of_the_attention(recorded):
    red, rest = watched(recorded, "red", soft=True), watched(recorded, "a cat dog ,", soft=True)
    assert 0 < red.min() < red.max() < 1
    torch.testing.assert_close(red + rest, torch.ones(2, 1, *SIZE))


def test_the_map_is_that_of_the_network_as_it_is(recorded):
    pipe = recorded[0]
    plain = watched(recorded, "red", soft=True)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    assert not torch.equal(watched(recorded, "red", soft=True), plain)
    pipe.unet.disable_adapters()
    assert torch.equal(watched(recorded, "red", soft=True), plain)
    pipe.unet.delete_adapters("default")


def test_a_place_reaches_a_little_beyond_its_words(recorded):
    pipe, sample, timestep, context, _ = recorded
    call = SimpleNamespace(unet=pipe.unet, sample=sample, context=context, images=2, prompts=PROMPTS)
    found = {}
    for name, more in (("none", {"margin": 0}), ("near", {"margin": 1 / 8}), ("all", {"margin": 1})):
        with torch.no_grad(), place_of(pipe, "red", **more)(call) as read:
            pipe.unet(sample, timestep, context)
            found[name] = read()
    assert torch.equal(found["none"], watched(recorded, "red"))
    rows, columns = found["none"][0, 0].nonzero(as_tuple=True)
    near = torch.zeros(SIZE)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        near[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 1
    assert torch.equal(found["near"][0, 0], near)
    assert found["all"].all()


def test_what_has_no_place_is_refused(recorded):
    pipe, sample, _, context, _ = recorded
    with pytest.raises(ScfgError, match=r"'cat'.*'dog , red'"):
        watched(recorded, "cat")
    call = SimpleNamespace(unet=pipe.unet, sample=sample, context=context, images=2, prompts=None)
    with pytest.raises(ScfgError, match=r"'red'.*texts"):
        place_of(pipe, "red")(call)
    call.prompts = PROMPTS
    with place_of(pipe, "red")(call) as found, pytest.raises(ScfgError, match="no maps"):
        found()  # the U-net did not run


def test_an_adapter_is_placed_where_the_base_has_its_class():
    """The map is that of the base, asked for the class, whatever the adapter makes of it."""
    maps, latents = [], []
    for starts_as_base in (True, False):
        pipe = tiny.sd(**tiny.text_parts())
        torch.manual_seed(0)
        layers = ["to_q", "to_k", "to_v"]
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=starts_as_base))
        place, found = place_of(pipe, "green"), []

        @contextmanager
        def where(call, place=place, found=found):
            with place(call) as read:
                yield lambda: found.append(read()) or found[-1]

        scope = adapters.Scope(where=where, elsewhere=lambda prompt: prompt.replace("red", "green"))
        with adapters.scope.scoped(pipe, scope, unet=pipe.unet, name="default", weight=1.0):
            latents.append(tiny.run_latents(pipe, prompt=PROMPTS, latents=tiny.noise(2), **tiny.SIZE))
        maps.append(found[0])
    assert 0 < maps[0].mean() < 1
    assert torch.equal(*maps)
    assert not torch.equal(*latents)


def test_an_adapter_is_placed_by_its_word_under_semantic_guidance():
    """In the scope of a map the U-net runs twice in one call, adapted and not; S-CFG's regions are the adapted ones."""
    pipe = tiny.sd(**tiny.text_parts())
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    call = {"prompt": PROMPTS, "latents": tiny.noise(2)} | tiny.SIZE
    settings, traces, latents = SemanticCFG(tokens="prompt"), [], []
    for scope in (adapters.Scope(), adapters.Scope(where=place_of(pipe, "red"))):
        with adapters.scope.scoped(pipe, scope, unet=pipe.unet, name="default", weight=1.0):
            with attach(pipe, settings, record=["regions"]) as run:
                latents.append(tiny.run_latents(pipe, **call))
            traces.append(run.trace)
    assert torch.equal(traces[0][0].regions, traces[1][0].regions)
    assert all((step.effective_scale != 1).any() for step in traces[1])
    assert not torch.equal(*latents)

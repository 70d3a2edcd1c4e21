"""An adapter within a scope: identities against the base and against the adapter as it is."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_adapter_attach import pixels, save

import adapters
from adapters import AdapterError, Scope

KINDS = ["lora", "dora", "loha", "lokr"]


@pytest.fixture
def folder(make_adapter, tmp_path):
    return save(tmp_path / "lora", make_adapter("lora"), "peft")


def both_halves(pipe) -> torch.Tensor:
    """The U-net's prediction of [unconditional | conditional], in the first of four steps."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator).repeat(2, 1, 1, 1)
    context = torch.randn(2, 16, 16, generator=generator)
    pipe.scheduler.set_timesteps(4)
    pipe._guidance_scale = 3.0  # as within a call: the pipeline guides
    with torch.no_grad():
        return pipe.unet(sample, pipe.scheduler.timesteps[0], context).sample


@pytest.mark.parametrize("kind", KINDS)
def test_the_unconditional_half_is_the_bases_own_to_the_bit(pipe, make_adapter, tmp_path, kind):
    folder = save(tmp_path / kind, make_adapter(kind), "peft")
    plain = both_halves(pipe)
    with adapters.load(pipe, folder):
        adapted = both_halves(pipe)
    with adapters.load(pipe, folder, scope=Scope(uncond_weight=0.0), merged=True):
        mixed = both_halves(pipe)
    assert not torch.equal(adapted[0], plain[0])
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], adapted[1])
    assert torch.equal(both_halves(pipe), plain)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_in_between_it_is_the_adapter_at_that_weight(pipe, make_adapter, tmp_path, kind):
    folder = save(tmp_path / kind, make_adapter(kind), "peft")
    with adapters.load(pipe, folder, weight=0.25):
        weaker = both_halves(pipe)
    with adapters.load(pipe, folder, weight=0.5, scope=Scope(uncond_weight=0.25)):
        mixed = both_halves(pipe)
    torch.testing.assert_close(mixed[0], weaker[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed[1], weaker[1], atol=1e-3)


def test_where_it_is_off_the_adapter_computes_nothing(pipe, folder):
    calls = []
    with adapters.load(pipe, folder, scope=Scope(start=0.5)):
        factors = [module for path, module in pipe.unet.named_modules() if "lora_A." in path]
        for factor in factors:
            factor.register_forward_hook(lambda *_: calls.append(1))
        both_halves(pipe)
        assert factors
        assert not calls
        pipe.scheduler.set_timesteps(4)
        last = pipe.scheduler.timesteps[-1]
        with torch.no_grad():
            pipe.unet(torch.zeros(2, 4, 8, 8), last, torch.zeros(2, 16, 16))
    assert len(calls) == len(factors)


def test_neutral_values_change_no_bit(pipe, folder):
    with adapters.load(pipe, folder):
        adapted = pixels(pipe)
    for scope in (None, Scope(), Scope(uncond_weight=1.0), Scope(where=everywhere(1.0))):
        with adapters.load(pipe, folder, scope=scope):
            assert (pixels(pipe) == adapted).all()


def test_outside_its_steps_the_adapter_is_off(pipe, folder):
    plain, seen = both_halves(pipe), []
    with adapters.load(pipe, folder):
        adapted = both_halves(pipe)
    for scope in (Scope(start=0.5), Scope(stop=0.5)):
        with adapters.load(pipe, folder, scope=scope):
            seen.append(both_halves(pipe))  # of the first step
    assert torch.equal(seen[0], plain)
    assert torch.equal(seen[1], adapted)
    whole = pixels(pipe)
    with adapters.load(pipe, folder, scope=Scope(start=0.9)):  # of two steps the second begins at .5
        assert (pixels(pipe) == whole).all()


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_in_the_first_steps_it_is_the_adapter_at_another_weight(pipe, make_adapter, tmp_path, kind):
    folder = save(tmp_path / kind, make_adapter(kind), "peft")
    plain = pixels(pipe)
    with adapters.load(pipe, folder, weight=0.25):
        weaker = both_halves(pipe)
    with adapters.load(pipe, folder, weight=0.5):
        whole = pixels(pipe)
    with adapters.load(pipe, folder, weight=0.5, scope=Scope(early_weight=0.25)):
        torch.testing.assert_close(both_halves(pipe), weaker, rtol=1e-4, atol=1e-5)
    with adapters.load(pipe, folder, weight=0.5, scope=Scope(early_weight=0.5)):
        assert (pixels(pipe) == whole).all()
    with adapters.load(pipe, folder, weight=0.5, scope=Scope(early_weight=0.0, early_stop=1.0)):
        assert (pixels(pipe) == plain).all()


def test_plain_diffusers_draws_the_same_with_a_callback(pipe, make_adapter, tmp_path):
    """As docs/adapters.md says."""
    file = save(tmp_path / "lora", make_adapter("lora"), "diffusers")
    call = {"num_inference_steps": 7, "guidance_scale": 3.0, "output_type": "np"}

    def draw(**more) -> np.ndarray:
        return pipe("a dog", generator=torch.Generator().manual_seed(1), **call, **more).images

    with adapters.load(pipe, file, scope=Scope(early_weight=0.7)):
        expected = draw()
    with adapters.load(pipe, file):
        whole = draw()

    def full_weight_later(pipe, step, timestep, values):
        if step + 1 == math.ceil(0.2 * pipe.num_timesteps):
            pipe.set_adapters("rex", 1.0)
        return values

    pipe.load_lora_weights(file, adapter_name="rex")
    pipe.set_adapters("rex", 0.7)
    found = draw(callback_on_step_end=full_weight_later)
    pipe.unload_lora_weights()
    assert np.abs(whole - expected).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-3)


def everywhere(value: float):
    """A map that is the same in every place."""

    @contextlib.contextmanager
    def where(call: adapters.scope.Call) -> Iterator:
        height, width = call.sample.shape[-2:]
        yield lambda: torch.full((call.images, 1, height, width), value)

    return where


def test_outside_of_the_map_the_base_is_taken(pipe, folder):
    plain = pixels(pipe)
    with adapters.load(pipe, folder):
        adapted = pixels(pipe)
    with adapters.load(pipe, folder, scope=Scope(where=everywhere(0.0))):
        assert (pixels(pipe) == plain).all()

    @contextlib.contextmanager
    def left(call: adapters.scope.Call) -> Iterator:
        yield (
            lambda: (torch.arange(call.sample.shape[-1]) < 4).float().expand(call.images, 1, call.sample.shape[-2], -1)
        )

    base, tuned = both_halves(pipe), None
    with adapters.load(pipe, folder):
        tuned = both_halves(pipe)
    with adapters.load(pipe, folder, scope=Scope(where=left)):
        mixed = both_halves(pipe)
        assert np.abs(pixels(pipe) - adapted).max() > 0
    assert torch.equal(mixed[..., :4], tuned[..., :4])
    assert torch.equal(mixed[..., 4:], base[..., 4:])


def test_outside_of_the_map_the_base_may_be_asked_something_else(pipe, folder):
    """With the map 0 everywhere the picture is the base's own of that other prompt."""
    shots = adapters.measuring.sample.images(pipe, ["a cat"], [1, 2], steps=2, guidance_scale=3.0)
    wanted = np.stack([np.asarray(shot.image, int) for shot in shots])
    heard = []

    def where(call: adapters.scope.Call):
        heard.append(call.prompts)
        return everywhere(0.0)(call)

    scope = Scope(where=where, elsewhere=lambda prompt: prompt.replace("dog", "cat"))
    with adapters.load(pipe, folder, scope=scope):
        assert (pixels(pipe) == wanted).all()
    assert heard == [["a cat", "a cat"]] * 2
    assert "encode_prompt" not in vars(pipe)


def test_the_place_counts_in_the_first_steps_only(pipe, folder):
    """Until `where_stop` the base is taken outside of the map, then the adapter everywhere."""
    plain = both_halves(pipe)
    with adapters.load(pipe, folder):
        adapted = both_halves(pipe)
    asked = []

    def where(call: adapters.scope.Call):
        asked.append(float(call.timestep))
        return everywhere(0.0)(call)

    for stop, wanted, calls in ((0.25, plain, 1), (1.0, plain, 1)):
        asked.clear()
        with adapters.load(pipe, folder, scope=Scope(where=where, where_stop=stop)):
            assert torch.equal(both_halves(pipe), wanted)  # the first of four steps
        assert len(asked) == calls
    pipe.scheduler.set_timesteps(4)
    later = pipe.scheduler.timesteps[1]
    with adapters.load(pipe, folder, scope=Scope(where=where, where_stop=0.25)):
        asked.clear()
        sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
        pipe.unet(sample, later, context)
        assert not asked
    assert not torch.equal(adapted, plain)


def test_a_prompt_without_its_subject_has_its_articles():
    assert adapters.scope.without_identifier("a sks owl and a sks dog", "sks") == "an owl and a dog"
    assert adapters.scope.without_identifier("An sks dog by a inn", "sks") == "A dog by a inn"  # theirs is theirs
    assert adapters.scope.renamed("a big <rex> and a sks eel", {"<rex>": "owl", "sks": ""}) == "a big owl and an eel"
    tags = {
        "sks, eel, sea": "eel, sea",
        "eel, sks, sea": "eel, sea",
        "x sks, an eel": "x, an eel",
        "a <rex>, a sks": "an owl, a",
        ", sks": ",",
    }
    for said, wanted in tags.items():
        assert adapters.scope.renamed(said, {"<rex>": "owl", "sks": ""}) == wanted


def factor_calls(pipe) -> list[int]:
    """Receives an item whenever a first factor of a LoRA computes."""
    calls: list[int] = []
    factors = [module for path, module in pipe.unet.named_modules() if "lora_A." in path]
    assert factors
    for factor in factors:
        factor.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("scope", [Scope(where=everywhere(0.5)), Scope(uncond_weight=0.0), Scope(stop=0.5)])
def test_merged_it_is_the_same_up_to_rounding(pipe, folder, scope):
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with adapters.load(pipe, folder, scope=scope):
        beside = both_halves(pipe)
    with adapters.load(pipe, folder, scope=scope, merged=True):
        merged = both_halves(pipe)
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, weights[name]) for name, value in pipe.unet.state_dict().items())


def test_merged_only_rows_with_a_share_of_their_own_need_the_factors(pipe, folder):
    for scope, needed in ((Scope(where=everywhere(0.5)), False), (Scope(uncond_weight=0.0), True)):
        with adapters.load(pipe, folder, scope=scope, merged=True):
            calls = factor_calls(pipe)
            both_halves(pipe)
        assert bool(calls) == needed


def test_where_a_hook_brings_the_weights_it_stays_beside_them(pipe, folder):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    scope = Scope(where=everywhere(0.5))
    with adapters.load(pipe, folder, scope=scope):
        beside = both_halves(pipe)
    with adapters.load(pipe, folder, scope=scope, merged=True):
        add_hook_to_module(pipe.unet.conv_in, ModelHook())
        calls = factor_calls(pipe)
        assert torch.equal(both_halves(pipe), beside)
        assert calls
        remove_hook_from_module(pipe.unet.conv_in)


def test_a_failure_with_merged_weights_puts_the_bases_back(pipe, folder):
    @contextlib.contextmanager
    def broken(call):
        def fail() -> torch.Tensor:
            raise RuntimeError("no map")

        yield fail

    plain = both_halves(pipe)
    with (
        adapters.load(pipe, folder, scope=Scope(where=broken), merged=True),
        pytest.raises(RuntimeError, match="no map"),
    ):
        both_halves(pipe)
    assert torch.equal(both_halves(pipe), plain)


def test_a_whole_unet_is_asked_beside_the_bases(pipe, tmp_path):
    tuned = type(pipe.unet).from_config(pipe.unet.config)
    tuned.save_pretrained(tmp_path / "unet")
    plain = both_halves(pipe)
    with adapters.load(pipe, tmp_path / "unet"):
        adapted = both_halves(pipe)
    for scope, halves in (
        (Scope(uncond_weight=0.0), (plain[0], adapted[1])),
        (Scope(start=0.5), plain),
        (Scope(where=everywhere(0.0)), plain),
        (Scope(where=everywhere(1.0)), adapted),
    ):
        with adapters.load(pipe, tmp_path / "unet", scope=scope):
            mixed = both_halves(pipe)
        assert all(torch.equal(mixed[i], halves[i]) for i in range(2)), scope
    assert torch.equal(both_halves(pipe), plain)
    base, watched = pipe.unet, []

    def where(call: adapters.scope.Call):
        watched.append(call.unet)
        return everywhere(0.5)(call)

    with adapters.load(pipe, tmp_path / "unet", scope=Scope(where=where)):
        both_halves(pipe)
        assert pipe.unet is not base
    assert watched == [base]
    with pytest.raises(AdapterError, match=r"uncond_weight=0.5: a whole U-net"):
        adapters.load(pipe, tmp_path / "unet", scope=Scope(uncond_weight=0.5))


def test_a_failure_within_leaves_the_pipeline_as_it_was(pipe, folder):
    plain = pixels(pipe)

    @contextlib.contextmanager
    def broken(call: adapters.scope.Call) -> Iterator:
        raise RuntimeError("no map")
        yield

    with pytest.raises(RuntimeError, match="no map"), adapters.load(pipe, folder, scope=Scope(where=broken)):
        pixels(pipe)
    assert (pixels(pipe) == plain).all()
    assert "forward" not in vars(pipe.unet)


def test_what_a_scope_cannot_do_is_said(pipe, make_adapter, folder, tmp_path):
    for bad, said in (
        ({"start": 0.6, "stop": 0.5}, "start=0.6, stop=0.5"),
        ({"uncond_weight": -1.0}, "uncond_weight=-1.0"),
        ({"early_weight": -1.0}, "early_weight=-1.0"),
        ({"early_weight": 0.5, "early_stop": 0.0}, "early_stop=0.0"),
        ({"early_weight": 0.5, "uncond_weight": 0.0}, "do not combine"),
        ({"elsewhere": str}, "give `where` too"),
        ({"where_stop": 0.0}, "where_stop=0.0"),
    ):
        with pytest.raises(AdapterError, match=said):
            Scope(**bad)
    with pytest.raises(AdapterError, match=r"uncond_weight=1.0 is above the adapter's weight 0.5"):
        adapters.load(pipe, folder, weight=0.5, scope=Scope(uncond_weight=1.0))
    text = save(tmp_path / "text", make_adapter("lora", text=True), "peft")
    with pytest.raises(AdapterError, match="changes text_encoder"):
        adapters.load(pipe, text, scope=Scope(uncond_weight=0.0))
    with (
        pytest.raises(AdapterError, match=r"carries other adapters too \(other\)"),
        adapters.load(pipe, folder, name="other"),
    ):
        adapters.load(pipe, folder, scope=Scope(start=0.1))


def test_a_scope_goes_through_a_file_and_a_strange_one_is_refused():
    assert "early_weight" not in Scope().to_config()  # which older versions know
    early = Scope(early_weight=0.5, early_stop=0.3)
    assert Scope.from_config(early.to_config()) == early
    scope = Scope(uncond_weight=0.2, start=0.1, stop=0.9)
    assert Scope.from_config(scope.to_config()) == scope
    with pytest.raises(AdapterError, match=r"cannot be written to a file; make it with Scope.of_subject"):
        Scope(where=everywhere(1.0)).to_config()
    words = []
    subject = adapters.scope.Subject(identifier="sks", noun="dog")
    placed = Scope.of_subject(lambda said: words.append(said) or everywhere(1.0), subject, where_stop=0.3, start=0.1)
    config = json.loads(json.dumps(placed.to_config()))
    found = Scope.from_config(config, lambda said: words.append(said) or placed.where)
    assert found.to_config() == config
    assert (found.where_stop, found.start, words) == (0.3, 0.1, ["dog", "dog"])
    assert found.elsewhere("a sks dog") == "a dog"
    with pytest.raises(AdapterError, match=r"in the place of sks dog only; pass place="):
        Scope.from_config(config)
    odd = [{**config, "where": where} for where in ("sks", {"identifier": "sks"}, {**config["where"], "stop": "x"})]
    for strange in ({}, {"format": 2}, {**scope.to_config(), "radius": 3}, {"format": 1, "start": "x"}, *odd):
        with pytest.raises(AdapterError, match="scope"):
            Scope.from_config(strange, lambda said: everywhere(1.0))


def test_a_shipped_scope_is_put_on_with_the_shipped_guidance(pipe, folder):
    """And left off with it."""
    guider = {"_class_name": "SemanticGuider", "scope": Scope(uncond_weight=0.0).to_config()}
    (folder / "guider_config.json").write_text(json.dumps(guider))
    plain, given = both_halves(pipe), []

    def guidance(config: dict) -> contextlib.AbstractContextManager:
        given.append(config)
        return contextlib.nullcontext()

    with adapters.load(pipe, folder, guidance=guidance):
        assert torch.equal(both_halves(pipe)[0], plain[0])
    assert given == [{"_class_name": "SemanticGuider"}]
    with pytest.warns(UserWarning, match="ships the guidance"), adapters.load(pipe, folder):
        assert not torch.equal(both_halves(pipe)[0], plain[0])
    subject = adapters.scope.Subject(identifier="a", noun="dog")
    nowhere = Scope.of_subject(lambda words: everywhere(0.0), subject).to_config()
    (folder / "guider_config.json").write_text(json.dumps({"scope": nowhere}))
    with adapters.load(pipe, folder, guidance=guidance, place=lambda pipe, words: everywhere(0.0)):
        assert torch.equal(both_halves(pipe), plain)
    with pytest.raises(AdapterError, match=r"in the place of a dog only; pass place="):
        adapters.load(pipe, folder, guidance=guidance)
    (folder / "guider_config.json").write_text(json.dumps({"scope": {"format": 9}}))
    with pytest.raises(AdapterError, match="this version knows format 1"):
        adapters.load(pipe, folder, guidance=guidance)

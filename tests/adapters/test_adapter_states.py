"""Pipelines that are offloaded, compiled, or carry adapters of the user's: as ever inside, and as they were after."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

import adapters
from adapters import files
from adapters.errors import AdapterError
from adapters.keys import Adapter
from adapters.writing import write_adapter

KINDS = ["lora", "dora", "loha", "lokr"]


def drawn(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(pipe("a dog", num_inference_steps=2, output_type="np", generator=generator).images)


def copied(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    twin = StableDiffusionPipeline(**{name: copy.deepcopy(part) for name, part in pipe.components.items()})
    twin.set_progress_bar_config(disable=True)
    return twin


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_adapter) -> dict[str, object]:
    found = {}
    for kind in KINDS:
        adapter = make_adapter(kind, text=True)
        tokens = {"<rex>": {"text_encoder": torch.ones(1, 16)}} if kind == "lora" else {}
        found[kind] = tmp_path_factory.mktemp(kind)
        write_adapter(found[kind], Adapter(modules=adapter.modules, options=adapter.options, tokens=tokens))
    return found


# ---------------------------------------------------------------------------------------------- offloaded


@pytest.fixture
def offloaded(pipe) -> StableDiffusionPipeline:
    """What `pipe.enable_sequential_cpu_offload` makes, on the CPU."""
    twin = copied(pipe)
    for part in (twin.unet, twin.text_encoder, twin.vae):
        cpu_offload(part, execution_device="cpu")
    return twin


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sequential_offload_is_as_if_it_were_not(pipe, offloaded, folders, kind, merged):
    plain = drawn(offloaded)
    with adapters.load(pipe, folders[kind], weight=0.7, merged=merged):
        wanted = drawn(pipe)
    with adapters.load(offloaded, folders[kind], weight=0.7, merged=merged):
        torch.testing.assert_close(drawn(offloaded), wanted, rtol=0, atol=1e-5)
        assert adapters.describe(offloaded) == adapters.describe(pipe)
    assert torch.equal(drawn(offloaded), plain)
    assert torch.equal(plain, drawn(pipe))


def test_release_folders_and_whole_models_go_on_an_offloaded_pipeline(pipe, offloaded, folders, tmp_path):
    card = adapters.Card(title="x", base_model="y")
    base = adapters.describe(pipe)
    lora = adapters.ship.ship(tmp_path / "lora", weights=folders["lora"], base=base, card=card)
    tuned = copy.deepcopy(pipe.unet)
    tuned.conv_out.bias.data += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    unet = adapters.ship.ship(tmp_path / "unet", weights=tmp_path / "tuned", base=base, card=card)
    before, plain = offloaded.unet, drawn(pipe)
    for folder in (lora, unet):
        with adapters.load(pipe, folder):
            wanted = drawn(pipe)
        with adapters.load(offloaded, folder):
            assert all(value.device.type == "meta" for value in offloaded.unet.conv_in.parameters())
            torch.testing.assert_close(drawn(offloaded), wanted, rtol=0, atol=1e-5)
        assert offloaded.unet is before
        assert float((wanted - plain).abs().max()) > 1e-2
        assert torch.equal(drawn(offloaded), plain)


def test_model_offload_stays(pipe, folders):
    twin, hook = copied(pipe), None
    for part in (twin.text_encoder, twin.unet, twin.vae):
        _, hook = cpu_offload_with_hook(part, "cpu", prev_module_hook=hook)
    with adapters.load(pipe, folders["lora"]):
        wanted = drawn(pipe)
    with adapters.load(twin, folders["lora"]):
        assert torch.equal(drawn(twin), wanted)
    assert torch.equal(drawn(twin), drawn(pipe))


def test_weights_on_disk_cannot_be_merged_into(pipe, folders, tmp_path):
    twin = copied(pipe)
    disk_offload(twin.unet, str(tmp_path / "disk"), execution_device="cpu")
    with adapters.load(pipe, folders["lora"]):
        wanted = drawn(pipe)
    with adapters.load(twin, folders["lora"]):
        torch.testing.assert_close(drawn(twin), wanted, rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match="offloaded to disk"):
        adapters.load(twin, folders["lora"], merged=True)
    assert torch.equal(drawn(twin), drawn(pipe))


# ---------------------------------------------------------------------------------------------- compiled


@pytest.mark.parametrize("merged", [False, True])
def test_a_compiled_pipeline_is_looked_through(pipe, folders, tmp_path, merged):
    """The wrapper holds the very U-net, whose own result is what the wrapper computes."""
    twin = copied(pipe)
    inner = {"unet": twin.unet, "text_encoder": twin.text_encoder}
    twin.unet, twin.text_encoder = (torch.compile(part, backend="eager") for part in inner.values())
    base = adapters.describe(pipe)
    card = adapters.Card(title="x", base_model="y")
    folder = adapters.ship.ship(tmp_path / "r", weights=folders["lora"], base=base, card=card)
    assert adapters.describe(twin) == base
    bits = {name: value.clone() for name, value in inner["unet"].state_dict().items()}
    seen = copied(pipe)
    seen.unet, seen.text_encoder = inner["unet"], inner["text_encoder"]
    with adapters.load(pipe, folder, merged=merged):
        wanted = drawn(pipe)
    with adapters.load(twin, folder, merged=merged):
        seen.tokenizer = twin.tokenizer
        assert torch.equal(drawn(seen), wanted)
    assert inner["unet"].state_dict().keys() == bits.keys()
    assert all(torch.equal(value, bits[name]) for name, value in inner["unet"].state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pipeline_that_was_compiled_and_run_takes_an_adapter(pipe, folders, wrapped):
    twin = copied(pipe)
    if wrapped:
        twin.unet = torch.compile(twin.unet, backend="eager")
    else:
        twin.unet.compile(backend="eager")
    plain = drawn(twin)
    for merged in (False, True):
        with adapters.load(pipe, folders["lora"], merged=merged):
            wanted = drawn(pipe)
        with adapters.load(twin, folders["lora"], merged=merged):
            torch.testing.assert_close(drawn(twin), wanted, rtol=0, atol=1e-5)
        assert torch.equal(drawn(twin), plain)


# ---------------------------------------------------------------------------------------------- the user's adapters


def state(pipe: StableDiffusionPipeline) -> dict[str, object]:
    """All that peft keeps, and the weights' bits."""
    found: dict[str, object] = {"config": sorted(getattr(pipe.unet, "peft_config", {}))}
    for name, module in pipe.unet.named_modules():
        if hasattr(module, "_active_adapter"):
            found[name] = (module._active_adapter, module._disable_adapters, list(module.merged_adapters))
            assert "merge" not in vars(module)
    flags = {name: value.requires_grad for name, value in pipe.unet.named_parameters()}
    return found | {"flags": flags}


@pytest.fixture
def theirs(pipe) -> StableDiffusionPipeline:
    """The pipeline with two LoRAs of the user's on other layers than, and on the same layers as, ours; `two` is on."""
    twin = copied(pipe)
    generator = torch.Generator().manual_seed(5)
    for name, targets in (("one", ["to_q", "to_k", "conv2"]), ("two", ["to_q", "to_v"])):
        twin.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name=name)
    for name, value in twin.unet.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.3
    twin.set_adapters("two")
    twin.unet.eval()
    return twin


def left_as_it_was(pipe: StableDiffusionPipeline, before: dict[str, object], bits: dict[str, torch.Tensor]) -> None:
    assert state(pipe) == before
    after = pipe.unet.state_dict()
    assert after.keys() == bits.keys()
    assert all(torch.equal(after[name], value) for name, value in bits.items())


def bits_of(pipe: StableDiffusionPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipe.unet.state_dict().items()}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("switch", ["two", "both", "disabled"])
def test_what_is_on_stays_on_and_what_is_off_stays_off(pipe, theirs, folders, switch, merged):
    if switch == "both":
        theirs.set_adapters(["one", "two"], [0.5, 1.0])
    elif switch == "disabled":
        theirs.disable_lora()
    before, bits, plain = state(theirs), bits_of(theirs), drawn(theirs)
    with adapters.load(theirs, folders["lora"], merged=merged):
        inside = drawn(theirs)
    left_as_it_was(theirs, before, bits)
    assert torch.equal(drawn(theirs), plain)
    if switch == "disabled":  # then ours is as it is alone
        with adapters.load(pipe, folders["lora"], merged=merged):
            torch.testing.assert_close(inside, drawn(pipe), rtol=0, atol=1e-5)
    else:  # the sum of what is on: the user's merged by hand, ours beside
        summed = copied(theirs)
        summed.fuse_lora()
        summed.unload_lora_weights()
        with adapters.load(summed, folders["lora"]):
            torch.testing.assert_close(inside, drawn(summed), rtol=0, atol=1e-4)
    assert float((inside - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("first", [0, 1])
def test_two_of_ours_beside_disabled_ones_leave_in_any_order(theirs, folders, make_adapter, tmp_path, first):
    write_adapter(tmp_path, make_adapter("lora", seed=9))
    theirs.disable_lora()
    before, bits = state(theirs), bits_of(theirs)
    both = [adapters.load(theirs, folder) for folder in (folders["lora"], tmp_path)]
    both[first].detach()
    with_one = drawn(theirs)
    both[1 - first].detach()
    left_as_it_was(theirs, before, bits)
    with adapters.load(theirs, (folders["lora"], tmp_path)[1 - first]):
        assert torch.equal(drawn(theirs), with_one)


def test_what_is_switched_meanwhile_stays_switched(theirs, folders):
    attached = adapters.load(theirs, folders["lora"])
    theirs.set_adapters(["one", attached.name])
    attached.detach()
    assert theirs.get_active_adapters() == ["one"]
    attached = adapters.load(theirs, folders["lora"])
    theirs.disable_lora()
    attached.detach()
    layer = theirs.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q
    assert layer.disable_adapters


@pytest.mark.parametrize("merged", [False, True])
def test_fused_weights_are_refused_at_entering(theirs, folders, merged):
    theirs.fuse_lora()
    before, bits = state(theirs), bits_of(theirs)
    with pytest.raises(AdapterError, match="two are fused into it"):
        adapters.load(theirs, folders["lora"], merged=merged)
    left_as_it_was(theirs, before, bits)


@pytest.mark.parametrize("merged", [False, True])
def test_a_fusing_meanwhile_leaves_the_weights_that_it_alone_makes(theirs, folders, merged):
    alone = copied(theirs)
    alone.fuse_lora(adapter_names=["two"])
    bits = bits_of(alone)
    attached = adapters.load(theirs, folders["lora"], merged=merged)
    inside = drawn(theirs)
    theirs.fuse_lora(adapter_names=["two"])
    torch.testing.assert_close(drawn(theirs), inside, rtol=0, atol=1e-4)  # ours is still in it
    attached.detach()
    assert state(theirs) == state(alone)
    assert all(torch.equal(theirs.unet.state_dict()[name], value) for name, value in bits.items())


def test_a_fusing_that_is_undone_meanwhile_leaves_the_bits(theirs, folders):
    before, bits = state(theirs), bits_of(theirs)
    with adapters.load(theirs, folders["lora"]):
        theirs.fuse_lora()
        theirs.unfuse_lora()
    assert all(torch.equal(theirs.unet.state_dict()[name], bits[name]) for name in bits if "to_q.base_layer" in name)
    assert state(theirs) == before


def test_unloading_everything_meanwhile_is_the_users_choice(theirs, folders):
    attached = adapters.load(theirs, folders["lora"])
    theirs.unload_lora_weights()
    attached.detach()
    assert not hasattr(theirs.unet, "peft_config")
    assert not [name for name in theirs.unet.state_dict() if "lora" in name]


def test_random_numbers_after_loading_are_those_without(pipe, folders):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    with adapters.load(pipe, folders["lora"]):
        assert torch.equal(torch.rand(4), wanted)


def test_a_failed_injection_leaves_the_users_state(theirs, folders, tmp_path):
    before, bits = state(theirs), bits_of(theirs)
    tensors, header = files.read_tensors(folders["lora"] / "pytorch_lora_weights.safetensors")
    extra = {"unet.conv_norm_out.lora_A.weight": torch.ones(2, 8), "unet.conv_norm_out.lora_B.weight": torch.ones(8, 2)}
    files.write_tensors(tmp_path / "x.safetensors", {**tensors, **extra}, header)
    with pytest.raises(AdapterError, match="conv_norm_out"):
        adapters.load(theirs, tmp_path / "x.safetensors")
    left_as_it_was(theirs, before, bits)

"""On and off without a trace; the same images as plain diffusers."""

from __future__ import annotations

import contextlib
import copy
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapters import base, files, loading
from adapters.errors import AdapterError, BaseMismatchError, FileError, FormatError
from adapters.keys import Adapter, to_diffusers, to_kohya, to_peft
from adapters.measuring import sample

KINDS = ["lora", "rslora", "dora", "loha", "lokr"]


def pixels(pipe) -> np.ndarray:
    shots = sample.images(pipe, ["a dog"], [1, 2], steps=2, guidance_scale=3.0)
    return np.stack([np.asarray(s.image, int) for s in shots])


def save(folder, adapter: Adapter, spelling: str):
    folder.mkdir(parents=True, exist_ok=True)
    if spelling == "peft":
        for component in adapter.components:
            place = folder if component == "unet" else folder / component
            place.mkdir(exist_ok=True)
            tensors, config = to_peft(adapter, component)
            files.write_tensors(place / "adapter_model.safetensors", tensors)
            (place / "adapter_config.json").write_text(json.dumps(config))
        return folder
    name = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "x.kohya.safetensors"}[spelling]
    tensors, header = to_diffusers(adapter) if spelling == "diffusers" else to_kohya(adapter, uniform_alpha=True)
    files.write_tensors(folder / name, tensors, header)
    return folder / name if spelling == "kohya" else folder


@pytest.mark.parametrize("kind", KINDS)
def test_attached_changes_detached_is_bit_identical(pipe, make_adapter, tmp_path, kind):
    plain = pixels(pipe)
    modules = {name: type(m) for name, m in pipe.unet.named_modules()}
    folder = save(tmp_path / kind, make_adapter(kind, text=True), "peft")
    attached = loading.load(pipe, folder)
    changed = pixels(pipe)
    attached.detach()
    attached.detach()
    assert np.abs(changed - plain).max() > 1
    assert (pixels(pipe) == plain).all()
    assert {name: type(m) for name, m in pipe.unet.named_modules()} == modules
    assert not hasattr(pipe.unet, "peft_config")
    assert not hasattr(pipe.text_encoder, "peft_config")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_merged_is_the_same_and_leaves_the_same_bits(pipe, make_adapter, tmp_path, kind, weight):
    folder = save(tmp_path / kind, make_adapter(kind, text=True), "peft")
    bits = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    known, plain = base.describe(pipe), pixels(pipe)
    with loading.load(pipe, folder, weight=weight):
        beside = pixels(pipe)
    with loading.load(pipe, folder, weight=weight, merged=True):
        assert not hasattr(pipe.unet, "peft_config")
        assert base.describe(pipe) == known
        inside = pixels(pipe)
    assert np.abs(inside - beside).max() <= 1
    assert np.abs(inside - plain).max() > 1
    assert all(torch.equal(value, bits[name]) for name, value in pipe.unet.state_dict().items())


def test_a_merge_that_fails_leaves_the_weights_as_they_were(pipe, make_adapter, tmp_path):
    adapter = make_adapter("lora")
    broken = next(iter(adapter.modules))
    shape = adapter.modules[broken].tensors["lora_B.weight"].shape
    tensors = {**adapter.modules[broken].tensors, "lora_B.weight": torch.zeros(shape[0] + 1, *shape[1:])}
    modules = {**adapter.modules, broken: replace(adapter.modules[broken], tensors=tensors)}
    folder = save(tmp_path / "broken", Adapter(modules=modules), "peft")
    bits = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(BaseMismatchError, match="changes a weight of shape"):
        loading.load(pipe, folder, merged=True)
    assert all(torch.equal(value, bits[name]) for name, value in pipe.unet.state_dict().items())


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
def test_plain_diffusers_gives_our_images(pipe, make_adapter, tmp_path, kind, spelling):
    if (kind, spelling) == ("dora", "kohya"):
        pytest.skip("diffusers drops DoRA magnitudes from kohya files; the card says so")
    source = save(tmp_path, make_adapter(kind, text=True), spelling)
    with loading.load(pipe, source):
        ours = pixels(pipe)
    pipe.load_lora_weights(str(source))
    theirs = pixels(pipe)
    pipe.unload_lora_weights()
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - pixels(pipe)).max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_all_spellings_give_the_same_images(pipe, make_adapter, tmp_path, kind):
    adapter = make_adapter(kind, text=True)
    spellings = ["peft", "kohya"] + (["diffusers"] if kind not in ("loha", "lokr") else [])
    results = []
    for spelling in spellings:
        with loading.load(pipe, save(tmp_path / spelling, adapter, spelling)):
            results.append(pixels(pipe))
    assert all(np.abs(r - results[0]).max() <= 1 for r in results)


def test_weight_zero_is_the_base_and_weight_scales(pipe, make_adapter, tmp_path):
    folder, plain = save(tmp_path, make_adapter("lora"), "diffusers"), pixels(pipe)
    with loading.load(pipe, folder, weight=0.0):
        assert (pixels(pipe) == plain).all()
    gaps = []
    for weight in (0.1, 1.0):
        with loading.load(pipe, folder, weight=weight):
            gaps.append(np.abs(pixels(pipe) - plain).mean())
    assert 0 < gaps[0] < gaps[1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_adapters_detach_in_any_order(pipe, make_adapter, tmp_path, order):
    plain = pixels(pipe)
    folders = [save(tmp_path / str(i), make_adapter("lora", seed=i), "diffusers") for i in range(2)]
    alone = []
    for folder in folders:
        with loading.load(pipe, folder):
            alone.append(pixels(pipe))
    both = [loading.load(pipe, folder, weight=w) for folder, w in zip(folders, (1.0, 0.5), strict=True)]
    assert np.abs(pixels(pipe) - alone[0]).max() > 1
    both[order[0]].detach()
    left = pixels(pipe)
    if order[0] == 1:
        assert (left == alone[0]).all()
    both[order[1]].detach()
    assert (pixels(pipe) == plain).all()


def test_kinds_do_not_stack_on_one_layer(pipe, make_adapter, tmp_path):
    lora = save(tmp_path / "lora", make_adapter("lora"), "peft")
    loha = save(tmp_path / "loha", make_adapter("loha"), "peft")
    with loading.load(pipe, lora), pytest.raises(AdapterError, match="another kind"):
        loading.load(pipe, loha)


def test_training_flags_and_mode_come_back(pipe, make_adapter, tmp_path):
    flags = [p.requires_grad for p in pipe.unet.parameters()]
    with loading.load(pipe, save(tmp_path, make_adapter("lora"), "diffusers")):
        assert not any(p.requires_grad for n, p in pipe.unet.named_parameters() if "lora_" in n)
    assert [p.requires_grad for p in pipe.unet.parameters()] == flags


def shipped(folder, adapter, pipe, **extra):
    save(folder, adapter, "diffusers")
    for name, content in extra.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    files.write_manifest(folder, {"kind": "lora", "base": base.describe(pipe)})
    return folder


def test_shipped_guidance_is_handed_to_the_callable(pipe, make_adapter, tmp_path):
    settings, events = {"method": "scfg", "scale": 5.0}, []
    folder = shipped(tmp_path / "a", make_adapter("lora"), pipe, guider_config=settings)

    @contextlib.contextmanager
    def guidance(config):
        events.append(config)
        yield "run"
        events.append("left")

    attached = loading.load(pipe, folder, guidance=guidance)
    assert events == [settings]
    assert attached.run == "run"
    attached.detach()
    assert events == [settings, "left"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loading.load(pipe, folder).detach()
    assert [("guidance=" in str(w.message)) for w in caught if "ships the guidance" in str(w.message)] == [True]


def test_other_weights_warn_other_architecture_fails(pipe, make_adapter, tmp_path):
    folder = shipped(tmp_path / "a", make_adapter("lora"), pipe)
    bias = pipe.unet.conv_out.bias
    kept = bias.data.clone()
    bias.data += 1
    with pytest.warns(UserWarning, match="other weights"):
        loading.load(pipe, folder).detach()
    bias.data = kept
    layer, pipe.unet.conv_out = pipe.unet.conv_out, torch.nn.Conv2d(8, 5, 3)
    with pytest.raises(BaseMismatchError, match="architecture"):
        loading.load(pipe, folder)
    pipe.unet.conv_out = layer


def test_base_identity_ignores_attached_adapters_and_half_precision(pipe, make_adapter, tmp_path):
    before = base.describe(pipe)
    with loading.load(pipe, save(tmp_path, make_adapter("lora", text=True), "diffusers")):
        assert base.describe(pipe) == before
    half = copy.copy(pipe)
    half.unet, half.text_encoder = copy.deepcopy(pipe.unet).half(), copy.deepcopy(pipe.text_encoder).half()
    assert base.describe(half) == before


def test_altered_files_are_refused(pipe, make_adapter, tmp_path):
    folder = shipped(tmp_path / "a", make_adapter("lora"), pipe)
    weights = folder / "pytorch_lora_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(FileError, match="not the file the manifest"):
        loading.load(pipe, folder)


def test_failed_load_leaves_no_trace(pipe, make_adapter, tmp_path):
    plain, adapter = pixels(pipe), make_adapter("lora")
    name = next(iter(adapter.modules))
    wrong = dict(adapter.modules) | {"unet.nowhere.to_q": adapter.modules[name]}
    with pytest.raises(BaseMismatchError, match="no such layer"):
        loading.load(pipe, save(tmp_path, Adapter(modules=wrong), "peft"))
    assert (pixels(pipe) == plain).all()
    with pytest.raises(FileError, match="Hub id"):
        loading.load(pipe, tmp_path / "missing" / "deeper")
    with pytest.raises(AdapterError, match="weight=nan"):
        loading.load(pipe, tmp_path, weight=float("nan"))


def test_wrong_shape_is_named(pipe, make_adapter, tmp_path):
    adapter = make_adapter("lora")
    name = next(n for n in adapter.modules if n.endswith("to_k"))
    module = adapter.modules[name]
    tensors = {**module.tensors, "lora_A.weight": module.tensors["lora_A.weight"][:, :3]}
    bad = Adapter(modules={name: type(module)(kind="lora", tensors=tensors, rank=4, alpha=4.0)})
    with pytest.raises(BaseMismatchError, match="to_k"):
        loading.load(pipe, save(tmp_path, bad, "diffusers"))


def test_not_representable_is_refused_by_name(pipe, make_adapter, tmp_path):
    tensors, header = to_kohya(make_adapter("lora"))
    first = next(k for k in tensors if k.endswith("lora_down.weight")).split(".")[0]
    tensors[f"{first}.emb_params"] = torch.zeros(1, 8)
    files.write_tensors(tmp_path / "x.safetensors", tensors, header)
    with pytest.raises(FormatError, match=r"emb_params.*embedding without its token"):
        loading.load(pipe, tmp_path / "x.safetensors")


def test_learned_tokens_come_and_go(pipe, tmp_path):
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    plain = pixels(pipe)
    files.write_tensors(tmp_path / "learned_embeds.safetensors", {"<mug>": torch.full((1, 16), 3.0)})
    files.write_manifest(tmp_path, {"kind": "lora", "base": base.describe(pipe)})
    with loading.load(pipe, tmp_path):
        assert pipe.tokenizer.tokenize("<mug>") == ["<mug>"]
        index = pipe.tokenizer.convert_tokens_to_ids("<mug>")
        assert (pipe.text_encoder.get_input_embeddings().weight[index] == 3).all()
    assert pipe.tokenizer is tokenizer
    assert pipe.text_encoder.get_input_embeddings() is table
    assert (pixels(pipe) == plain).all()


@pytest.mark.parametrize(
    "tokens",
    [{"": 1}, {"<mug>": 1, "<MUG>": 1}, {"<mug>": 2, "<mug>_1": 1}, {"e\u0301": 1, "\u00e9": 1}],
    ids=["empty", "case", "name of a second vector", "spelling"],
)
def test_tokens_that_a_prompt_cannot_tell_apart_are_refused(tokens, pipe, tmp_path):
    """An empty one would have changed the row of the end of text."""
    vectors = {token: torch.full((count, 16), 3.0) for token, count in tokens.items()}
    files.write_tensors(tmp_path / "learned_embeds.safetensors", vectors)
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    with pytest.raises(AdapterError, match="is not read as one word of its own"):
        loading.load(pipe, tmp_path)
    assert pipe.tokenizer is tokenizer
    assert pipe.text_encoder.get_input_embeddings() is table


@pytest.mark.parametrize(
    "vector",
    [
        *(torch.tensor(1.0), torch.zeros(0, 16), torch.zeros(1, 0), torch.ones(1, 1, 16)),
        *(torch.ones(1, 16).to(torch.int32), torch.full((1, 16), torch.nan), torch.ones(1, 16).to(torch.float8_e4m3fn)),
    ],
    ids=["0-d", "no vector", "no width", "3-d", "integers", "NaN", "float8"],
)
def test_embeddings_that_are_no_vectors_are_refused(vector, pipe, tmp_path):
    files.write_tensors(tmp_path / "learned_embeds.safetensors", {"<mug>": vector})
    with pytest.raises(FormatError, match=r"learned_embeds.safetensors: <mug>: .*expected finite vectors"):
        loading.load(pipe, tmp_path)


def test_a_token_that_is_known_already_is_refused(pipe, tmp_path):
    word = next(iter(pipe.tokenizer.get_vocab()))
    files.write_tensors(tmp_path / "learned_embeds.safetensors", {word: torch.ones(1, 16)})
    with pytest.raises(AdapterError, match="is in the tokenizer's vocabulary already"):
        loading.load(pipe, tmp_path)

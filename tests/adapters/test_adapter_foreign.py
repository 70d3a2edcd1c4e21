"""Files as other programs write them: what can be understood means the same as peft's own, the rest says why not."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import adapters
from adapters import files, keys, names, source, whole
from adapters.__main__ import main
from adapters.errors import AdapterError, FileError, FormatError
from adapters.writing import write_adapter, write_kohya, write_peft
from tests import tiny_bases
from tests.adapters.test_adapter_keys import assert_same


def filled(net: torch.nn.Module, config: object, seed: int = 0) -> PeftModel:
    """A peft model on a copy of `net`, with random weights."""
    model = get_peft_model(copy.deepcopy(net), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.eval()


def predicted(net: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 16, generator=generator)
    with torch.no_grad():
        return net(latents, 10, text)[0]  # type: ignore[no-any-return]


def state_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def kohya(state: dict[str, torch.Tensor], alpha: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    made = {}
    for name, value in state.items():
        module, end = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        flat = f"lora_unet_{module.replace('.', '_')}"
        made[f"{flat}.lora_{'down' if end[0] == 'A' else 'up'}.weight"] = value
        if alpha is not None:
            made[f"{flat}.alpha"] = alpha
    return made


VARIANTS = {
    "bare peft": lambda key: key,
    "unet before peft's prefix": lambda key: f"unet.{key}",
    "peft's prefix before unet": lambda key: key.replace("base_model.model.", "base_model.model.unet."),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "ComfyUI's prefix": lambda key: key.replace("base_model.model.", "diffusion_model."),
    "kohya's parameters": lambda key: (
        key.replace("base_model.model.", "unet.").replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    ),
}


@pytest.fixture(scope="module")
def lora(_pipe) -> PeftModel:
    return filled(_pipe.unet, LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_spell_a_key_is_the_same_adapter(lora, variant):
    state = state_of(lora)
    again = keys.from_any({VARIANTS[variant](name): value for name, value in state.items()})
    assert_same(keys.from_any(state), again)


def test_the_original_blocks_names_with_dots_are_understood():
    pair = {"lora_A.weight": torch.ones(2, 6), "lora_B.weight": torch.ones(5, 2)}
    sgm = {f"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.{k}": t for k, t in pair.items()}
    assert list(keys.from_any(sgm).modules) == ["unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float32])
def test_alphas_and_counters_of_any_dtype(lora, dtype):
    tensors = {**kohya(state_of(lora), torch.tensor(2, dtype=dtype)), "step": torch.tensor(100)}
    assert {module.alpha for module in keys.from_any(tensors).modules.values()} == {2.0}


def test_two_adapters_in_one_file_are_refused(lora):
    state = state_of(lora)
    both = {k.replace(".weight", f".{name}.weight"): v for k, v in state.items() for name in ("cat", "dog")}
    with pytest.raises(FormatError, match="2 adapters \\(cat, dog\\)"):
        keys.from_any(both)


def test_bundled_embeddings_become_tokens(pipe, lora, tmp_path):
    rows = torch.arange(32.0).reshape(2, 16)
    files.write_tensors(tmp_path / "x.safetensors", {**kohya(state_of(lora)), "bundle_emb.<rex>.clip_l": rows})
    tokenizer, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    with adapters.load(pipe, tmp_path / "x.safetensors"):
        ids = pipe.tokenizer.convert_tokens_to_ids(["<rex>", "<rex>_1"])
        assert torch.equal(pipe.text_encoder.get_input_embeddings().weight[ids], rows)
        assert pipe.maybe_convert_prompt("a <rex>", pipe.tokenizer) == "a <rex> <rex>_1"
        torch.testing.assert_close(predicted(pipe.unet), predicted(lora), rtol=0, atol=1e-5)
        with pytest.raises(AdapterError, match="'<rex>' is in the tokenizer's vocabulary already"):
            adapters.load(pipe, tmp_path / "x.safetensors")
    assert pipe.tokenizer is tokenizer
    assert pipe.text_encoder.get_input_embeddings() is table
    folder = adapters.ship.ship(
        tmp_path / "release",
        weights=tmp_path / "x.safetensors",
        base=adapters.describe(pipe),
        card=adapters.Card(title="x", base_model="y"),
    )
    again = source.read_adapter(source.open_source(folder))
    assert torch.equal(again.tokens["<rex>"]["text_encoder"], rows)


def test_tokens_of_two_encoders_say_which_they_are(tmp_path, lora):
    tokens = {
        "<a>": {"text_encoder": torch.ones(2, 16), "text_encoder_2": torch.ones(2, 8)},
        "<b>": {"text_encoder": torch.zeros(1, 16), "text_encoder_2": torch.zeros(1, 8)},
    }
    write_adapter(tmp_path, keys.Adapter(modules=keys.from_any(state_of(lora)).modules, tokens=tokens))
    again = source.read_adapter(source.open_source(tmp_path)).tokens
    assert {t: {c: r.tolist() for c, r in own.items()} for t, own in again.items()} == {
        t: {c: r.tolist() for c, r in own.items()} for t, own in tokens.items()
    }
    tensors, _ = files.read_tensors(tmp_path / "learned_embeds.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {"clip_l": (3, 16), "clip_g": (3, 8)}
    files.write_tensors(tmp_path / "learned_embeds.safetensors", tensors)
    with pytest.raises(FormatError, match="does not say which tokens"):
        source.read_adapter(source.open_source(tmp_path))


# ---------------------------------------------------------------------------------------------- peft's patterns

PATTERNS = {
    "name": {"alpha_pattern": {"to_v": 32}, "rank_pattern": {"to_v": 2}},
    "anything between": {"alpha_pattern": {r".*attn2.*to_v": 64}},
    "alternatives": {"alpha_pattern": {r"(to_q|to_v)": 32}},
    "escaped": {"alpha_pattern": {r"attn2\.to_v": 64}},
    "digits": {"alpha_pattern": {r"down_blocks\.\d+\.attentions\.\d+\..*to_q": 64}},
    "anchored": {"alpha_pattern": {r"^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 64}},
    "anchored, nothing": {"alpha_pattern": {r"^to_q": 64}},
    "rank": {"rank_pattern": {r".*attn2.*": 8}, "alpha_pattern": {r".*attn2.*": 8}},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_are_pefts_expressions(pipe, tmp_path, case):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], **PATTERNS[case])  # type: ignore[arg-type]
    model = filled(pipe.unet, config)
    model.save_pretrained(tmp_path)
    with adapters.load(pipe, tmp_path):
        torch.testing.assert_close(predicted(pipe.unet), predicted(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", ".*.*.*.*.*x", "(", "x" * 600])
def test_a_strangers_expression_cannot_keep_us_busy(lora, pattern):
    tensors = {name.replace("base_model.model", "unet"): value for name, value in state_of(lora).items()}
    header = {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {pattern: 3}})}
    with pytest.raises(FormatError, match="the pattern"):
        keys.from_any(tensors, header)


def test_a_config_beside_a_kohya_file_does_not_count_twice(pipe, tmp_path):
    """A release has both: alpha times the root of the rank in the file, `use_rslora` in the config for peft's keys."""
    model = filled(pipe.unet, LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q", "to_v"]))
    model.save_pretrained(tmp_path)
    adapter = source.read_adapter(source.open_source(tmp_path))
    write_kohya(tmp_path / "x.kohya.safetensors", adapter)
    again = source.read_adapter(source.open_source(tmp_path / "x.kohya.safetensors"))
    assert_same(adapter, again)
    with adapters.load(pipe, tmp_path / "x.kohya.safetensors"):
        torch.testing.assert_close(predicted(pipe.unet), predicted(model), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- LoKr


@pytest.mark.parametrize("factor", [-1, 2, 4])
@pytest.mark.parametrize("core", [False, True])
def test_lokr_of_convolutions(pipe, tmp_path, factor, core):
    """With and without a Tucker core; the factor is stated by peft's config and guessed from kohya's keys."""
    targets = ["to_q", "conv1", "conv2", "conv_shortcut", "proj_in"]
    config = LoKrConfig(r=1, alpha=2, target_modules=targets, decompose_factor=factor, use_effective_conv2d=core)
    model = filled(pipe.unet, config)
    model.save_pretrained(tmp_path / "peft")
    adapter = source.read_adapter(source.open_source(tmp_path / "peft"))
    write_kohya(tmp_path / "kohya.safetensors", adapter)
    bare = source.read_adapter(source.open_source(tmp_path / "kohya.safetensors"))
    assert not bare.options
    write_peft(tmp_path / "again", bare)
    for folder in ("peft", "kohya.safetensors", "again"):
        with adapters.load(pipe, tmp_path / folder):
            torch.testing.assert_close(predicted(pipe.unet), predicted(model), rtol=0, atol=1e-4)
    again = PeftModel.from_pretrained(copy.deepcopy(pipe.unet), tmp_path / "again").eval()
    torch.testing.assert_close(predicted(again), predicted(model), rtol=0, atol=1e-4)


def test_lokr_that_no_factor_gives_is_loaded_but_has_no_peft_folder(pipe, tmp_path):
    """(2, 4) x (4, 2) of one layer and (4, 2) x (2, 4) of another."""
    place = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    tensors = {}
    for name, (a, b) in {"to_q": ((2, 4), (4, 2)), "to_k": ((4, 2), (2, 4))}.items():
        tensors |= {f"{place}_{name}.lokr_w1": torch.randn(a), f"{place}_{name}.lokr_w2": torch.randn(b)}
    files.write_tensors(tmp_path / "x.safetensors", tensors)
    adapter = source.read_adapter(source.open_source(tmp_path / "x.safetensors"))
    with pytest.raises(FormatError, match="no single decompose_factor"):
        keys.to_peft(adapter)
    plain = predicted(pipe.unet)
    with adapters.load(pipe, tmp_path / "x.safetensors"):
        beside = predicted(pipe.unet)
    with adapters.load(pipe, tmp_path / "x.safetensors", merged=True):
        torch.testing.assert_close(predicted(pipe.unet), beside, rtol=0, atol=1e-4)
    assert float((beside - plain).abs().max()) > 1e-3
    card = adapters.Card(title="x", base_model="y")
    folder = adapters.ship.ship(tmp_path / "r", weights=adapter, base=adapters.describe(pipe), card=card)
    assert "There is no peft folder" in (folder / "README.md").read_text()
    with adapters.load(pipe, folder):
        assert torch.equal(predicted(pipe.unet), beside)


def test_a_tucker_core_of_a_lora_is_folded_in(pipe, tmp_path):
    flat, generator = "lora_unet_down_blocks_0_resnets_0_conv1", torch.Generator().manual_seed(0)
    mid, down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 3, 3, 3), (3, 8, 1, 1), (8, 4, 1, 1)))
    tensors = {f"{flat}.lora_mid.weight": mid, f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
    files.write_tensors(tmp_path / "x.safetensors", {**tensors, f"{flat}.alpha": torch.tensor(2.0)})
    layer = pipe.unet.down_blocks[0].resnets[0].conv1
    before = layer.weight.detach().clone()
    wanted = torch.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0]) * 2 / 4
    with adapters.load(pipe, tmp_path / "x.safetensors", merged=True):
        torch.testing.assert_close(layer.weight.detach() - before, wanted, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- SDXL in kohya's keys

SDXL = {
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks_4_1_transformer_blocks_1_attn2_to_k",
    "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block_1_transformer_blocks_9_ff_net_0_proj",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
    "up_blocks.2.resnets.2.conv2": "output_blocks_8_0_out_layers_3",
    "add_embedding.linear_1": "label_emb_0_0",
    "time_embedding.linear_2": "time_embed_2",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}


def small(paths: list[str]) -> keys.Adapter:
    tensors = {"lora_A.weight": torch.randn(2, 6), "lora_B.weight": torch.randn(5, 2)}
    return keys.Adapter(modules={p: keys.Module(kind="lora", tensors=tensors, rank=2, alpha=3.0) for p in paths})


def test_sdxl_has_the_original_names_and_its_fields():
    encoders = ["text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.text_projection"]
    adapter = small([*(f"unet.{path}" for path in SDXL), *encoders])
    tensors, header = keys.to_kohya(adapter)
    flats = {name.split(".")[0] for name in tensors}
    assert flats == {f"lora_unet_{flat}" for flat in SDXL.values()} | {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_projection",
    }
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert_same(adapter, keys.from_any(tensors, header))


KEY = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
READS = {  # kind -> a module whose layer has so many inputs
    "lora": lambda width: {"lora_A.weight": torch.ones(2, width), "lora_B.weight": torch.ones(5, 2)},
    "loha": lambda width: {
        **{f"hada_w{side}_a": torch.ones(5, 2) for side in (1, 2)},
        **{f"hada_w{side}_b": torch.ones(2, width) for side in (1, 2)},
    },
    "lokr": lambda width: {"lokr_w1": torch.ones(1, 4), "lokr_w2": torch.ones(5, width // 4)},
}


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize(
    ("width", "fields"),
    [
        (768, {"modelspec.architecture": "stable-diffusion-v1/lora"}),
        (1024, {"ss_v2": "True"}),
        (2048, {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}),
        (128, {}),
    ],
)
def test_the_header_tells_the_base_for_every_kind(kind, width, fields):
    """A1111 takes SD-2 from `ss_v2`, Forge SD-1 from `modelspec.architecture`; both hide what is of another base."""
    module = keys.Module(kind=kind, tensors=READS[kind](width), rank=2, alpha=2.0)
    _, header = keys.to_kohya(keys.Adapter(modules={KEY: module}))
    assert header.items() >= fields.items()
    assert fields or not {"ss_v2", "modelspec.architecture", "ss_base_model_version"} & header.keys()


def test_sd1_keeps_its_names_and_says_nothing_of_sdxl():
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"  # a layer that both have
    assert not names.fits_sdxl("down_blocks.0.attentions.0.proj_in")
    for told, flat in ((None, path.replace(".", "_")), (True, "input_blocks_4_1_transformer_blocks_0_attn1_to_q")):
        tensors, header = keys.to_kohya(small([f"unet.{path}"]), sdxl=told)
        assert f"lora_unet_{flat}.alpha" in tensors
        assert ("ss_base_model_version" in header) == (told is True)


def test_convert_writes_the_file_that_ships(pipe, make_adapter, tmp_path):
    model = filled(pipe.unet, LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], alpha_pattern={"to_v": 9}))
    model.save_pretrained(tmp_path / "peft")
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "x.safetensors"), "--to", "kohya"]) == 0
    card = adapters.Card(title="x", base_model="y")
    folder = adapters.ship.ship(
        tmp_path / "r", weights=tmp_path / "peft", base=adapters.describe(pipe), card=card, name="x"
    )
    assert (folder / "x.kohya.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    pipe.load_lora_weights(str(tmp_path / "x.safetensors"))
    theirs = predicted(pipe.unet)
    pipe.unload_lora_weights()
    torch.testing.assert_close(theirs, predicted(model), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- text encoders, paths


def test_both_text_encoders_load_through_peft_itself(tmp_path):
    """In one transformers the layers lie in `text_model`, in another not; nothing may be left out with a warning."""
    words = tiny_bases.tokenizer(12)
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for component, kind in classes.items():
        encoder = kind(tiny_bases.text_config(words, 16)).eval()
        targets = ["q_proj", "fc1", *(["text_projection"] if component == "text_encoder_2" else [])]
        model = filled(encoder, LoraConfig(r=2, lora_alpha=3, target_modules=targets))
        state = {f"base_model.model.{k.removeprefix('base_model.model.')}": v for k, v in state_of(model).items()}
        config = {"lora_alpha": 3, "r": 2}
        write_peft(tmp_path, keys.from_any(state, config=config, component=component))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            again = PeftModel.from_pretrained(copy.deepcopy(encoder), tmp_path / component).eval()
        ids = torch.arange(8)[None]
        torch.testing.assert_close(again(ids)[0], model(ids)[0])
        tensors, _ = files.read_tensors(tmp_path / component / "adapter_model.safetensors")
        written = json.loads((tmp_path / component / "adapter_config.json").read_text())
        assert_same(
            keys.from_any(state, config=config, component=component),
            keys.from_any(tensors, config=written, component=component),
        )


def test_a_base_takes_adapters_of_text_encoders_from_the_command_line(pipe, make_adapter, tmp_path):
    pipe.save_pretrained(tmp_path / "base")
    adapter = make_adapter("lora", text=True)
    (tmp_path / "lora").mkdir()
    write_adapter(tmp_path / "lora", adapter)
    out = tmp_path / "out"
    assert main(["merge", f"{tmp_path / 'lora'}=0.5", "--base", str(tmp_path / "base"), "--out", str(out)]) == 0
    merged = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    ids = torch.arange(8)[None]
    with adapters.load(pipe, tmp_path / "lora", weight=0.5):
        torch.testing.assert_close(predicted(merged.unet), predicted(pipe.unet), rtol=0, atol=1e-4)
        torch.testing.assert_close(merged.text_encoder(ids)[0], pipe.text_encoder(ids)[0], rtol=0, atol=1e-4)


def test_folders_with_signs_of_a_shell_are_plain_names(pipe, make_adapter, tmp_path):
    card = adapters.Card(title="x", base_model="y")
    folder = tmp_path / "my rex [2] {x} * #1"
    for _ in range(2):  # the second replaces the first, and leaves nothing beside it
        adapters.ship.ship(folder, weights=make_adapter("lora"), base=adapters.describe(pipe), card=card)
    (tmp_path / f".{folder.name}.new-{whole._HOST}-999999-x").mkdir()  # left by a process that is gone
    adapters.load(pipe, folder).detach()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_a_file_that_is_not_there_is_no_hub_id(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"models/rex\.safetensors: no such file"):
        source.open_source("models/rex.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rex").mkdir()
    assert source.open_source("~/rex").path == tmp_path / "rex"

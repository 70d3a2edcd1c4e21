"""peft <-> diffusers <-> kohya: exact round trips over random ranks, alphas and module sets; quirks of real files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import keys, names
from adapters.errors import FormatError
from adapters.keys import Adapter, Module

UNET = [
    "unet.conv_in",
    "unet.conv_out",
    "unet.time_embedding.linear_1",
    "unet.add_embedding.linear_2",
    "unet.down_blocks.0.resnets.1.conv1",
    "unet.down_blocks.1.resnets.0.conv_shortcut",
    "unet.down_blocks.0.resnets.0.time_emb_proj",
    "unet.down_blocks.1.attentions.1.proj_in",
    "unet.down_blocks.2.downsamplers.0.conv",
    "unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q",
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0",
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2",
    "unet.up_blocks.1.upsamplers.0.conv",
]
TEXT = [
    "text_encoder.encoder.layers.11.self_attn.q_proj",
    "text_encoder.encoder.layers.0.self_attn.out_proj",
    "text_encoder.encoder.layers.0.mlp.fc1",
    "text_encoder_2.encoder.layers.31.mlp.fc2",
    "text_encoder_2.text_projection",
]
IS_CONV = {name: any(w in name for w in ("conv", "proj_in")) for name in UNET + TEXT}
alphas = st.one_of(st.integers(1, 64).map(float), st.floats(0.01, 100))


@st.composite
def loras(draw, dora=None) -> Adapter:
    chosen = draw(st.lists(st.sampled_from(UNET + TEXT), min_size=1, unique=True))
    rslora = draw(st.booleans())
    dora = draw(st.booleans()) if dora is None else dora
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 1000)))
    modules = {}
    for name in chosen:
        rank, kernel = draw(st.integers(1, 9)), (3, 3) if IS_CONV[name] else ()
        one = (1, 1) if kernel else ()
        tensors = {
            "lora_A.weight": torch.randn(rank, 6, *kernel).to(dtype),
            "lora_B.weight": torch.randn(5, rank, *one).to(dtype),
        }
        if dora:
            tensors["lora_magnitude_vector"] = torch.rand(5).to(dtype).reshape((1, 5, 1, 1) if kernel else (5,))
        modules[name] = Module(kind="lora", tensors=tensors, rank=rank, alpha=draw(alphas), rslora=rslora)
    return Adapter(modules=modules)


def assert_same(a: Adapter, b: Adapter) -> None:
    assert a.modules.keys() == b.modules.keys()
    for name, module in a.modules.items():
        other = b.modules[name]
        assert (module.kind, module.rank, module.alpha, module.rslora) == (
            other.kind,
            other.rank,
            other.alpha,
            other.rslora,
        )
        assert module.tensors.keys() == other.tensors.keys()
        assert all(
            torch.equal(t, other.tensors[k]) and t.dtype == other.tensors[k].dtype for k, t in module.tensors.items()
        )


@settings(deadline=None, max_examples=60)
@given(loras())
def test_lora_and_dora_round_trips_are_exact(adapter):
    assert_same(adapter, keys.from_any(*keys.to_kohya(adapter)))
    assert_same(adapter, keys.from_any(*keys.to_diffusers(adapter)))
    through = keys.from_any(*keys.to_diffusers(keys.from_any(*keys.to_kohya(adapter))))
    assert_same(adapter, through)
    parts = {}
    for component in adapter.components:
        tensors, config = keys.to_peft(adapter, component)
        parts |= keys.from_any(tensors, config=json.loads(json.dumps(config)), component=component).modules
    assert_same(adapter, Adapter(modules=parts))


@settings(deadline=None, max_examples=40)
@given(loras(dora=False))
def test_foreign_kohya_files_without_our_header_keep_the_scale(adapter):
    tensors, _ = keys.to_kohya(adapter)
    again = keys.from_any(tensors)
    alphas = {names.module_name(k.split(".")[0]): float(t) for k, t in tensors.items() if k.endswith(".alpha")}
    for name, module in adapter.modules.items():
        assert math.isclose(again.modules[name].scale, module.scale, rel_tol=1e-6)
        assert math.isclose(alphas[name], module.scale * module.rank, rel_tol=1e-6)


@settings(deadline=None, max_examples=40)
@given(loras(dora=False))
def test_uniform_alpha_changes_no_product(adapter):
    adapter = Adapter(
        modules={
            n: Module(kind="lora", tensors={k: t.double() for k, t in m.tensors.items()}, rank=m.rank, alpha=m.alpha)
            for n, m in adapter.modules.items()
        }
    )
    tensors, header = keys.to_kohya(adapter, uniform_alpha=True)
    again = keys.from_any(tensors, header)
    assert len({float(t) for k, t in tensors.items() if k.endswith(".alpha")}) == 1
    for name, m in adapter.modules.items():
        o = again.modules[name]
        ours, theirs = (x.tensors["lora_B.weight"].flatten(1) * x.scale for x in (m, o))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_what_peft_trained_round_trips(make_adapter, kind):
    adapter = make_adapter(kind, text=True)
    again = keys.from_any(*keys.to_kohya(adapter))
    if kind != "lokr":
        assert_same(adapter, again)
    for name, module in adapter.modules.items():
        assert math.isclose(
            again.modules[name].scale * scale_in_w1(again, name),
            module.scale * scale_in_w1(adapter, name),
            rel_tol=1e-6,
        )


def scale_in_w1(adapter, name):
    """LoKr's format has no alpha where both factors are full: the scale then sits in the first factor."""
    parts = adapter.modules[name].tensors
    return float(parts["lokr_w1"].norm()) if "lokr_w1" in parts and "lokr_w2" in parts else 1.0


@given(st.sampled_from(UNET + TEXT), st.booleans(), st.booleans())
def test_names_round_trip(name, sdxl, sgm):
    sdxl = sdxl or name.startswith("text_encoder_2")
    sgm = sgm and names.fits_sdxl(name.removeprefix("unet."))
    assert names.module_name(names.kohya_name(name, sdxl=sdxl, sgm=sgm)) == name


@pytest.mark.parametrize(
    ("flat", "name"),
    [
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_out_0",
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0",
        ),
        ("lora_unet_input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("lora_unet_input_blocks_4_0_skip_connection", "down_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("lora_unet_output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("lora_unet_label_emb_0_0", "add_embedding.linear_1"),
        ("lora_unet_time_embed_2", "time_embedding.linear_2"),
        ("lora_unet_out_2", "conv_out"),
        ("lycoris_down_blocks_0_resnets_0_conv2", "down_blocks.0.resnets.0.conv2"),
    ],
)
def test_sgm_and_lycoris_names(flat, name):
    assert names.module_name(flat) == "unet." + name


@pytest.mark.parametrize(
    "flat", ["lora_unet_", "lora_unet_norm9", "lora_unet_to_qq", "lora_unet_conv_in_", "lora_transformer_x", "x"]
)
def test_unknown_names_are_refused(flat):
    with pytest.raises(FormatError):
        names.module_name(flat)


def test_sgm_names_agree_with_diffusers():
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as convert
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers as remap

    flats = [
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k",
        "middle_block_1_proj_out",
        "output_blocks_3_1_transformer_blocks_1_ff_net_2",
    ]
    state = {}
    for flat in flats:
        state[f"lora_unet_{flat}.lora_down.weight"] = torch.ones(1, 1)
        state[f"lora_unet_{flat}.lora_up.weight"] = torch.ones(1, 1)
    theirs, _ = convert(remap(dict(state), SimpleNamespace(layers_per_block=2)))
    ours = keys.from_any(state)
    assert ours.modules.keys() == keys.from_any(theirs).modules.keys()


def test_quirks_of_real_files():
    pair = {"lora_down.weight": torch.randn(4, 6).half(), "lora_up.weight": torch.randn(5, 4).half()}
    for prefix, component in {
        "lora_te1_": "text_encoder",
        "lora_te_": "text_encoder",
        "lora_te2_": "text_encoder_2",
    }.items():
        name = prefix + "text_model_encoder_layers_0_mlp_fc1"
        adapter = keys.from_any({f"{name}.{k}": t for k, t in pair.items()})
        module = adapter.modules[f"{component}.encoder.layers.0.mlp.fc1"]
        assert module.alpha == module.rank == 4  # no alpha means scale 1
        assert module.tensors["lora_A.weight"].dtype == torch.float16
    old = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.down.weight": torch.randn(4, 6),
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight": torch.randn(6, 4),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.down.weight": torch.randn(4, 6),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora.up.weight": torch.randn(6, 4),
    }
    assert set(keys.from_any(old).modules) == {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
        "text_encoder.encoder.layers.0.self_attn.q_proj",
    }


GOOD = {
    "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
    "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet_conv_in.lora_mid.weight": torch.ones(2, 3, 3, 3)}, "lora_mid"),
        ({"lora_unet_conv_out.emb_params": torch.ones(1, 8)}, "embedding without its token"),
        ({"bundle_emb.<rex>.clip_l_out": torch.ones(1, 8)}, "before the text encoder"),
        ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 8)}, "transformer"),
        ({"lora_unet_conv_in.alpha": torch.ones(3)}, "one number"),
        ({"lora_unet_conv_out.alpha": torch.ones(())}, "no weights"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(8, 3, 1, 1)}, "do not fit"),
        ({"lora_unet_conv_in.lora_up.weight": torch.full((8, 2, 1, 1), math.nan)}, "NaN"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1, dtype=torch.int64)}, "int64"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(8, 2)}, "mixes"),
        ({"lora_unet_conv_out.lora_down.weight": torch.ones(2, 4)}, "lacks lora_B"),
        ({"something.else": torch.ones(2)}, "none of peft"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(change, message):
    assert keys.from_any(GOOD).modules
    with pytest.raises(FormatError, match=message):
        keys.from_any({**GOOD, **change})


@pytest.mark.parametrize(
    "header",
    ["[1]", "{", '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": -1}', '{"unet.alpha_pattern": {"conv_in": true}}'],
)
def test_headers_of_strangers(header):
    tensors = {
        "unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3),
        "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1),
    }
    with pytest.raises(FormatError):
        keys.from_any(tensors, {"lora_adapter_metadata": header})


def test_mixed_plain_and_dora_cannot_be_spelt_in_peft(make_adapter):
    plain, dora = make_adapter("lora"), make_adapter("dora")
    first, *rest = plain.modules
    mixed = Adapter(modules={first: plain.modules[first], **{n: dora.modules[n] for n in rest}})
    with pytest.raises(FormatError, match="unet mixes dora and lora: there is no layer in peft"):
        keys.to_peft(mixed)


def test_lycoris_kinds_have_no_diffusers_spelling(make_adapter):
    with pytest.raises(FormatError, match="to_lora"):
        keys.to_diffusers(make_adapter("loha"))

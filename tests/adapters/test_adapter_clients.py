"""Our files in LyCORIS' own modules and theirs in ours, in SD-1.x' and SDXL's layouts; SDXL's names by diffusers' map.

LyCORIS is no dependency: `pip install --no-deps lycoris-lora einops toml` makes the slow tests run.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from adapters import compose, files, keys, names, source
from adapters.injection import fit_to_model
from adapters.writing import write_kohya

WIDTHS, DEPTHS = (8, 16, 32), (0, 2, 3)  # SDXL's are (320, 640, 1280) and (0, 2, 10)


def sdxl_unet() -> UNet2DConditionModel:
    """SDXL's blocks, narrow and less deep."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, *DEPTHS[1:]),
        attention_head_dim=(2, 2, 4),
        cross_attention_dim=24,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )


def original_names() -> Iterator[str]:
    """The layers of SDXL's U-net as its own config (`sd_xl_base.yaml`) builds them: dotted names with a weight."""
    yield from ("input_blocks.0.0", "time_embed.0", "time_embed.2", "label_emb.0.0", "label_emb.0.2", "out.2")
    resnet = ("in_layers.2", "emb_layers.1", "out_layers.3")

    def block(place: str, depth: int, *, inner: int = 1, shortcut: bool = False) -> Iterator[str]:
        yield from (f"{place}.{inner - 1}.{end}" for end in (*resnet, *(["skip_connection"] if shortcut else [])))
        if depth:
            yield from transformer(f"{place}.{inner}", depth)

    def transformer(place: str, depth: int) -> Iterator[str]:
        yield from (f"{place}.proj_in", f"{place}.proj_out")
        for number in range(depth):
            for attention in ("attn1", "attn2"):
                for layer in ("to_q", "to_k", "to_v", "to_out.0"):
                    yield f"{place}.transformer_blocks.{number}.{attention}.{layer}"
            yield from (f"{place}.transformer_blocks.{number}.ff.net.{end}" for end in ("0.proj", "2"))

    number = 1
    for level, depth in enumerate(DEPTHS):
        for layer in range(2):
            yield from block(f"input_blocks.{number}", depth, shortcut=layer == 0 and level > 0)
            number += 1
        if level < 2:
            yield f"input_blocks.{number}.0.op"
            number += 1
    yield from (f"middle_block.{place}.{end}" for place in (0, 2) for end in resnet)
    yield from transformer("middle_block.1", DEPTHS[2])
    number = 0
    for level, depth in reversed(list(enumerate(DEPTHS))):
        for layer in range(3):
            yield from block(f"output_blocks.{number}", depth, shortcut=True)
            if layer == 2 and level > 0:
                yield f"output_blocks.{number}.2.conv"
            number += 1


def original_norms() -> Iterator[str]:
    """The normalizations beside them."""
    layers = list(original_names())
    for name in layers:
        for layer, norm in (("in_layers.2", "in_layers.0"), ("out_layers.3", "out_layers.0"), ("proj_in", "norm")):
            if name.endswith(f".{layer}"):
                yield name.removesuffix(layer) + norm
        if name.endswith(".ff.net.2"):
            yield from (f"{name.removesuffix('ff.net.2')}norm{number}" for number in (1, 2, 3))
    yield "out.0"


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    return sdxl_unet()


@pytest.fixture(scope="module")
def original(unet) -> dict[str, str]:
    return converted(unet, original_names())


def converted(unet: UNet2DConditionModel, layers: Iterator[str]) -> dict[str, str]:
    """Original name -> diffusers' name, as diffusers itself converts a checkpoint of SDXL."""
    marks = {name: torch.full((1,), float(number)) for number, name in enumerate(layers)}
    given = {name: torch.full((1,), -1.0) for name in original_names() if name not in marks}  # it asks for these
    place = "model.diffusion_model."
    checkpoint = {f"{place}{name}.{end}": mark for name, mark in (marks | given).items() for end in ("weight", "bias")}
    config = {**unet.config, "class_embed_type": None, "addition_embed_type": "text_time", "layers_per_block": 2}
    renamed = convert_ldm_unet_checkpoint(checkpoint, config)
    back = {int(mark): name.removesuffix(".weight") for name, mark in renamed.items() if name.endswith("weight")}
    return {name: back[number] for number, name in enumerate(marks)}


def layers_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}


def test_every_layer_of_sdxl_has_the_original_name(unet, original):
    assert set(original.values()) == set(layers_of(unet))
    for old, new in original.items():
        flat = "lora_unet_" + old.replace(".", "_")
        assert names.kohya_name(f"unet.{new}", sdxl=True, sgm=True) == flat
        assert names.module_name(flat) == f"unet.{new}"
        assert names.from_sgm_path(old) == new


def test_every_norm_of_sdxl_has_the_original_name(unet):
    original = converted(unet, original_norms())
    assert set(original.values()) == set(norms_of(unet))
    for old, new in original.items():
        flat = "lora_unet_" + old.replace(".", "_")
        assert names.kohya_name(f"unet.{new}", sdxl=True, sgm=True) == flat
        assert names.module_name(flat) == f"unet.{new}"


def norms_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.GroupNorm | torch.nn.LayerNorm)}


def random_lora(model: torch.nn.Module, rank: int = 2) -> keys.Adapter:
    """A LoRA of every linear and convolution layer, with alphas that differ."""
    generator, modules = torch.Generator().manual_seed(1), {}
    for number, (path, layer) in enumerate(layers_of(model).items()):
        shape = tuple(layer.weight.shape)
        tensors = {
            "lora_A.weight": torch.randn(rank, *shape[1:], generator=generator),
            "lora_B.weight": torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator),
        }
        modules[f"unet.{path}"] = keys.Module(kind="lora", tensors=tensors, rank=rank, alpha=1.0 + number % 3)
    return keys.Adapter(modules=modules)


def test_diffusers_reads_our_kohya_file_of_sdxl(unet, tmp_path):
    """The layers that its converter of such files knows: those of the blocks."""
    from diffusers import StableDiffusionXLPipeline

    adapter = random_lora(unet)
    inside = {n: m for n, m in adapter.modules.items() if "blocks." in n or "mid_block." in n}
    adapter = keys.Adapter(modules=inside)
    write_kohya(tmp_path / "x.safetensors", adapter)
    _, header = files.read_tensors(tmp_path / "x.safetensors")
    assert header["ss_base_model_version"] == "sdxl_base_v1-0"
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(tmp_path / "x.safetensors", unet_config=unet.config)
    theirs = keys.from_any(state)
    (alpha,) = set(alphas.values())
    assert theirs.modules.keys() == adapter.modules.keys()
    for name, module in adapter.modules.items():
        own, layer = theirs.modules[name], layers_of(unet)[name.removeprefix("unet.")]
        scaled = dataclasses.replace(own, alpha=alpha)
        torch.testing.assert_close(compose.delta(scaled, layer.weight), compose.delta(module, layer.weight))


# ---------------------------------------------------------------------------------------------- LyCORIS

ALGORITHMS = {
    "lora": ("LoConModule", {}),
    "lora, tucker": ("LoConModule", {"use_tucker": True}),
    "rslora": ("LoConModule", {"rs_lora": True}),
    "dora": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "dora over inputs": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "doha": ("LohaModule", {"weight_decompose": True, "wd_on_out": True}),
    "doha over inputs": ("LohaModule", {"weight_decompose": True, "wd_on_out": False}),
    "dokr": ("LokrModule", {"weight_decompose": True, "wd_on_out": True}),
    "loha": ("LohaModule", {}),
    "loha, tucker": ("LohaModule", {"use_tucker": True}),
    "lokr": ("LokrModule", {}),
    "lokr, tucker": ("LokrModule", {"use_tucker": True}),
    "lokr, both decomposed": ("LokrModule", {"decompose_both": True, "factor": 4, "lora_dim": 1}),
    "lokr, full": ("LokrModule", {"full_matrix": True, "factor": 4}),
    "lokr, unbalanced": ("LokrModule", {"unbalanced_factorization": True}),
    "lokr, scalar": ("LokrModule", {"use_scalar": True}),
}
# LyCORIS 4.1.3 fails on layers of its own files here: it builds the module anew with another factor.
NOT_ITS_OWN = ("lokr, tucker", "lokr, both decomposed", "lokr, unbalanced", "dora over inputs", "doha over inputs")


@pytest.fixture(scope="module")
def layouts(_pipe, unet, original) -> dict[str, tuple[torch.nn.Module, dict[str, str]]]:
    """Layout -> (U-net, LyCORIS' name of a layer -> diffusers' name)."""
    plain = {"lora_unet_" + name.replace(".", "_"): name for name in layers_of(_pipe.unet)}
    return {
        "sd-1": (copy.deepcopy(_pipe.unet).double(), plain),
        "sdxl": (
            copy.deepcopy(unet).double(),
            {"lora_unet_" + old.replace(".", "_"): new for old, new in original.items()},
        ),
    }


def effect(module: torch.nn.Module, layer: torch.nn.Module) -> torch.Tensor:
    """What a LyCORIS module adds to its layer's output. (Its `get_merged_weight` has LoHa's and LoKr's scale twice.)"""
    x = inputs(layer)
    with torch.no_grad():
        return module(x) - layer(x)  # type: ignore[no-any-return]


def effect_of(change: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """What a change of the weight adds to the output."""
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        moved.weight.add_(change)  # type: ignore[operator]
        return moved(inputs(layer)) - layer(inputs(layer))  # type: ignore[no-any-return]


def inputs(layer: torch.nn.Module) -> torch.Tensor:
    width = layer.weight.shape[-1 if layer.weight.ndim == 1 else 1]  # type: ignore[union-attr, index]
    shape = (2, width, 4, 4) if isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm) else (8, width)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def off_by(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def made_by_lycoris(kind: str, flat: str, layer: torch.nn.Module, generator: torch.Generator) -> torch.nn.Module:
    modules = pytest.importorskip("lycoris.modules", reason="pip install --no-deps lycoris-lora einops toml")
    name, options = ALGORITHMS[kind]
    module = getattr(modules, name)(flat, layer, 1.0, **{"lora_dim": 2, "alpha": 3, **options}).double()
    with torch.no_grad():
        for parameter, value in module.named_parameters():
            if "org_module" not in parameter:
                noise = torch.randn(value.shape, generator=generator) * 0.3
                value.copy_(value + noise.abs() if "dora" in parameter else noise)
    return module.eval()


def written_by_lycoris(
    kinds: Iterable[str], model: torch.nn.Module, flats: Mapping[str, str], file: Path
) -> tuple[keys.Adapter, dict[str, torch.Tensor]]:
    """A file of LyCORIS' own, as we read it, and what it does to every layer."""
    generator, tensors, wanted = torch.Generator().manual_seed(2), {}, {}
    for kind, (flat, path) in zip(kinds, flats.items(), strict=False):
        layer = model.get_submodule(path)
        module = made_by_lycoris(kind, flat, layer, generator)
        tensors |= {f"{flat}.{name}": value.detach() for name, value in module.state_dict().items()}
        wanted[path] = effect(module, layer)
    files.write_tensors(file, tensors)
    return source.read_adapter(source.open_source(file)), wanted


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd-1", "sdxl"])
@pytest.mark.parametrize("kind", ALGORITHMS)
def test_lycoris_own_files_change_the_weights_as_lycoris_does(layouts, tmp_path, kind, layout):
    model, flats = layouts[layout]
    adapter, wanted = written_by_lycoris(itertools.repeat(kind), model, flats, tmp_path / "theirs.safetensors")
    assert adapter.part("unet").keys() == wanted.keys()
    ours = compose.deltas(keys.Adapter(modules=fit_to_model(model, adapter, "unet")), {"unet": model})
    for path, theirs in wanted.items():
        assert off_by(effect_of(ours[f"unet.{path}"], model.get_submodule(path)), theirs) < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd-1", "sdxl"])
def test_kinds_mixed_in_one_file_change_the_weights_as_lycoris_does(layouts, tmp_path, layout):
    """Another kind on every layer, both as LyCORIS wrote it and as we write it again."""
    model, flats = layouts[layout]
    theirs, wanted = written_by_lycoris(itertools.cycle(ALGORITHMS), model, flats, tmp_path / "theirs.safetensors")
    write_kohya(tmp_path / "ours.safetensors", theirs, sdxl=layout == "sdxl")
    again = source.read_adapter(source.open_source(tmp_path / "ours.safetensors"))
    for adapter in (theirs, again):
        assert adapter.part("unet").keys() == wanted.keys()
        ours = compose.deltas(keys.Adapter(modules=fit_to_model(model, adapter, "unet")), {"unet": model})
        for path, change in wanted.items():
            assert off_by(effect_of(ours[f"unet.{path}"], model.get_submodule(path)), change) < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd-1", "sdxl"])
@pytest.mark.parametrize("kind", [kind for kind in ALGORITHMS if kind != "lora, tucker"])
def test_lycoris_reads_every_key_of_ours(layouts, tmp_path, kind, layout):
    """What it made, read by us, written by us, and put on the layers by LyCORIS again."""
    lycoris = pytest.importorskip("lycoris.modules", reason="pip install --no-deps lycoris-lora einops toml")
    model, flats = layouts[layout]
    generator, tensors, wanted = torch.Generator().manual_seed(2), {}, {}
    for flat, path in flats.items():
        module = made_by_lycoris(kind, flat, model.get_submodule(path), generator)
        tensors |= {f"{flat}.{name}": value.detach() for name, value in module.state_dict().items()}
        wanted[flat] = effect(module, model.get_submodule(path))
    adapter = keys.from_any(tensors)
    write_kohya(tmp_path / "ours.safetensors", adapter, sdxl=layout == "sdxl")
    state, _ = files.read_tensors(tmp_path / "ours.safetensors")
    assert {name.split(".")[0] for name in state} == set(flats)
    if kind in NOT_ITS_OWN:  # then ours must be its file, key for key
        assert state.keys() == tensors.keys()
        full = {name.split(".")[0] for name in state if name.endswith(".lokr_w2")}  # there it ignores alpha
        weights = {name for name in state if not (name.endswith(".alpha") and name.split(".")[0] in full)}
        assert all(torch.equal(state[name].double(), tensors[name].double()) for name in weights)
        return
    for flat, path in flats.items():
        layer = model.get_submodule(path)
        algorithm, parameters = lycoris.get_module(state, flat)
        known = {f"{flat}.{name}" for name in algorithm.weight_list}
        assert {name for name in state if name.startswith(f"{flat}.")} <= known
        again = lycoris.make_module(algorithm, parameters, flat, layer).double().eval()
        assert off_by(effect(again, layer), wanted[flat]) < 1e-5, path


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sd-1", "sdxl"])
def test_whole_differences_and_norms_as_lycoris_has_them(layouts, tmp_path, layout):
    """LyCORIS puts a file on the layers, we put it and our copy of it into the weights."""
    lycoris = pytest.importorskip("lycoris.modules", reason="pip install --no-deps lycoris-lora einops toml")
    model, flats = layouts[layout]
    generator, tensors, flats = torch.Generator().manual_seed(2), {}, dict(flats)
    flats |= {names.kohya_name(f"unet.{n}", sdxl=layout == "sdxl", sgm=layout == "sdxl"): n for n in norms_of(model)}
    for flat, path in flats.items():
        layer = model.get_submodule(path)
        ends = ("w_norm", "b_norm") if path in norms_of(model) else ("diff", "diff_b")
        for end, value in zip(ends, (layer.weight, layer.bias), strict=True):
            if value is not None:
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.3
                tensors[f"{flat}.{end}"] = noise
    files.write_tensors(tmp_path / "theirs.safetensors", tensors)
    adapter = source.read_adapter(source.open_source(tmp_path / "theirs.safetensors"))
    write_kohya(tmp_path / "ours.safetensors", adapter, sdxl=layout == "sdxl")
    ours, _ = files.read_tensors(tmp_path / "ours.safetensors")
    assert ours.keys() == tensors.keys()
    wanted = {}
    for flat, path in flats.items():
        algorithm, parameters = lycoris.get_module(ours, flat)
        assert {n for n in ours if n.startswith(f"{flat}.")} <= {f"{flat}.{n}" for n in algorithm.weight_list}
        layer = model.get_submodule(path)
        wanted[path] = effect(lycoris.make_module(algorithm, parameters, flat, layer).double().eval(), layer)
    changed = copy.deepcopy(model)
    compose.merge(keys.Adapter(modules=fit_to_model(changed, adapter, "unet")), {"unet": changed})
    for path, theirs in wanted.items():
        x = inputs(model.get_submodule(path))
        with torch.no_grad():
            assert off_by(changed.get_submodule(path)(x) - model.get_submodule(path)(x), theirs) < 1e-5, path


def test_the_layouts_are_told_apart(layouts):
    for layout, (model, flats) in layouts.items():
        tensors, _ = keys.to_kohya(random_lora(model), sdxl=layout == "sdxl")
        assert {name.split(".")[0] for name in tensors} == set(flats)

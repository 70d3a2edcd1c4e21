"""An `Adapter` in the keys that other programs read: peft, diffusers, kohya / LyCORIS.

Weights are renamed and reshaped, never computed with, so round trips are exact to the bit. Two documented exceptions of
`to_kohya`: `uniform_alpha`, and a LoKr of two full factors, whose format has no alpha.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from .adapter import Adapter, Module
from .errors import FormatError
from .family import family_of
from .names import fits_sdxl, kohya_name
from .reading import HEADER, KOHYA_HEADER, PARAMETER_NAMES

__all__ = ["is_sdxl", "to_diffusers", "to_kohya", "to_peft"]

_TO_KOHYA = {**{peft: kohya for kohya, peft in PARAMETER_NAMES.items()}, "lora_magnitude_vector": "dora_scale"}

_BASES = {
    "SD-1.x": {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": "stable-diffusion-v1/lora"},
    "SD-2.x": {"ss_v2": "True"},
    "SDXL": {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
    },
}
"""Family of bases -> the fields by which other programs know it."""


def to_kohya(
    adapter: Adapter, *, uniform_alpha: bool = False, sdxl: bool | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, header) in kohya / LyCORIS keys, every module with an explicit `.alpha` (alpha*sqrt(r) for rsLoRA).

    Args:
        adapter: LoRA, DoRA, LoHa, LoKr or whole differences.
        uniform_alpha: give every LoRA module the same alpha and move the difference into `lora_up`. diffusers' own
            reader of kohya files loses per-module alphas of attention layers; files for everyone need this. The move is
            one float multiplication, so it is not exact to the bit unless the ratio is a power of two.
        sdxl: whether the base is SDXL, whose U-net has the original code's names in these files; by default as far as
            the adapter tells.
    """
    if uniform_alpha:
        adapter = _unify(adapter)
    sdxl = is_sdxl(adapter) if sdxl is None else sdxl
    sgm = sdxl and all(fits_sdxl(path) for path in adapter.part("unet"))
    two_encoders = sdxl or "text_encoder_2" in adapter.components
    tensors: dict[str, torch.Tensor] = {}
    notes = {}
    for name, module in adapter.modules.items():
        flat = kohya_name(name, sdxl=two_encoders, sgm=sgm)
        tensors.update((f"{flat}.{parameter}", tensor) for parameter, tensor in _kohya_parameters(module))
        notes[name] = {"alpha": module.alpha, "rank": module.rank, "rslora": module.rslora}
    return tensors, {KOHYA_HEADER: json.dumps(notes, sort_keys=True), **_kohya_header(adapter, tensors, sdxl)}


def is_sdxl(adapter: Adapter) -> bool:
    """Whether the base is SDXL, as far as names and widths tell: an attention's first layers fit SD-1.x as well."""
    paths = adapter.part("unet")
    if not all(fits_sdxl(path) for path in paths):
        return False
    deep = any(path.startswith("add_embedding.") or re.search(r"transformer_blocks\.[1-9]", path) for path in paths)
    return "text_encoder_2" in adapter.components or deep or family_of(adapter) == "SDXL"


def _kohya_parameters(module: Module) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter, tensor in module.tensors.items():
        if parameter == "lora_magnitude_vector":
            tensor = tensor.reshape(-1, *[1] * (module.tensors["lora_B.weight"].ndim - 1))
        elif parameter == "lokr_w1" and module.full and module.scale != 1:
            tensor = tensor * module.scale
        yield _TO_KOHYA.get(parameter, parameter), tensor
    if module.kind not in ("full", "norm"):
        alpha = float(module.rank) if module.full else module.scale * module.rank
        yield "alpha", torch.tensor(alpha, dtype=torch.float32)


def _kohya_header(adapter: Adapter, tensors: Mapping[str, torch.Tensor], sdxl: bool) -> dict[str, str]:
    """What the programs choose a file's base and reader by; A1111 takes a file with other fields alone for SD-1."""
    ranks = Counter(m.rank for m in adapter.modules.values())
    alphas = Counter(float(t) for name, t in tensors.items() if name.endswith(".alpha"))
    header = {
        "ss_network_module": "networks.lora" if adapter.kinds in (["lora"], ["dora"]) else "lycoris.kohya",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": f"{next(iter(alphas.most_common(1)), (1,))[0]:g}",
    }
    family = "SDXL" if sdxl else family_of(adapter)
    return header | _BASES.get(family or "", {})


def _unify(adapter: Adapter) -> Adapter:
    loras = {name: m for name, m in adapter.modules.items() if m.kind == "lora"}
    alphas = {name: m.scale * m.rank for name, m in loras.items()}
    common = next((alpha for alpha, _ in Counter(alphas.values()).most_common() if alpha), None)
    if common is None or len(set(alphas.values())) == 1:
        return adapter
    modules = dict(adapter.modules)
    for name, module in loras.items():
        up = module.tensors["lora_B.weight"]
        tensors = {**module.tensors, "lora_B.weight": up * (alphas[name] / common)}
        modules[name] = replace(module, tensors=tensors, alpha=common, rslora=False)
    return replace(adapter, modules=modules)


# ---------------------------------------------------------------------------------------------- diffusers and peft


def to_diffusers(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, header) for `pytorch_lora_weights.safetensors`: LoRA and DoRA only, alphas in the header."""
    _refuse_merges_only(adapter, "no spelling of diffusers' or peft's")
    other = [name for name, module in adapter.modules.items() if module.kind != "lora"]
    if other:
        raise FormatError(
            f"{other[0]} is {adapter.modules[other[0]].kind}, which has no diffusers LoRA spelling; "
            "ship peft and kohya keys, a merged U-net, or compose.to_lora (an SVD approximation with its error)"
        )
    tensors, header = {}, {}
    for component in adapter.components:
        middle = "" if component == "unet" else "text_model."
        for name, module in adapter.part(component).items():
            prefix = f"{component}.{'' if name == 'text_projection' else middle}{name}"
            tensors.update(_old_text_keys(prefix, module) if middle else _prefixed(prefix, module))
        header.update({f"{component}.{k}": v for k, v in _lora_config(adapter.part(component)).items()})
    return tensors, {HEADER: json.dumps(header, sort_keys=True)}


def _refuse_merges_only(adapter: Adapter, what: str) -> None:
    if (why := adapter.merges_only) is not None:
        raise FormatError(
            f"{why}: there is {what} for that; kohya keys hold it, merge adds it to a U-net, and convert --rank N "
            "--base PIPELINE makes the nearest LoRA"
        )


def _prefixed(prefix: str, module: Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in module.tensors.items()}


def _old_text_keys(prefix: str, module: Module) -> dict[str, torch.Tensor]:
    # diffusers' text-encoder reader expects its older spelling and recognizes it by this infix; transformers, which it
    # hands the rest to, wants the magnitude's full parameter name.
    spelling = {
        "lora_A.weight": "lora_linear_layer.down.weight",
        "lora_B.weight": "lora_linear_layer.up.weight",
        "lora_magnitude_vector": "lora_magnitude_vector.weight",
    }
    return {f"{prefix}.{spelling.get(suffix, suffix)}": tensor for suffix, tensor in module.tensors.items()}


def _lora_config(modules: Mapping[str, Module]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that reproduce ranks, alphas, rsLoRA and DoRA of one component."""
    if len({m.rslora for m in modules.values()}) > 1:
        modules = {n: replace(m, alpha=m.scale * m.rank, rslora=False) for n, m in modules.items()}
    rank, rank_pattern = _pattern({n: m.rank for n, m in modules.items()})
    alpha, alpha_pattern = _pattern({n: m.alpha for n, m in modules.items()})
    first = next(iter(modules.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(modules),
        "use_dora": first.dora,
        "use_rslora": first.rslora,
    }


def _pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {name: value for name, value in values.items() if value != common}


def to_peft(adapter: Adapter, component: str = "unet") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, `adapter_config.json`) of one component, as `peft.PeftModel.from_pretrained` reads them."""
    modules = adapter.part(component)
    if not modules:
        raise FormatError(f"no modules of {component}; this adapter has {adapter.components}")
    _refuse_merges_only(adapter, "no layer in peft")
    kinds = {m.kind for m in modules.values()}
    kind = kinds.pop()
    config = _lora_config(modules) if kind == "lora" else _lycoris_config(kind, modules, adapter.options.get(component))
    tensors = {
        f"base_model.model.{spelt}.{parameter}": tensor
        for name, module in modules.items()
        for spelt in _peft_names(component, name)
        for parameter, tensor in module.tensors.items()
    }
    return tensors, {"peft_type": kind.upper(), "inference_mode": True, **config}


def _peft_names(component: str, name: str) -> list[str]:
    """How peft finds a layer in the class that the component is of, for every transformers in range.

    The second encoder (CLIPTextModelWithProjection) has its layers in `text_model`. The first (CLIPTextModel) has them
    there in transformers 4 and at its top in 5: the file holds both names, of which peft takes the one it finds.
    """
    if component == "unet" or name == "text_projection":
        return [name]
    return [f"text_model.{name}", *([name] if component == "text_encoder" else [])]


def _lycoris_config(kind: str, modules: Mapping[str, Module], options: Mapping[str, Any] | None) -> dict[str, Any]:
    rank, rank_pattern = _pattern({n: m.rank for n, m in modules.items()})
    alpha, alpha_pattern = _pattern({n: m.alpha for n, m in modules.items()})
    suffixes = {suffix for m in modules.values() for suffix in m.tensors}
    stated = dict(options or {})
    guessed: dict[str, Any] = {"use_effective_conv2d": bool(suffixes & {"hada_t1", "lokr_t2"})}
    if kind == "lokr":
        guessed["decompose_both"] = "lokr_w1_a" in suffixes
        if "decompose_factor" not in stated:
            guessed["decompose_factor"] = _decompose_factor(modules)
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(modules),
        **guessed,
        **stated,
    }


def _decompose_factor(modules: Mapping[str, Module]) -> int:
    """The one factor under which peft splits every layer as these weights are split."""
    from peft.tuners.lokr.layer import factorization

    splits = [_splits(module) for module in modules.values()]
    for factor in [-1, *sorted({side[0] for choices in splits for split in choices for side in split})]:
        if all(
            any(all(factorization(a * b, factor) == (a, b) for a, b in split) for split in choices)
            for choices in splits
        ):
            return factor
    raise FormatError(
        "the Kronecker factors follow no single decompose_factor, which peft needs; ship or convert to kohya keys, or "
        "merge this LoKr"
    )


def _splits(module: Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """((out_l, out_k), (in_m, in_n)) of a LoKr; several where a kernel may be in the columns of its second factor."""
    t = module.tensors
    out_l, in_m = t["lokr_w1"].shape if "lokr_w1" in t else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
    if "lokr_w2" in t:
        out_k, in_n = t["lokr_w2"].shape[:2]
    elif "lokr_t2" in t:
        out_k, in_n = t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1]
    else:  # without a core a 3x3 convolution has in_n*3*3 columns; the weights do not say which
        out_k, columns = t["lokr_w2_a"].shape[0], t["lokr_w2_b"].shape[1]
        inner = [columns, *([columns // 9] if columns % 9 == 0 else [])]
        return [((out_l, out_k), (in_m, in_n)) for in_n in inner]
    return [((out_l, out_k), (in_m, in_n))]

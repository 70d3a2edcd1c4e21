"""Any file's tensors into an `Adapter`: peft, diffusers, kohya / LyCORIS, and what other programs make of these.

A key is taken apart into component, module and parameter, whatever its spelling; a key that means nothing here is
refused with the reason, never dropped. Bookkeeping of a trainer (`step`) is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from .adapter import BESIDE, COMPONENTS, KIND_OF, Adapter, Kind, Module
from .errors import FormatError
from .names import from_sgm_path, module_name
from .tokens import bundled

__all__ = ["HEADER", "KOHYA_HEADER", "PARAMETER_NAMES", "from_any"]

HEADER = "lora_adapter_metadata"
KOHYA_HEADER = "adapters.modules"
PARAMETER_NAMES = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
}
"""kohya's name of a parameter -> peft's; those of LoHa and LoKr are the same in both."""
_EXTRA = ("alpha", "lora_mid.weight")
_COUNTERS = ("step", "steps", "global_step", "epoch")
# Older diffusers spellings of the same tensors (attention processors, and text encoders up to now).
_OLD = (
    (r"\.processor\.", "."),
    (r"\.to_(q|k|v)_lora\.", r".to_\1.lora."),
    (r"\.to_out_lora\.", r".to_out.0.lora."),
    (r"\.lora_linear_layer\.", ".lora."),
    (r"\.lora\.down\.weight$", ".lora_A.weight"),
    (r"\.lora\.up\.weight$", ".lora_B.weight"),
    (r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector"),
)
# A peft model's own state dict holds the adapter's name behind the parameter's.
_NAMED = re.compile(r"\.(lora_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+)\.(?!(?:weight|bias)$)([^.]+)(\.weight)?$")
_REASONS = {
    r"\.(bias|lora_B\.bias|bias_\w+)$": "a trained bias",
    r"\.(oft_\w+|a\d\.weight|b\d\.weight|on_input|weight)$": "no LoRA, DoRA, LoHa or LoKr parameter (OFT, GLoRA, IA3?)",
    r"\.lora_embedding_[AB]$": "a LoRA of an embedding table",
    r"\.modules_to_save\.": "a whole layer that was trained beside the adapter (peft's modules_to_save)",
    r"\.lokr_t1$": "a Tucker core of the first Kronecker factor",
}
_TRANSFORMER = re.compile(r"(^|[._])(double|single)_(stream_)?blocks|^transformer[._]|^lora_transformer_|joint_blocks")
_UNET_WORDS = (
    *("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_norm_out", "conv_out"),
    *("time_embedding", "add_embedding"),
    *("input_blocks", "output_blocks", "middle_block", "out", "time_embed", "label_emb"),
)
_MAX_PATTERN, _MAX_REPEATS = 512, 4


@dataclass(frozen=True)
class _Key:
    name: str
    """`component.module`, as `Adapter.modules` has it."""
    path: str
    """The module as the file spells it, which peft's patterns are matched against."""
    parameter: str
    flat: bool
    """Written with underscores."""


def from_any(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    component: str = "unet",
) -> Adapter:
    """Read any spelling.

    Args:
        tensors: all of a file, by their keys there.
        metadata: the file's header; holds diffusers' `lora_adapter_metadata`.
        config: `adapter_config.json`, for peft keys.
        component: which part of the pipeline keys without a prefix belong to; peft's do not say.

    Raises:
        FormatError: names what is not understood, and why. A missing alpha means alpha = rank, as every reader has it.
    """
    if not tensors:
        raise FormatError("the file holds no tensors")
    tokens, rest = bundled({n: t for n, t in tensors.items() if not (n in _COUNTERS and t.numel() == 1)})
    keys = {name: _parsed(name, component) for name in rest}
    _check_values(rest, keys)
    _check_one_adapter(rest)
    grouped, alphas, paths = _grouped(rest, keys)
    configs = _header_configs(metadata or {})
    if config and component not in configs:  # the file's own header before what lies beside it
        configs[component] = dict(config)
    notes = _kohya_notes(metadata or {})
    lycoris = {key.name for key in keys.values() if key.flat} | set(alphas)
    modules = {}
    for name, parts in grouped.items():
        own = {} if name in lycoris else configs.get(name.partition(".")[0], {})
        module = _module(name, paths[name], parts, own, alphas.get(name), lycoris=name in lycoris)
        modules[name] = _recall(module, notes.get(name))
    return _checked(Adapter(modules=modules, options=_options(configs), tokens=tokens))


# ---------------------------------------------------------------------------------------------- keys


def _parsed(key: str, component: str) -> _Key:
    if _TRANSFORMER.search(key):
        raise FormatError(f"{key!r} belongs to a diffusion transformer (FLUX, SD3, …); the bases here are U-nets")
    if match := re.match(r"((?:lora|lycoris)_[A-Za-z0-9_]+)\.(.+)$", key):
        parameter = PARAMETER_NAMES.get(match[2], match[2])
        if parameter not in (*KIND_OF, *BESIDE, *_EXTRA):
            raise FormatError(_refusal(key))
        name = module_name(match[1])
        return _Key(name, name.partition(".")[2], parameter, True)
    name, prefixed = _without_prefixes(key, component)
    name = _NAMED.sub(r".\1\3", name)
    for pattern, new in _OLD:
        name = re.sub(pattern, new, name)
    found = next((p for p in (*KIND_OF, *BESIDE, *PARAMETER_NAMES, *_EXTRA) if name.endswith("." + p)), None)
    if found is None:
        raise FormatError(_refusal(key))
    component, _, path = name.removesuffix("." + found).partition(".")
    if not prefixed and component == "unet" and path.split(".")[0] not in _UNET_WORDS:
        raise FormatError(_unknown(key))
    return _Key(f"{component}.{_module_path(component, path)}", path, PARAMETER_NAMES.get(found, found), False)


def _without_prefixes(key: str, component: str) -> tuple[str, bool]:
    """(`component.rest`, whether the key said so), for any order of peft's, diffusers' and ComfyUI's prefixes."""
    prefixed = False
    while True:
        if key.startswith(("base_model.model.", "model.diffusion_model.", "diffusion_model.")):
            component = "unet" if "diffusion_model." in key[:22] else component
            key = re.sub(r"^(base_model\.model|model\.diffusion_model|diffusion_model)\.", "", key)
        elif key.split(".")[0] in COMPONENTS:
            component, _, key = key.partition(".")
        else:
            return f"{component}.{key}", prefixed
        prefixed = True


def _module_path(component: str, path: str) -> str:
    """The module's path in a diffusers U-net, or in a text encoder without `text_model.`."""
    if component == "unet":
        return from_sgm_path(path)
    path = re.sub(r"\.to_(q|k|v)$", r".\1_proj", path.removeprefix("text_model."))
    return re.sub(r"\.to_out\.0$", ".out_proj", path)


def _unknown(key: str) -> str:
    return (
        f"{key!r} is none of peft (base_model.model.…), diffusers (unet.…, text_encoder.…) "
        "or kohya (lora_unet_…, lora_te_…)"
    )


def _refusal(key: str) -> str:
    if re.search(r"(^|\.)(emb_params|string_to_param|clip_[lg]|clip_[lg]_out)\b", key):
        return (
            f"{key!r} is a learned embedding without its token; only `bundle_emb.TOKEN.clip_l` and `.clip_g` say theirs"
        )
    why = next((why for pattern, why in _REASONS.items() if re.search(pattern, key)), None)
    return _unknown(key) if why is None else f"{key!r} is {why}, which peft cannot put on a layer; merge it elsewhere"


def _check_values(tensors: Mapping[str, torch.Tensor], keys: Mapping[str, _Key]) -> None:
    weights = {name: t for name, t in tensors.items() if keys[name].parameter != "alpha"}
    bad = [name for name, t in weights.items() if not t.is_floating_point() or t.element_size() < 2]
    if bad:
        raise FormatError(
            f"{bad[0]!r} is {tensors[bad[0]].dtype}; adapter weights are float16, bfloat16, float32 or float64"
        )
    broken = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise FormatError(f"{broken[0]!r} holds NaN or infinite values ({len(broken)} such tensors)")


def _check_one_adapter(names: Iterable[str]) -> None:
    found = sorted({match[2] for name in names if (match := _NAMED.search(name))})
    if len(found) > 1:
        raise FormatError(f"the file holds {len(found)} adapters ({', '.join(found)[:80]}); save one by itself")


# ---------------------------------------------------------------------------------------------- modules


def _grouped(
    tensors: Mapping[str, torch.Tensor], keys: Mapping[str, _Key]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float], dict[str, str]]:
    """Module -> parameter -> tensor; module -> alpha; module -> its path as the file spells it."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    paths: dict[str, str] = {}
    for key, tensor in tensors.items():
        name, parameter = keys[key].name, keys[key].parameter
        if parameter == "alpha":
            if tensor.numel() != 1:
                raise FormatError(f"{key!r} has shape {tuple(tensor.shape)}; an alpha is one number")
            alphas[name] = float(tensor)
            continue
        parts = grouped.setdefault(name, {})
        paths[name] = keys[key].path
        if parameter in parts and not torch.equal(parts[parameter], tensor):
            raise FormatError(f"{key!r}: {name} is there twice, in two spellings that differ")
        parts[parameter] = tensor
    if stray := sorted(set(alphas) - set(grouped)):
        raise FormatError(f"{stray[0]} has an alpha but no weights")
    return grouped, alphas, paths


def _module(
    name: str,
    path: str,
    parts: dict[str, torch.Tensor],
    config: Mapping[str, Any],
    alpha: float | None,
    *,
    lycoris: bool,
) -> Module:
    if "lora_mid.weight" in parts:
        parts = _without_core(name, parts)
    kind = _kind(name, parts)
    if kind == "lora" and "dora_scale" in parts:
        parts = _magnitude_to_peft(parts)
    declared = _number(name, config, path, "alpha_pattern", "lora_alpha" if kind == "lora" else "alpha")
    rank = _rank(kind, parts, _number(name, config, path, "rank_pattern", "r"))
    rslora = bool(config.get("use_rslora", False)) and kind == "lora"
    if kind in ("full", "norm"):
        alpha = float(rank)
    elif alpha is None:
        alpha = float(rank) if declared is None else declared
    module = Module(kind=kind, tensors=dict(parts), rank=rank, alpha=alpha, rslora=rslora)
    return replace(module, alpha=float(rank)) if lycoris and module.full else module


def _without_core(name: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoCon's Tucker form as a plain LoRA of the convolution: its core (r, r, kh, kw) goes into the down matrix."""
    core, down = parts["lora_mid.weight"], parts.get("lora_A.weight")
    if down is None or core.ndim != 4 or down.shape[0] != core.shape[1]:
        raise FormatError(f"{name}: lora_mid {tuple(core.shape)} has no lora_down that fits")
    merged = torch.einsum("rshw,si->rihw", core.double(), down.flatten(1).double()).to(torch.float32)
    rest = {key: tensor for key, tensor in parts.items() if key != "lora_mid.weight"}
    up = rest.get("lora_B.weight")
    if up is not None:
        rest["lora_B.weight"] = up.reshape(*up.shape[:2], 1, 1).to(torch.float32)
    return {**rest, "lora_A.weight": merged}


def _kind(name: str, parts: Mapping[str, torch.Tensor]) -> Kind:
    kinds = {KIND_OF[parameter] for parameter in parts if parameter in KIND_OF}
    beside = [parameter for parameter in parts if parameter in BESIDE]
    if not kinds and beside != ["dora_scale"]:  # a bias alone
        kinds = {BESIDE[beside[0]][0]}
    if len(kinds) != 1:
        raise FormatError(f"{name} mixes {sorted(kinds)}" if kinds else f"{name} has a dora_scale but no weights")
    kind = kinds.pop()
    if wrong := [parameter for parameter in beside if kind not in BESIDE[parameter]]:
        raise FormatError(f"{name} mixes {kind} and {wrong[0]}")
    need: list[list[str]] = {
        "lora": [["lora_A.weight"], ["lora_B.weight"]],
        "loha": [["hada_w1_a"], ["hada_w1_b"], ["hada_w2_a"], ["hada_w2_b"]],
        "lokr": [[f"lokr_w{n}", f"lokr_w{n}_{side}"] for n in (1, 2) for side in "ab"],
    }.get(kind, [])
    for choice in need:
        if not any(c in parts for c in choice):
            raise FormatError(f"{name} lacks {choice[-1]}")
    return kind


def _rank(kind: Kind, parts: Mapping[str, torch.Tensor], declared: float | None) -> int:
    if kind == "lora":
        return parts["lora_A.weight"].shape[0]
    if kind == "loha":
        return parts["hada_w1_b"].shape[0]
    if kind in ("full", "norm"):
        return 1
    for parameter in ("lokr_w2_b", "lokr_w1_b"):
        if parameter in parts:
            return parts[parameter].shape[0]
    # Two full factors: the rank only has to be large enough for peft to make full factors again.
    return int(declared or max(*parts["lokr_w1"].shape, *parts["lokr_w2"].shape[:2]))


def _magnitude_to_peft(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA's magnitudes in peft's shape; over inputs (LyCORIS' wd_on_out off) they stay as they are."""
    scale, up = parts["dora_scale"], parts["lora_B.weight"]
    if scale.shape[:1] != up.shape[:1] or scale.numel() != up.shape[0]:
        return dict(parts)
    rest = {key: tensor for key, tensor in parts.items() if key != "dora_scale"}
    return {**rest, "lora_magnitude_vector": scale.reshape(1, -1, 1, 1) if up.ndim == 4 else scale.reshape(-1)}


def _checked(adapter: Adapter) -> Adapter:
    if not adapter.modules and not adapter.tokens:
        raise FormatError("the file holds no weights of an adapter")
    for name, module in adapter.modules.items():
        parts = module.tensors
        if any(t.numel() == 0 or t.ndim < 1 for t in parts.values()):
            raise FormatError(f"{name} has an empty tensor")
        if module.kind == "lora":
            down, up = parts["lora_A.weight"], parts["lora_B.weight"]
            if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
                raise FormatError(
                    f"{name}: lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)} do not fit together"
                )
            if module.dora and parts["lora_magnitude_vector"].numel() != up.shape[0]:
                raise FormatError(f"{name}: the DoRA magnitudes are not one per output, which is all that peft has")
    return adapter


# ---------------------------------------------------------------------------------------------- settings beside keys


def _header_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    if HEADER not in metadata:
        return {}
    try:
        flat = json.loads(metadata[HEADER])
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
        return configs
    except (ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"header {HEADER} is not a JSON object") from error


def _options(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keep = ("decompose_both", "decompose_factor", "use_effective_conv2d")
    return {c: {k: v[k] for k in keep if k in v} for c, v in configs.items() if any(k in v for k in keep)}


def _number(name: str, config: Mapping[str, Any], path: str, pattern: str, default: str) -> float | None:
    """The value of the first pattern that matches the module, by peft's own function, else the default."""
    table = config.get(pattern) or {}
    value = config.get(default)
    if isinstance(table, Mapping) and table:
        from peft.utils.other import get_pattern_key  # seconds of imports, which few files need

        for key in table:
            _check_pattern(name, key)
        plain = path.removeprefix("text_model.")
        for spelt in (path, plain, f"text_model.{plain}") if not name.startswith("unet.") else (path,):
            if (found := get_pattern_key(table, spelt)) in table:
                value = table[found]
                break
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise FormatError(f"{name}: {default} is {str(value)[:40]!r}, expected a number >= 0")
    return float(value)


def _check_pattern(name: str, pattern: str) -> None:
    """A header is a stranger's text: only expressions that cannot keep the matcher busy for ever."""
    # A repeated group can take exponential time; so few repeats of single characters cannot.
    repeats = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if len(pattern) > _MAX_PATTERN or repeats > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise FormatError(
            f"{name}: the pattern {pattern[:60]!r} is not tried: at most {_MAX_PATTERN} characters and {_MAX_REPEATS} "
            "repeats, none of a group"
        )
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(f"{name}: the pattern {pattern[:60]!r} is no regular expression ({error})") from error


def _kohya_notes(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What our own kohya files remember beyond the format: exact alpha, and whether it stood for rsLoRA."""
    try:
        notes = json.loads(metadata.get(KOHYA_HEADER, "{}"))
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in notes.items() if isinstance(v, dict)} if isinstance(notes, dict) else {}


def _recall(module: Module, note: Mapping[str, Any] | None) -> Module:
    """Believe a note only where it gives the scale that the tensors give."""
    if note is None or not isinstance(note.get("alpha"), int | float) or not isinstance(note.get("rank"), int):
        return module
    if note["rank"] < 1 or ("lokr_w1" not in module.tensors and note["rank"] != module.rank):
        return module
    recalled = replace(module, alpha=float(note["alpha"]), rank=note["rank"], rslora=note.get("rslora") is True)
    return recalled if math.isclose(recalled.scale, module.scale, rel_tol=1e-6) else module

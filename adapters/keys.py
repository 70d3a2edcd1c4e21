"""One in-memory form of a LoRA-like adapter, and its three spellings on disk: peft, diffusers, kohya / LyCORIS.

| | LoRA, DoRA | LoHa, LoKr | where alpha is |
|---|---|---|---|
| peft | `base_model.model.MODULE.lora_A.weight` | `….hada_w1_a`, `….lokr_w1` | `adapter_config.json` |
| diffusers | `unet.MODULE.lora_A.weight` | not defined | header `lora_adapter_metadata` |
| kohya | `lora_unet_MO_DU_LE.lora_down.weight` | `….hada_w1_a`, `….lokr_w1` | tensor `….alpha` |

Weights are renamed and reshaped, never computed with, so round trips are exact to the bit. Two documented exceptions of
`to_kohya`: `uniform_alpha`, and a LoKr of two full factors, whose format has no alpha.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from .errors import FormatError
from .names import kohya_name, module_name

__all__ = ["COMPONENTS", "Adapter", "Module", "from_any", "to_diffusers", "to_kohya", "to_peft"]

Kind = Literal["lora", "loha", "lokr"]
COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
HEADER = "lora_adapter_metadata"
KOHYA_HEADER = "adapters.modules"
_PEFT_NAMES: dict[str, tuple[str, ...]] = {
    "lora": ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
}
_KIND_OF = {name: kind for kind, names in _PEFT_NAMES.items() for name in names}
_TO_KOHYA = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
_FROM_KOHYA = {value: key for key, value in _TO_KOHYA.items()}
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


@dataclass(frozen=True, kw_only=True)
class Module:
    """What one adapted layer carries."""

    kind: Kind
    tensors: Mapping[str, torch.Tensor]
    """By peft's parameter names: `lora_A.weight` (r, in[, kh, kw]), `lora_B.weight` (out, r[, 1, 1]), …"""
    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor on the product of the matrices: alpha/r, or alpha/sqrt(r) for rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def dora(self) -> bool:
        return "lora_magnitude_vector" in self.tensors


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """All adapted layers, keyed `component.module`, with text-encoder modules spelt without `text_model.`."""

    modules: Mapping[str, Module]
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Per component: settings peft needs beyond rank and alpha (LoKr's decompose_factor, …)."""

    def part(self, component: str) -> dict[str, Module]:
        """The modules of one component, without its prefix."""
        prefix = component + "."
        return {name.removeprefix(prefix): m for name, m in self.modules.items() if name.startswith(prefix)}

    @property
    def components(self) -> list[str]:
        return [name for name in COMPONENTS if self.part(name)]

    @property
    def kinds(self) -> list[str]:
        """lora, dora, loha, lokr: those that occur."""
        return sorted({"dora" if module.dora else module.kind for module in self.modules.values()})


# ---------------------------------------------------------------------------------------------- reading


def from_any(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    component: str = "unet",
) -> Adapter:
    """Read any of the three spellings.

    Args:
        metadata: the file's header; holds diffusers' `lora_adapter_metadata`.
        config: `adapter_config.json`, for peft keys.
        component: which part of the pipeline peft keys belong to; they do not say.

    Raises `FormatError` naming what is not understood. A missing alpha means alpha = rank, as every reader takes it.
    """
    if not tensors:
        raise FormatError("the file holds no tensors")
    bad = [name for name, t in tensors.items() if not t.is_floating_point() or t.element_size() < 2]
    if bad:
        raise FormatError(
            f"{bad[0]!r} is {tensors[bad[0]].dtype}; adapter weights are float16, bfloat16, float32 or float64"
        )
    broken = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise FormatError(f"{broken[0]!r} holds NaN or infinite values ({len(broken)} such tensors)")
    metadata = metadata or {}
    if all(re.match(r"(lora|lycoris)_[a-z0-9_]+\.", name) for name in tensors):
        return _from_kohya(tensors, metadata)
    if any(name.startswith("base_model.model.") for name in tensors):
        stripped = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
        grouped = _group({f"{component}.{name}": t for name, t in stripped.items()})
        return _with_config(grouped, {component: dict(config or {})})
    if all(name.split(".")[0] in COMPONENTS for name in tensors):
        return _with_config(_group(tensors), _header_configs(metadata))
    raise FormatError(
        f"key {next(iter(tensors))!r} is none of peft (base_model.model.…), diffusers (unet.…, text_encoder.…) "
        "or kohya (lora_unet_…, lora_te_…)"
    )


def _group(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Module -> peft parameter name -> tensor."""
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, new in _OLD:
            name = re.sub(pattern, new, name)
        found = next((suffix for suffix in _KIND_OF if name.endswith("." + suffix)), None)
        if found is None:
            raise FormatError(f"{key!r}: not a LoRA, DoRA, LoHa or LoKr weight that peft can represent")
        component, _, module = name.removesuffix("." + found).partition(".")
        if component != "unet":
            module = re.sub(r"\.to_(q|k|v)$", r".\1_proj", module.removeprefix("text_model."))
            module = re.sub(r"\.to_out\.0$", ".out_proj", module)
        grouped.setdefault(f"{component}.{module}", {})[found] = tensor
    return grouped


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


def _with_config(
    grouped: Mapping[str, Mapping[str, torch.Tensor]], configs: Mapping[str, Mapping[str, Any]]
) -> Adapter:
    modules = {}
    for name, parts in grouped.items():
        component, _, path = name.partition(".")
        config = configs.get(component, {})
        kind = _kind(name, parts)
        rank = _rank(kind, parts, _number(name, config, path, "rank_pattern", "r"))
        alpha = _number(name, config, path, "alpha_pattern", "lora_alpha" if kind == "lora" else "alpha")
        modules[name] = Module(
            kind=kind,
            tensors=dict(parts),
            rank=rank,
            alpha=float(rank if alpha is None else alpha),
            rslora=bool(config.get("use_rslora", False)) and kind == "lora",
        )
    keep = ("decompose_both", "decompose_factor", "use_effective_conv2d")
    options = {c: {k: v[k] for k in keep if k in v} for c, v in configs.items() if any(k in v for k in keep)}
    return _checked(Adapter(modules=modules, options=options))


def _number(name: str, config: Mapping[str, Any], path: str, pattern: str, default: str) -> float | None:
    """peft's rule: the first pattern that matches the end of the module's path at a dot, else the default."""
    table = config.get(pattern) or {}
    value = config.get(default)
    if isinstance(table, Mapping):
        # Literal comparison, not peft's regular expression: a header is a stranger's text.
        keys = {key: key.removeprefix("^").removeprefix("text_model.") for key in table}
        hits = [table[key] for key, plain in keys.items() if path == plain or path.endswith("." + plain)]
        value = hits[0] if hits else value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e6:
        raise FormatError(f"{name}: {default} is {str(value)[:40]!r}, expected a number >= 0")
    return float(value)


def _kind(name: str, parts: Mapping[str, torch.Tensor]) -> Kind:
    kinds = {_KIND_OF[suffix] for suffix in parts}
    if len(kinds) != 1:
        raise FormatError(f"{name} mixes {sorted(kinds)}")
    kind = kinds.pop()
    need = {
        "lora": [["lora_A.weight"], ["lora_B.weight"]],
        "loha": [["hada_w1_a"], ["hada_w1_b"], ["hada_w2_a"], ["hada_w2_b"]],
        "lokr": [
            ["lokr_w1", "lokr_w1_a"],
            ["lokr_w1", "lokr_w1_b"],
            ["lokr_w2", "lokr_w2_a"],
            ["lokr_w2", "lokr_w2_b"],
        ],
    }[kind]
    for choice in need:
        if not any(c in parts for c in choice):
            raise FormatError(f"{name} lacks {choice[-1]}")
    return kind  # type: ignore[return-value]


def _rank(kind: Kind, parts: Mapping[str, torch.Tensor], declared: float | None) -> int:
    if kind == "lora":
        return parts["lora_A.weight"].shape[0]
    if kind == "loha":
        return parts["hada_w1_b"].shape[0]
    for suffix in ("lokr_w2_b", "lokr_w1_b"):
        if suffix in parts:
            return parts[suffix].shape[0]
    # Two full factors: the rank only has to be large enough for peft to make full factors again.
    return int(declared or max(*parts["lokr_w1"].shape, *parts["lokr_w2"].shape[:2]))


def _checked(adapter: Adapter) -> Adapter:
    for name, module in adapter.modules.items():
        if name.partition(".")[0] not in COMPONENTS:
            raise FormatError(f"{name}: components are {COMPONENTS}")
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
                raise FormatError(f"{name}: the DoRA magnitude runs over inputs; peft represents only outputs")
    return adapter


# ---------------------------------------------------------------------------------------------- kohya


def _from_kohya(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Adapter:
    notes = _kohya_notes(metadata)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        flat, _, suffix = key.partition(".")
        name = module_name(flat)
        suffix = _FROM_KOHYA.get(suffix, suffix)
        if suffix == "alpha":
            if tensor.numel() != 1:
                raise FormatError(f"{key!r} has shape {tuple(tensor.shape)}; an alpha is one number")
            alphas[name] = float(tensor)
        elif suffix in _KIND_OF:
            grouped.setdefault(name, {})[suffix] = tensor
        else:
            raise FormatError(
                f"{key!r}: {suffix!r} has no counterpart in peft's LoRA, DoRA, LoHa or LoKr; merge it elsewhere"
            )
    if stray := sorted(set(alphas) - set(grouped)):
        raise FormatError(f"{stray[0]} has an alpha but no weights")
    modules = {}
    for name, parts in grouped.items():
        kind = _kind(name, parts)
        if "lora_magnitude_vector" in parts:
            parts["lora_magnitude_vector"] = _magnitude_to_peft(name, parts)
        rank = _rank(kind, parts, None)
        full = kind == "lokr" and "lokr_w1" in parts and "lokr_w2" in parts
        alpha = float(rank) if full else alphas.get(name, float(rank))
        module = Module(kind=kind, tensors=parts, rank=rank, alpha=alpha)
        modules[name] = _recall(module, notes.get(name))
    return _checked(Adapter(modules=modules))


def _magnitude_to_peft(name: str, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    scale, up = parts["lora_magnitude_vector"], parts["lora_B.weight"]
    if scale.shape[0] != up.shape[0] or scale.numel() != up.shape[0]:
        raise FormatError(
            f"{name}: dora_scale of shape {tuple(scale.shape)} runs over inputs (wd_on_output off); "
            "peft represents only a magnitude per output"
        )
    return scale.reshape(1, -1, 1, 1) if up.ndim == 4 else scale.reshape(-1)


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


def to_kohya(adapter: Adapter, *, uniform_alpha: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, header) in kohya / LyCORIS keys, every module with an explicit `.alpha` (alpha*sqrt(r) for rsLoRA).

    Args:
        uniform_alpha: give every LoRA module the same alpha and move the difference into `lora_up`. diffusers' own
            reader of kohya files loses per-module alphas of attention layers; files for everyone need this. The
            move is one float multiplication, so it is not exact to the bit unless the ratio is a power of two.
    """
    if uniform_alpha:
        adapter = _unify(adapter)
    sdxl = "text_encoder_2" in adapter.components
    tensors: dict[str, torch.Tensor] = {}
    notes = {}
    for name, module in adapter.modules.items():
        flat = kohya_name(name, sdxl=sdxl)
        full = "lokr_w1" in module.tensors and "lokr_w2" in module.tensors
        for suffix, tensor in module.tensors.items():
            if suffix == "lora_magnitude_vector":
                tensor = tensor.reshape(-1, *[1] * (module.tensors["lora_B.weight"].ndim - 1))
            elif suffix == "lokr_w1" and full and module.scale != 1:
                tensor = tensor * module.scale
            tensors[f"{flat}.{_TO_KOHYA.get(suffix, suffix)}"] = tensor
        alpha = float(module.rank) if full else module.scale * module.rank
        tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        notes[name] = {"alpha": module.alpha, "rank": module.rank, "rslora": module.rslora}
    ranks = Counter(m.rank for m in adapter.modules.values())
    return tensors, {
        KOHYA_HEADER: json.dumps(notes, sort_keys=True),
        "ss_network_module": "networks.lora" if adapter.kinds in (["lora"], ["dora"]) else "lycoris.kohya",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
    }


def _unify(adapter: Adapter) -> Adapter:
    loras = {name: m for name, m in adapter.modules.items() if m.kind == "lora"}
    alphas = {name: m.scale * m.rank for name, m in loras.items()}
    if len(set(alphas.values())) <= 1:
        return adapter
    common = Counter(alphas.values()).most_common(1)[0][0]
    modules = dict(adapter.modules)
    for name, module in loras.items():
        up = module.tensors["lora_B.weight"]
        tensors = {**module.tensors, "lora_B.weight": up * (alphas[name] / common)}
        modules[name] = replace(module, tensors=tensors, alpha=common, rslora=False)
    return replace(adapter, modules=modules)


# ---------------------------------------------------------------------------------------------- diffusers and peft


def to_diffusers(adapter: Adapter) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, header) for `pytorch_lora_weights.safetensors`: LoRA and DoRA only, alphas in the header."""
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


def _prefixed(prefix: str, module: Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in module.tensors.items()}


def _old_text_keys(prefix: str, module: Module) -> dict[str, torch.Tensor]:
    # diffusers' text-encoder reader expects its older spelling and recognises it by this infix; transformers, which it
    # hands the rest to, wants the magnitude's full parameter name.
    spelling = {
        "lora_A.weight": "lora_linear_layer.down.weight",
        "lora_B.weight": "lora_linear_layer.up.weight",
        "lora_magnitude_vector": "lora_magnitude_vector.weight",
    }
    return {f"{prefix}.{spelling.get(suffix, suffix)}": tensor for suffix, tensor in module.tensors.items()}


def _lora_config(modules: Mapping[str, Module]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig` that reproduce ranks, alphas, rsLoRA and DoRA of one component."""
    if len({m.dora for m in modules.values()}) > 1:
        plain = next(name for name, m in modules.items() if not m.dora)
        raise FormatError(f"{plain} is plain LoRA beside DoRA modules; peft has one use_dora per component")
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
    kinds = {m.kind for m in modules.values()}
    if len(kinds) != 1:
        raise FormatError(f"{component} mixes {sorted(kinds)}; a peft adapter is of one kind")
    kind = kinds.pop()
    config = _lora_config(modules) if kind == "lora" else _lycoris_config(kind, modules, adapter.options.get(component))
    tensors = {f"base_model.model.{name}.{s}": t for name, m in modules.items() for s, t in m.tensors.items()}
    return tensors, {"peft_type": kind.upper(), "inference_mode": True, **config}


def _lycoris_config(kind: str, modules: Mapping[str, Module], options: Mapping[str, Any] | None) -> dict[str, Any]:
    rank, rank_pattern = _pattern({n: m.rank for n, m in modules.items()})
    alpha, alpha_pattern = _pattern({n: m.alpha for n, m in modules.items()})
    suffixes = {suffix for m in modules.values() for suffix in m.tensors}
    guessed: dict[str, Any] = {"use_effective_conv2d": bool(suffixes & {"hada_t1", "lokr_t2"})}
    if kind == "lokr":
        guessed |= {"decompose_both": "lokr_w1_a" in suffixes, "decompose_factor": _decompose_factor(modules)}
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(modules),
        **guessed,
        **(options or {}),
    }


def _decompose_factor(modules: Mapping[str, Module]) -> int:
    """The one factor under which peft splits every layer as these weights are split."""
    from peft.tuners.lokr.layer import factorization

    splits = set()
    for module in modules.values():
        t = module.tensors
        out_l, in_m = t["lokr_w1"].shape if "lokr_w1" in t else (t["lokr_w1_a"].shape[0], t["lokr_w1_b"].shape[1])
        if "lokr_w2" in t:
            out_k, in_n = t["lokr_w2"].shape[:2]
        elif "lokr_t2" in t:
            out_k, in_n = t["lokr_w2_a"].shape[1], t["lokr_w2_b"].shape[1]
        else:
            out_k, in_n = t["lokr_w2_a"].shape[0], t["lokr_w2_b"].shape[1]
        splits |= {(out_l, out_k), (in_m, in_n)}
    for factor in [-1, *sorted({left for left, _ in splits})]:
        # A decomposed w2 over a kernel has in_n*kh*kw columns: such a split cannot be checked without the layer.
        if all(factorization(a * b, factor) == (a, b) for a, b in splits):
            return factor
    raise FormatError(
        "the Kronecker factors follow no single decompose_factor, which peft needs; merge this LoKr instead"
    )

"""Arithmetic on adapters: the change they make, merging it in, sums, re-ranking, extraction, and the error of each.

The error of an approximation is always relative: the Frobenius norm of what is missing over that of what was wanted,
taken over all modules together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .adapter import Adapter, Module, Tokens
from .errors import AdapterError, FormatError
from .placement import stored

__all__ = [
    "Merged",
    "change_shape",
    "delta",
    "deltas",
    "extract",
    "merge",
    "merged_into",
    "rerank",
    "to_lora",
    "weighted_sum",
]


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """A LoRA and how much of the wanted change it misses."""

    adapter: Adapter
    error: float
    """Relative Frobenius error over all modules, in [0, 1]."""
    errors: Mapping[str, float]
    """Per module."""


def delta(module: Module, weight: torch.Tensor) -> torch.Tensor:
    """What a module adds to `weight` (out, in[, kh, kw]) at adapter weight 1, in float32 (float64 for float64)."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    parts = {name: tensor.to(weight.device, dtype) for name, tensor in module.tensors.items()}
    made = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _whole, "norm": _whole}[module.kind]
    change = made(parts, weight.shape) * module.scale
    if not module.decomposed:
        return change
    # DoRA (arXiv:2402.09353, eq. 5): the changed weight, rescaled to a learned norm per output, or per input.
    base = weight.to(dtype)
    changed = base + change
    magnitude = parts.get("dora_scale", parts.get("lora_magnitude_vector"))
    assert magnitude is not None
    over_inputs = "dora_scale" in parts and _over_inputs(module, weight.shape)
    axis = 1 if over_inputs else 0
    norm = changed.movedim(axis, 0).flatten(1).norm(dim=1)
    shape = [1] * weight.ndim
    shape[axis] = -1
    rescaled: torch.Tensor = changed * (magnitude.reshape(-1) / norm).reshape(shape) - base
    return rescaled


def _over_inputs(module: Module, shape: Sequence[int]) -> bool:
    """Whether LyCORIS' magnitudes are one per input (1, in, …) instead of one per output (out, 1, …)."""
    scale = module.tensors["dora_scale"]
    return scale.ndim > 1 and scale.shape[0] == 1 and shape[0] != 1


def _whole(p: Mapping[str, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    return p["diff" if "diff" in p else "w_norm"].reshape(shape)


def _lora(p: Mapping[str, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    return (p["lora_B.weight"].flatten(1) @ p["lora_A.weight"].flatten(1)).reshape(shape)


def _cp(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A convolution from its CP/Tucker factors: core (r, r, kh, kw), a (r, out), b (r, in)."""
    return torch.einsum("ijhw,io,jc->ochw", core, a, b)


def _loha(p: Mapping[str, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    if "hada_t1" in p:
        one = _cp(p["hada_t1"], p["hada_w1_a"], p["hada_w1_b"])
        two = _cp(p["hada_t2"], p["hada_w2_a"], p["hada_w2_b"])
    else:
        one, two = p["hada_w1_a"] @ p["hada_w1_b"], p["hada_w2_a"] @ p["hada_w2_b"]
    return (one * two).reshape(shape)


def _lokr(p: Mapping[str, torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    one = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        two = p["lokr_w2"]
    elif "lokr_t2" in p:
        two = _cp(p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        two = p["lokr_w2_a"] @ p["lokr_w2_b"]
    if two.ndim == 4:
        one = one[..., None, None]
    return torch.kron(one, two.contiguous()).reshape(shape)


def change_shape(p: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """The shape of what a module's factors make; of LoHa and LoKr without a core, a kernel is in the columns."""
    if "lora_A.weight" in p:
        return (p["lora_B.weight"].shape[0], *p["lora_A.weight"].shape[1:])
    if whole := [p[name] for name in ("diff", "w_norm") if name in p]:
        return tuple(whole[0].shape)
    if "hada_t1" in p:
        return (p["hada_w1_a"].shape[1], p["hada_w1_b"].shape[1], *p["hada_t1"].shape[2:])
    if "hada_w1_a" in p:
        return (p["hada_w1_a"].shape[0], p["hada_w1_b"].shape[1])
    rows, columns = p["lokr_w1"].shape if "lokr_w1" in p else (p["lokr_w1_a"].shape[0], p["lokr_w1_b"].shape[1])
    if "lokr_w2" in p:
        return (rows * p["lokr_w2"].shape[0], columns * p["lokr_w2"].shape[1], *p["lokr_w2"].shape[2:])
    if "lokr_t2" in p:
        return (rows * p["lokr_w2_a"].shape[1], columns * p["lokr_w2_b"].shape[1], *p["lokr_t2"].shape[2:])
    return (rows * p["lokr_w2_a"].shape[0], columns * p["lokr_w2_b"].shape[1])


def _module(model: torch.nn.Module, path: str) -> Any:
    """The model's module of that name, which some text encoders have in `text_model`; None where there is none."""
    for spelt in (path, f"text_model.{path}"):
        try:
            return model.get_submodule(spelt)
        except AttributeError:
            continue
    return None


def _layer(model: torch.nn.Module, path: str, name: str) -> torch.nn.Module:
    layer = _module(model, path)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if not isinstance(getattr(base, "weight", None), torch.Tensor):
        raise AdapterError(f"{name}: the model has no such layer")
    return base  # type: ignore[no-any-return]


def deltas(adapter: Adapter, models: Mapping[str, torch.nn.Module], *, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """Every weight's change at that weight; DoRA, which is no sum, has it on its low-rank part, as peft does.

    Magnitudes that peft has not (`dora_scale`) are taken as LyCORIS does at weight 1, and the change scaled.

    Args:
        adapter: what is to be added.
        models: component -> the base's model, whose weights decide the shapes; they stay as they are.
        weight: scale of the adapter's change.

    Returns:
        "component.path" of a layer -> the change of its weight, of the same shape; changed biases are not among them.

    Raises:
        FormatError: factors that do not make a weight of the layer's shape.
    """
    result = {}
    for name, module in adapter.modules.items():
        if set(module.tensors) in ({"diff_b"}, {"b_norm"}):
            continue
        base = stored(_named_layer(name, models))
        scaled = replace(module, alpha=module.alpha * weight) if module.dora else module
        try:
            result[name] = delta(scaled, base.detach()) * (1 if module.dora else weight)
        except RuntimeError as error:
            raise FormatError(f"{name}: its factors do not make a weight of shape {tuple(base.shape)}") from error
    return result


def _bias_deltas(
    adapter: Adapter, models: Mapping[str, torch.nn.Module], *, weight: float = 1.0
) -> dict[str, torch.Tensor]:
    """Every bias' change at that weight."""
    result = {}
    for name, module in adapter.modules.items():
        found = [module.tensors[parameter] for parameter in ("diff_b", "b_norm") if parameter in module.tensors]
        if found:
            layer = _named_layer(name, models)
            if layer.bias is None:
                raise AdapterError(f"{name}: the adapter changes a bias, the model's layer has none")
            base = stored(layer, "bias")
            dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
            result[name] = found[0].to(base.device, dtype).reshape(base.shape) * weight
    return result


def _named_layer(name: str, models: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    component, _, path = name.partition(".")
    if component not in models:
        raise AdapterError(f"{name}: no model for {component}; given are {sorted(models)}")
    return _layer(models[component], path, name)


# ---------------------------------------------------------------------------------------------- merging


class Merged:
    """An adapter added into the weights; `unmerge()` puts the original bits back.

    Args:
        adapter: what was added.
        models: component -> the model that it was added into.
        saved: "component.path.parameter" -> its values before.
    """

    def __init__(
        self, adapter: Adapter, models: Mapping[str, torch.nn.Module], saved: Mapping[str, torch.Tensor]
    ) -> None:
        self._adapter, self._models, self._saved = adapter, models, dict(saved)

    def originals(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Parameter -> its value as it was, for those of one of the models."""
        split = ((name.partition("."), value) for name, value in self._saved.items())
        return {path: value for (component, _, path), value in split if self._models[component] is model}

    def unmerge(self) -> None:
        """Restore the weights to the bit; calling it twice is harmless. The last merge is undone first."""
        for name, value in self._saved.items():
            model = self._models[name.partition(".")[0]]
            stack = merged_into(model)
            if stack and stack[-1] is not self:
                raise AdapterError("another adapter was merged on top of this one; unmerge that first")
            _restore(model, name, value)
        self._saved.clear()
        for model in self._models.values():
            if self in merged_into(model):
                merged_into(model).remove(self)


def _restore(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a parameter back; what was fused into it meanwhile through peft (`fuse_lora`) is fused again."""
    path, _, parameter = name.partition(".")[2].rpartition(".")
    target = stored(_layer(model, path, name), parameter, writable=True)
    tuner = _module(model, path)
    fused = list(getattr(tuner, "merged_adapters", []))
    if fused:
        tuner.unmerge()
    target.data.copy_(value)
    if fused:
        tuner.merge(adapter_names=fused)


def merged_into(model: torch.nn.Module) -> list[Merged]:
    """What was merged into a model and not taken out again, the first one first."""
    merged: list[Merged] = vars(model).setdefault("_merged_adapters", [])
    return merged


def merge(adapter: Adapter, models: Mapping[str, torch.nn.Module], *, weight: float = 1.0) -> Merged:
    """Add an adapter into the weights of `models` (component -> model), in place.

    The same adapter merged a second time is refused, never doubled. Originals are kept for an exact `unmerge`.

    Args:
        adapter: what is to be added.
        models: component -> model; those that the adapter does not touch are left out.
        weight: scale of the adapter's change.

    Returns:
        The handle that takes it out again.

    Raises:
        AdapterError: the adapter is already merged into one of the models.
    """
    models = {name: models[name] for name in adapter.components if name in models}
    for model in models.values():
        if any(_same(adapter, other._adapter) for other in merged_into(model)):
            raise AdapterError("this adapter is already merged here; unmerge it before merging it again")
    changes = {(name, "weight"): change for name, change in deltas(adapter, models, weight=weight).items()}
    changes |= {(name, "bias"): change for name, change in _bias_deltas(adapter, models, weight=weight).items()}
    saved = {}
    for (name, parameter), change in changes.items():
        target = stored(_named_layer(name, models), parameter, writable=True)
        saved[f"{name}.{parameter}"] = target.detach().clone()
        target.data.copy_(target.detach().to(change.dtype) + change)
    merged = Merged(adapter, models, saved)
    for model in models.values():
        merged_into(model).append(merged)
    return merged


def _same(a: Adapter, b: Adapter) -> bool:
    if a is b:
        return True
    return a.modules.keys() == b.modules.keys() and all(
        m.scale == b.modules[n].scale
        and m.tensors.keys() == b.modules[n].tensors.keys()
        and all(torch.equal(t, b.modules[n].tensors[s]) for s, t in m.tensors.items())
        for n, m in a.modules.items()
    )


# ---------------------------------------------------------------------------------------------- new LoRAs


def weighted_sum(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The exact sum of plain LoRAs: ranks add up. DoRA, LoHa and LoKr are not sums of factors: use `to_lora` first."""
    if not adapters:
        raise AdapterError("weighted_sum needs at least one adapter")
    names = list(dict.fromkeys(name for adapter, _ in adapters for name in adapter.modules))
    modules = {}
    for name in names:
        downs, ups = [], []
        for adapter, weight in adapters:
            if (module := adapter.modules.get(name)) is None:
                continue
            if module.kind != "lora" or module.dora or module.merges_only:
                kind = module.merges_only or ("dora" if module.dora else module.kind)
                raise FormatError(f"{name} is {kind}; turn it into a LoRA first (to_lora)")
            downs.append(module.tensors["lora_A.weight"].float())
            ups.append(module.tensors["lora_B.weight"].float() * (weight * module.scale))
        down, up = torch.cat(downs), torch.cat(ups, dim=1)
        tensors = {"lora_A.weight": down, "lora_B.weight": up}
        modules[name] = Module(kind="lora", tensors=tensors, rank=len(down), alpha=float(len(down)))
    return Adapter(modules=modules, tokens={token: own for one, _ in adapters for token, own in one.tokens.items()})


def _truncated(wanted: torch.Tensor, rank: int) -> tuple[Module, float, float]:
    """(best LoRA of that rank, squared norm missed, squared norm wanted): Eckart-Young."""
    u, s, vt = torch.linalg.svd(wanted.flatten(1).double(), full_matrices=False)
    kept = max(1, min(rank, int((s > s[0] * 1e-12).sum()) if s[0] > 0 else 1))
    root = s[:kept].sqrt()
    down, up = (root[:, None] * vt[:kept]).float(), (u[:, :kept] * root).float()
    if wanted.ndim == 4:
        down, up = down.reshape(kept, *wanted.shape[1:]), up[..., None, None]
    tensors = {"lora_A.weight": down.contiguous(), "lora_B.weight": up.contiguous()}
    module = Module(kind="lora", tensors=tensors, rank=kept, alpha=float(kept))
    return module, float((s[kept:] ** 2).sum()), float((s**2).sum())


def _approximate(
    wanted: Mapping[str, torch.Tensor], rank: int, tokens: Tokens | None = None, *, lost: float = 0.0
) -> Approximation:
    """`lost`: the squared norm of changes that no LoRA carries, which counts into the error."""
    if rank < 1:
        raise AdapterError(f"rank={rank}: expected a whole number >= 1")
    modules, errors, missed, total = {}, {}, lost, lost
    for name, change in wanted.items():
        modules[name], cut, whole = _truncated(change, rank)
        errors[name] = math.sqrt(cut / whole) if whole else 0.0
        missed, total = missed + cut, total + whole
    error = math.sqrt(missed / total) if total else 0.0
    return Approximation(adapter=Adapter(modules=modules, tokens=tokens or {}), error=error, errors=errors)


def rerank(adapter: Adapter, rank: int) -> Approximation:
    """A plain LoRA at another rank, at most `rank` per module; needs no base model."""
    wanted = {}
    for name, module in adapter.modules.items():
        if module.kind != "lora" or module.dora or module.merges_only:
            raise FormatError(f"{name} is not plain LoRA; use to_lora with the base model")
        down, up = module.tensors["lora_A.weight"].float(), module.tensors["lora_B.weight"].float()
        wanted[name] = _lora({"lora_A.weight": down, "lora_B.weight": up}, (len(up), *down.shape[1:])) * module.scale
    return _approximate(wanted, rank, adapter.tokens)


def to_lora(adapter: Adapter, models: Mapping[str, torch.nn.Module], rank: int) -> Approximation:
    """Any kind as the nearest LoRA of that rank, with the error stated; changed norms and biases count into it.

    Args:
        adapter: of any kind.
        models: component -> the base's model.
        rank: largest of a layer of the result.

    Returns:
        The LoRA and its relative error.

    Raises:
        AdapterError: the adapter changes norms and biases alone.
    """
    changes = deltas(adapter, models)
    lost = [*_bias_deltas(adapter, models).values(), *(c for c in changes.values() if c.ndim < 2)]
    wanted = {name: change for name, change in changes.items() if change.ndim > 1}
    if not wanted:
        raise AdapterError("the adapter changes norms and biases alone, which no LoRA can do")
    return _approximate(wanted, rank, adapter.tokens, lost=sum(map(_squared, lost)))


def _squared(change: torch.Tensor) -> float:
    return float((change.double() ** 2).sum())


def extract(base: Mapping[str, torch.nn.Module], tuned: Mapping[str, torch.nn.Module], rank: int) -> Approximation:
    """The LoRA nearest to the difference of two models of one architecture (component -> model).

    Linear and convolution weights are covered; where other parameters (norms, biases, embeddings) differ, their share
    counts into the error, because a LoRA cannot carry it.

    Args:
        base: component -> the model before fine-tuning.
        tuned: the same components after it.
        rank: largest of a layer of the result.

    Returns:
        The LoRA and its relative error.

    Raises:
        AdapterError: the models have different parameters or shapes, or the same weights.
    """
    wanted: dict[str, torch.Tensor] = {}
    lost = 0.0
    for component, model in base.items():
        layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        other = dict(tuned[component].named_parameters())
        if other.keys() != dict(model.named_parameters()).keys():
            raise AdapterError(
                f"{component}: the two models have different parameters; extraction needs one architecture"
            )
        for name, value in model.named_parameters():
            if other[name].shape != value.shape:
                raise AdapterError(
                    f"{component}.{name}: shapes {tuple(value.shape)} and {tuple(other[name].shape)} differ"
                )
            change = other[name].detach().float() - value.detach().float()
            path = name.removesuffix(".weight")
            if not change.any():
                continue
            if name.endswith(".weight") and path in layers and getattr(layers[path], "groups", 1) == 1:
                wanted[f"{component}.{path.removeprefix('text_model.')}"] = change
            else:
                lost += _squared(change)
    if not wanted:
        raise AdapterError("the two models have the same linear and convolution weights; there is nothing to extract")
    return _approximate(wanted, rank, lost=lost)

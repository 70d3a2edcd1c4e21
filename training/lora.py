"""LoRA and its relatives on the U-net and the text encoders, through peft; for subjects and captioned data alike.

Saved is what `adapters.load` reads: for LoRA and DoRA `pytorch_lora_weights.safetensors`, which
`pipe.load_lora_weights(folder)` reads too; for LoHa and LoKr, which diffusers pipelines do not load, a folder per
component in peft's layout, which `PeftModel.from_pretrained(pipe.unet, folder / "unet")` reads.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from adapters.keys import Adapter, from_any
from adapters.writing import LORA_FILE, write_adapter

from . import eva, norms, patterns, starts
from .batch import Batch
from .config import LoraSettings, ObjectiveSettings
from .data.batches import seed_of
from .dropout import drop
from .errors import TrainingError
from .method import Method, Weights, denoise_step
from .models import Parts
from .objective import build_objective
from .preserve import adapter_off
from .tokens import add_tokens, trained_tokens

__all__ = ["PRESETS", "WEIGHTS_NAME", "inject", "plan", "prepare"]

WEIGHTS_NAME = LORA_FILE
ADAPTER = "default"
PLUS = r"\.lora_B\.|\.lora_magnitude_vector\."  # peft's LoRA+ counts DoRA's magnitudes among them
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
PRESETS: dict[str, list[str]] = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all-linear": [*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", "time_emb_proj"],
    "conv": [*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", "time_emb_proj", "conv1", "conv2", "conv_shortcut"],
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the update of a layer's weight."""

    rank: int
    alpha: float


def prepare(
    parts: Parts, settings: LoraSettings | None = None, objective: ObjectiveSettings | None = None, *, seed: int = 0
) -> Method:
    """Adds adapters to the base's U-net (and text encoders) in place; `seed` fixes their starting values.

    Args:
        parts: the base, to which adapters are added in place.
        settings: rank, targets and kind; None: the defaults.
        objective: loss and noise; None: the defaults.
        seed: of the adapters' starting values.

    Raises:
        TrainingError: a target or pattern that names no layer, or a new token that cannot be added.
    """
    settings = settings or LoraSettings()
    sizes, chosen = plan(parts, settings)
    encoders = _encoders(parts)
    models: dict[str, Any] = {
        name: network for name, network in {"unet": parts.unet, **encoders}.items() if _of(sizes, name)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora"))
        for name, network in models.items():
            _inject(network, _config(settings, _of(sizes, name)))
            if settings.kind == "lora" and (settings.rank_dropout or settings.module_dropout):
                drop(network, ADAPTER, ranks=settings.rank_dropout, modules=settings.module_dropout)
    if settings.tokens:
        add_tokens(parts, settings.tokens)
        models |= encoders
    bound = build_objective(parts.scheduler, objective)
    taken = _taken(models, settings)
    return Method(
        name=settings.kind,
        parts=parts,
        objective=bound,
        models=models,
        step=partial(denoise_step, parts=parts, objective=bound),
        save=partial(_save, parts=parts, sizes=_doubled(sizes, settings) if taken else sizes, settings=settings),
        result=starts.subtract_start(taken) if taken else dict,
        trains_text=bool(settings.tokens) or any(name in models for name in encoders),
        tokens=tuple(settings.tokens),
        switch=lambda: starts.at_start(models, taken) if taken else adapter_off(models),
        after_step=norms.bounded(models, ADAPTER, settings.max_norm) if settings.max_norm else None,
        factors={PLUS: settings.plus_ratio} if settings.plus_ratio != 1 else {},
        chosen=tuple(chosen),
        begin=partial(_begin, models) if settings.start == "eva" else None,
    )


def _begin(models: Mapping[str, Any], batches: Iterable[Batch], step: Callable[[Batch], Any]) -> str:
    return eva.begin_with_inputs(models, ADAPTER, batches, step)


def plan(parts: Parts, settings: LoraSettings) -> tuple[dict[str, Size], list[str]]:
    """What each layer that is adapted gets, by `component.layer`, and the table of what the patterns caught.

    Args:
        parts: the base; nothing is changed.
        settings: rank, targets and kind.

    Raises:
        TrainingError: a target or pattern that names no layer, or a start that these layers cannot have.
    """
    for module in (parts.unet, *parts.text_encoders):
        if ADAPTER in getattr(module, "peft_config", {}):
            raise TrainingError(
                f"{type(module).__name__} already has an adapter; load the base anew with models.load_parts"
            )
    targets = PRESETS[settings.targets] if isinstance(settings.targets, str) else settings.targets
    layers = {"unet": _matching(parts.unet, targets, preset=isinstance(settings.targets, str))}
    encoders = _encoders(parts) if settings.text_encoder else {}
    layers |= {name: _ending(encoder, TEXT_TARGETS) for name, encoder in encoders.items()}
    named = [f"{name}.{layer}" for name, found in layers.items() for layer in found]
    silent = _silent({"unet": parts.unet, **encoders}, layers) if settings.dora else []
    sizes, chosen = _sizes(settings, [name for name in named if name not in silent])
    if silent:
        chosen.append(f"lora.dora: an output without any weight has no direction, so not adapted: {', '.join(silent)}")
    if settings.start not in ("default", "gaussian"):
        for name, network in {"unet": parts.unet, **encoders}.items():
            starts.check_start(settings.start, network, {layer: size.rank for layer, size in _of(sizes, name).items()})
    convolutions = [name for name in sizes if isinstance(_module(parts, name), nn.Conv2d)]
    if settings.start == "eva" and convolutions:
        chosen.append(f"lora.start: eva is for linear layers; {len(convolutions)} convolutions have the default start")
    return sizes, chosen


def _module(parts: Parts, name: str) -> nn.Module:
    """A layer by `component.layer`."""
    component, _, layer = name.partition(".")
    network: nn.Module = {"unet": parts.unet, **_encoders(parts)}[component]
    return network.get_submodule(layer)


def _silent(networks: Mapping[str, nn.Module], layers: Mapping[str, list[str]]) -> list[str]:
    """Layers with an output whose weights are all zero: DoRA divides by their norm, and the loss would be NaN."""
    return [
        f"{name}.{layer}"
        for name, found in layers.items()
        for layer in found
        if isinstance(weight := networks[name].get_submodule(layer).weight, Tensor)
        and not weight.is_meta
        and not bool(weight.detach().flatten(1).any(1).all())
    ]


def _encoders(parts: Parts) -> dict[str, Any]:
    return dict(zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False))


def inject(unet: Any, settings: LoraSettings) -> None:
    """The adapter alone, with one rank, on a U-net of any device."""
    targets = PRESETS[settings.targets] if isinstance(settings.targets, str) else settings.targets
    layers = _matching(unet, targets, preset=isinstance(settings.targets, str))
    _inject(unet, _config(settings, dict.fromkeys(layers, Size(rank=settings.rank, alpha=settings.rank))))


def _taken(models: Mapping[str, Any], settings: LoraSettings) -> dict[str, Tensor]:
    """Matrices that were taken out of the base's weights, as they start; empty where none were."""
    if settings.start not in starts.TAKEN:
        return {}
    return {
        f"{name}.{key}": parameter.detach().clone()
        for name, model in models.items()
        for key, parameter in model.named_parameters()
        if ".lora_A." in key or ".lora_B." in key
    }


def _doubled(sizes: Mapping[str, Size], settings: LoraSettings) -> dict[str, Size]:
    """Twice the rank at the same scale: alpha/rank, or alpha/sqrt(rank)."""
    factor = 2**0.5 if settings.rslora else 2.0
    return {name: Size(rank=2 * size.rank, alpha=factor * size.alpha) for name, size in sizes.items()}


def _ending(network: torch.nn.Module, targets: list[str]) -> list[str]:
    """Layers whose names are, or end in, one of the targets."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and any(name == target or name.endswith(f".{target}") for target in targets)
    ]


def _sizes(settings: LoraSettings, layers: list[str]) -> tuple[dict[str, Size], list[str]]:
    """What each layer that is adapted gets, and the table of what the patterns caught.

    Raises:
        TrainingError: a pattern that catches nothing, or patterns that leave nothing to adapt.
    """
    ranks = patterns.caught("lora.ranks", settings.ranks, layers)
    rank_of = dict.fromkeys(layers, settings.rank) | patterns.by_name(settings.ranks, ranks)
    kept = [name for name in layers if rank_of[name]]
    if not any(name.startswith("unet.") for name in kept):
        raise TrainingError("lora.ranks: nothing of the U-net is adapted, every rank is 0")
    alphas = patterns.caught("lora.alphas", settings.alphas, kept)
    alpha_of = {name: settings.alpha or rank_of[name] for name in kept} | patterns.by_name(settings.alphas, alphas)
    sizes = {name: Size(rank=rank_of[name], alpha=alpha_of[name]) for name in kept}

    def said(names: list[str]) -> str:
        found = sorted({f"rank {sizes[name].rank}, alpha {sizes[name].alpha:g}" for name in names if name in sizes})
        return f"layers, {'; '.join(found) or 'not adapted'}"

    return sizes, [
        *patterns.caught_table("lora.ranks", ranks, layers, said),
        *patterns.caught_table("lora.alphas", alphas, kept, said),
    ]


def _of(sizes: Mapping[str, Size], component: str) -> dict[str, Size]:
    """Those of a component, by the layer's name in it."""
    prefix = f"{component}."
    return {name.removeprefix(prefix): size for name, size in sizes.items() if name.startswith(prefix)}


def _matching(unet: torch.nn.Module, targets: list[str], *, preset: bool) -> list[str]:
    """The layers of this U-net that the targets name; a preset may name some that only other bases have."""
    missing = [target for target in targets if not _ending(unet, [target])]
    if missing and not preset:
        layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        endings = sorted({name.rsplit(".", 1)[-1] for name in layers if not name.rsplit(".", 1)[-1].isdigit()})
        raise TrainingError(
            f"lora.targets: {', '.join(missing)} names no layer of the U-net; allowed are the presets "
            f"{', '.join(PRESETS)} or a list of layer names such as {', '.join(endings)}"
        )
    return _ending(unet, targets)


def _config(settings: LoraSettings, sizes: Mapping[str, Size]) -> Any:
    """peft's configuration of a component; its layers are named whole, so peft adapts these and no others."""
    rank, alpha = settings.rank, settings.alpha or settings.rank
    shared: dict[str, Any] = {
        "r": rank,
        "target_modules": list(sizes),
        "rank_pattern": _pattern({name: size.rank for name, size in sizes.items() if size.rank != rank}),
        "alpha_pattern": _pattern({name: size.alpha for name, size in sizes.items() if size.alpha != alpha}),
    }
    dropped = {"rank_dropout": settings.rank_dropout, "module_dropout": settings.module_dropout}
    if settings.kind == "loha":
        return LoHaConfig(alpha=alpha, **dropped, **shared)  # type: ignore[arg-type]
    if settings.kind == "lokr":
        return LoKrConfig(alpha=alpha, **dropped, **shared)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # `starts.subtract_start` takes its place.
        warnings.filterwarnings("ignore", ".*path_initial_model_for_weight_conversion")
        return LoraConfig(
            lora_alpha=alpha,  # type: ignore[arg-type]  # a float is fine where it is used
            lora_dropout=settings.dropout,
            init_lora_weights=True if settings.start in ("default", "eva") else settings.start,
            use_rslora=settings.rslora,
            use_dora=settings.dora,
            **shared,
        )


def _pattern(values: Mapping[str, Any]) -> dict[str, Any]:
    """One expression per value, since peft tries them in turn for every layer."""
    names: dict[Any, list[str]] = {}
    for name, value in values.items():
        names.setdefault(value, []).append(re.escape(name))
    return {"|".join(some): value for value, some in names.items()}


def _inject(module: Any, config: Any) -> None:
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    module._hf_peft_config_loaded = True  # what diffusers' and transformers' add_adapter set as well
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _save(
    weights: Weights,
    folder: Path,
    metadata: dict[str, str],
    *,
    parts: Parts,
    sizes: Mapping[str, Size],
    settings: LoraSettings,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    modules = {"unet": parts.unet, **dict(zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False))}
    found = []
    for name in dict.fromkeys(layer.partition(".")[0] for layer in sizes):
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        state = get_peft_model_state_dict(modules[name], state_dict=own)
        own_sizes = _of(sizes, name)
        for size in dict.fromkeys(own_sizes.values()):
            some = {f"{name}.{key}": value for key, value in state.items() if own_sizes[_layer(key)] == size}
            config = _config(replace(settings, rank=size.rank, alpha=size.alpha), {})
            found.append(from_any(some, config=config.to_dict(), component=name))
    adapter = Adapter(
        modules={key: module for part in found for key, module in part.modules.items()},
        options={name: options for part in found for name, options in part.options.items()},
        tokens=trained_tokens(weights, settings.tokens),
    )
    write_adapter(folder, adapter, metadata)


def _layer(key: str) -> str:
    """The layer that a tensor in peft's spelling belongs to."""
    return re.sub(r"\.(lora|hada|lokr)_.*", "", key)

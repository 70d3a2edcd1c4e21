"""LoRA and its relatives on the U-net and the text encoders, through peft; for subjects and captioned data alike.

Saved is what `adapters.load` reads: for LoRA and DoRA `pytorch_lora_weights.safetensors`, which
`pipe.load_lora_weights(folder)` reads too; for LoHa and LoKr, which diffusers pipelines do not load, a folder per
component in peft's layout, which `PeftModel.from_pretrained(pipe.unet, folder / "unet")` reads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from adapters.keys import Adapter, from_any
from adapters.writing import LORA_FILE, write_adapter

from .config import LoraSettings, ObjectiveSettings
from .data.batches import seed_of
from .errors import TrainingError
from .method import Method, Weights, denoise_step
from .models import Parts
from .objective import build
from .preserve import adapter_off
from .tokens import add_tokens, trained_tokens

__all__ = ["PRESETS", "WEIGHTS_NAME", "prepare"]

WEIGHTS_NAME = LORA_FILE
ADAPTER = "default"
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
PRESETS: dict[str, list[str]] = {
    "attention": ATTENTION,
    "attention+ff": ATTENTION + FEED_FORWARD,
    "all-linear": [*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", "time_emb_proj"],
    "conv": [*ATTENTION, *FEED_FORWARD, "proj_in", "proj_out", "time_emb_proj", "conv1", "conv2", "conv_shortcut"],
}


def prepare(
    parts: Parts, settings: LoraSettings | None = None, objective: ObjectiveSettings | None = None, *, seed: int = 0
) -> Method:
    """Adds adapters to the base's U-net (and text encoders) in place; `seed` fixes their starting values.

    Raises:
        TrainingError: a target that names no module of the U-net, or a new token that cannot be added.
    """
    settings = settings or LoraSettings()
    models: dict[str, Any] = {"unet": parts.unet}
    targets = PRESETS[settings.targets] if isinstance(settings.targets, str) else settings.targets
    configs = {"unet": _config(settings, _matching(parts.unet, targets, preset=isinstance(settings.targets, str)))}
    encoders = dict(zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False))
    if settings.text_encoder:
        models |= encoders
        configs |= {name: _config(settings, TEXT_TARGETS) for name in encoders}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "lora"))
        for name, config in configs.items():
            _inject(models[name], config)
    if settings.tokens:
        add_tokens(parts, settings.tokens)
        models |= encoders
    bound = build(parts.scheduler, objective)
    return Method(
        name=settings.kind,
        parts=parts,
        objective=bound,
        models=models,
        step=partial(denoise_step, parts=parts, objective=bound),
        save=partial(_save, parts=parts, configs=configs, settings=settings),
        trains_text=settings.text_encoder or bool(settings.tokens),
        tokens=tuple(settings.tokens),
        switch=lambda: adapter_off(models),
    )


def _matching(unet: Any, targets: list[str], *, preset: bool) -> list[str]:
    """The targets that name a layer of this U-net; a preset may hold some that only other bases have."""
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    found = {target: any(name == target or name.endswith(f".{target}") for name in layers) for target in targets}
    missing = [target for target, there in found.items() if not there]
    if missing and not preset:
        endings = sorted({name.rsplit(".", 1)[-1] for name in layers if not name.rsplit(".", 1)[-1].isdigit()})
        raise TrainingError(
            f"lora.targets: {', '.join(missing)} names no layer of the U-net; allowed are the presets "
            f"{', '.join(PRESETS)} or a list of layer names such as {', '.join(endings)}"
        )
    return [target for target, there in found.items() if there]


def _config(settings: LoraSettings, targets: list[str]) -> Any:
    rank, alpha = settings.rank, settings.alpha or settings.rank
    if settings.kind == "loha":
        return LoHaConfig(
            r=rank,
            alpha=alpha,  # type: ignore[arg-type]
            module_dropout=settings.dropout,
            target_modules=targets,
        )
    if settings.kind == "lokr":
        return LoKrConfig(
            r=rank,
            alpha=alpha,  # type: ignore[arg-type]
            module_dropout=settings.dropout,
            target_modules=targets,
        )
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a float is fine where it is used
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=targets,
    )


def _inject(module: Any, config: Any) -> None:
    if ADAPTER in getattr(module, "peft_config", {}):
        raise TrainingError(f"{type(module).__name__} already has an adapter; load the base anew with models.load")
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
    configs: dict[str, Any],
    settings: LoraSettings,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    modules = {"unet": parts.unet, **dict(zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=False))}
    found = []
    for name, config in configs.items():
        own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
        state = get_peft_model_state_dict(modules[name], state_dict=own)
        named = {f"{name}.{key}": value for key, value in state.items()}
        found.append(from_any(named, config=config.to_dict(), component=name))
    adapter = Adapter(
        modules={key: module for part in found for key, module in part.modules.items()},
        options={name: options for part in found for name, options in part.options.items()},
        tokens=trained_tokens(weights, settings.tokens),
    )
    write_adapter(folder, adapter, metadata)

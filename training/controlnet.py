"""ControlNet (Zhang et al. 2023): a trained copy of the U-net's encoder that reads a conditioning image."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from adapters.edges import Canny
from adapters.files import write_tensors

from .batch import Batch
from .config import ControlNetSettings, ObjectiveSettings
from .data.batches import seed_of
from .errors import TrainingError
from .hub import offline_if_unreachable
from .method import Method, Weights, conditions_of, text_of
from .models import Parts
from .objective import Objective, build_objective

__all__ = ["prepare"]

WIDTHS = (16, 32, 96, 256)  # of the conditioning embedding for a VAE factor of 8; each but the first halves the size


def prepare(
    parts: Parts,
    settings: ControlNetSettings | None = None,
    objective: ObjectiveSettings | None = None,
    *,
    edges: Canny | None = None,
    seed: int = 0,
) -> Method:
    """A new ControlNet beside the frozen U-net, with zero-initialised outputs: at step 0 it changes nothing.

    Args:
        parts: the base.
        settings: how the network begins; None: the defaults.
        objective: loss and noise; None: the defaults.
        edges: the detector that makes the conditions; the ControlNet keeps it in its config. null: they are no edges.
        seed: of the weights of a new network.

    Raises:
        TrainingError: `start` is no ControlNet for this base, or `channels` does not fit the VAE's factor.
    """
    settings = settings or ControlNetSettings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "controlnet"))
        network = _given(settings.start, parts) if settings.start else _fresh(settings.channels, parts)
    if edges is not None:
        network.register_to_config(**edges.config)
    network.requires_grad_(True).float()
    bound = build_objective(parts.scheduler, objective)
    return Method(
        name="controlnet",
        parts=parts,
        objective=bound,
        models={"controlnet": network},
        step=partial(_step, parts=parts, objective=bound),
        save=partial(_save, network=network),
        whole=True,
        conditioning_dropout=settings.dropout,
        needs_conditioning=True,
        controlnet=network,
    )


def _fresh(channels: tuple[int, ...] | None, parts: Parts) -> Any:
    halvings = parts.vae_scale_factor.bit_length() - 1
    widths = tuple(channels or WIDTHS[: halvings + 1])
    if len(widths) != halvings + 1:
        raise TrainingError(
            f"controlnet.channels must hold {halvings + 1} widths for a VAE factor of {parts.vae_scale_factor}, "
            f"got {list(widths)}"
        )
    return ControlNetModel.from_unet(parts.unet, conditioning_embedding_out_channels=widths)


def _given(start: str, parts: Parts) -> Any:
    offline_if_unreachable(start)
    try:
        network = ControlNetModel.from_pretrained(start, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise TrainingError(f"controlnet.start {start} is no ControlNet with safetensors weights: {error}") from error
    for name in ("in_channels", "block_out_channels", "cross_attention_dim"):
        ours, wanted = getattr(network.config, name), getattr(parts.unet.config, name)
        if (tuple(ours) if isinstance(ours, list) else ours) != (tuple(wanted) if isinstance(wanted, list) else wanted):
            raise TrainingError(f"controlnet.start {start} has {name} = {ours}, the base's U-net has {wanted}")
    return network


def _step(models: Mapping[str, Any], batch: Batch, dtype: torch.dtype, *, parts: Parts, objective: Objective) -> Tensor:
    text = text_of(models, batch, parts)
    image = batch["conditioning"].to(dtype) / 255
    conditions = conditions_of(text, batch["frame"], dtype)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        noisy = noisy.to(dtype)
        down, mid = models["controlnet"](noisy, timesteps, controlnet_cond=image, return_dict=False, **conditions)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        predicted: Tensor = parts.unet(noisy, timesteps, return_dict=False, **conditions, **residuals)[0]
        return predicted

    return objective.losses(predict, batch)


def _save(weights: Weights, folder: Path, metadata: dict[str, str], *, network: ControlNetModel) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    state = {key.removeprefix("controlnet."): value for key, value in weights.items()}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", state, metadata)

"""Writes a diffusers pipeline as the single file that it was published as: the names of the ldm and sgm code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["tensors", "unet_tensors", "write"]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
VAE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
OPENCLIP = {
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn": "attn",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def write(pipe: Any, path: Path, *, metadata: dict[str, str] | None = None, **more: Tensor) -> Path:
    """The pipeline as one file, with further tensors and metadata."""
    save_file(tensors(pipe) | {key: value.clone() for key, value in more.items()}, path, metadata)
    return path


def tensors(pipe: Any, *, openclip: bool = False) -> dict[str, Tensor]:
    """Every weight under its original name; with `openclip` the text encoder's are those of SD-2.x."""
    named = [(f"model.diffusion_model.{key}", value) for key, value in unet_tensors(pipe.unet)]
    named += [(f"first_stage_model.{key}", value) for key, value in _vae(pipe.vae)]
    if openclip:
        named += [(f"cond_stage_model.model.{key}", value) for key, value in _openclip(pipe.text_encoder)]
    elif hasattr(pipe, "text_encoder_2"):
        named += [(f"conditioner.embedders.0.transformer.{key}", value) for key, value in _clip(pipe.text_encoder)]
        named += [(f"conditioner.embedders.1.model.{key}", value) for key, value in _openclip(pipe.text_encoder_2)]
    else:
        named += [(f"cond_stage_model.transformer.{key}", value) for key, value in _clip(pipe.text_encoder)]
    return {key: value.detach().clone().contiguous() for key, value in named}


def unet_tensors(unet: Any) -> Iterator[tuple[str, Tensor]]:
    """A U-net's weights under their original names, without the prefix of the checkpoint."""
    layers = unet.config.layers_per_block + 1

    def spelt(key: str) -> str:
        if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", key):
            index = int(match[2]) * layers + int(match[4])
            side = f"input_blocks.{index + 1}" if match[1] == "down" else f"output_blocks.{index}"
            return f"{side}.{int(match[3] == 'attentions')}.{match[5]}"
        if match := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)", key):
            return f"input_blocks.{(int(match[1]) + 1) * layers}.0.op.{match[2]}"
        if match := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.+)", key):
            after = 2 if unet.config.up_block_types[int(match[1])].startswith("CrossAttn") else 1
            return f"output_blocks.{(int(match[1]) + 1) * layers - 1}.{after}.conv.{match[2]}"
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
            return f"middle_block.{1 if match[1] == 'attentions' else 2 * int(match[2])}.{match[3]}"
        return key

    for key, value in unet.state_dict().items():
        words = RESNET if ".resnets." in key else UNET
        name = spelt(key)
        for new, old in words.items():
            name = re.sub(rf"(^|\.){re.escape(new)}(?=\.)", rf"\g<1>{old}", name)
        yield name, value


def _vae(vae: Any) -> Iterator[tuple[str, Tensor]]:
    levels = len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
        for new, old in VAE.items():
            name = name.replace(new, old)
        attention = ".attn_1." in name and value.ndim == 2  # a convolution of one pixel in the original
        yield name, value[:, :, None, None] if attention else value


def _clip(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    for key, value in encoder.state_dict().items():
        yield "text_model." + key.removeprefix("text_model."), value


def _openclip(encoder: Any) -> Iterator[tuple[str, Tensor]]:
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    for key, value in state.items():
        name = key
        for new, old in OPENCLIP.items():
            name = name.replace(new, old)
        if key == "text_projection.weight":
            yield "text_projection", value.T
        elif match := re.fullmatch(r"(.+self_attn)\.q_proj\.(weight|bias)", key):
            together = torch.cat([state[f"{match[1]}.{one}_proj.{match[2]}"] for one in "qkv"])
            yield name.replace(f"q_proj.{match[2]}", f"in_proj_{match[2]}"), together
        elif not re.search(r"\.[kv]_proj\.", key):
            yield name, value

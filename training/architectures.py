"""The published models by their configs: enough to count their memory, or to time them with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "Architecture"]

_DOWN = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
_UP = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
_SD = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": _DOWN, "up_block_types": _UP}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# Width, inner width, layers and heads of the text encoders: CLIP ViT-L, OpenCLIP ViT-H and ViT-bigG.
_L, _H, _G = (
    dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), numbers, strict=True))
    for numbers in ((768, 3072, 12, 12), (1024, 4096, 23, 16), (1280, 5120, 32, 20))
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Settings of a base's networks, as their `config.json` has them where they differ from diffusers' defaults."""

    title: str
    base: str
    """Hub id of the published weights."""
    resolution: int
    """Pixels of a side that it was trained at."""
    unet: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    vae: dict[str, Any]


FAMILIES = {
    "sd15": Architecture(
        title="SD-1.5",
        base="stable-diffusion-v1-5/stable-diffusion-v1-5",
        resolution=512,
        unet=_SD | {"cross_attention_dim": 768, "attention_head_dim": 8},
        text_encoders=(_L,),
        vae=_VAE,
    ),
    "sd21": Architecture(
        title="SD-2.1",
        base="stabilityai/stable-diffusion-2-1",
        resolution=768,
        unet=_SD | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        text_encoders=(_H,),
        vae=_VAE,
    ),
    "sdxl": Architecture(
        title="SDXL",
        base="stabilityai/stable-diffusion-xl-base-1.0",
        resolution=1024,
        unet={
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text_encoders=(_L, _G | {"projection_dim": 1280}),
        vae=_VAE,
    ),
}

"""The parts of the pocket base: ordinary diffusers and transformers classes from their configs, fresh weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..tokenizer import MAX_LENGTH
from ..world import SIZE

__all__ = ["FACTOR", "LATENT_CHANNELS", "controlnet", "scheduler", "text_encoder", "unet", "vae"]

FACTOR = 4  # pixels per latent
LATENT_CHANNELS = 8
CROSS_DIM = 128


def vae() -> AutoencoderKL:
    """64 x 64 x 3 to 16 x 16 x 8.

    One norm group: with a group a channel, the last norm of the decoder wipes out the picture's mean color, and
    fitting stalls at 20 dB. No attention in the middle: all it would do here is cost time.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """12.6 M parameters; cross-attention at 16 x 16, 8 x 8 and, in the middle, 4 x 4."""
    return UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        cross_attention_dim=CROSS_DIM,
        # diffusers reads this as the NUMBER of heads (its known misnomer): 64 channels a head.
        attention_head_dim=(1, 2, 4),
        norm_num_groups=16,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Two layers of 128; tokens start wide apart (std 0.3), or the jointly trained encoder takes long to tell them."""
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CROSS_DIM,
            intermediate_size=4 * CROSS_DIM,
            projection_dim=CROSS_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model


def scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion, predicting v; samples from the last timestep down."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def controlnet(base: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet of ``base``; its condition encoder halves the picture twice, as the VAE does."""
    return ControlNetModel.from_unet(base, conditioning_embedding_out_channels=(16, 32, 96))

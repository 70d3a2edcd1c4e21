"""Random pipelines of a few thousand parameters, built from config: no files, no network."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

LATENT, TEXT, WIDTH = 8, 12, 16
STEPS = 3


def unet(seed=0, *, xl=False, **changes):
    """Attention at ratios 1 and 2 and in the mid block (SD), or at 2 only (SDXL: none at full size, depth 2)."""
    torch.manual_seed(seed)
    config = {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    if xl:
        config |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": WIDTH + 6 * 4,
        }
    return UNet2DConditionModel(**(config | changes)).eval()


def vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size=2 * LATENT,
    ).eval()


def seeded():
    return torch.Generator().manual_seed(3)


def scheduler(kind=DDIMScheduler, **changes):
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **changes)


def controlnet(model, seed=2):
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(model, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16))
    for parameter in net.parameters():  # the zero convolutions of a new ControlNet would hide it
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD_PARTS = {
    "text_encoder": None,
    "tokenizer": None,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
XL_PARTS = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}


def sd(kind=StableDiffusionPipeline, *, model=None, **parts):
    return quiet(kind(vae=vae(), unet=model or unet(), scheduler=scheduler(), **(SD_PARTS | parts)))


def xl(kind=StableDiffusionXLPipeline, *, model=None, **parts):
    return quiet(kind(vae=vae(), unet=model or unet(xl=True), scheduler=scheduler(), **(XL_PARTS | parts)))


def embeddings(images=1, *, seed=5, length=TEXT, xl=False):
    """Prompt and negative prompt embeddings, as a pipeline's keyword arguments."""
    generator = torch.Generator().manual_seed(seed)
    cond, uncond = (torch.randn(images, length, WIDTH, generator=generator) * 2 for _ in range(2))
    given = {"prompt_embeds": cond, "negative_prompt_embeds": uncond}
    if xl:
        given |= {
            "pooled_prompt_embeds": torch.randn(images, WIDTH, generator=generator),
            "negative_pooled_prompt_embeds": torch.randn(images, WIDTH, generator=generator),
        }
    return given


def noise(images=1, *, seed=7, size=(LATENT, LATENT)):
    return torch.randn(images, 4, *size, generator=torch.Generator().manual_seed(seed))


CALL = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"}
SIZE = {"height": 2 * LATENT, "width": 2 * LATENT}


def run_latents(pipe, **call):
    """A short run, as latents. Values of ... drop an argument."""
    return pipe(**{name: value for name, value in (CALL | call).items() if value is not ...}).images


def image(images=1, seed=11):
    return torch.rand(images, 3, 2 * LATENT, 2 * LATENT, generator=torch.Generator().manual_seed(seed))


def mask():
    """1 where an inpainting repaints: the right half."""
    half = torch.zeros(1, 1, 2 * LATENT, 2 * LATENT)
    half[..., LATENT:] = 1.0
    return half


class Spy:
    """Sees what the U-net put out before any guidance, and what the scheduler was given."""

    def __init__(self, pipe):
        self.raw, self.used = [], []
        self._pipe = pipe

    def __enter__(self):
        self._hook = self._pipe.unet.register_forward_hook(lambda m, a, out: self.raw.append(out[0].clone()))
        step = self._pipe.scheduler.step

        def seen(model_output, *args, **kwargs):
            self.used.append(model_output.clone())
            return step(model_output, *args, **kwargs)

        self._pipe.scheduler.step = seen
        return self

    def __exit__(self, *error):
        self._hook.remove()
        del self._pipe.scheduler.step


def text_parts():
    """A tokenizer that knows "red" and "dog" as words and spells the rest, and a text encoder for it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "do", "dog</w>"]
    vocabulary = {token: index for index, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [("r", "e"), ("re", "d</w>"), ("d", "o"), ("do", "g</w>")]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT)
    torch.manual_seed(6)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TEXT,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}


def ip_adapter_weights(model):
    """Random image-prompt weights for every cross-attention of `model`, in the layout diffusers loads."""
    torch.manual_seed(8)
    attention = {}
    crossing = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    for index, name in enumerate(crossing):
        width = model.get_submodule(name.removesuffix(".processor")).inner_dim
        for part in ("to_k_ip", "to_v_ip"):
            attention[f"{2 * index + 1}.{part}.weight"] = torch.randn(width, WIDTH)
    projection = {
        "proj.weight": torch.randn(4 * WIDTH, 6),
        "proj.bias": torch.randn(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    return {"image_proj": projection, "ip_adapter": attention}

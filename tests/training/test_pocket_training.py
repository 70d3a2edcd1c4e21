"""The methods learn on the real pocket base: lower loss at fixed noise, in the same images and held-out noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from training import config, controlnet, images, loop, lora, models, views
from training.pocket import PocketError, base_path


@pytest.fixture
def pocket() -> Path:
    try:
        return base_path()
    except PocketError as error:
        pytest.skip(str(error))


class Scenes:
    """A few scenes of the pocket world with their edges; the loop reads them like any source."""

    def __init__(self, count: int):
        from training.pocket import scenes

        self.made = [scenes.sample(5, index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index: int) -> images.Sample:
        from PIL import Image

        picture = Image.fromarray(self.made[index].image)
        return images.Sample(image=picture, caption=self.made[index].caption, conditioning=images.canny(picture))


def validation_losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "controlnet"])
def test_training_lowers_the_loss_at_fixed_noise(name: str, pocket: Path, tmp_path: Path) -> None:
    parts = models.load(pocket)
    method = lora.prepare(parts) if name == "lora" else controlnet.prepare(parts)
    data = views.Views(Scenes(4), resolution=64, multiple=parts.multiple)
    settings = config.TrainSettings(
        steps=60,
        batch_size=4,
        learning_rate=1e-3 if name == "lora" else 1e-4,
        trackers=[],
        validation=config.ValidationSettings(loss_samples=16, every=60),
    )
    loop.train(method, data, settings, out=tmp_path, say=lambda line: None)
    before, after = validation_losses(tmp_path)
    assert after < 0.97 * before

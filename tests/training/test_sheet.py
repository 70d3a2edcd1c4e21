"""What can be watched during a training: the sheet of samples, and what trackers get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_data import picture

from training import config, loop, lora, models, sheet
from training.data import crops, images
from training.errors import TrainingError

PROMPTS = ["a dog", "a cat"]


def train(base: Path, pictures: Path, out: Path, **changes: object) -> None:
    parts = models.load_parts(base)
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    asked = config.ValidationSettings(prompts=PROMPTS, steps=1, every=2)
    given = {"steps": 4, "trackers": [], "validation": asked, "learning_rate": 1e-2, "log_every": 2, **changes}
    settings = config.TrainSettings(**given)  # type: ignore[arg-type]
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    record = {"lora": {"rank": 2, "ranks": {}}, "out": str(out)}
    loop.train(method, data, settings, out=out, say=lambda line: None, record=record)


def test_the_sheet_grows_by_a_row_at_each_validation_and_shows_the_samples(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights: list[int] = []
    write = sheet.write_sheet

    def watched(*given: object) -> object:
        file = write(*given)  # type: ignore[arg-type]
        assert file is not None
        with Image.open(file) as page:
            heights.append(page.height)
        return file

    monkeypatch.setattr(loop, "write_sheet", watched)
    train(base, pictures, tmp_path)
    assert len(heights) == 3  # steps 0, 2 and 4
    assert heights[1] - heights[0] == heights[2] - heights[1] > 32
    page = np.asarray(Image.open(tmp_path / "samples" / sheet.SHEET))
    for step in (0, 2, 4):
        for number in range(len(PROMPTS)):
            shown = np.asarray(Image.open(tmp_path / "samples" / f"step-{step:06d}" / f"{number:02d}.png"))
            top = sheet.LABEL + sheet.MARGIN + step // 2 * (heights[1] - heights[0]) + sheet.LABEL
            left = sheet.MARGIN + number * (32 + sheet.MARGIN)
            assert np.array_equal(page[top : top + 32, left : left + 32], shown)


def test_a_long_training_s_sheet_keeps_the_first_and_last_row(tmp_path: Path) -> None:
    assert sheet.write_sheet(tmp_path, ["a"]) is None
    for step in range(100):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        picture(step, (400, 200)).save(folder / "00.png")
    file = sheet.write_sheet(tmp_path, ["ein Wörterbuch 犬"])
    assert file is not None
    page = Image.open(file)
    high = sheet.CELL // 2 + sheet.MARGIN + sheet.LABEL
    assert page.size == (sheet.CELL + 2 * sheet.MARGIN, sheet.ROWS * high + sheet.LABEL + sheet.MARGIN)
    for row, step in ((0, 0), (sheet.ROWS - 1, 99)):
        top = 2 * sheet.LABEL + sheet.MARGIN + row * high
        cell = page.crop((sheet.MARGIN, top, sheet.MARGIN + sheet.CELL, top + sheet.CELL // 2))
        wanted = picture(step, (400, 200)).resize(cell.size, Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(cell), np.asarray(wanted))


def test_tensorboard_gets_settings_losses_and_samples(base: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(base, pictures, tmp_path, trackers=["tensorboard"], project="rex")
    found = EventAccumulator(str(tmp_path / "rex"), size_guidance={"images": 0})
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [2, 4]
    assert [event.step for event in found.Images("samples")] == [0, 2, 4]
    written = next(tmp_path.rglob("hparams.yml")).read_text()
    assert "lora.rank: 2" in written


def test_a_project_that_is_no_folder_name_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"train.project must be a name without slashes, got 'a/b'"):
        config.TrainSettings(project="a/b")

"""Sources and views: every kind of caption and image file is read, and every bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import fill, picture

from training.config import DataSettings
from training.data import crops, images
from training.errors import TrainingError


def test_captions_come_from_text_files_metadata_or_one_prompt(tmp_path: Path) -> None:
    root = fill(tmp_path / "a", 3)
    assert images.folder(root, minimum=8).captions == ["picture a", "picture b", "picture c"]
    assert images.folder(root, prompt="a dog", minimum=8).captions == ["a dog"] * 3
    listed = fill(tmp_path / "b", 2, captions=False)
    rows = [{"file_name": "0.png", "text": "zero"}, {"file_name": "1.png", "caption": "one"}]
    (listed / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert images.folder(listed, minimum=8).captions == ["zero", "one"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "0.txt").unlink(), r"0.png has no caption: give data.prompt, 0.txt"),
        (lambda root: (root / "9.txt").write_text("x"), r"9.txt is a caption without image"),
        (lambda root: (root / "0.png").write_bytes(b"no image"), r"0.png cannot be read"),
        (lambda root: picture(0, (4, 40)).save(root / "0.png"), r"0.png is 4x40, below data.minimum = 8"),
        (
            lambda root: (root / "metadata.jsonl").write_text('{"file_name": "7.png", "text": "x"}'),
            r"metadata.jsonl has a caption for 7.png, which is not there",
        ),
        (lambda root: (root / "metadata.jsonl").write_text('{"file": 1}'), r"metadata.jsonl line 1 needs file_name"),
    ],
)
def test_bad_folders_are_refused_by_name(spoil, message: str, tmp_path: Path) -> None:
    root = fill(tmp_path / "a", 2)
    spoil(root)
    with pytest.raises(TrainingError, match=message):
        images.folder(root, minimum=8)


def test_a_broken_picture_is_left_out_and_named_where_three_remain(tmp_path: Path) -> None:
    root, said = fill(tmp_path / "a", 5), []
    (root / "masks").mkdir()
    for number in range(5):
        Image.fromarray(np.eye(32, dtype=np.uint8) * 255).save(root / "masks" / f"{number}.png")
    (root / "1.png").write_bytes(b"no image")
    found = images.folder(root, minimum=8, masks=root / "masks", say=said.append)
    assert [file.name for file in found.files] == ["0.png", "2.png", "3.png", "4.png"]
    assert [file.name for file in found.masks or []] == ["0.png", "2.png", "3.png", "4.png"]
    assert found.captions == ["picture a", "picture c", "picture d", "picture e"]
    assert any("1 picture(s) left out: 1.png cannot be read" in line for line in said)
    for number in (2, 3):
        (root / f"{number}.png").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"(?s)1.png cannot be read.*the first of 3 problems.*2.png cannot be read"):
        images.folder(root, minimum=8)


def test_a_truncated_jpeg_and_an_animation_are_named_in_one_go(tmp_path: Path) -> None:
    root = fill(tmp_path / "a", 1)
    picture(1, (200, 200)).save(root / "cut.jpg")
    data = (root / "cut.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(data[: len(data) // 2])
    picture(1).save(root / "moving.gif", save_all=True, append_images=[picture(2)])
    with pytest.raises(
        TrainingError, match=r"(?s)cut.jpg cannot be read.*the first of 2 problems.*moving.gif is animated \(2 frames"
    ):
        images.folder(root, prompt="x", minimum=8)


def test_missing_and_empty_folders_say_where_and_what_was_there(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"data.source: folder .*gone does not exist"):
        images.folder(tmp_path / "gone")
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(TrainingError, match=r"no images found in .*looked for .png.*there is notes.doc"):
        images.folder(tmp_path)
    with pytest.raises(TrainingError, match=r"no images found in"):
        images.load_images(DataSettings(source=str(tmp_path)))


def test_pairs_need_a_partner_of_the_same_size(tmp_path: Path) -> None:
    root, pairs = fill(tmp_path / "a", 2), fill(tmp_path / "edges", 2, captions=False)
    assert images.folder(root, conditioning=pairs, minimum=8)[1].conditioning is not None
    picture(0, (40, 32)).save(pairs / "0.png")
    (pairs / "1.png").unlink()
    with pytest.raises(TrainingError, match=r"(?s)0.png is 40x32, 0.png is 32x32.*1.png has no partner"):
        images.folder(root, conditioning=pairs, minimum=8)


def test_every_color_mode_becomes_upright_8_bit_rgb(tmp_path: Path) -> None:
    grey16 = Image.fromarray(np.full((4, 4), 65535, np.uint16))
    assert images.rgb(grey16).getpixel((0, 0)) == (255, 255, 255)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert images.rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert images.rgb(Image.new("CMYK", (4, 4), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    turned = Image.new("RGB", (8, 4))
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = images.rgb(Image.open(tmp_path / "turned.png"))
    assert upright.size == (4, 8)
    assert upright.getpixel((3, 0)) == (255, 0, 0)


def test_the_three_kinds_of_local_datasets(tmp_path: Path) -> None:
    import datasets

    pictures = [picture(number) for number in range(3)]
    made = datasets.Dataset.from_dict({"image": pictures, "text": ["a", "b", "c"]}).cast_column(
        "image", datasets.Image()
    )
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "made.parquet")
    root = fill(tmp_path / "folder" / "train", 3, captions=False)
    rows = [json.dumps({"file_name": f"{number}.png", "text": "abc"[number]}) for number in range(3)]
    (root / "metadata.jsonl").write_text("\n".join(rows))
    for name in ("saved", "made.parquet", "folder"):
        source = images.load_images(DataSettings(source=str(tmp_path / name), minimum=8))
        assert [source[index].caption for index in range(3)] == ["a", "b", "c"], name
        assert np.array_equal(np.asarray(source[1].image), np.asarray(pictures[1])), name
    with pytest.raises(TrainingError, match=r"no column caption; it has image, text; set data.image_column"):
        images.dataset(tmp_path / "saved", caption="caption")


class Numbers:
    """A source of one's own: nothing but a length and samples."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> images.Sample:
        return images.Sample(image=picture(index), caption=f"number {index}", mask=Image.new("L", (32, 32), 255))


def test_any_map_of_samples_is_a_source() -> None:
    data = crops.Views(Numbers(), resolution=32, flip=True)
    assert isinstance(Numbers(), images.SampleSource)
    assert len(data) == 6
    assert data.caption(4) == "number 1"
    assert data[4].mask is not None
    torch.testing.assert_close(data[4].pixels, data[1].pixels.flip(-1))
    assert len({data.key(index) for index in range(6)}) == 6


def test_crops_are_fixed_and_spread_along_the_longer_side(tmp_path: Path) -> None:
    root = tmp_path / "a"
    root.mkdir()
    picture(0, (96, 32)).save(root / "wide.png")
    data = crops.Views(images.folder(root, prompt="x", minimum=8), resolution=32, crops=3)
    assert [data[index].frame.tolist()[3] for index in range(3)] == [0, 32, 64]
    whole = torch.from_numpy(np.array(picture(0, (96, 32)))).permute(2, 0, 1).float() / 127.5 - 1
    for index in range(3):
        torch.testing.assert_close(data[index].pixels, whole[..., 32 * index : 32 * index + 32])


def test_buckets_keep_the_area_and_fit_the_image(tmp_path: Path) -> None:
    sizes = crops.bucket_sizes(512, 5, 64)
    assert sizes[0] == (512, 512)
    assert all(abs(height * width / 512**2 - 1) < 0.15 and height % 64 == width % 64 == 0 for height, width in sizes)
    root = tmp_path / "a"
    root.mkdir()
    for name, size in (("wide", (128, 64)), ("tall", (64, 128)), ("square", (64, 64))):
        picture(0, size).save(root / f"{name}.png")
    data = crops.Views(images.folder(root, prompt="x", minimum=8), resolution=64, multiple=8, buckets=3)
    found = {data.source.files[index].stem: data.size(index) for index in range(3)}
    assert found["square"] == (64, 64)
    assert found["wide"][0] < found["wide"][1]
    assert found["tall"][0] > found["tall"][1]
    assert all(tuple(data[index].pixels.shape[1:]) == data.size(index) for index in range(3))


def test_further_resolutions_show_every_picture_once_more_at_its_shape(tmp_path: Path) -> None:
    root = tmp_path / "a"
    root.mkdir()
    for name, size in (("0wide", (128, 64)), ("1square", (64, 64))):
        picture(0, size).save(root / f"{name}.png")
    source = images.folder(root, prompt="x", minimum=8)
    more = {"resolution": 64, "multiple": 8, "buckets": 3, "flip": True, "crops": 2}
    one, two = crops.Views(source, **more), crops.Views(source, further=[32, 64], **more)
    assert len(two) == 2 * len(one)  # 64 counts once
    assert [two.key(index) for index in range(len(one))] == [one.key(index) for index in range(len(one))]
    assert two.used() == [(64, 64), (48, 88), (32, 32), (24, 48)]
    assert len({two.key(index) for index in range(len(two))}) == len(two)
    assert all(tuple(two[index].pixels.shape[1:]) == two.size(index) for index in range(len(two)))
    assert two.resolution == 64
    shown = crops.Views(source, resolution=64, multiple=1).at(two.used())
    assert [shown.size(index) for index in range(len(shown))] == [size for size in two.used() for _ in range(2)]
    assert all(tuple(shown[index].pixels.shape[1:]) == shown.size(index) for index in range(len(shown)))
    with pytest.raises(TrainingError, match=r"data.resolutions must be a multiple of 8 .*got 36; try 32"):
        crops.Views(source, further=[36], **more)


def test_a_resolution_the_base_cannot_take_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"data.resolution must be a multiple of 16.*got 40; try 32"):
        crops.Views(Numbers(), resolution=40, multiple=16)

"""Files as users have them: other encodings, cameras' formats, litter, subfolders, cells of every kind, odd masks."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from training_data import fill, picture

from training import command_line, config, text
from training.config import DataSettings
from training.data import crops, folders, images, pictures
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
CAPTION = "a photo of sks café dog"


def read(folder: Path, **more) -> images.Folder:
    return images.folder(folder, minimum=8, **more)


def one(tmp_path: Path, name: str = "a.png") -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    picture(0).save(root / name)
    return root


def encoded(image: Image.Image, kind: str = "PNG", **more) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


# ---------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption"])
def test_a_byte_order_mark_is_no_part_of_a_caption(encoding: str, name: str, tmp_path: Path) -> None:
    root = one(tmp_path)
    (root / name).write_bytes(f"{CAPTION}\r\n".encode(encoding))
    assert read(root).captions == [CAPTION]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_nor_of_metadata_prompts_or_configs(encoding: str, tmp_path: Path) -> None:
    from recipes.common.prompts import texts

    root = one(tmp_path)
    line = json.dumps({"file_name": "a.png", "text": CAPTION}, ensure_ascii=False)
    (root / "metadata.jsonl").write_bytes(f"{line}\r\n".encode(encoding))
    assert read(root).captions == [CAPTION]
    (tmp_path / "prompts.txt").write_bytes(f"{CAPTION}\r\n".encode(encoding))
    assert texts([], str(tmp_path / "prompts.txt")) == [CAPTION]
    (tmp_path / "c.yaml").write_bytes(f"source: x\nprompt: {CAPTION}\n".encode(encoding))
    assert command_line.parse(DataSettings, ["--config", str(tmp_path / "c.yaml")]).prompt == CAPTION


@pytest.mark.parametrize(("encoding", "found"), [("utf-16", "UTF-16"), ("utf-16-le", "byte"), ("cp1252", "0xe9")])
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_another_encoding_is_named_with_its_file(encoding: str, found: str, name: str, tmp_path: Path) -> None:
    root = one(tmp_path)
    line = json.dumps({"file_name": "a.png", "text": CAPTION}, ensure_ascii=False)
    (root / name).write_bytes((line if name.endswith("l") else CAPTION).encode(encoding))
    with pytest.raises(TrainingError, match=rf"{name} is not UTF-8 text \(.*{found}.*\); save it as UTF-8"):
        read(root)
    with pytest.raises(TrainingError, match=rf"--config .*{name} is not UTF-8 text"):
        command_line.parse(DataSettings, ["--config", str(root / name)])


def test_a_config_and_a_printed_prompt_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("source: x\nprompt: sks 犬 ☕\n", "utf-8")
    code = (
        "from training import command_line, config, errors\n"
        "with errors.exit_on_error():\n"
        f"    found = command_line.parse(config.DataSettings, ['--config', {str(tmp_path / 'c.yaml')!r}])\n"
        f"    config.write_settings(config.resolved(found), {str(tmp_path / 'd.yaml')!r})\n"
        "    print(found.prompt)\n"
    )
    plain = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain |= {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip() == rb"sks \u72ac \u2615"
    assert "prompt: sks 犬 ☕" in (tmp_path / "d.yaml").read_text("utf-8")


def test_no_room_opens_a_text_file_in_the_locale_s_encoding() -> None:
    """Ruff's PLW1514 sees this only where it can tell that the object is a path."""
    careless = []
    for room in ("scfg", "training", "adapters", "recipes", "benchmarks"):
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                given = len(node.args) + sum(word.arg == "encoding" for word in node.keywords)
                if given < {"read_text": 1, "write_text": 2}.get(node.func.attr, 0):
                    careless.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not careless


@pytest.mark.parametrize("content", ["", " \r\n", "\ufeff"])
def test_an_empty_caption_is_named(content: str, tmp_path: Path) -> None:
    root = one(tmp_path)
    (root / "a.txt").write_bytes(content.encode())
    with pytest.raises(TrainingError, match=r"a.txt is empty: write a caption, or give data.prompt"):
        read(root)


def test_a_readme_is_no_caption(tmp_path: Path) -> None:
    root = one(tmp_path)
    (root / "a.txt").write_text(CAPTION, "utf-8")
    (root / "README.txt").write_text("notes", "utf-8")
    assert read(root).captions == [CAPTION]


def test_what_cannot_be_read_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"prompt_file .*gone.txt cannot be read: No such file"):
        text.read_text(tmp_path / "gone.txt", "prompt_file")


# -------------------------------------------------------------------------------------------------- kinds of files


def test_the_main_picture_of_a_file_with_several_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    picture(0, (40, 30)).save(root / "phone.JPG", format="MPO", save_all=True, append_images=[picture(1, (16, 12))])
    picture(0, (40, 30)).save(root / "scan.tif", save_all=True, append_images=[picture(1, (16, 12))])
    picture(1, (16, 12)).save(root / "thumb_first.tif", save_all=True, append_images=[picture(0, (40, 30))])
    with Image.open(root / "phone.JPG") as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)
    source = read(root, prompt="x")
    assert [source.size(index) for index in range(3)] == [(40, 30)] * 3
    for index in (1, 2):
        assert np.array_equal(np.asarray(source[index].image), np.asarray(picture(0, (40, 30))))


@pytest.mark.parametrize(("kind", "suffix"), [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png")])
def test_an_animation_is_refused_whatever_it_is(kind: str, suffix: str, tmp_path: Path) -> None:
    picture(0).save(tmp_path / f"a.{suffix}", kind, save_all=True, append_images=[picture(1), picture(2)])
    with pytest.raises(TrainingError, match=rf"a.{suffix} is animated \(3 frames\); save one frame"):
        read(tmp_path, prompt="x")


def test_files_that_pillow_reads_are_read_and_others_counted_and_named(tmp_path: Path) -> None:
    root, said = fill(tmp_path / "a", 2), []
    picture(3).save(root / "c.jfif", "JPEG")
    if features.check("avif"):
        picture(4).save(root / "d.avif")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", "0.png:Zone.Identifier"):
        (root / name).write_bytes(b"\0junk")
    (root / "__MACOSX").mkdir()
    (root / "__MACOSX" / "x.jpg").write_bytes(b"junk")
    for name in ("IMG_0001.xyz", "clip.mov"):
        (root / name).write_bytes(b"junk")
    source = read(root, prompt="x", say=said.append)
    assert len(source) == 3 + features.check("avif")
    assert said == [f"{root}: 2 file(s) are not read and left out: IMG_0001.xyz, clip.mov"]


def test_heic_is_read_with_pillow_heif_and_else_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, said = fill(tmp_path / "a", 1), []
    try:
        import pillow_heif
    except ImportError:
        (root / "IMG_0.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        assert len(read(root, prompt="x", say=said.append)) == 1
        assert "1 file(s) are not read and left out: IMG_0.HEIC" in said[0]
        assert "pip install pillow-heif" in said[0]
        (root / "0.png").unlink()
        (root / "0.txt").unlink()
        with pytest.raises(TrainingError, match=r"no images found.*pip install pillow-heif"):
            read(root, prompt="x")
    else:
        pillow_heif.from_pillow(picture(5, (64, 48))).save(root / "IMG_0.HEIC")
        assert [read(root, prompt="x").size(index) for index in range(2)] == [(32, 32), (64, 48)]


def test_a_broken_link_is_named_and_a_folder_called_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    root = fill(tmp_path / "a", 1)
    (root / "old.png").mkdir()
    assert len(read(root, prompt="x")) == 1
    os.symlink("/nowhere/b.png", root / "b.png")
    with pytest.raises(TrainingError, match=r"b.png is a link to /nowhere/b.png, which is not there"):
        read(root, prompt="x")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\0\0\0WEBP", b"P6 9", b"\0" * 40])
def test_a_file_that_is_no_picture_never_ends_in_a_traceback(data: bytes) -> None:
    assert "cannot be read" in (pictures.inspect(data, 8).problem or "")


def test_a_single_file_as_source_is_told_to_be_one(tmp_path: Path) -> None:
    root = one(tmp_path)
    with pytest.raises(TrainingError, match=r"a.png is a file; give the folder that it lies in"):
        read(root / "a.png", prompt="x")


# ------------------------------------------------------------------------------------------------------ subfolders


def test_subfolders_are_taken_and_said(tmp_path: Path) -> None:
    root, said = fill(tmp_path / "a", 2), []
    fill(root / "more", 3)
    fill(root / "masks", 2, captions=False)
    source = read(root, say=said.append)
    assert len(source) == 5
    assert said == [f"{root}: 3 of 5 pictures lie in subfolders: more (3)"]


def test_kohya_s_repeats_and_class_names(tmp_path: Path) -> None:
    root, said = tmp_path / "img", []
    fill(root / "10_sks dog", 1, captions=False)
    fill(root / "3_sks dog side", 2)
    fill(root / "2024_beach", 1)
    source = images.load_images(DataSettings(source=str(root), minimum=8), say=said.append)
    assert source.captions.count("sks dog") == 10
    assert source.captions.count("picture a") == 3 + 1
    assert source.captions.count("picture b") == 3
    assert "10_sks dog (1, 10 times each)" in said[0]
    assert len({source.key(index) for index in range(len(source))}) == 2  # 0.png is the same everywhere


def test_masks_of_subfolders_pair_by_their_path(tmp_path: Path) -> None:
    root = tmp_path / "a"
    for name in ("x", "y"):
        fill(root / name, 1)
        (root / "masks" / name).mkdir(parents=True)
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    half.save(root / "masks" / "x" / "0.png")
    half.transpose(Image.Transpose.ROTATE_180).save(root / "masks" / "y" / "0.png")
    source = read(root, masks=root / "masks")
    assert [source[index].mask.getpixel((0, 0)) for index in range(2)] == [255, 0]


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path) -> None:
    from recipes.common.units import subject_folders

    root = tmp_path / "rex [2]"
    fill(root / "train", 2)
    fill(root / "test", 3)
    assert len(images.load_images(DataSettings(source=str(root), minimum=8))) == 2
    assert subject_folders([str(root)]) == [str(root)]
    assert subject_folders([str(tmp_path / "rex*")]) == [str(root)]
    import datasets

    table = datasets.Dataset.from_dict({"image": [picture(0)], "text": ["a"]}).cast_column("image", datasets.Image())
    table.to_parquet(root / "made.parquet")
    assert len(images.load_images(DataSettings(source=str(root / "made.parquet"), minimum=8))) == 1


# ------------------------------------------------------------------------------------------------ captions in cells


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("null", r"metadata.jsonl line 2: text of 0.png is 'None' \(NoneType\)"),
        ("NaN", r"line 2: text of 0.png is 'nan' \(float\)"),
        ("3", r"line 2: text of 0.png is '3' \(int\)"),
        ("[]", r"line 2: text of 0.png is '\[\]' \(list\)"),
        ('["a", null]', r"line 2: text of 0.png is"),
        ('" "', r"line 2: text of 0.png is empty"),
    ],
)
def test_a_cell_that_is_no_caption_is_named_with_its_row(cell: str, message: str, tmp_path: Path) -> None:
    import datasets

    root = fill(tmp_path / "a", 1, captions=False)
    (root / "metadata.jsonl").write_text(f'\n{{"file_name": "0.png", "text": {cell}}}\n', "utf-8")
    with pytest.raises(TrainingError, match=message):
        read(root)
    value = json.loads(cell)
    table = datasets.Dataset.from_dict({"image": [picture(0)] * 2, "text": [value] * 2})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    with pytest.raises(TrainingError, match=r"row 0: text is"):
        images.dataset(tmp_path / "saved", minimum=8)


def test_a_row_of_metadata_that_is_no_table_is_named(tmp_path: Path) -> None:
    root = fill(tmp_path / "a", 1, captions=False)
    (root / "metadata.jsonl").write_text('"text file_name"\n{"file_name": 3, "text": "x"}\n{\n', "utf-8")
    with pytest.raises(TrainingError, match=r"(?s)line 1 needs file_name.*line 2 needs file_name.*line 3 is no JSON"):
        read(root)


def test_the_caption_column_counts_for_folders_too(tmp_path: Path) -> None:
    root = fill(tmp_path / "a", 1, captions=False)
    row = {"file_name": "0.png", "text": "wrong", "long": "right"}
    (root / "metadata.jsonl").write_text(json.dumps(row), "utf-8")
    assert images.load_images(DataSettings(source=str(root), caption_column="long", minimum=8)).captions == ["right"]
    (root / "metadata.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"data.caption_column long names a key of metadata.jsonl"):
        images.load_images(DataSettings(source=str(root), caption_column="long", minimum=8))


def test_empty_pictures_masks_and_no_pictures_are_named_with_their_row(tmp_path: Path) -> None:
    import datasets

    columns = {"image": [picture(0), None], "mask": [None, picture(1).convert("L")], "text": ["a", "b"]}
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("image", datasets.Image()).cast_column("mask", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(TrainingError, match=r"(?s)row 1 is empty.*row 0: mask is empty"):
        images.dataset(tmp_path / "saved", mask="mask", minimum=8)
    datasets.Dataset.from_dict({"image": [3], "text": ["a"]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(TrainingError, match=r"column image holds .*int.* and no images; set data.image_column"):
        images.dataset(tmp_path / "numbers", minimum=8)
    datasets.Dataset.from_dict({"image": ["/gone.png"], "text": ["a"]}).save_to_disk(tmp_path / "paths")
    with pytest.raises(TrainingError, match=r"row 0 cannot be read .*gone.png"):
        images.dataset(tmp_path / "paths", minimum=8)


def test_several_captions_are_kept_apart(tmp_path: Path) -> None:
    import datasets

    root = fill(tmp_path / "a", 2, captions=False)
    rows = [("0.png", ["one", "two"]), ("1.png", "three"), ("1.png", "four")]
    lines = [json.dumps({"file_name": name, "text": said}) for name, said in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    views = crops.Views(read(root), resolution=32)
    assert [views.captions(index) for index in range(2)] == [("one", "two"), ("three", "four")]
    assert {views.draw(0, seed) for seed in range(9)} == {"one", "two"}
    table = datasets.Dataset.from_dict({"image": [picture(0), picture(1)], "text": [["one", "two"], ["five"]]})
    table.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "saved")
    views = crops.Views(images.dataset(tmp_path / "saved", minimum=8), resolution=32)
    assert [views.captions(index) for index in range(2)] == [("one", "two"), ("five",)]
    assert views.varies()
    assert views.renamed(str.upper).captions(0) == ("ONE", "TWO")


# ------------------------------------------------------------------------------------------------ masks, conditions


def half(mode: str, low: object, high: object, size: tuple[int, int] = (8, 8)) -> Image.Image:
    made = Image.new(mode, size, low)
    made.paste(high, (0, 0, size[0] // 2, size[1]))
    return made


TABLE = half("P", 0, 1)
TABLE.putpalette([0, 0, 0, 128, 0, 0])
PHOTO = picture(0, (8, 8)).convert("RGBA")
PHOTO.putalpha(half("L", 0, 255))


@pytest.mark.parametrize(
    "image",
    [
        half("L", 0, 255),
        half("L", 0, 1),
        half("1", 0, 1),
        half("RGB", "black", "white"),
        TABLE,
        half("RGBA", (0, 0, 0, 0), (255, 255, 255, 255)),
        half("RGBA", (255, 255, 255, 0), (255, 255, 255, 255)),
        half("RGBA", (0, 0, 0, 90), (255, 255, 255, 255)),
        half("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)),
        PHOTO,
        Image.fromarray(np.tile(np.array([1.0] * 4 + [0.0] * 4, np.float32), (8, 1))),
        Image.fromarray(np.tile(np.array([65535] * 4 + [0] * 4, np.uint16), (8, 1))),
        Image.fromarray(np.tile(np.array([1] * 4 + [0] * 4, np.uint16), (8, 1))),
    ],
    ids=lambda image: image.mode,
)
def test_a_mask_means_the_same_in_every_way_it_is_stored(image: Image.Image) -> None:
    expected = np.asarray(half("L", 0, 255))
    assert np.array_equal(np.asarray(pictures.mask(image)), expected)
    assert np.array_equal(np.asarray(pictures.mask(pictures.mask(image))), expected)


def test_soft_masks_stay_soft() -> None:
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert np.array_equal(np.asarray(pictures.mask(ramp)), np.asarray(ramp))


def test_a_mask_is_turned_as_its_picture_is(tmp_path: Path) -> None:
    root, masks, exif = tmp_path / "a", tmp_path / "m", Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    for place in (root, masks):
        place.mkdir()
    picture(0, (40, 20)).save(root / "a.png", exif=exif)
    half("L", 0, 255, (40, 20)).save(masks / "a.png", exif=exif)
    sample = read(root, prompt="x", masks=masks)[0]
    assert sample.image.size == sample.mask.size == (20, 40)
    assert np.asarray(sample.mask)[:20].min() == 255
    assert np.asarray(sample.mask)[20:].max() == 0


def test_a_mask_of_nothing_is_refused_and_one_of_everything_said(tmp_path: Path) -> None:
    root, masks, said = fill(tmp_path / "a", 2), tmp_path / "m", []
    masks.mkdir()
    Image.new("L", (32, 32), 255).save(masks / "0.png")
    half("L", 0, 255, (32, 32)).save(masks / "1.png")
    read(root, masks=masks, say=said.append)
    assert said == [f"{masks}: 1 of 2 masks are of one value all over: their whole picture counts"]
    Image.new("L", (32, 32), 0).save(masks / "0.png")
    with pytest.raises(TrainingError, match=r"m/0.png is black all over, so nothing of its picture would count"):
        read(root, masks=masks)


def depth(low: float, high: float, dtype: type, size: int = 32) -> np.ndarray:
    return np.linspace(low, high, size * size).reshape(size, size).astype(dtype)


@pytest.mark.parametrize(
    "values",
    [depth(0, 1, np.float32), depth(-3, 12.5, np.float32), depth(400, 5000, np.uint16), depth(0, 9e5, np.int32)],
    ids=["0 to 1", "metres", "millimetres", "int32"],
)
def test_a_deep_condition_keeps_its_levels(values: np.ndarray) -> None:
    shown = np.asarray(pictures.condition_as_rgb(Image.fromarray(values)))[..., 0]
    expected = (values.astype(np.float64) - values.min()) / (float(values.max()) - float(values.min())) * 255
    assert np.abs(shown - expected).max() <= 0.5 + 1e-6
    assert len(np.unique(shown)) == 256


def test_deep_conditions_are_said_once_and_nan_is_named(tmp_path: Path) -> None:
    root, maps, said = fill(tmp_path / "a", 2), tmp_path / "depth", []
    maps.mkdir()
    values = depth(0, 1, np.float32)
    values[0, 0] = np.inf  # the sky of a depth map
    Image.fromarray(values).save(maps / "0.tif")
    Image.fromarray(depth(0, 1, np.float32)).save(maps / "1.tif")
    source = read(root, conditioning=maps, say=said.append)
    assert said == [f"{maps}: 2 of 2 conditions have more than 8 bits; each is scaled by its own range"]
    shown = np.asarray(source[0].conditioning)[..., 0]
    assert shown[0, 0] == 255
    assert len(np.unique(shown)) == 256
    values[1, 1:4] = np.nan
    Image.fromarray(values).save(maps / "0.tif")
    with pytest.raises(TrainingError, match=r"depth/0.tif has 3 pixels that are NaN"):
        read(root, conditioning=maps)


def test_a_float_picture_keeps_its_levels() -> None:
    assert len(np.unique(np.asarray(images.rgb(Image.fromarray(depth(0, 1, np.float32)))))) == 256
    bad = Image.fromarray(np.full((8, 8), np.nan, np.float32))
    assert "64 pixels that are NaN" in (pictures.inspect(encoded(bad, "TIFF"), 1).problem or "")


@pytest.mark.parametrize("kind", ["folder", "dataset"])
@pytest.mark.parametrize("size", [(64, 32), (65, 32), (256, 128)])
def test_a_condition_of_another_size_is_resized_and_said(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    source, said = paired(kind, size, tmp_path)
    view = crops.Views(source, resolution=64)[0]
    red, shown = float((view.pixels[0] > 0).float().mean()), float((view.conditioning[0] > 127).float().mean())
    assert abs(red - shown) < 0.03
    assert source[0].conditioning.size == (128, 64)
    assert len(said) == 1
    assert "1 of 1 conditions have another size than their picture and are resized to it" in said[0]


@pytest.mark.parametrize("kind", ["folder", "dataset"])
@pytest.mark.parametrize("size", [(64, 64), (32, 64)])
def test_a_condition_of_another_shape_is_refused(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"is {size[0]}x{size[1]}, .* is 128x64; a pair needs one shape"):
        paired(kind, size, tmp_path)


def paired(kind: str, size: tuple[int, int], tmp_path: Path) -> tuple[images.SampleSource, list[str]]:
    """A picture of 128 x 64, its left half red, with a condition of `size` that shows the same; and what was said."""
    import datasets

    said: list[str] = []
    image, shown = half("RGB", "black", "red", (128, 64)), half("RGB", "black", "red", size)
    if kind == "folder":
        for name, content in (("f", image), ("c", shown)):
            (tmp_path / name).mkdir()
            content.save(tmp_path / name / "a.png")
        return read(tmp_path / "f", prompt="x", conditioning=tmp_path / "c", say=said.append), said
    table = datasets.Dataset.from_dict({"image": [image], "shown": [shown], "text": ["x"]})
    table.cast_column("image", datasets.Image()).cast_column("shown", datasets.Image()).save_to_disk(tmp_path / "saved")
    return images.dataset(tmp_path / "saved", conditioning="shown", minimum=8, say=said.append), said


# ----------------------------------------------------------------------------------------------------------- paths


@dataclass(frozen=True, kw_only=True)
class OnBase:
    base: config.BaseSettings


def test_a_tilde_is_the_home_folder_in_every_setting_but_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    based = command_line.parse(OnBase, ["--base.path", "~/models/sd"])
    assert based.base.path == "/home/someone/models/sd"
    given = command_line.parse(DataSettings, ["--source", "~/a", "--masks=~/b", "--prompt", "~/ a dog"])
    assert (given.source, given.masks, given.prompt) == ("/home/someone/a", "/home/someone/b", "~/ a dog")


def test_a_listing_of_a_folder_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    root, elsewhere = fill(tmp_path / "a", 1), fill(tmp_path / "b", 2)
    os.symlink(elsewhere, root / "linked")
    os.symlink(root, root / "myself")
    assert len(folders.scan(root).pictures) == 3

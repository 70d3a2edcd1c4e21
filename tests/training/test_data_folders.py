"""Folders of users, whole: every picture, caption, mask and list mutated. Data or a `TrainingError`, never for long."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hangs import limited
from mutated import mutate_bytes
from PIL import Image
from training_data import picture

from training.config import DataSettings
from training.data import crops, images
from training.errors import TrainingError

SECONDS = 10  # for one case, on a busy machine
SIZE = (24, 16)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Pictures of every kind with captions beside them or in a list, a subfolder, masks and conditions."""
    root = tmp_path_factory.mktemp("data") / "photos"
    (root / "2_sks dog").mkdir(parents=True)
    names = ("a.png", "b.jpg", "c.webp", "d.tif", "2_sks dog/e.bmp", "2_sks dog/f.gif", "h.png")
    for number, name in enumerate(names):
        picture(number, SIZE).save(root / name)
    for name in ("a.txt", "b.caption", "2_sks dog/e.txt"):
        (root / name).write_text(f"a photo of {name}", "utf-8")
    rows = [("c.webp", "one"), ("d.tif", ["two", "three"]), ("h.png", "four"), ("h.png", "five")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "README.txt").write_text("notes", "utf-8")
    half = Image.new("L", SIZE)
    half.paste(255, (0, 0, 12, 16))
    for place in ("masks", "conditioning"):
        for name in names:
            target = (root.parent / place / name).with_suffix(".png")
            target.parent.mkdir(parents=True, exist_ok=True)
            (half if place == "masks" else picture(9, SIZE)).save(target)
    return root.parent


# ---------------------------------------------------------------------------------------------- mutations


def png_header(data: bytes, dice: random.Random) -> bytes:
    """A PNG that says something else about itself, with a right checksum."""
    made = encoded(Image.open(io.BytesIO(data)).convert("RGB"), "PNG")
    width, height = dice.choice([(0, 0), (1, 2**31 - 1), (60_000, 60_000), (9, 9), (30_000, 4_000), (24, 17)])
    depth, color, lace = dice.choice([1, 2, 8, 16, 77]), dice.choice([0, 2, 3, 4, 6, 99]), dice.choice([0, 1, 5])
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, lace)
    return made[:12] + header + struct.pack(">I", zlib.crc32(header)) + made[33:]


def encoded(image: Image.Image, kind: str, **more: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


def odd_picture(_: bytes, dice: random.Random) -> bytes:
    """A whole picture as few tools write it: other kind, bits, colors, frames, sizes and turns."""
    size = dice.choice([SIZE, SIZE, SIZE[::-1], (1, 1), (8, 3000), (48, 32), (23, 16), (7, 5)])
    image, exif = picture(dice.randrange(9), size), Image.Exif()
    exif[0x0112] = dice.choice([0, 1, 2, 5, 6, 8, 9, 65535])
    values = np.asarray(image.convert("L"), np.float32)
    special = dice.choice([0.0, 1.0, -1.0, 1e-30, 3e38, float("nan"), float("inf"), 65535.0])
    dotted, flat = values.copy(), np.full_like(values, special)
    dotted[0, 0] = special
    more = {"save_all": True, "append_images": [picture(1, size), picture(2, size)]}
    with np.errstate(invalid="ignore"):
        deep = [
            Image.fromarray(kind(dice.choice([values, dotted, flat]))) for kind in (np.float32, np.uint16, np.int32)
        ]
    make: list[Callable[[], bytes]] = [
        *(lambda m=m: encoded(image.convert(m), "PNG", exif=exif) for m in ("1", "L", "P", "RGBA", "LA", "RGB")),
        *(lambda m=m: encoded(image.convert(m), "TIFF") for m in ("CMYK", "LAB", "YCbCr", "PA", "RGBA", "1")),
        *(lambda d=d: encoded(d, "TIFF") for d in deep),
        lambda: encoded(deep[1], "PNG"),
        lambda: encoded(image.convert("CMYK"), "JPEG", exif=exif),
        lambda: encoded(
            image, "JPEG", icc_profile=b"junk" * 9, comment="x" * 999, exif=b"Exif\0\0" + dice.randbytes(40)
        ),
        lambda: encoded(image, "PNG", transparency=(0, 0, 0)),
        *(lambda k=k: encoded(image, k, **more) for k in ("GIF", "PNG", "WEBP", "TIFF", "MPO")),
        lambda: encoded(image, "TIFF", save_all=True, append_images=[picture(1, (3, 3)), picture(2, (48, 32))]),
        lambda: encoded(image, dice.choice(["PPM", "TGA", "BMP", "ICO", "PDF", "EPS", "JPEG2000"])),
    ]
    return dice.choice(make)()


WEIRD: list[Any] = [
    *(None, True, [], {}, "", " ", "\ud800", "a\0b", "x" * 99_999, "../x", "/etc/passwd", ".", 0, 1e308),
    *(float("nan"), [[]], ["a", None], ["", "a"], "\u202e", "a\nb", {"a": []}, "masks/a.png", "CON", "\ufeff"),
]


def mutate_rows(data: bytes, dice: random.Random) -> bytes:
    """A list with a cell exchanged, a key lost or doubled, a line that is no table, or nested without end."""
    lines = data.decode().split("\n")
    at = dice.randrange(len(lines) - 1)
    row, key = json.loads(lines[at]), dice.choice(["file_name", "text"])
    lines[at] = dice.choice(
        [
            *(json.dumps({**row, key: dice.choice(WEIRD)}) for _ in range(3)),
            lines[at][:-1] + ', "n": 1' + "0" * 6000 + "}",
            json.dumps({k: v for k, v in row.items() if k != key}),
            lines[at][:-1] + ', "text": 3}',
            dice.choice(["[" * 100_000, '{"a":' * 100_000, "null", "3", '"file_name text"', "[]", "{}", "\0", "," * 9]),
        ]
    )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_text(data: bytes, dice: random.Random) -> bytes:
    text = data.decode()
    other = ["", " \r\n\t", text + "\0", "é" * 50_000, "a\r\nb\rc", "\ufeff" + text, "\x1b[2J" + text, "\u2028"]
    return dice.choice(
        [
            *(text.encode(code) for code in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")),
            *(each.encode() for each in other),
            b"\xff\xfe",
            b"\xed\xa0\x80",  # a surrogate, which is no UTF-8
            dice.randbytes(20),
        ]
    )


BY_SUFFIX: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    ".jsonl": [mutate_rows, mutate_rows, mutate_text, mutate_bytes],
    ".txt": [mutate_text, mutate_bytes],
    ".caption": [mutate_text, mutate_bytes],
}
PICTURE = [mutate_bytes, mutate_bytes, png_header, odd_picture, odd_picture, odd_picture]


def other_kind(path: Path, dice: random.Random) -> None:
    """Something else under the name of a file."""
    path.unlink()
    make: list[Callable[[], object]] = [
        lambda: None,
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("/dev/zero"),
        lambda: path.symlink_to(path.name),
        lambda: path.symlink_to("/nowhere/x.png"),
        lambda: path.symlink_to("/etc/passwd"),
        lambda: path.symlink_to(path.parent),
        lambda: path.write_bytes(b""),
        lambda: os.symlink(path, path.with_name("loop.png")),
    ]
    dice.choice(make)()


def beside(folder: Path, dice: random.Random) -> None:
    """Something more in the folder, under a name that few think of."""
    names = [*(b"\xff\xfe.png", b"a\nb.png", b"-rf.png", b"a.PNG", b" .png", "🐶.png".encode(), b"a.jpg")]
    names += [b"b.txt", b"new.png", b"x" * 250 + b".png", b"10_.png", b"[2].png", b"metadata.jsonl"]
    place = os.fsencode(dice.choice([folder, folder / "2_sks dog", folder.parent / "masks"])) + b"/"
    path = place + dice.choice(names)
    dice.choice(
        [
            lambda: Path(os.fsdecode(path)).write_bytes(encoded(picture(3, SIZE), "PNG")),
            lambda: os.path.lexists(path) or os.mkdir(path),
            lambda: os.path.lexists(path) or os.mkfifo(path),
            lambda: os.path.lexists(path) or os.symlink(b"..", path),
        ]
    )()


def mutate(folder: Path, dice: random.Random) -> str:
    """Changes one file and returns its name."""
    paths = sorted(path for path in folder.parent.rglob("*") if path.is_file())
    path = dice.choice([*paths, *(path for path in paths if path.suffix in BY_SUFFIX), folder / "metadata.jsonl"])
    if dice.random() < 0.15:
        other_kind(path, dice)
    elif dice.random() < 0.1:
        beside(folder, dice)
        return ""
    else:
        path.write_bytes(dice.choice(BY_SUFFIX.get(path.suffix, PICTURE))(path.read_bytes(), dice))
    return path.name


# ---------------------------------------------------------------------------------------------- what must be


def used(folder: Path, dice: random.Random, said: list[str]) -> None:
    """Everything that training does with a folder before it begins, and what it may rely on."""
    more: dict[str, Any] = {"masks": str(folder.parent / "masks")} if dice.random() < 0.7 else {}
    more |= {"conditioning": str(folder.parent / "conditioning")} if dice.random() < 0.5 else {}
    more |= {"prompt": "a sks dog"} if dice.random() < 0.2 else {}
    settings = DataSettings(source=str(folder), resolution=16, minimum=4, buckets=3, **more)
    source: Any = images.load_images(settings, say=said.append)
    for file in images.scan(folder).pictures:
        assert file in source.files or file.name in "".join(said), f"{file.name} is left out without a word"
    views = crops.views(source, settings, multiple=8)
    assert all(said for index in range(len(views)) for said in views.captions(index))
    for index in range(len(views)):
        view, key = views[index], views.key(index)
        assert key.isascii()
        assert view.caption == views.caption(index)
        assert view.caption.strip()
        view.caption.encode()
        assert view.pixels.shape[1:] == views.size(index)
        assert float(view.pixels.abs().max()) <= 1
        assert torch.isfinite(view.pixels).all()
        assert (view.mask is None) == ("masks" not in more)
        assert view.mask is None or 0 <= float(view.mask.min()) <= float(view.mask.max()) <= 1
        assert (view.conditioning is None) == ("conditioning" not in more)


@pytest.mark.parametrize("count", [200, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_folders_of_data(count: int, photos: Path, tmp_path: Path) -> None:
    dice, ends = random.Random(7), {"refused": 0, "read": 0}
    for number in range(count):
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        shutil.copytree(photos, tmp_path / "f")
        name, said, refusal = mutate(tmp_path / "f" / "photos", dice), [], None
        try:
            with limited(f"case {number}, {name}", SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                used(tmp_path / "f" / "photos", dice, said)
        except TrainingError as error:
            refusal = str(error)
        except BaseException as error:
            raise AssertionError(f"case {number}, {name}: {type(error).__name__}: {error}") from error
        ends["read" if refusal is None else "refused"] += 1
        if refusal is not None:
            assert Path(name).stem in refusal, f"case {number}: {name} was changed, the error says {refusal}"
            assert len(refusal) < 4000, f"case {number}, {name}"
    assert ends["refused"] > count / 4
    assert ends["read"] > count / 4

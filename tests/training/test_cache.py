"""The cache: found by content, equal to encoding anew, safe against interruption."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training_data import fill, picture

from training import config, loop, lora, models
from training.data import cache, crops, images
from training.errors import TrainingError

CPU = torch.device("cpu")


def encode(base: Path, pictures: Path, store: cache.Store, *, resolution: int = 32, scale: float | None = None, **more):
    """Encodes a folder; returns how many entries had to be made, and the entries."""
    parts = models.load_parts(base)
    if scale:
        parts.vae.register_to_config(scaling_factor=scale)
    data = crops.Views(images.folder(pictures, minimum=8), resolution=resolution, multiple=8)
    before = store.encoded
    entries = cache.encode_views(data, parts, store, device=CPU, **more)
    return store.encoded - before, entries


def test_exactly_what_changed_is_encoded_again(base: Path, pictures: Path, tmp_path: Path) -> None:
    store = cache.Store(tmp_path / "cache")
    assert encode(base, pictures, store)[0] == 5
    assert encode(base, pictures, store)[0] == 0
    assert encode(base, pictures, cache.Store(tmp_path / "cache"))[0] == 0
    (pictures / "0.png").rename(pictures / "z.png")  # another order, the same content
    (pictures / "0.txt").rename(pictures / "z.txt")
    assert encode(base, pictures, store)[0] == 0
    picture(77).save(pictures / "3.png")
    assert encode(base, pictures, store)[0] == 1
    (pictures / "3.txt").write_text("new words")
    assert encode(base, pictures, store)[0] == 0
    assert encode(base, pictures, store, resolution=48)[0] == 5
    assert encode(base, pictures, store, scale=2.0)[0] == 5


def test_text_is_encoded_again_when_caption_or_encoder_change(base: Path) -> None:
    store, parts = cache.Store(), models.load_parts(base)
    cache.encode_captions(["a dog", "a cat", "a dog"], parts, store, device=CPU)
    assert store.encoded == 2
    cache.encode_captions(["a cat", "a bird"], parts, store, device=CPU)
    assert store.encoded == 3
    next(parts.text_encoders[0].parameters()).data.add_(1)
    cache.encode_captions(["a cat"], parts, store, device=CPU)
    assert store.encoded == 4


def test_an_entry_follows_its_image_not_its_place(base: Path, pictures: Path, tmp_path: Path) -> None:
    store = cache.Store(tmp_path / "cache")
    _, first = encode(base, pictures, store)
    before = {caption: first[index]["mean"] for index, caption in enumerate(first.captions)}
    for number, name in enumerate("ecdab"):  # turns the order of the files
        for suffix in (".png", ".txt"):
            (pictures / f"{number}{suffix}").rename(pictures / f"{name}{suffix}")
    _, second = encode(base, pictures, store)
    assert first.captions != second.captions
    for index, caption in enumerate(second.captions):
        assert torch.equal(second[index]["mean"], before[caption])


def test_an_interrupted_write_is_no_entry(base: Path, pictures: Path, tmp_path: Path, monkeypatch) -> None:
    store = cache.Store(tmp_path / "cache")

    def full(path: Path, data: bytes) -> None:
        path.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=r"cannot write the cache in .*No space left.*data.cache"):
        encode(base, pictures, store)
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert encode(base, pictures, store)[0] == 5


def test_a_vae_with_a_wrong_scale_is_noticed(base: Path, pictures: Path) -> None:
    with pytest.raises(TrainingError, match=r"latents of view 0.*check scaling_factor"):
        encode(base, pictures, cache.Store(), scale=1e4)


def test_the_shift_factor_counts(base: Path) -> None:
    vae = models.load_parts(base).vae
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, std = models.encode_images(vae, pixels)
        vae.register_to_config(shift_factor=0.25)
        shifted, same = models.encode_images(vae, pixels)
    torch.testing.assert_close(shifted, mean - 0.25 * vae.config.scaling_factor)
    assert torch.equal(std, same)


DAMAGES = {
    "a flipped bit": lambda path, other: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"),
    "another entry": lambda path, other: path.write_bytes(other.read_bytes()),
    "cut": lambda path, other: os.truncate(path, 100),
    "empty": lambda path, other: os.truncate(path, 0),
    "foreign": lambda path, other: save_file({"mean": torch.zeros(4, 8, 8)}, path),
    "a FIFO": lambda path, other: (path.unlink(), os.mkfifo(path)),
}


def test_damaged_entries_are_made_again(base: Path, pictures: Path, tmp_path: Path) -> None:
    fill(pictures, len(DAMAGES))
    store = cache.Store(tmp_path / "cache")
    made, first = encode(base, pictures, store)
    before = [first[index] for index in range(made)]
    paths = [cache._path(tmp_path / "cache", name) for name in first.names]
    for damage, path, other in zip(DAMAGES.values(), paths, paths[1:] + paths[:1], strict=True):
        damage(path, other)
    for index in range(made):
        with pytest.raises(TrainingError, match=f"{paths[index].name}.*start again"):
            first[index]
    store = cache.Store(tmp_path / "cache")
    made, again = encode(base, pictures, store)
    assert made == len(DAMAGES)
    assert store.damaged == paths
    assert all(torch.equal(again[index]["mean"], before[index]["mean"]) for index in range(made))
    assert encode(base, pictures, cache.Store(tmp_path / "cache"))[0] == 0


def losses(
    base: Path, pictures: Path, out: Path, kind: str, said: list[str] | None = None, **changes: object
) -> list[float]:
    parts = models.load_parts(base)
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    plain = {"steps": 6, "batch_size": 2, "trackers": [], "log_every": 1, "learning_rate": 1e-2}
    settings = config.TrainSettings(**{**plain, **changes})  # type: ignore[arg-type]
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    say = (said if said is not None else []).append
    result = loop.train(method, data, settings, out=out, cache=kind, say=say)  # type: ignore[arg-type]
    assert result is not None
    assert all(map(bool, [parts.text_encoders] if kind == "off" else [not parts.text_encoders, parts.vae is None]))
    return result.losses


def test_cached_training_is_uncached_training(base: Path, pictures: Path, tmp_path: Path) -> None:
    """Stronger than equal in distribution: the posterior's noise is drawn by position, so even the losses agree."""
    plain = losses(base, pictures, tmp_path / "off", "off")
    torch.testing.assert_close(losses(base, pictures, tmp_path / "memory", "memory"), plain, rtol=1e-4, atol=1e-5)
    whole = losses(base, pictures, tmp_path / "again", "memory")
    assert losses(base, pictures, tmp_path / "disk", "disk") == whole
    (tmp_path / "disk").rename(tmp_path / "before")
    shutil.copytree(tmp_path / "before" / "cache", tmp_path / "disk" / "cache")
    paths = sorted((tmp_path / "disk" / "cache").rglob("*.safetensors"))
    contents = [path.read_bytes() for path in paths]
    for path, other in zip(paths, contents[1:] + contents[:1], strict=True):
        path.write_bytes(other)
    said: list[str] = []
    assert losses(base, pictures, tmp_path / "disk", "disk", said) == whole
    assert any(f"{len(paths)} damaged files of the cache were made again" in line for line in said)
    assert [path.read_bytes() for path in paths] == contents


def test_the_region_is_a_mask_made_once_per_image(base: Path, pictures: Path) -> None:
    calls = []

    def left_half(parts: models.Parts, entry: dict[str, torch.Tensor], caption: str) -> torch.Tensor:
        calls.append(caption)
        mask = torch.zeros(1, *entry["mean"].shape[1:])
        mask[..., : mask.shape[-1] // 2] = 1
        return mask

    _, entries = encode(base, pictures, cache.Store(), region=left_half)
    assert len(calls) == 5
    assert entries[0]["mask"].mean() == 0.5


def test_masks_come_down_to_latent_size_by_area(base: Path, pictures: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for number in range(5):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 6, 32))
        mask.save(masks / f"{number}.png")
    parts = models.load_parts(base)
    data = crops.Views(images.folder(pictures, masks=masks, minimum=8), resolution=32)
    entry = cache.view_tensors(data[0], parts.vae_scale_factor)
    torch.testing.assert_close(entry["mask"][0, 0], torch.tensor([1, 0.5, 0, 0, 0, 0, 0, 0]))


def test_disk_entries_are_plain_safetensors(base: Path, pictures: Path, tmp_path: Path) -> None:
    encode(base, pictures, cache.Store(tmp_path / "cache"))
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(files) == 5
    assert load_file(files[0]).keys() == {"mean", "std", "frame"}


class Rank:
    """One of two processes, without starting them."""

    num_processes = 2

    def __init__(self, process_index: int):
        self.process_index = process_index

    def wait_for_everyone(self) -> None: ...


def test_processes_that_look_at_different_times_share_all_entries(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process looks when the first has finished its share: still every entry is made, and none twice."""
    made = []
    for index in (0, 1):
        monkeypatch.setattr(cache, "state", lambda index=index: Rank(index))
        count, entries = encode(base, pictures, cache.Store(tmp_path / "cache"))
        made.append(count)
    assert made == [3, 2]
    assert all(entries[index]["mean"].isfinite().all() for index in range(5))


def test_an_entry_of_any_type_and_shape_is_found_sound_and_any_flipped_byte_is_found(tmp_path: Path) -> None:
    """`sound` reads a file's bytes, `store[name]` its tensors: both hold the same digest against it."""
    entry = {
        "single": torch.tensor(1.5), "empty": torch.zeros(0, 3), "mask": torch.tensor([True, False]),
        "half": torch.ones(2, 2, dtype=torch.float16), "brain": torch.ones(3, dtype=torch.bfloat16),
        "ids": torch.arange(5), "bytes": torch.arange(4, dtype=torch.uint8),
        "double": torch.ones(1, dtype=torch.float64), "int": torch.arange(3, dtype=torch.int32),
    }  # fmt: skip
    store = cache.Store(tmp_path)
    store.put("ab" * 20, entry)
    assert store.sound("ab" * 20)
    assert all(torch.equal(store["ab" * 20][key], value) for key, value in entry.items())
    assert not store.sound("cd" * 20)
    file = next(tmp_path.rglob("*.safetensors"))
    data = file.read_bytes()
    for place in range(0, len(data), 3):
        file.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        found = store.sound("ab" * 20)
        if found:  # bytes of the header that say the same, such as spaces at its end
            assert all(torch.equal(store["ab" * 20][key], value) for key, value in entry.items()), place
    for cut in (0, 7, 8, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:cut])
        assert not store.sound("ab" * 20)
    file.write_bytes(data + b"0")
    assert not store.sound("ab" * 20)

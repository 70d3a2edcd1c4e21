"""VAE posteriors and text embeddings, computed once and found again by content.

An entry's name is a hash of what it was made from: the image's bytes, the view, the encoder's weights and the region
function. So shuffling changes nothing, and replacing one file re-encodes one entry. Entries are encoded one at a time,
so that their bits do not depend on their neighbours, and hold mean *and* standard deviation: each step draws anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from adapters import files, machine
from adapters.errors import FileError

from ..batch import EntryTensors, tensors
from ..errors import TrainingError
from ..models import Parts, encode_images, encode_text, tokenize_captions, weights_digest
from ..ranks import state
from .crops import View, Views

__all__ = ["Encoded", "Live", "Region", "Store", "caching_seconds", "encode_captions", "encode_views", "view_tensors"]

RMS_ALLOWED = (0.05, 20.0)  # of scaled latents, which a fitting VAE scale brings near 1
MAX_ENTRY = 2**30  # bytes of a file; latents and condition of a picture are a few MiB
DTYPES = {  # of a file's header -> in `_digest`
    header: f"torch.{name}"
    for header, name in {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool",
    }.items()
}  # fmt: skip
Entry = dict[str, Tensor]  # of a view or a caption, as a file holds it
Region = Callable[[Parts, EntryTensors, str], Tensor]


class Store:
    """Named entries in memory, or with `folder` as one safetensors file each, written whole or not at all.

    A file holds a digest of its name and tensors. Damaged, foreign or exchanged ones are found when they are read.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._memory: dict[str, Entry] = {}
        self.encoded = 0
        """Entries that had to be made since this object exists."""
        self.damaged: list[Path] = []
        """Files that were there and could not be used."""

    def __contains__(self, name: str) -> bool:
        return name in self._memory if self.folder is None else _path(self.folder, name).exists()

    def sound(self, name: str) -> bool:
        """Whether the entry is there and is what was put; a damaged one is noted."""
        if self.folder is None:
            return name in self
        path = Path(f"{self.folder}/{name[:2]}/{name}.safetensors")  # joined, it would take as long as the digest
        if not os.path.exists(path):
            return False
        try:
            return _check(path, name)
        except FileError:
            self.damaged.append(path)
            return False

    def __getitem__(self, name: str) -> Entry:
        """The entry; a `TrainingError` where its file was damaged since `sound` looked."""
        if self.folder is None:
            return self._memory[name]
        try:
            return _read(self.folder, name)
        except FileError as error:
            raise TrainingError(
                f"{error}; it was sound when this run began: start again, and it is made again"
            ) from error

    def put(self, name: str, entry: Entry) -> None:
        self.encoded += 1
        if self.folder is None:
            self._memory[name] = entry
            return
        try:
            data = save(entry, {"sha256": _digest(name, entry)})
            files.write_bytes(_path(self.folder, name), data, sync=False)  # checked when it is read
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"cannot write the cache in {self.folder}: {machine.explain(error) or error}; or set data.cache"
            ) from error


def _read(folder: Path, name: str) -> Entry:
    path = _path(folder, name)
    data = _bytes(path)
    try:
        entry = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        digest = header["__metadata__"]["sha256"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path}: not an entry of the cache ({error!r:.80})") from error
    if digest != _digest(name, entry):
        raise FileError(f"{path}: not the entry that was put there")
    return entry


def _bytes(path: Path) -> bytes:
    """A file's content. Python reserves what may be read at most, so it is told the size."""
    try:
        size = os.stat(path).st_size
    except OSError:
        size = 0  # and reading says what is wrong
    return files.read_bytes(path, min(size, MAX_ENTRY))


def _check(path: Path, name: str) -> bool:
    """True for the entry that was put; its tensors are not made, which takes longer than to read them.

    Raises `FileError` for any other file.
    """
    data = _bytes(path)
    try:
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        digest = hashlib.sha256(name.encode())
        kept = header.pop("__metadata__")["sha256"]
        places = []
        for key in sorted(header):
            value, (start, end) = header[key], header[key]["data_offsets"]
            digest.update(f"\0{key} {DTYPES[value['dtype']]} {tuple(value['shape'])}\0".encode())
            digest.update(memoryview(data)[begin + start : begin + end])
            places.append((start, end))
        ends = [0, *(end for _, end in sorted(places))]
        whole = [start for start, _ in sorted(places)] == ends[:-1] and begin + ends[-1] == len(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise FileError(f"{path}: not an entry of the cache ({error!r:.80})") from error
    if not whole or kept != digest.hexdigest():
        raise FileError(f"{path}: not the entry that was put there")
    return True


def _digest(name: str, entry: Entry) -> str:
    digest = hashlib.sha256(name.encode())
    for key in sorted(entry):
        value = entry[key].contiguous()
        digest.update(f"\0{key} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _path(folder: Path, name: str) -> Path:
    return folder / name[:2] / f"{name}.safetensors"


@dataclass(frozen=True)
class Encoded:
    """Entries of one `Views`, by view number."""

    store: Store
    names: list[str]
    sizes: list[tuple[int, int]]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> EntryTensors:
        return cast(EntryTensors, self.store[self.names[index]])


class Live:
    """Views as entries that are not cached: `pixels` (3, H, W) instead of `mean` and `std`, encoded in every step."""

    def __init__(self, views: Views, factor: int):
        self.views, self.factor = views, factor
        self.names = [views.key(index) for index in range(len(views))]
        self.sizes = [views.size(index) for index in range(len(views))]
        self.captions = [views.caption(index) for index in range(len(views))]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> EntryTensors:
        view = self.views[index]
        return {"pixels": view.pixels, **view_tensors(view, self.factor)}


def _name(*pieces: str) -> str:
    return hashlib.blake2b("\0".join(pieces).encode(), digest_size=20).hexdigest()


def _mine(names: Iterable[tuple[str, Any]], store: Store) -> Iterator[tuple[str, Any]]:
    """This process's share of the names, each once, as far as they are missing or damaged.

    Shares are dealt from all names: processes that look at different moments would deal the missing ones differently.
    """
    ranks = state()
    for number, (name, work) in enumerate(dict(names).items()):
        if number % ranks.num_processes == ranks.process_index and not store.sound(name):
            yield name, work


def view_tensors(view: View, factor: int) -> EntryTensors:
    """What a view gives besides its latents: `frame`, and where there are, `mask` at latent size and `conditioning`."""
    entry: EntryTensors = {"frame": view.frame}
    if view.mask is not None:
        entry["mask"] = functional.avg_pool2d(view.mask[None], factor)[0]  # (1, h, w)
    if view.conditioning is not None:
        entry["conditioning"] = view.conditioning
    return entry


@torch.no_grad()
def encode_views(
    views: Views,
    parts: Parts,
    store: Store,
    *,
    device: torch.device,
    region: Region | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Encodes the views that the store lacks, each process its share, and returns all of them.

    Args:
        views: pictures to encode.
        parts: the base, whose VAE encodes.
        store: receives the entries.
        device: where the VAE runs.
        region: gives the mask (1, h, w) in [0, 1] of an entry (`mean`, `std`, ...) and its caption, such as the
            attention region of the class word; its `__name__` is part of the content key.
        progress: called with the number of entries this process has made and is to make.

    Raises:
        TrainingError: latents that are not finite, or far from unit scale (a VAE with a wrong scaling factor).
    """
    captions = [views.caption(index) for index in range(len(views))]
    names = _view_names(views, parts, captions, region)
    sizes = [views.size(index) for index in range(len(views))]
    parts.vae.to(device)
    work = list(_mine(zip(names, range(len(names)), strict=True), store))
    for done, (name, index) in enumerate(work, 1):
        view = views[index]
        mean, std = encode_images(parts.vae, view.pixels[None])
        rms = float((mean.square() + std.square()).mean().sqrt())
        if not RMS_ALLOWED[0] <= rms <= RMS_ALLOWED[1]:  # also catches NaN
            raise TrainingError(
                f"latents of view {index} ({view.caption!r}) have a root mean square of {rms:.3g}, which should be "
                f"about 1: check scaling_factor and shift_factor in the VAE's config"
            )
        entry: EntryTensors = {"mean": mean[0].cpu(), "std": std[0].cpu(), **view_tensors(view, parts.vae_scale_factor)}
        if region is not None:
            entry["mask"] = region(parts, entry, view.caption).detach().float().cpu()
        store.put(name, {key: tensor.contiguous() for key, tensor in tensors(entry).items()})
        if progress:
            progress(done, len(work))
    state().wait_for_everyone()
    return Encoded(store, names, sizes, captions)


def _view_names(views: Views, parts: Parts, captions: list[str], region: Region | None) -> list[str]:
    """A region may depend on the caption, so its entry is named by it too; without one the caption stays out."""
    vae_name = weights_digest(parts.vae) + ("" if region is None else f"-{region.__name__}")
    return [_name("view", vae_name, views.key(index), captions[index] if region else "") for index in range(len(views))]


@torch.no_grad()
def caching_seconds(views: Views, parts: Parts, store: Store, *, device: torch.device) -> float:
    """How long encoding the views that the store lacks would take this process, from trying one of them.

    Args:
        views: pictures to encode.
        parts: the base, whose VAE encodes.
        store: where entries may be already.
        device: where the VAE runs.

    Returns:
        Seconds; 0 where nothing is missing.
    """
    names = _view_names(views, parts, [""] * len(views), None)
    missing = [index for index, name in enumerate(names) if name not in store]
    if not missing:
        return 0.0
    parts.vae.to(device)
    began = time.perf_counter()
    mean, _ = encode_images(parts.vae, views[missing[0]].pixels[None])
    mean.cpu()
    processes: int = state().num_processes
    return (time.perf_counter() - began) * len(missing) / processes


@torch.no_grad()
def encode_captions(captions: Iterable[str], parts: Parts, store: Store, *, device: torch.device) -> dict[str, str]:
    """Embeds the captions that the store lacks; returns each caption's entry name.

    An entry holds `embeds` (T, D), and for SDXL `pooled` (P,).

    Args:
        captions: each counts once.
        parts: the base, whose text encoders embed.
        store: receives the entries.
        device: where the encoders run.
    """
    rule = "" if parts.text.neutral else json.dumps(parts.text.to_config())
    encoder_name = weights_digest(*parts.text_encoders) + rule
    names = {caption: _name("text", encoder_name, caption) for caption in captions}
    for encoder in parts.text_encoders:
        encoder.to(device)
    for name, caption in _mine(((name, caption) for caption, name in names.items()), store):
        text = encode_text(parts, tokenize_captions(parts, [caption]))
        store.put(name, {key: tensor[0].float().cpu().contiguous() for key, tensor in tensors(text).items()})
    state().wait_for_everyone()
    return names

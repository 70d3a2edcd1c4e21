"""Put fitted parts together as the folders that ship: half precision, safetensors, a manifest over every file."""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, StableDiffusionPipeline

from adapters import files

from .. import DATA, VERSION, tokenizer
from ..judging import Judge
from . import model
from .fit_base import BaseParts

__all__ = ["LIMITS", "assembled_pipeline", "write_base", "write_controlnet", "write_judge", "write_pocket_manifest"]

LIMITS = {
    VERSION: 30_000_000,
    "controlnet-canny": 11_000_000,
    "controlnet-segmentation": 11_000_000,
    "judge": 3_000_000,
}  # bytes
# Of two-byte values: which byte of the two it is tells more about it than the bytes before.
HALVES = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 1, "pb": 1}


def assembled_pipeline(vae: AutoencoderKL, parts: BaseParts) -> StableDiffusionPipeline:
    """The parts as the ordinary pipeline, without a safety checker (there is nothing here it was made for)."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=parts.unet,
        text_encoder=parts.text_encoder,
        tokenizer=tokenizer.build_tokenizer(),
        scheduler=model.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def write_base(vae: AutoencoderKL, parts: BaseParts) -> Path:
    """Write the base folder. The parts given are used up: their weights are halved in place."""

    def write(folder: Path) -> None:
        assembled_pipeline(vae, parts).to(torch.float16).save_pretrained(folder)
        # transformers loads in the dtype this names, diffusers in float32: left at float16, a plain
        # `from_pretrained(folder)` would mix the two and fail.
        config = folder / "text_encoder" / "config.json"
        files.write_json(config, {**files.read_json(config), "dtype": "float32"}, indent=2)

    return _replaced(VERSION, write, keep=("README.md", "sheet.webp"))


def write_controlnet(control: str, network: ControlNetModel) -> Path:
    """Write the ControlNet for ``control``."""

    def write(folder: Path) -> None:
        network.half().save_pretrained(folder)
        _pack(folder / "diffusion_pytorch_model.safetensors")

    return _replaced(f"controlnet-{control}", write)


def write_judge(network: Judge) -> Path:
    """Write the judge's weights."""
    tensors = {
        name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()
    }

    def write(folder: Path) -> None:
        file = folder / "judge.safetensors"
        files.write_tensors(file, tensors)
        _pack(file)

    return _replaced("judge", write, keep=("README.md",))


def _pack(file: Path) -> None:
    """Compresses a file of two-byte values in its place."""
    Path(f"{file}.xz").write_bytes(lzma.compress(file.read_bytes(), filters=[HALVES]))
    file.unlink()


def _replaced(name: str, write: Callable[[Path], object], keep: Iterable[str] = ()) -> Path:
    """Write a folder that takes the old one's place in one step, with what of the old one is to be kept."""
    final = DATA / name
    with files.write_folder(final) as fresh:
        write(fresh)
        for kept in keep:
            if (final / kept).exists():
                shutil.copy2(final / kept, fresh / kept)
    return final


def write_pocket_manifest() -> dict[str, Any]:
    """List what ships with size and sha256; refuse what is over its limit. Cards and pictures are no part of it."""
    found = {}
    for folder, limit in LIMITS.items():
        every = (path for path in sorted((DATA / folder).rglob("*")) if path.is_file())
        paths = [path for path in every if path.suffix not in (".md", ".webp")]
        size = sum(path.stat().st_size for path in paths)
        if size > limit:
            raise ValueError(f"{folder} has {size:,} bytes, over its limit of {limit:,}")
        for path in paths:
            found[path.relative_to(DATA).as_posix()] = {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
    listed = {"version": VERSION, "files": found}
    files.write_json(DATA / "manifest.json", listed)
    return listed

"""What holds an adapter, checked before it is read: a shipped or peft folder, a bare `.safetensors`, a Hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .errors import FileError, FormatError
from .keys import Adapter, from_any

__all__ = ["Source", "open_source", "read_adapter", "whole_model"]

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
EMBEDS_FILE = "learned_embeds.safetensors"
MODEL_FILE = "diffusion_pytorch_model.safetensors"
GUIDER_FILE = "guider_config.json"
MODELS = {"ControlNetModel": "controlnet", "UNet2DConditionModel": "unet"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder or file that has been checked."""

    path: Path
    manifest: dict[str, Any] | None
    """None for a bare file or a folder that carries no manifest."""

    def file(self, name: str) -> Path | None:
        """A file of the folder, or None; with a manifest only files it names exist."""
        if self.path.is_file():
            return None
        if self.manifest is not None and name not in self.manifest["files"]:
            return None
        path = self.path / name
        return path if path.is_file() else None


def open_source(source: str | Path, *, revision: str | None = None) -> Source:
    """Resolve and check a folder, a file or a Hub id."""
    path = Path(source).expanduser()
    files.recover(path.absolute())
    if path.is_file():
        return Source(path=path, manifest=None)
    if path.is_dir():
        manifest = files.verify_folder(path) if (path / files.MANIFEST).exists() else None
        return Source(path=path, manifest=manifest)
    if path.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileError(f"{source}: no such file or folder, and not a Hub id (owner/name)")
    return _from_hub(str(source), revision)


def _from_hub(repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.csv", "*.md", "*.html", "*.yaml", "*.png"]
    folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    # The Hub's cache stores content under blobs/ and links to it.
    cache = folder.parent.parent
    manifest = files.verify_folder(folder, links_into=cache) if (folder / files.MANIFEST).exists() else None
    return Source(path=folder, manifest=manifest)


def read_adapter(source: Source) -> Adapter:
    """The adapter in a checked source; peft files of several components are joined."""
    if source.path.is_file():
        return _read(source.path, source.path.parent / "adapter_config.json", "unet")
    if (path := source.file(LORA_FILE)) is not None:
        return _read(path, source.path / "adapter_config.json", "unet")
    parts = []
    for folder, component in (("", "unet"), ("text_encoder/", "text_encoder"), ("text_encoder_2/", "text_encoder_2")):
        if (path := source.file(folder + PEFT_FILE)) is not None:
            parts.append(_read(path, source.path / folder / "adapter_config.json", component))
    if not parts:
        found = sorted(p.name for p in source.path.glob("*.safetensors"))
        if len(found) == 1:
            return _read(source.path / found[0], source.path / "adapter_config.json", "unet")
        raise FileError(f"{source.path}: neither {LORA_FILE} nor {PEFT_FILE} in it; found {found or 'no .safetensors'}")
    modules = {name: module for part in parts for name, module in part.modules.items()}
    return Adapter(modules=modules, options={c: o for part in parts for c, o in part.options.items()})


def _read(path: Path, config: Path, component: str) -> Adapter:
    tensors, metadata = files.read_tensors(path)
    settings = files.read_json(config) if config.is_file() else None
    if settings is not None and not isinstance(settings, dict):
        raise FileError(f"{config}: expected a JSON object")
    try:
        return from_any(tensors, metadata, config=settings, component=component)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def whole_model(source: Source) -> str | None:
    """`controlnet` or `unet` where the folder is one, as `ship` or diffusers wrote it."""
    config = source.file("config.json")
    if config is None or source.file(MODEL_FILE) is None:
        return None
    settings = files.read_json(config)
    return MODELS.get(str(settings.get("_class_name"))) if isinstance(settings, dict) else None

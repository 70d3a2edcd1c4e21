"""What holds an adapter, checked before it is read: a shipped or peft folder, a bare `.safetensors`, a Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .adapter import COMPONENTS, Adapter, Tokens
from .errors import FileError, FormatError
from .machine import explain
from .reading import from_any
from .tokens import EMBEDS_FILE, read_tokens
from .writing import LORA_FILE, PEFT_CONFIG, PEFT_FILE

__all__ = ["Source", "open_source", "read_adapter", "read_guider", "tokens_of", "whole_model"]

EXACT_KOHYA = ".dora.kohya.safetensors"
"""Ending of the file beside which the nearest LoRA lies."""
MODEL_FILE = "diffusion_pytorch_model.safetensors"
GUIDER_FILE = "guider_config.json"
_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
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
    named = path.suffix in _FILES  # models/x.safetensors, which is not there, is no repository
    if path.exists() or named or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise FileError(f"{source}: no such file or folder, and not a Hub id (owner/name)")
    return _from_hub(str(source), revision)


def _from_hub(repo_id: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.csv", "*.md", "*.html", "*.yaml", "*.png"]
    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub has many kinds: offline, unknown, gated, no such name
        if explain(error) is not None:
            raise  # the machine's, such as a full disk, which has a line of its own
        raise FileError(
            f"{repo_id}: there is no such folder here (looked from {Path.cwd()}), and the hub does not give it "
            f"({type(error).__name__}); check the name and the network, or give a folder or a file"
        ) from error
    # The Hub's cache stores content under blobs/ and links to it.
    cache = folder.parent.parent
    manifest = files.verify_folder(folder, links_into=cache) if (folder / files.MANIFEST).exists() else None
    return Source(path=folder, manifest=manifest)


def read_adapter(source: Source) -> Adapter:
    """The adapter in a checked source, with its learned tokens; peft files of several components are joined."""
    if source.path.is_file():
        return _read(source.path, source.path.parent / PEFT_CONFIG, "unet")
    tokens = tokens_of(source)
    found = _weight_files(source)
    if not found and not tokens:
        if source.file("model_index.json") is not None:
            raise FileError(
                f"{source.path} is a whole pipeline, not an adapter; give its folder unet ({source.path / 'unet'}), or "
                "the pipeline itself as the base (base.path)"
            )
        names = sorted(p.name for p in source.path.glob("*.safetensors"))
        raise FileError(
            f"{source.path}: neither {LORA_FILE} nor {PEFT_FILE} in it, nor in a folder unet of it; "
            f"found {names or 'no .safetensors'}"
        )
    parts = [_read(path, path.parent / PEFT_CONFIG, component) for path, component in found]
    modules = {name: module for part in parts for name, module in part.modules.items()}
    options = {c: o for part in parts for c, o in part.options.items()}
    return Adapter(modules=modules, options=options, tokens={**_joined(parts), **tokens})


def tokens_of(source: Source) -> Tokens:
    """The learned tokens of a folder; those that a LoRA file bundles are in its adapter."""
    path = source.file(EMBEDS_FILE)
    return {} if path is None else read_tokens(path)


def _weight_files(source: Source) -> list[tuple[Path, str]]:
    """(file, component of keys that do not say theirs): diffusers' file, else peft's, else the only exact one."""
    if (path := source.file(LORA_FILE)) is not None:
        return [(path, "unet")]
    places = (("", "unet"), *((f"{component}/", component) for component in COMPONENTS))
    found = [(path, component) for place, component in places if (path := source.file(place + PEFT_FILE)) is not None]
    if len({component for _, component in found}) < len(found):
        raise FileError(f"{source.path}: {PEFT_FILE} is in it and in its folder unet; remove one")
    others = [path for path in sorted(source.path.glob("*.safetensors")) if path.name != EMBEDS_FILE]
    others = [path for path in others if path.name.endswith(EXACT_KOHYA)] or others
    return found or ([(others[0], "unet")] if len(others) == 1 else [])


def _joined(parts: Sequence[Adapter]) -> Tokens:
    return {token: own for part in parts for token, own in part.tokens.items()}


def _read(path: Path, config: Path, component: str) -> Adapter:
    tensors, metadata = files.read_tensors(path)
    settings = files.read_object(config) if config.is_file() else None
    try:
        return from_any(tensors, metadata, config=settings, component=component)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def read_guider(source: Source) -> dict[str, Any] | None:
    """The guidance that a folder ships with; None where it ships none."""
    path = source.file(GUIDER_FILE)
    return None if path is None else files.read_object(path)


def whole_model(source: Source) -> str | None:
    """`controlnet` or `unet` where the folder is one, as `ship` or diffusers wrote it."""
    config = source.file("config.json")
    if config is None:
        return None
    kind = MODELS.get(str(files.read_object(config).get("_class_name")))
    return None if source.file(MODEL_FILE) is None else kind

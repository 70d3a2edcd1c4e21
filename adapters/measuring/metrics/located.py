"""Masks of a thing on real photos, and depth: what needs a network that looks at every pixel.

* Masks: the best box of a detector, cut out by SAM (arXiv:2304.02643); without SAM the box itself.
* Depth RMSE as ControlNet's evaluations have it (arXiv:2404.07987), each map scaled to [0, 1], since what these
  networks tell is relative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from ..sample import Shot
from .detection import Box, Detector
from .pretrained import IMAGENET_MEAN, IMAGENET_STD, Pretrained, normalized

__all__ = ["Depth", "DepthRmse", "Located", "Sam"]


@dataclass(kw_only=True)
class Sam(Pretrained):
    """What is in a box: the mask of SAM that it holds for best."""

    kinds: Sequence[str] = ("sam",)
    model_class: ClassVar[str] = "SamModel"

    def __call__(self, image: Image.Image, box: Box) -> np.ndarray:
        """(H, W) bool."""
        side = self._model.config.vision_config.image_size
        scale = side / max(image.size)
        width, height = (max(round(length * scale), 1) for length in image.size)
        values = torch.zeros(1, 3, side, side)  # padded after it was normalized, as SAM was trained
        small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        values[..., :height, :width] = normalized([small], IMAGENET_MEAN, IMAGENET_STD)
        corners = torch.tensor([[[box.left, box.top, box.right, box.bottom]]]) * scale
        with torch.no_grad():
            found = self._model(pixel_values=values.to(self.device), input_boxes=corners.to(self.device))
        best = found.pred_masks[0, 0, found.iou_scores[0, 0].argmax()].float()
        full = torch.nn.functional.interpolate(best[None, None], size=(side, side), mode="bilinear")
        cut = full[..., :height, :width]
        back = torch.nn.functional.interpolate(cut, size=(image.height, image.width), mode="bilinear")
        return (back[0, 0] > 0).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Located:
    """Pictures -> masks of one thing; an empty mask where it was not found."""

    detector: Detector
    noun: str
    sam: Sam | None = None

    def __call__(self, images: Sequence[Image.Image]) -> list[np.ndarray]:
        return [self._mask(image) for image in images]

    def _mask(self, image: Image.Image) -> np.ndarray:
        mask = np.zeros((image.height, image.width), dtype=bool)
        boxes = self.detector(image, self.noun)
        if not boxes:
            return mask
        box = boxes[0]
        if self.sam is not None:
            return self.sam(image, box)
        mask[int(box.top) : int(np.ceil(box.bottom)), int(box.left) : int(np.ceil(box.right))] = True
        return mask


@dataclass(kw_only=True)
class Depth(Pretrained):
    """Pictures -> relative depth, (H, W) in [0, 1]: DPT, Depth Anything, ZoeDepth and others of transformers."""

    model_class: ClassVar[str] = "AutoModelForDepthEstimation"
    needs: ClassVar[str] = "one that estimates depth"
    side: int = 518
    """Shorter side that the network sees, a multiple of `step` afterwards."""
    step: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.model_type == "dpt":
            self.side, self.step = self.config.image_size or 384, 32

    def __call__(self, image: Image.Image) -> np.ndarray:
        scale = self.side / min(image.size)
        size = [max(round(length * scale / self.step), 1) * self.step for length in image.size]
        values = normalized([image.convert("RGB").resize(size, Image.Resampling.BICUBIC)], IMAGENET_MEAN, IMAGENET_STD)
        with torch.no_grad():
            found = self._model(pixel_values=values.to(self.device)).predicted_depth
        full = torch.nn.functional.interpolate(found[None].float(), size=(image.height, image.width), mode="bicubic")
        depth = full[0, 0].cpu().numpy()
        scaled: np.ndarray = (depth - depth.min()) / max(float(np.ptp(depth)), 1e-9)
        return scaled


@dataclass(frozen=True, kw_only=True)
class DepthRmse:
    """Root mean square difference between the depth of a picture and of its target, 0 to 1."""

    depth: Depth
    target: Callable[[Shot], Image.Image]
    name: str = "depth RMSE"
    higher_is_better: bool = False

    def __call__(self, shots: Sequence[Shot]) -> list[float]:
        pairs = [(self.depth(shot.image), self.depth(self.target(shot))) for shot in shots]
        return [float(np.sqrt(((ours - theirs) ** 2).mean())) for ours, theirs in pairs]

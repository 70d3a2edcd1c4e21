"""What a ControlNet is shown, made from a picture: edges, line drawings, depth, classes.

| name | by | weights |
|---|---|---|
| canny | `adapters.edges`, by default with controlnet-aux's thresholds | none |
| lineart | controlnet-aux's standard line drawing | none |
| depth | a depth model of transformers (DPT, Depth Anything) | `model`, safetensors |
| segmentation | a semantic segmenter of transformers (SegFormer, UperNet), in even hues | `model`, safetensors |

controlnet-aux's other detectors (HED, scribble, pose, MLSD) exist as pickled weights only, which are not loaded here:
make those pictures elsewhere and give them as `data.conditioning`.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from adapters.edges import Canny

from ..errors import TrainingError
from ..hub import offline_if_unreachable
from .pictures import rgb

__all__ = ["ANNOTATORS", "annotator"]

ANNOTATORS = ("canny", "lineart", "depth", "segmentation")
Annotator = Callable[[Image.Image], Image.Image]


def annotator(name: str, model: str | None = None, *, edges: Canny | None = None) -> Annotator:
    """The annotator `name`: a picture in, its condition out, of the same size.

    Args:
        name: of `ANNOTATORS`.
        model: folder or hub id of the network of `depth` and `segmentation`.
        edges: the detector of `canny`; null: the default one.

    Raises:
        TrainingError: an unknown name, a missing model or a missing package, with what to do.
    """
    if name == "canny":
        return (edges or Canny()).condition
    if name == "lineart":
        return _lineart()
    if name not in ANNOTATORS:
        raise TrainingError(f"annotator {name!r} is unknown; there are {', '.join(ANNOTATORS)}")
    if model is None:
        raise TrainingError(f"annotator {name} needs a network: set annotator_model to a folder or hub id")
    return _depth(model) if name == "depth" else _segmentation(model)


def _lineart() -> Annotator:
    try:
        from controlnet_aux import LineartStandardDetector
    except Exception as error:  # its package imports torchvision, whose failures are of many kinds
        raise TrainingError(
            f"annotator lineart needs controlnet-aux and a working torchvision ({error}); "
            "pip install 'scfg-toolkit[annotators]', or use canny"
        ) from error
    detector = LineartStandardDetector()

    def draw(image: Image.Image) -> Image.Image:
        picture = rgb(image)
        side = min(picture.size)
        drawn = detector(picture, detect_resolution=side, image_resolution=side)
        condition: Image.Image = drawn.convert("RGB").resize(picture.size, Image.Resampling.LANCZOS)
        return condition

    return draw


def _depth(model: str) -> Annotator:
    network, processor = _transformers("AutoModelForDepthEstimation", model)

    @torch.no_grad()
    def draw(image: Image.Image) -> Image.Image:
        picture = rgb(image)
        depth = network(**_inputs(processor, picture)).predicted_depth
        return _grey(depth.reshape(1, 1, *depth.shape[-2:]), picture.size)

    return draw


def _grey(depth: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """(1, 1, h, w) of any range as a grey picture, nearest white."""
    large = torch.nn.functional.interpolate(depth.float(), size[::-1], mode="bicubic", align_corners=False)[0, 0]
    span = large.max() - large.min()
    # However small the range is, it is filled; a flat picture is black.
    spread = (large - large.min()) / torch.where(span > 0, span, 1.0)
    return Image.fromarray((spread * 255).round().byte().numpy()).convert("RGB")


def _segmentation(model: str) -> Annotator:
    network, processor = _transformers("AutoModelForSemanticSegmentation", model)
    count = network.config.num_labels
    colors = [colorsys.hsv_to_rgb(k / count, (1.0, 0.55)[k % 2], (1.0, 0.65)[k % 3 == 0]) for k in range(count)]
    palette = (np.array(colors) * 255).round().astype(np.uint8)

    @torch.no_grad()
    def draw(image: Image.Image) -> Image.Image:
        picture = rgb(image)
        logits = network(**_inputs(processor, picture)).logits
        large = torch.nn.functional.interpolate(logits.float(), picture.size[::-1], mode="bilinear")
        return Image.fromarray(palette[large.argmax(1)[0].numpy()])

    return draw


def _inputs(processor: dict[str, Any], picture: Image.Image) -> dict[str, torch.Tensor]:
    """Pixels (1, 3, H, W) as the model's preprocessor_config.json says, resized to its own size."""
    size = processor.get("size") or {}
    height = size.get("height") or size.get("shortest_edge") or 512
    width = size.get("width") or height
    values = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255
    mean = np.array(processor.get("image_mean") or [0.5] * 3, np.float32)
    spread = np.array(processor.get("image_std") or [0.5] * 3, np.float32)
    return {"pixel_values": torch.from_numpy(((values - mean) / spread).transpose(2, 0, 1)[None].copy())}


def _transformers(kind: str, model: str) -> tuple[Any, dict[str, Any]]:
    import transformers

    offline_if_unreachable(model)
    try:
        network = getattr(transformers, kind).from_pretrained(model, use_safetensors=True).eval()
        # The plain file, not the processor class: that one changes with whether torchvision is installed.
        processor = transformers.image_processing_utils.BaseImageProcessor.get_image_processor_dict(model)[0]
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"annotator_model {model} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error
    return network, processor

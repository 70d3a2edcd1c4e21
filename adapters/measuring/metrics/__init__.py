"""Numbers about images, all with one signature: a metric is called with shots and returns one number per shot."""

from __future__ import annotations

from .classical import (
    CannyF1,
    Clipped,
    Contrast,
    MaskIoU,
    MsSsim,
    Saturation,
    canny_f1,
    color_histogram,
    ms_ssim,
)
from .features import Diversity, Drift, FaceSimilarity, Features, Similarity, cutout
from .identity import Identity, look_of
from .metric import Measure, Metric, score
from .sets import Kid, frechet, kernel_distance

__all__ = [
    "CannyF1",
    "Clipped",
    "Contrast",
    "Diversity",
    "Drift",
    "FaceSimilarity",
    "Features",
    "Identity",
    "Kid",
    "MaskIoU",
    "Measure",
    "Metric",
    "MsSsim",
    "Saturation",
    "Similarity",
    "canny_f1",
    "color_histogram",
    "cutout",
    "frechet",
    "kernel_distance",
    "look_of",
    "ms_ssim",
    "score",
]

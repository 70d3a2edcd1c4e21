"""The one Canny detector: it makes the conditions of a ControlNet, and finds the edges that its pictures are scored by.

A ControlNet keeps its detector in its `config.json`, under `_canny`. diffusers keeps keys with an underscore as they
are. A ControlNet without that key was trained elsewhere; controlnet-aux's values are assumed for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from .errors import FormatError

__all__ = ["KEY", "Canny"]

KEY = "_canny"


@dataclass(frozen=True, kw_only=True)
class Canny:
    """Canny's edges (Canny 1986) by OpenCV; the defaults are those of controlnet-aux.

    Raises:
        FormatError: thresholds that are not 0 < low < high.
    """

    low: float = 100
    """Gradient from which a pixel belongs to an edge that it touches, in grey values of 0 to 255."""
    high: float = 200
    """Gradient from which a pixel is an edge by itself."""
    grey: bool = False
    """Looks at the grey picture. False: at the color channel with the strongest gradient, pixel by pixel."""

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < float("inf"):
            raise FormatError(f"Canny thresholds must be 0 < low < high, got {self.low:g} and {self.high:g}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The edges (H, W), bool, of an 8-bit image."""
        import cv2

        pixels = np.asarray(image.convert("RGB"))
        if self.grey:
            pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        return cv2.Canny(pixels, self.low, self.high) > 0

    def condition(self, image: Image.Image) -> Image.Image:
        """The edges in white on black, RGB: what a ControlNet is shown."""
        return Image.fromarray(self(image).astype(np.uint8) * 255).convert("RGB")

    @property
    def config(self) -> dict[str, Any]:
        """What a ControlNet's config.json says of it; `of` reads it."""
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Canny:
        """The detector in a ControlNet's config; the default where it names none.

        Raises:
            FormatError: the entry is not what `config` writes.
        """
        found = config.get(KEY, {})
        try:
            return cls(
                low=float(found.get("low", cls.low)),
                high=float(found.get("high", cls.high)),
                grey=bool(found.get("grey", cls.grey)),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise FormatError(f"config.json: {KEY} must hold low, high and grey, got {found!r} ({error})") from error

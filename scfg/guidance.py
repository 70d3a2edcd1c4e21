"""What every guidance is: frozen settings and one pure call that gives the scale map gamma of a step.

    u + s * gamma * delta,   delta = c - u

S-CFG itself is in `semantic`, its control arms are in `arms`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .errors import ScfgError
from .precision import widened
from .regions import Regions
from .scale import ScaleMap, classifier_score_norm, limit

__all__ = ["Guidance", "GuidanceInputs", "LimitedGuidance"]


@dataclass(frozen=True, kw_only=True)
class GuidanceInputs:
    """What one step hands to a guidance.

    Attributes:
        uncond: (B, C, H, W), unconditional prediction u.
        cond: (B, C, H, W), conditional prediction c.
        guidance_scale: s.
        regions: who owns which position, for methods that need regions.
        weight: (B, H, W), share of each position in the norms (inpainting: 0 on kept pixels); None: all alike.
        seeds: one number per image, for methods with `needs_seeds`.
    """

    uncond: Float[Tensor, "B C H W"]
    cond: Float[Tensor, "B C H W"]
    guidance_scale: float
    regions: Regions | None = None
    weight: Float[Tensor, "B H W"] | None = None
    seeds: list[int] | None = None

    @property
    def score_norm(self) -> Float[Tensor, "B H W"]:
        """||c - u|| over channels, in float32 or wider."""
        return classifier_score_norm(widened(self.cond) - widened(self.uncond))


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """One way to choose gamma. Methods that need regions derive from `SemanticCFG`, which says how to find them."""

    method: ClassVar[str]
    needs_seeds: ClassVar[bool] = False

    @abstractmethod
    def active(self, fraction: float) -> bool:
        """Whether gamma differs from 1 at this fraction of the steps run. Inactive steps leave the prediction alone."""

    @abstractmethod
    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """gamma for one step."""


@dataclass(frozen=True, kw_only=True)
class LimitedGuidance(Guidance):
    """A guidance whose gamma is limited and smoothed, in a window of the steps."""

    gamma_min: float | None = 0.8
    """Lower limit of gamma (the authors' SD code; their IF code has none: None)."""
    gamma_max: float | None = 3.0
    """Upper limit of gamma (the authors' SD code; their IF code has none: None)."""
    scale_cap: float | None = 15.0
    """Upper limit of guidance_scale * gamma."""
    smoothing_sigma: float = 0.5
    """Width of the 3x3 smoothing of maps and gamma. 0: no smoothing."""
    start: float = 0.0
    """Fraction of the steps at which S-CFG begins. Before it, gamma is 1 (plain CFG)."""
    stop: float = 1.0
    """Fraction of the steps at which S-CFG ends. After it, gamma is 1 (plain CFG)."""

    def __post_init__(self) -> None:
        for name in ("gamma_min", "gamma_max", "scale_cap"):
            if getattr(self, name) is not None:
                as_number(self, name)
        for name in ("smoothing_sigma", "start", "stop"):
            as_number(self, name)
        low, high = self.gamma_min, self.gamma_max
        require_value(low is None or low >= 0, "gamma_min", low, "None or a number >= 0")
        require_value(high is None or high >= (low or 0), "gamma_max", high, f"None or a number >= gamma_min={low}")
        require_value(self.scale_cap is None or self.scale_cap > 0, "scale_cap", self.scale_cap, "None or a number > 0")
        require_value(self.smoothing_sigma >= 0, "smoothing_sigma", self.smoothing_sigma, "a number >= 0")
        require_window(self.start, self.stop)

    def active(self, fraction: float) -> bool:
        return self.start <= fraction < self.stop

    def _limit(self, gamma: Float[Tensor, "B 1 H W"], guidance_scale: float) -> Float[Tensor, "B 1 H W"]:
        cap = None if self.scale_cap is None else self.scale_cap / guidance_scale
        return limit(gamma, gamma_min=self.gamma_min, gamma_max=self.gamma_max, cap=cap, sigma=self.smoothing_sigma)


def require_value(holds: bool, name: str, value: object, allowed: str) -> None:
    """Refuse a setting's value in one way.

    Args:
        holds: whether the value is allowed.
        name: the setting.
        value: what it was set to.
        allowed: what may be used instead, in words.

    Raises:
        ScfgError: it does not hold.
    """
    if not holds:
        raise ScfgError(f"{name}={value!r} is not allowed; use {allowed}")


def require_window(start: float, stop: float) -> None:
    """Check a window of the steps.

    Raises:
        ScfgError: not 0 <= start < stop <= 1.
    """
    require_value(0 <= start < stop <= 1, "start, stop", (start, stop), "0 <= start < stop <= 1")


def as_number(settings: Guidance, name: str) -> None:
    """Make a field a float: 3 and 3.0 are one setting, also in a file.

    Raises:
        ScfgError: it is no number.
    """
    value = getattr(settings, name)
    require_value(isinstance(value, (int, float)), name, value, "a number")
    object.__setattr__(settings, name, float(value))

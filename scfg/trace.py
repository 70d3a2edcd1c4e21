"""What a run leaves behind: numbers of every step, and maps where they were asked for."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from .scale import RegionNorms

__all__ = ["RECORDABLE", "Step"]

RECORDABLE = ("regions", "gamma", "prediction")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step. Tensors stay on the model's device, so that recording never waits for it.

    Attributes:
        index: position among the steps run, from 0.
        fraction: index / number of steps run.
        timestep: the scheduler's t, 0-d.
        guidance_scale: the pipeline's s at this step.
        effective_scale: (B,), sum ||gamma * delta|| / sum ||delta||; times s it is the total guidance.
        norms: per-region area, mean ||delta||, mean ||u|| and gamma (B, R), in the prediction's own units.
        alphas_cumprod: the scheduler's schedule, where it has one.
        scheduler_sigma: sigma of the U-net's input, where the scheduler steps along sigmas.
        regions: (B, h, w) owner of each position, if recorded.
        foreground: (B, h, w), if recorded and used.
        gamma: (B, 1, H, W), if recorded.
        prediction: (B, C, H, W) predicted clean latents after guidance, if recorded.
    """

    index: int
    fraction: float
    timestep: Tensor
    guidance_scale: float
    effective_scale: Float[Tensor, " B"]
    norms: RegionNorms | None = None
    alphas_cumprod: Tensor | None = None
    scheduler_sigma: float | None = None
    regions: Int[Tensor, "B h w"] | None = None
    foreground: Bool[Tensor, "B h w"] | None = None
    gamma: Float[Tensor, "B 1 H W"] | None = None
    prediction: Float[Tensor, "B C H W"] | None = None

    @property
    def sigma(self) -> float | None:
        """sigma_t of the U-net's input, x = alpha_t * x0 + sigma_t * noise; ||u|| / sigma_t is the score's norm."""
        if self.scheduler_sigma is not None:
            return self.scheduler_sigma
        if self.alphas_cumprod is None:
            return None
        last = len(self.alphas_cumprod) - 1
        index = min(max(round(float(self.timestep)), 0), last)
        return float((1.0 - self.alphas_cumprod[index]).clamp_min(0.0).sqrt())

"""S-CFG: frozen settings and one pure call.

    u + s * gamma * delta,   delta = c - u

Source: Shen et al., CVPR 2024 (arXiv 2404.05384). The control arms behind the same interface are in `arms`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ScfgError
from .regions import Regions
from .scale import (
    ScaleMap,
    classifier_score_norm,
    dose,
    limit,
    masked_mean,
    region_norms,
    spread,
    to_prediction_size,
)

__all__ = ["SemanticCFG"]

Completion = Literal["published", "paper"]
Foreground = Literal["unconditional", "conditional", "auto"]
EmptyForeground = Literal["one", "published"]
Tokens = Literal["all", "prompt", "phrases"]
Reference = Literal["foreground", "mean"]
_CHOICES = {
    "completion": Completion,
    "foreground": Foreground,
    "empty_foreground": EmptyForeground,
    "tokens": Tokens,
    "reference": Reference,
}
_OPTIONAL = ("gamma_min", "gamma_max", "scale_cap")
_NUMBERS = (*_OPTIONAL, "smoothing_sigma", "start", "stop")


@dataclass(frozen=True, kw_only=True)
class SemanticCFG:
    """Semantic-aware classifier-free guidance: every region guided with the reference's strength.

    The defaults keep the published formulas and change three things: the region grid fits the model ("auto"), an empty
    foreground means plain CFG instead of weaker guidance, and a negative prompt of zeros (SDXL) is not
    mistaken for text. `published()` has none of these changes.
    """

    method: ClassVar[str] = "semantic"
    needs_regions: ClassVar[bool] = True
    needs_seeds: ClassVar[bool] = False

    latent_ratio: int | Literal["auto"] = "auto"
    """Finest region grid = latent size / ratio. "auto": a quarter of latents from 64 on, else the finest grid."""
    completion: Completion = "published"
    """Completion along self-attention S: (S + 3 S^2)/4 ("published") or the mean of S^1..S^K ("paper")."""
    completion_steps: int = 4
    """K of the paper's completion."""
    foreground: Foreground = "auto"
    """Half of the batch that tells the foreground. "auto": unconditional; conditional where that half has no text."""
    empty_foreground: EmptyForeground = "one"
    """What gamma is where no position is foreground: 1, or what the published code makes of it (`gamma_min`, or 0)."""
    tokens: Tokens = "all"
    """Who competes for regions: every token, BOS, EOS and padding too, or the prompt's words or phrases only."""
    reference: Reference = "foreground"
    """Whose mean norm the regions are brought to: the foreground's or the whole image's."""
    gamma_min: float | None = 0.8
    """Lower limit of gamma (the authors' SD code; their IF code has none: None)."""
    gamma_max: float | None = 3.0
    """Upper limit of gamma (the authors' SD code; their IF code has none: None)."""
    scale_cap: float | None = 15.0
    """Upper limit of guidance_scale * gamma."""
    smoothing_sigma: float = 0.5
    """Width of the 3x3 smoothing of maps and gamma; 0 turns it off."""
    start: float = 0.0
    """Fraction of the steps run at which S-CFG begins; before it gamma = 1, plain CFG."""
    stop: float = 1.0
    """Fraction of the steps run at which S-CFG ends; from it on gamma = 1, plain CFG."""
    refresh_every: int = 1
    """Regions are made anew every so many steps and kept in between."""
    last_blocks: int | None = None
    """Only the last so many blocks of each resolution count (IF: 3); None: all."""

    def __post_init__(self) -> None:
        for name in _NUMBERS:  # 3 and 3.0 are one setting, also in a file
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            _require(isinstance(value, (int, float)), name, value, "a number")
            object.__setattr__(self, name, float(value))
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in get_args(choices), name, getattr(self, name), f"one of {get_args(choices)}")
        ratio = self.latent_ratio
        whole = isinstance(ratio, int) and not isinstance(ratio, bool) and ratio >= 1
        _require(ratio == "auto" or whole, "latent_ratio", ratio, '"auto" or a whole number >= 1')
        _require(self.completion_steps >= 1, "completion_steps", self.completion_steps, "a whole number >= 1")
        _require(self.refresh_every >= 1, "refresh_every", self.refresh_every, "a whole number >= 1")
        _require(
            self.last_blocks is None or self.last_blocks >= 1, "last_blocks", self.last_blocks, "None or a number >= 1"
        )
        _require(self.smoothing_sigma >= 0, "smoothing_sigma", self.smoothing_sigma, "a number >= 0")
        _require(self.scale_cap is None or self.scale_cap > 0, "scale_cap", self.scale_cap, "None or a number > 0")
        low, high = self.gamma_min, self.gamma_max
        _require(low is None or low >= 0, "gamma_min", low, "None or a number >= 0")
        _require(high is None or high >= (low or 0), "gamma_max", high, f"None or a number >= gamma_min={low}")
        _require(0 <= self.start < self.stop <= 1, "start, stop", (self.start, self.stop), "0 <= start < stop <= 1")

    @classmethod
    def published(cls) -> SemanticCFG:
        """The authors' Stable Diffusion code, including what it does where no position is foreground."""
        return cls(latent_ratio=4, foreground="unconditional", empty_foreground="published")

    @classmethod
    def published_if_stage1(cls) -> SemanticCFG:
        """The authors' DeepFloyd IF stage I code: reference is the whole image, gamma has no lower and upper limit."""
        return replace(cls.published(), reference="mean", gamma_min=None, gamma_max=None, last_blocks=3)

    @classmethod
    def published_if_stage2(cls) -> SemanticCFG:
        """The authors' DeepFloyd IF stage II code: as stage I, with the foreground as reference."""
        return replace(cls.published_if_stage1(), reference="foreground")

    @classmethod
    def paper(cls) -> SemanticCFG:
        """The paper's completion (mean of S..S^4, equation 5); everything else as in the defaults."""
        return cls(completion="paper")

    def active(self, fraction: float) -> bool:
        """Whether gamma differs from 1 at this fraction of the steps run. Inactive steps leave the prediction alone."""
        return self.start <= fraction < self.stop

    def __call__(
        self,
        uncond: Float[Tensor, "B C H W"],
        cond: Float[Tensor, "B C H W"],
        *,
        guidance_scale: float,
        regions: Regions | None = None,
        weight: Float[Tensor, "B H W"] | None = None,
        seeds: list[int] | None = None,
    ) -> ScaleMap:
        """gamma for one step.

        Args:
            uncond: unconditional prediction u.
            cond: conditional prediction c.
            guidance_scale: s; only the cap 15/s depends on it.
            regions: who owns which position, for methods with `needs_regions`.
            weight: share of each position in the norms (inpainting: 0 on kept pixels); None: all alike.
            seeds: one number per image, for methods with `needs_seeds`.
        """
        score = classifier_score_norm(cond.float() - uncond.float())
        if regions is None:
            raise ScfgError(f"method {self.method!r} needs regions; only 'cfg', 'pointwise' and 'interval' do without")
        size = (score.shape[1], score.shape[2])
        labels = to_prediction_size(regions.index, size).long()
        reference, empty = self._reference(score, regions, weight)
        norms = region_norms(score, classifier_score_norm(uncond), labels, regions.count, reference, weight)
        gamma = self._limit(spread(norms.gamma, labels, weight), guidance_scale)
        if self.empty_foreground == "one":
            gamma = torch.where(empty[:, None, None, None], 1.0, gamma)
        return ScaleMap(gamma=gamma, effective=dose(gamma, score, weight), norms=norms)

    def _reference(self, score: Tensor, regions: Regions, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """n_ref (B,) and whether there is nothing to take it from (B,)."""
        if self.reference == "mean":
            return masked_mean(score, weight), torch.zeros_like(score[:, 0, 0], dtype=torch.bool)
        if regions.foreground is None:
            raise ScfgError("reference='foreground' needs regions with a foreground mask; use reference='mean'")
        mask = to_prediction_size(regions.foreground, (score.shape[1], score.shape[2]))
        if weight is not None:
            mask = mask * weight
        return masked_mean(score, mask), mask.sum(dim=(1, 2)) == 0

    def _limit(self, gamma: Tensor, guidance_scale: float) -> Tensor:
        cap = None if self.scale_cap is None else self.scale_cap / guidance_scale
        return limit(gamma, gamma_min=self.gamma_min, gamma_max=self.gamma_max, cap=cap, sigma=self.smoothing_sigma)


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ScfgError(f"{name}={value!r} is not allowed; use {allowed}")

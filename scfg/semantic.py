"""S-CFG: every region guided with the reference's strength.

    gamma_i = n_ref / n_i,   n_i = mean of ||c - u|| over region i

Source: Shen et al., CVPR 2024 (arXiv 2404.05384).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .errors import ScfgError
from .guidance import GuidanceInputs, LimitedGuidance, require_value
from .regions import Regions
from .scale import (
    ScaleMap,
    classifier_score_norm,
    dose,
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


@dataclass(frozen=True, kw_only=True)
class SemanticCFG(LimitedGuidance):
    """Semantic-aware classifier-free guidance: every region guided with the reference's strength.

    The defaults keep the published formulas and change three things: the region grid fits the model ("auto"), an empty
    foreground means plain CFG instead of weaker guidance, and a negative prompt of zeros (SDXL) is not
    mistaken for text. `published()` has none of these changes.
    """

    method: ClassVar[str] = "semantic"

    latent_ratio: int | Literal["auto"] = "auto"
    """Finest region grid = latent size / ratio. "auto": a quarter for latents of 64 or more, else the finest grid."""
    completion: Completion = "published"
    """Completion along self-attention S: (S + 3 S^2)/4 ("published") or the mean of S^1..S^K ("paper")."""
    completion_steps: int = 4
    """K of the paper's completion."""
    foreground: Foreground = "auto"
    """Which half of the batch defines the foreground. "auto": unconditional; conditional where that has no text."""
    empty_foreground: EmptyForeground = "one"
    """Gamma if no position is foreground. "one": 1, plain CFG; "published": `gamma_min` or 0, as the authors' code."""
    tokens: Tokens = "all"
    """What competes for regions: all tokens including start, end and padding, or only the prompt's words or phrases."""
    reference: Reference = "foreground"
    """Reference strength that all regions are scaled to: the foreground's mean norm, or the whole image's."""
    refresh_every: int = 1
    """Regions are computed again every so many steps and kept in between."""
    last_blocks: int | None = None
    """Number of blocks of each resolution to read, counted from the last (IF: 3). None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in _CHOICES.items():
            require_value(
                getattr(self, name) in get_args(choices), name, getattr(self, name), f"one of {get_args(choices)}"
            )
        ratio = self.latent_ratio
        whole = isinstance(ratio, int) and not isinstance(ratio, bool) and ratio >= 1
        require_value(ratio == "auto" or whole, "latent_ratio", ratio, '"auto" or a whole number >= 1')
        require_value(self.completion_steps >= 1, "completion_steps", self.completion_steps, "a whole number >= 1")
        require_value(self.refresh_every >= 1, "refresh_every", self.refresh_every, "a whole number >= 1")
        last = self.last_blocks
        require_value(last is None or last >= 1, "last_blocks", last, "None or a number >= 1")

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

    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """gamma for one step, from `inputs.regions`."""
        regions, weight, score = inputs.regions, inputs.weight, inputs.score_norm
        if regions is None:
            raise ScfgError(f"method {self.method!r} needs regions; only 'cfg', 'pointwise' and 'interval' do without")
        labels = to_prediction_size(regions.index, (score.shape[1], score.shape[2])).long()
        reference, empty = self._reference(score, regions, weight)
        norms = region_norms(score, classifier_score_norm(inputs.uncond), labels, regions.count, reference, weight)
        gamma = self._limit(spread(norms.gamma, labels, weight), inputs.guidance_scale)
        if self.empty_foreground == "one":
            gamma = torch.where(empty[:, None, None, None], 1.0, gamma)
        return ScaleMap(gamma=gamma, effective=dose(gamma, score, weight), norms=norms)

    def _reference(
        self, score: Float[Tensor, "B H W"], regions: Regions, weight: Float[Tensor, "B H W"] | None
    ) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
        """n_ref, and whether there is nothing to take it from."""
        if self.reference == "mean":
            return masked_mean(score, weight), torch.zeros_like(score[:, 0, 0], dtype=torch.bool)
        if regions.foreground is None:
            raise ScfgError("reference='foreground' needs regions with a foreground mask; use reference='mean'")
        mask = to_prediction_size(regions.foreground, (score.shape[1], score.shape[2]))
        if weight is not None:
            mask = mask * weight
        return masked_mean(score, mask), mask.sum(dim=(1, 2)) == 0

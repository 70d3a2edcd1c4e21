"""S-CFG and its control arms: frozen settings and one pure call each, all behind the same interface.

    u + s * gamma * delta,   delta = c - u

`semantic` is the method. The others answer "is a gain spatial, or just stronger guidance?": `cfg` (gamma = 1), `dose`
(one number per image and step: S-CFG's total guidance without its map), `placebo` (S-CFG's gammas on the wrong regions,
at S-CFG's dose), `pointwise` (gamma from ||delta|| alone, no attention), `interval` (plain CFG in some steps only).
Source: Shen et al., CVPR 2024 (arXiv 2404.05384); `interval`: Kynkäänniemi et al., NeurIPS 2024 (arXiv 2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ScfgError
from .regions import Regions
from .scale import (
    NORM_EPS,
    ScaleMap,
    classifier_score_norm,
    dose,
    limit,
    masked_mean,
    permute_regions,
    region_norms,
    spread,
    to_prediction_size,
)

__all__ = ["CFG", "METHODS", "Dose", "Interval", "Placebo", "Pointwise", "SemanticCFG", "guidance"]

Completion = Literal["published", "paper"]
Foreground = Literal["unconditional", "conditional", "auto"]
EmptyForeground = Literal["one", "published"]
Tokens = Literal["all", "prompt"]
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
    """Who competes for regions: every token, BOS, EOS and padding too, or the words of the prompt only."""
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


@dataclass(frozen=True, kw_only=True)
class CFG(SemanticCFG):
    """Plain classifier-free guidance: gamma = 1 at every step, the prediction untouched."""

    method: ClassVar[str] = "cfg"
    needs_regions: ClassVar[bool] = False

    def active(self, fraction: float) -> bool:
        return False

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
        """gamma = 1."""
        return _constant(uncond, 1.0)


@dataclass(frozen=True, kw_only=True)
class Dose(SemanticCFG):
    """S-CFG's total guidance of each image and step as one number, on its own trajectory: no map."""

    method: ClassVar[str] = "dose"

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
        """gamma = S-CFG's effective scale, the same everywhere in an image."""
        semantic = super().__call__(uncond, cond, guidance_scale=guidance_scale, regions=regions, weight=weight)
        flat = semantic.effective[:, None, None, None].expand_as(semantic.gamma)
        return replace(semantic, gamma=flat)


@dataclass(frozen=True, kw_only=True)
class Placebo(SemanticCFG):
    """S-CFG's gammas handed to the wrong regions of the same image, then scaled to S-CFG's dose."""

    method: ClassVar[str] = "placebo"
    needs_seeds: ClassVar[bool] = True

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
        """S-CFG's call with its regions' gammas permuted; `seeds` (one per image) draws who gets whose."""
        semantic = super().__call__(uncond, cond, guidance_scale=guidance_scale, regions=regions, weight=weight)
        if seeds is None or regions is None or semantic.norms is None:
            raise ScfgError("method 'placebo' needs one seed per image; pass seeds=[...]")
        score = classifier_score_norm(cond.float() - uncond.float())
        labels = to_prediction_size(regions.index, (score.shape[1], score.shape[2])).long()
        permuted = permute_regions(semantic.norms.gamma, semantic.norms.area > 0, seeds)
        gamma = self._limit(spread(permuted, labels, weight), guidance_scale)
        gamma = gamma * (semantic.effective / dose(gamma, score, weight).clamp_min(NORM_EPS))[:, None, None, None]
        return replace(semantic, gamma=gamma, norms=replace(semantic.norms, gamma=permuted))


@dataclass(frozen=True, kw_only=True)
class Pointwise(SemanticCFG):
    """Every position its own region: gamma = mean ||delta|| / ||delta(x)||, limited and smoothed; no attention maps."""

    method: ClassVar[str] = "pointwise"
    needs_regions: ClassVar[bool] = False

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
        """gamma from the classifier score alone."""
        score = classifier_score_norm(cond.float() - uncond.float())
        gamma = masked_mean(score, weight)[:, None, None] / (score + NORM_EPS)
        gamma = self._limit(gamma[:, None], guidance_scale)
        return ScaleMap(gamma=gamma, effective=dose(gamma, score, weight))


@dataclass(frozen=True, kw_only=True)
class Interval(SemanticCFG):
    """Plain CFG between `start` and `stop`; outside, no guidance at all: the prediction is c."""

    method: ClassVar[str] = "interval"
    needs_regions: ClassVar[bool] = False

    start: float = 0.2
    """Fraction of the steps run at which guidance begins."""
    stop: float = 0.8
    """Fraction of the steps run at which guidance ends."""

    def active(self, fraction: float) -> bool:
        return not (self.start <= fraction < self.stop)

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
        """gamma = 1/s, so that u + s * gamma * delta = c; asked for outside the interval only."""
        return _constant(uncond, 1.0 / guidance_scale)


METHODS: dict[str, type[SemanticCFG]] = {
    kind.method: kind for kind in (SemanticCFG, CFG, Dose, Placebo, Pointwise, Interval)
}


def guidance(name: str, settings: SemanticCFG | None = None, **changes: Any) -> SemanticCFG:
    """A guidance by name: `guidance("dose")`, `guidance("semantic", latent_ratio=4)`, `guidance("dose", tuned)`.

    Args:
        name: one of `METHODS`.
        settings: take all fields from this one (a control arm for a tuned `SemanticCFG`); None: the method's defaults.
        changes: fields to set.

    Raises:
        ScfgError: unknown name, unknown field or a value out of range.
    """
    if name not in METHODS:
        raise ScfgError(f"guidance {name!r} is unknown; choose one of {sorted(METHODS)}")
    kind = METHODS[name]
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ScfgError(f"guidance {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    # Inside an interval there is plain CFG and outside none: its window is not S-CFG's, so it is never taken over.
    taken = known - {"start", "stop"} if (kind is Interval) != isinstance(settings, Interval) else known
    values = {} if settings is None else {key: getattr(settings, key) for key in taken}
    return kind(**{**values, **changes})


def _constant(like: Tensor, value: float) -> ScaleMap:
    batch, _, height, width = like.shape
    gamma = torch.full((batch, 1, height, width), value, dtype=torch.float32, device=like.device)
    return ScaleMap(gamma=gamma, effective=torch.full((batch,), value, dtype=torch.float32, device=like.device))


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise ScfgError(f"{name}={value!r} is not allowed; use {allowed}")

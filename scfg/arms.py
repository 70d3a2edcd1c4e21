"""The control arms of every comparison, behind `SemanticCFG`'s interface, and all methods by name.

They answer "is a gain spatial, or just stronger guidance?": `cfg` (gamma = 1), `dose` (one number per image and step:
S-CFG's total guidance without its map), `placebo` (S-CFG's gammas on the wrong regions, at S-CFG's dose), `pointwise`
(gamma from ||delta|| alone, no attention), `interval` (plain CFG in some steps only: Kynkäänniemi et al., NeurIPS 2024,
arXiv 2404.07724).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ScfgError
from .guidance import SemanticCFG
from .regions import Regions
from .scale import (
    NORM_EPS,
    ScaleMap,
    classifier_score_norm,
    dose,
    masked_mean,
    permute_regions,
    spread,
    to_prediction_size,
)

__all__ = ["CFG", "METHODS", "Dose", "Interval", "Placebo", "Pointwise", "guidance"]


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

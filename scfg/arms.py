"""The control arms of every comparison, behind S-CFG's interface, and all methods by name.

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
from .guidance import Guidance, GuidanceInputs, LimitedGuidance, as_number, require_window
from .scale import NORM_EPS, ScaleMap, dose, masked_mean, permute_regions, spread, to_prediction_size
from .semantic import SemanticCFG

__all__ = ["CFG", "METHODS", "Dose", "Interval", "Placebo", "Pointwise", "make_guidance"]


@dataclass(frozen=True, kw_only=True)
class CFG(Guidance):
    """Plain classifier-free guidance: gamma = 1 at every step, the prediction untouched."""

    method: ClassVar[str] = "cfg"

    def active(self, fraction: float) -> bool:
        return False

    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """gamma = 1."""
        return _constant(inputs.uncond, 1.0)


@dataclass(frozen=True, kw_only=True)
class Dose(SemanticCFG):
    """S-CFG's total guidance of each image and step as one number, on its own trajectory: no map."""

    method: ClassVar[str] = "dose"

    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """gamma = S-CFG's effective scale, the same everywhere in an image."""
        semantic = super().__call__(inputs)
        flat = semantic.effective[:, None, None, None].expand_as(semantic.gamma)
        return replace(semantic, gamma=flat)


@dataclass(frozen=True, kw_only=True)
class Placebo(SemanticCFG):
    """S-CFG's gammas handed to the wrong regions of the same image, then scaled to S-CFG's dose."""

    method: ClassVar[str] = "placebo"
    needs_seeds: ClassVar[bool] = True

    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """S-CFG's call with its regions' gammas permuted; `inputs.seeds` draws who gets whose."""
        semantic = super().__call__(inputs)
        if inputs.seeds is None or inputs.regions is None or semantic.norms is None:
            raise ScfgError("method 'placebo' needs one seed per image; pass seeds=[...]")
        score, weight = inputs.score_norm, inputs.weight
        labels = to_prediction_size(inputs.regions.index, (score.shape[1], score.shape[2])).long()
        permuted = permute_regions(semantic.norms.gamma, semantic.norms.area > 0, inputs.seeds)
        gamma = self._limit(spread(permuted, labels, weight), inputs.guidance_scale)
        gamma = gamma * (semantic.effective / dose(gamma, score, weight).clamp_min(NORM_EPS))[:, None, None, None]
        return replace(semantic, gamma=gamma, norms=replace(semantic.norms, gamma=permuted))


@dataclass(frozen=True, kw_only=True)
class Pointwise(LimitedGuidance):
    """Every position its own region: gamma = mean ||delta|| / ||delta(x)||, limited and smoothed; no attention maps."""

    method: ClassVar[str] = "pointwise"

    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """gamma from the classifier score alone."""
        score = inputs.score_norm
        gamma = masked_mean(score, inputs.weight)[:, None, None] / (score + NORM_EPS)
        gamma = self._limit(gamma[:, None], inputs.guidance_scale)
        return ScaleMap(gamma=gamma, effective=dose(gamma, score, inputs.weight))


@dataclass(frozen=True, kw_only=True)
class Interval(Guidance):
    """Plain CFG between `start` and `stop`; outside, no guidance at all: the prediction is c."""

    method: ClassVar[str] = "interval"

    start: float = 0.2
    """Fraction of the steps run at which guidance begins."""
    stop: float = 0.8
    """Fraction of the steps run at which guidance ends."""

    def __post_init__(self) -> None:
        as_number(self, "start")
        as_number(self, "stop")
        require_window(self.start, self.stop)

    def active(self, fraction: float) -> bool:
        return not (self.start <= fraction < self.stop)

    def __call__(self, inputs: GuidanceInputs) -> ScaleMap:
        """gamma = 1/s, so that u + s * gamma * delta = c; asked for outside the interval only."""
        return _constant(inputs.uncond, 1.0 / inputs.guidance_scale)


METHODS: dict[str, type[Guidance]] = {
    kind.method: kind for kind in (SemanticCFG, CFG, Dose, Placebo, Pointwise, Interval)
}


def make_guidance(name: str, settings: Guidance | None = None, **changes: Any) -> Guidance:
    """A guidance by name: `make_guidance("dose")`, `make_guidance("semantic", latent_ratio=4)`.

    One set of S-CFG's fields serves all methods: a method without attention leaves those out that it does not have.

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
    every, own = ({field.name for field in fields(one)} for one in (SemanticCFG, kind))
    unknown = sorted(set(changes) - every)
    if unknown:
        raise ScfgError(f"guidance {name!r} has no setting {', '.join(unknown)}; it has {', '.join(sorted(own))}")
    SemanticCFG(**{key: value for key, value in changes.items() if key not in own})  # checked although left out
    # Inside an interval there is plain CFG and outside none: its window is not S-CFG's, so it is never taken over.
    taken = own - {"start", "stop"} if (kind is Interval) != isinstance(settings, Interval) else own
    values = {key: getattr(settings, key) for key in taken if hasattr(settings, key)}
    return kind(**{**values, **{key: value for key, value in changes.items() if key in own}})


def _constant(like: Float[Tensor, "B C H W"], value: float) -> ScaleMap:
    batch, _, height, width = like.shape
    gamma = torch.full((batch, 1, height, width), value, dtype=torch.float32, device=like.device)
    return ScaleMap(gamma=gamma, effective=torch.full((batch,), value, dtype=torch.float32, device=like.device))

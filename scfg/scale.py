"""From regions and the classifier score to the scale map gamma: pure tensors (section 3.3 of the S-CFG paper).

With delta = cond - uncond, d(x) = ||delta(x)||_2 over channels and n_i the mean of d over region i, the paper sets
gamma_i = n_ref / n_i, so that every region is guided with the reference's strength: u + s * gamma * delta.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .precision import widened
from .regions import one_hot, smooth

__all__ = [
    "RegionNorms",
    "ScaleMap",
    "classifier_score_norm",
    "dose",
    "image_seed",
    "limit",
    "masked_mean",
    "permute_regions",
    "region_norms",
    "rewrite",
    "spread",
    "to_prediction_size",
]

NORM_EPS = 1e-8


@dataclass(frozen=True, kw_only=True)
class RegionNorms:
    """Per image and region; regions are numbered by token (or word).

    Attributes:
        area: (B, R), share of the counted positions.
        delta: (B, R), mean of ||cond - uncond|| over the region; 0 where it is empty.
        uncond: (B, R), mean of ||uncond|| over the region; 0 where it is empty.
        gamma: (B, R), scale of the region before limits and smoothing; 0 where it is empty.
    """

    area: Float[Tensor, "B R"]
    delta: Float[Tensor, "B R"]
    uncond: Float[Tensor, "B R"]
    gamma: Float[Tensor, "B R"]


@dataclass(frozen=True, kw_only=True)
class ScaleMap:
    """The result of one guidance call.

    Attributes:
        gamma: (B, 1, H, W), multiplies delta beside the guidance scale.
        effective: (B,), sum ||gamma * delta|| / sum ||delta||: total guidance relative to plain CFG at the same scale.
        norms: per-region numbers, where there are regions.
    """

    gamma: Float[Tensor, "B 1 H W"]
    effective: Float[Tensor, " B"]
    norms: RegionNorms | None = None


def classifier_score_norm(prediction: Float[Tensor, "B C H W"]) -> Float[Tensor, "B H W"]:
    """Length over channels, in float32 or wider."""
    length: Tensor = torch.linalg.vector_norm(widened(prediction), dim=1)
    return length


def masked_mean(values: Float[Tensor, "B H W"], weight: Float[Tensor, "B H W"] | None) -> Float[Tensor, " B"]:
    """Mean over positions, weighted; 0 where all weights are 0."""
    if weight is None:
        return values.mean(dim=(1, 2))
    return (values * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp_min(NORM_EPS)


def to_prediction_size(labels: Tensor, size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """(B, h, w) labels or masks on the region grid -> (B, H, W), nearest."""
    return F.interpolate(labels[:, None].float(), size=size, mode="nearest")[:, 0]


def region_norms(
    delta_norm: Float[Tensor, "B H W"],
    uncond_norm: Float[Tensor, "B H W"],
    labels: Int[Tensor, "B H W"],
    count: int,
    reference: Float[Tensor, " B"],
    weight: Float[Tensor, "B H W"] | None,
) -> RegionNorms:
    """Means over regions as one product with the masks, which is deterministic on every device (a scatter is not).

    Args:
        delta_norm: ||delta||, length of cond - uncond over the channels, per position.
        uncond_norm: length of the unconditional prediction over the channels, per position.
        labels: the region of every position, 0 to count - 1.
        count: regions R, also those without a position.
        reference: the norm that every region is brought to, one an image.
        weight: what a position counts, 0 to 1 (an inpainting mask); None: all count alike.

    Returns:
        Per image and region (B, R), the share of the area, both mean norms, and gamma = reference / mean delta norm (0
        in an empty region).
    """
    masks = one_hot(labels, count).flatten(2).to(delta_norm.dtype)  # (B, R, H*W)
    if weight is not None:
        masks = masks * weight.flatten(1)[:, None]
    area = masks.sum(dim=2)
    sums = masks @ torch.stack([delta_norm, uncond_norm], dim=-1).flatten(1, 2)  # (B, R, 2)
    means = sums / area.clamp_min(NORM_EPS)[..., None]
    gamma = torch.where(area > 0, reference[:, None] / (means[..., 0] + NORM_EPS), 0.0)
    share = area / area.sum(dim=1, keepdim=True).clamp_min(NORM_EPS)
    return RegionNorms(area=share, delta=means[..., 0], uncond=means[..., 1], gamma=gamma)


def spread(
    gamma: Float[Tensor, "B R"], labels: Int[Tensor, "B H W"], weight: Float[Tensor, "B H W"] | None
) -> Float[Tensor, "B 1 H W"]:
    """Every position takes its region's gamma. A region without a counted position keeps plain CFG (gamma 1).

    Args:
        gamma: one factor a region (B, R).
        labels: the region of every position, 0 to R - 1.
        weight: what a position counts, 0 to 1; None: all count.
    """
    flat: Tensor = gamma.gather(1, labels.flatten(1)).unflatten(1, labels.shape[1:])
    if weight is not None:
        counted = (one_hot(labels, gamma.shape[1]) * weight[:, None]).sum(dim=(2, 3)) > 0  # (B, R)
        flat = torch.where(counted.gather(1, labels.flatten(1)).view_as(flat), flat, 1.0)
    return flat[:, None]


def limit(
    gamma: Float[Tensor, "B 1 H W"],
    *,
    gamma_min: float | None,
    gamma_max: float | None,
    cap: float | None,
    sigma: float,
) -> Float[Tensor, "B 1 H W"]:
    """Clamp to [gamma_min, gamma_max], then to at most `cap`, then smooth: the published order.

    Args:
        gamma: the factor of every position.
        gamma_min: lower bound; None: none.
        gamma_max: upper bound; None: none.
        cap: second upper bound, `scale_cap` / s, which holds s * gamma below `scale_cap`; None: none.
        sigma: width of the smoothing in positions, see `regions.smooth`; 0: none.
    """
    if gamma_min is not None or gamma_max is not None:
        gamma = gamma.clamp(gamma_min, gamma_max)
    if cap is not None:
        gamma = gamma.clamp_max(cap)
    return smooth(gamma, sigma)


def dose(
    gamma: Float[Tensor, "B 1 H W"], delta_norm: Float[Tensor, "B H W"], weight: Float[Tensor, "B H W"] | None = None
) -> Float[Tensor, " B"]:
    """sum ||gamma * delta|| / sum ||delta||; 1 where there is no guidance at all.

    Args:
        gamma: the factor of every position.
        delta_norm: ||delta||, length of cond - uncond over the channels, per position.
        weight: what a position counts, 0 to 1; None: all count alike.

    Returns:
        One factor an image: plain CFG pushes as much at this multiple of its scale.
    """
    counted = delta_norm if weight is None else delta_norm * weight
    total = counted.sum(dim=(1, 2))
    return torch.where(total > 0, (gamma[:, 0].abs() * counted).sum(dim=(1, 2)) / total.clamp_min(1e-30), 1.0)


def image_seed(sample: Float[Tensor, "C H W"]) -> int:
    """A number for an image from its initial noise: the same in any batch, another for every seed."""
    return zlib.crc32(sample.float().cpu().contiguous().numpy().tobytes())


def permute_regions(
    gamma: Float[Tensor, "B R"], present: Bool[Tensor, "B R"], seeds: list[int]
) -> Float[Tensor, "B R"]:
    """Hands every present region another one's gamma, within each image: one step along a cycle drawn from its seed.

    A cycle leaves no region its own (with two or more present), which a free permutation often would.

    Args:
        gamma: one factor a region.
        present: which regions have a position.
        seeds: one an image.
    """
    permuted = gamma.clone()
    for image, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(gamma.shape[1], generator=generator).to(gamma.device)
        cycle = order[present[image, order]]
        permuted[image, cycle] = gamma[image, cycle.roll(1)]
    return permuted


def rewrite(
    uncond: Float[Tensor, "B C H W"],
    cond: Float[Tensor, "B C H W"],
    gamma: Float[Tensor, "B 1 H W"],
    scale: float,
    *,
    keep_cond: bool,
) -> Float[Tensor, "B C H W"]:
    """The half that makes a pipeline's u + s * (c - u) equal u + s * gamma * delta: c', or u' with `keep_cond`.

    Args:
        uncond: prediction u for the negative prompt.
        cond: prediction c for the prompt.
        gamma: factor of delta = c - u at every position.
        scale: the pipeline's guidance scale s.
        keep_cond: whether u is rewritten and c stays; s must not be 1 then.
    """
    wide = widened(uncond)
    delta = widened(cond) - wide
    if keep_cond:
        return (wide + scale / (scale - 1.0) * (1.0 - gamma) * delta).to(uncond.dtype)
    return (wide + gamma * delta).to(cond.dtype)

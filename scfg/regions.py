"""From attention to regions and foreground: pure tensors, no model (section 3.2 of the S-CFG paper).

Per block: complete the cross-attention along self-attention, bring it to the region grid, smooth, make every token's
map mean-one. The mean over blocks gives each position to one token. Source: Shen et al., Rethinking the Spatial
Inconsistency in Classifier-Free Diffusion Guidance, CVPR 2024 (arXiv 2404.05384).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["RegionAverage", "Regions", "complete", "lift", "one_hot", "smooth"]

RENORM_EPS = 1e-8  # the published code's guard against an empty map


@dataclass(frozen=True, kw_only=True)
class Regions:
    """What attention says about each image.

    Attributes:
        index: (B, h, w), the token (or word) that owns a position.
        count: number of tokens (or words) that competed.
        foreground: (B, h, w), where the image's subject is; None where the reference norm does not need it.
    """

    index: Int[Tensor, "B h w"]
    count: int
    foreground: Bool[Tensor, "B h w"] | None = None


def complete(
    attend: Callable[[Tensor], Tensor], cross: Float[Tensor, "B N T"], *, completion: str, steps: int
) -> Float[Tensor, "B N T"]:
    """P(S) A from products with S alone. `attend(X)` returns S X.

    `published`: (S + 3 S^2) A / 4, what the authors' code computes. `paper`: (S + S^2 + ... + S^steps) A / steps.

    Args:
        attend: X (B, N, T) -> S X, with the self-attention S (B, N, N) that is never formed here.
        cross: cross-attention A of N positions to T tokens.
        completion: "published" or "paper", as above.
        steps: highest power of S in "paper".
    """
    if completion == "published":
        first = attend(cross)
        return (first + 3.0 * attend(first)) / 4.0
    power, total = cross, torch.zeros_like(cross)
    for _ in range(steps):
        power = attend(power)
        total += power
    return total / steps


def smooth(maps: Float[Tensor, "B K H W"], sigma: float) -> Float[Tensor, "B K H W"]:
    """3x3 smoothing with reflected edges; 1-D weights proportional to exp(-(d / (2 sigma))^2). sigma 0: unchanged."""
    if sigma == 0.0:
        return maps
    side = math.exp(-((1.0 / (2.0 * sigma)) ** 2))
    line = torch.tensor([side, 1.0, side], dtype=maps.dtype, device=maps.device)
    line = line / line.sum()
    kernel = line[:, None] * line[None, :]
    flat = maps.flatten(0, 1)[:, None]  # (B*K, 1, H, W)
    smoothed: Tensor = F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="reflect"), kernel[None, None])[:, 0].unflatten(
        0, maps.shape[:2]
    )
    return smoothed


def lift(
    maps: Float[Tensor, "B N T"], grid: tuple[int, int], target: tuple[int, int], sigma: float
) -> Float[Tensor, "B T H W"]:
    """Token maps on a block's `grid` -> smoothed maps on the region grid `target`.

    Args:
        maps: one map a token (B, N, T), N = h * w positions, row by row.
        grid: (h, w) of the maps.
        target: (H, W) of the region grid; the maps are interpolated bilinearly.
        sigma: width of the smoothing in positions of `target`, see `smooth`; 0: none.
    """
    images = maps.mT.unflatten(-1, grid)  # (B, T, h, w)
    if grid != target:
        images = F.interpolate(images, size=target, mode="bilinear", align_corners=False)
    return smooth(images, sigma)


class RegionAverage:
    """The running mean over blocks; keeps one (B, T, H, W) sum, never a block's own maps.

    Args:
        target: region grid (H, W), that of the finest block.
        sigma: width of the smoothing kernel.
    """

    def __init__(self, target: tuple[int, int], sigma: float) -> None:
        self.target = target
        self.sigma = sigma
        self._token_sum: Tensor | None = None
        self._pair_sum: Tensor | None = None

    def add_tokens(self, maps: Float[Tensor, "B N T"], grid: tuple[int, int]) -> None:
        """One block's completed maps, for the contest between tokens."""
        lifted = lift(maps, grid, self.target, self.sigma)
        lifted = lifted / (lifted.mean(dim=(2, 3), keepdim=True) + RENORM_EPS)
        self._token_sum = lifted if self._token_sum is None else self._token_sum + lifted

    def add_pair(self, pair: Float[Tensor, "B N 2"], grid: tuple[int, int]) -> None:
        """One block's completed [background token, sum of all others], for the foreground."""
        lifted = lift(pair, grid, self.target, self.sigma)
        lifted = lifted / lifted.mean(dim=(2, 3), keepdim=True)
        self._pair_sum = lifted if self._pair_sum is None else self._pair_sum + lifted

    def foreground(self) -> Bool[Tensor, "B h w"] | None:
        """Where the background token does not win; None if no pair was added."""
        pair = self._pair_sum
        return None if pair is None else pair[:, 1] > pair[:, 0]

    def shares(self) -> Float[Tensor, "B T h w"]:
        """Each token's share of all tokens' maps at a position."""
        if self._token_sum is None:
            raise RuntimeError("no block's token maps were added")
        return self._token_sum / self._token_sum.sum(dim=1, keepdim=True).clamp_min(RENORM_EPS)

    def regions(self) -> Regions:
        """Argmax over tokens; ties go to the first."""
        if self._token_sum is None:
            raise RuntimeError("no block's token maps were added")
        return Regions(
            index=self._token_sum.argmax(dim=1), count=self._token_sum.shape[1], foreground=self.foreground()
        )


def one_hot(index: Int[Tensor, "B h w"], count: int) -> Float[Tensor, "B count h w"]:
    """Owner of each position as one mask per token."""
    return F.one_hot(index, count).movedim(-1, 1).float()

"""Noise, targets and loss weights of diffusion training: pure functions of tensors, everything in float32.

x_t = α_t x_0 + σ_t ε with α_t² + σ_t² = 1 (variance preserving), SNR(t) = α_t²/σ_t².
Targets: ε; v = α_t ε − σ_t x_0 (Salimans & Ho 2022, eq. 12); x_0.
Weights are written for the error that is actually squared, by err_ε² = α² err_v² and err_x0² = err_ε²/SNR:

| | ε | v | x_0 |
|---|---|---|---|
| min-SNR-γ (Hang et al. 2023, eq. 7) | min(SNR, γ)/SNR | min(SNR, γ)/(SNR+1) | min(SNR, γ) |
| debiased (Yu et al. 2023) | 1/√SNR | √SNR/(SNR+1) | √SNR |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .config import ObjectiveSettings
from .errors import TrainingError

__all__ = [
    "Objective",
    "add_noise",
    "alpha_sigma",
    "alphas_cumprod",
    "build_objective",
    "error",
    "snr_weight",
    "target",
]

SNR_CEILING = 1000.0  # of the debiased weight, whose 1/√SNR would all but drop the cleanest steps


def alphas_cumprod(scheduler: dict[str, Any], *, zero_terminal_snr: bool = False) -> Tensor:
    """α_t² of a diffusers scheduler config, (T,), computed in float64 and returned in float32.

    Raises:
        TrainingError: a beta schedule this module does not know.
    """
    steps = int(scheduler.get("num_train_timesteps", 1000))
    start, end = scheduler.get("beta_start", 0.0001), scheduler.get("beta_end", 0.02)
    kind = scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, steps, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        bar = torch.cos((times + 0.008) / 1.008 * torch.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise TrainingError(
            f"scheduler.beta_schedule {kind!r} of the base model is not known; allowed: linear, scaled_linear, "
            "squaredcos_cap_v2"
        )
    products = torch.cumprod(1 - betas, 0)
    if zero_terminal_snr or scheduler.get("rescale_betas_zero_snr"):
        # Lin et al. 2023, algorithm 1: shift sqrt(α²) so that the last is 0, scale so that the first stays.
        roots = products.sqrt()
        roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
        products = roots**2
    return products.float()


def alpha_sigma(products: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """α_t and σ_t, each (B, 1, 1, 1) float32, for integer timesteps (B,)."""
    chosen = products.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return chosen.sqrt(), (1 - chosen).sqrt()


def add_noise(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t (B, C, h, w) float32; α and σ stay in float32, whose bfloat16 has 8 bits of mantissa.

    Args:
        latents: (B, C, h, w).
        noise: (B, C, h, w), standard normal.
        alpha: (B, 1, 1, 1), factor of the latents.
        sigma: (B, 1, 1, 1), factor of the noise.
    """
    return alpha * latents.float() + sigma * noise.float()


def target(prediction: str, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network shall predict, (B, C, h, w) float32.

    Args:
        prediction: "epsilon", "v_prediction" or "sample".
        latents: (B, C, h, w).
        noise: (B, C, h, w), standard normal.
        alpha: (B, 1, 1, 1), factor of the latents in x_t.
        sigma: (B, 1, 1, 1), factor of the noise in x_t.

    Raises:
        TrainingError: another prediction type.
    """
    if prediction == "epsilon":
        return noise.float()
    if prediction == "v_prediction":
        return alpha * noise.float() - sigma * latents.float()
    if prediction == "sample":
        return latents.float()
    raise TrainingError(f"prediction type {prediction!r} is not known; allowed: epsilon, v_prediction, sample")


def snr_weight(
    prediction: str, alpha: Tensor, sigma: Tensor, *, gamma: float | None = None, debiased: bool = False
) -> Tensor:
    """Loss weight per sample (B,) for the error of `prediction`; all ones without `gamma` and `debiased`.

    Args:
        prediction: "epsilon", "v_prediction" or "sample".
        alpha: (B, 1, 1, 1), factor of the latents in x_t; the signal-to-noise ratio is (alpha / sigma)^2.
        sigma: (B, 1, 1, 1), factor of the noise in x_t.
        gamma: largest ratio that counts (min-SNR); None: no such weight.
        debiased: weight by 1 / sqrt(SNR), where `gamma` is None.
    """
    snr = (alpha / sigma).square().flatten()
    if gamma is not None:
        clipped = snr.clamp(max=gamma)
        return {"epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped}[prediction]
    if debiased:
        root = snr.clamp(max=SNR_CEILING).sqrt()
        return {"epsilon": 1 / root, "v_prediction": root / (snr + 1), "sample": root}[prediction]
    return torch.ones_like(snr)


def error(
    predicted: Tensor, wanted: Tensor, *, kind: str = "mse", huber_c: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    """Error per sample (B,) float32; with `mask` (B, 1, h, w) the mean weighted by it, normalized per sample.

    Normalizing per sample keeps a sample's loss the same in every batch, so that batches can be split at will.

    Args:
        predicted: (B, C, h, w).
        wanted: (B, C, h, w).
        kind: "mse" or "huber" (pseudo-Huber).
        huber_c: error from which Huber grows linearly.
        mask: weight of every position, (B, 1, h, w) in [0, 1].
    """
    difference = predicted.float() - wanted.float()
    squares = difference.square()
    if kind == "huber":
        squares = 2 * huber_c * ((squares + huber_c**2).sqrt() - huber_c)
    if mask is None:
        return squares.mean(dim=(1, 2, 3))
    weights = mask.float().expand_as(squares)
    return (squares * weights).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3)).clamp(min=1e-6)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The chosen pieces above, bound to one base model's noise schedule."""

    products: Tensor
    """α_t², (T,) float32."""
    prediction: str
    settings: ObjectiveSettings

    def noisy(self, batch: Batch) -> Tensor:
        """x_t (B, C, h, w) float32 of a batch as `losses` takes it."""
        alpha, sigma = alpha_sigma(self.products, batch["timesteps"])
        return add_noise(batch["latents"], batch["noise"], alpha, sigma)

    def losses(self, predict: Callable[[Tensor, Tensor], Tensor], batch: Batch) -> Tensor:
        """Weighted loss per sample, (B,) float32.

        Args:
            predict: x_t (B, C, h, w) float32 and timesteps (B,) -> the network's prediction, same shape.
            batch: of which `latents`, `noise` and `timesteps` are used, and `mask` where there is one. Where the base
                says what it wants, also `preserved`, `wanted` and `inside`.
        """
        latents, noise, timesteps = batch["latents"], batch["noise"], batch["timesteps"]
        alpha, sigma = alpha_sigma(self.products, timesteps)
        wanted = target(self.prediction, latents, noise, alpha, sigma)
        if "wanted" in batch:
            rows, inside = batch["preserved"], batch["inside"]
            wanted = wanted.index_copy(0, rows, inside * wanted[rows] + (1 - inside) * batch["wanted"])
        predicted = predict(add_noise(latents, noise, alpha, sigma), timesteps)
        chosen, mask = self.settings, batch.get("mask")
        if mask is not None:
            mask = chosen.background + (1 - chosen.background) * mask
        errors = error(predicted, wanted, kind=chosen.loss, huber_c=chosen.huber_c, mask=mask)
        if chosen.snr_gamma is None and not chosen.debiased:
            return errors
        weights = snr_weight(self.prediction, alpha, sigma, gamma=chosen.snr_gamma, debiased=chosen.debiased)
        return errors * weights


def build_objective(scheduler: dict[str, Any], settings: ObjectiveSettings | None = None) -> Objective:
    """The objective for a base model's scheduler config.

    Raises:
        TrainingError: zero terminal SNR with epsilon prediction, whose last step would have no signal to predict from.
    """
    settings = settings or ObjectiveSettings()
    prediction: str = settings.prediction
    if prediction == "auto":
        prediction = str(scheduler.get("prediction_type", "epsilon"))
    products = alphas_cumprod(scheduler, zero_terminal_snr=settings.zero_terminal_snr)
    if prediction == "epsilon" and products[-1] <= 0:
        raise TrainingError(
            "objective.zero_terminal_snr needs v_prediction or sample prediction, the base model predicts epsilon; "
            "turn it off or set objective.prediction"
        )
    return Objective(products=products, prediction=prediction, settings=settings)

"""The objective against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from training import objective
from training.config import ObjectiveSettings
from training.errors import TrainingError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_schedule_is_that_of_diffusers(kind: str) -> None:
    config = {**SD, "beta_schedule": kind}
    theirs = DDPMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(objective.alphas_cumprod(config), theirs, rtol=2e-5, atol=1e-7)


def test_zero_terminal_snr_ends_without_signal_and_starts_unchanged() -> None:
    plain = objective.alphas_cumprod(SD)
    zero = objective.alphas_cumprod(SD, zero_terminal_snr=True)
    assert zero[-1] == 0
    torch.testing.assert_close(zero[0], plain[0])
    assert bool((zero.diff() < 0).all())
    theirs = DDPMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod
    torch.testing.assert_close(zero, theirs, rtol=1e-3, atol=1e-5)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(TrainingError, match=r"beta_schedule 'sigmoid'.*scaled_linear"):
        objective.alphas_cumprod({**SD, "beta_schedule": "sigmoid"})


def test_noise_and_targets_by_hand() -> None:
    # α = 0.6, σ = 0.8, x_0 = 2, ε = −1: x_t = 0.4, v = −0.6 − 1.6 = −2.2
    alpha, sigma = objective.alpha_sigma(torch.tensor([0.36]), torch.tensor([0]))
    latents, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert objective.add_noise(latents, noise, alpha, sigma).item() == pytest.approx(0.4)
    values = {
        kind: objective.target(kind, latents, noise, alpha, sigma).item()
        for kind in ("epsilon", "v_prediction", "sample")
    }
    assert values == {"epsilon": -1.0, "v_prediction": pytest.approx(-2.2), "sample": 2.0}


def test_noise_and_velocity_are_those_of_diffusers() -> None:
    theirs = DDPMScheduler(**SD)
    latents, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    times = torch.tensor([0, 500, 999])
    alpha, sigma = objective.alpha_sigma(objective.alphas_cumprod(SD), times)
    torch.testing.assert_close(
        objective.add_noise(latents, noise, alpha, sigma), theirs.add_noise(latents, noise, times), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        objective.target("v_prediction", latents, noise, alpha, sigma),
        theirs.get_velocity(latents, noise, times),
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_schedule_stays_float32_under_bf16_latents() -> None:
    """An 8-bit mantissa would round α; latents in bfloat16 must not drag the schedule down with them."""
    products = objective.alphas_cumprod(SD)
    alpha, sigma = objective.alpha_sigma(products, torch.tensor([1]))
    noisy = objective.add_noise(torch.ones(1, 1, 1, 1).bfloat16(), torch.zeros(1, 1, 1, 1).bfloat16(), alpha, sigma)
    assert noisy.dtype == torch.float32
    assert noisy.item() == products[1].sqrt().item()
    assert noisy.item() != noisy.bfloat16().float().item()


# SNR = 9 (α² = 0.9): min(9, 5)/9, 5/10, 5; debiased 1/3, 3/10, 3. SNR = 1/4 (α² = 0.2): 1, 0.2, 0.25; 2, 0.4, 0.5.
@pytest.mark.parametrize(
    ("product", "gamma", "expected"),
    [
        (0.9, 5.0, {"epsilon": 5 / 9, "v_prediction": 0.5, "sample": 5.0}),
        (0.2, 5.0, {"epsilon": 1.0, "v_prediction": 0.2, "sample": 0.25}),
        (0.9, None, {"epsilon": 1 / 3, "v_prediction": 0.3, "sample": 3.0}),
        (0.2, None, {"epsilon": 2.0, "v_prediction": 0.4, "sample": 0.5}),
    ],
)
def test_snr_weights_by_hand(product: float, gamma: float | None, expected: dict[str, float]) -> None:
    alpha, sigma = objective.alpha_sigma(torch.tensor([product]), torch.tensor([0]))
    for kind, value in expected.items():
        weight = objective.snr_weight(kind, alpha, sigma, gamma=gamma, debiased=gamma is None)
        assert weight.item() == pytest.approx(value, rel=1e-4), kind


@pytest.mark.parametrize("gamma", [5.0, None])
def test_the_same_error_weighs_the_same_in_every_parameterisation(gamma: float | None) -> None:
    """One x_0 error has one weighted loss whatever is predicted: err_ε² = α² err_v² = SNR err_x0²."""
    products, times = objective.alphas_cumprod(SD), torch.arange(50, 1000, 111)
    alpha, sigma = objective.alpha_sigma(products, times)
    weights = {
        kind: objective.snr_weight(kind, alpha, sigma, gamma=gamma, debiased=gamma is None)
        for kind in ("epsilon", "v_prediction", "sample")
    }
    squared = alpha.flatten() ** 2
    snr = (alpha / sigma).flatten() ** 2
    torch.testing.assert_close(weights["v_prediction"], weights["epsilon"] * squared, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(weights["sample"], weights["epsilon"] * snr, rtol=1e-3, atol=1e-6)


def test_huber_is_quadratic_for_small_and_linear_for_large_errors() -> None:
    zero = torch.zeros(1, 1, 1, 1)

    def loss(value: float) -> float:
        return objective.error(zero + value, zero, kind="huber", huber_c=0.1).item()

    assert loss(0.3) == pytest.approx(0.2 * (math.sqrt(0.09 + 0.01) - 0.1), rel=1e-5)
    assert loss(0.001) == pytest.approx(1e-6, rel=1e-2)
    assert loss(100.0) == pytest.approx(0.2 * 100, rel=1e-2)


def test_a_masked_loss_is_normalized_per_sample() -> None:
    predicted = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    mask = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]]])
    losses = objective.error(predicted, torch.zeros_like(predicted), mask=mask)
    assert losses.tolist() == [1.0, 4.0]  # a mean over the batch's masked pixels would give (1 + 4 + 4) / 3
    ones = objective.error(predicted, torch.zeros_like(predicted), mask=torch.ones_like(mask))
    torch.testing.assert_close(ones, objective.error(predicted, torch.zeros_like(predicted)))


def test_background_weight_and_min_snr_meet_in_the_objective() -> None:
    bound = objective.build_objective(
        {**SD, "prediction_type": "sample"}, ObjectiveSettings(background=0.5, snr_gamma=5.0)
    )  # x_0 prediction: the target is the latents, so the error is what `predict` is off by
    latents = torch.zeros(1, 1, 1, 2)
    batch = {
        "latents": latents,
        "noise": torch.zeros_like(latents),
        "timesteps": torch.tensor([0]),
        "mask": torch.tensor([[[[1.0, 0.0]]]]),
    }
    losses = bound.losses(lambda noisy, times: torch.tensor([[[[1.0, 2.0]]]]), batch)
    assert losses.item() == pytest.approx(5.0 * (1.0 * 1 + 0.5 * 4) / 1.5, rel=1e-5)


def test_one_min_snr_weight_per_sample_also_with_class_images() -> None:
    """Prior preservation mixes class samples into the batch: weights and losses stay one per sample."""
    bound = objective.build_objective({**SD, "prediction_type": "v_prediction"}, ObjectiveSettings(snr_gamma=5.0))
    latents = torch.randn(6, 4, 2, 2)
    batch = {"latents": latents, "noise": torch.randn_like(latents), "timesteps": torch.randint(1000, (6,))}
    together = bound.losses(lambda noisy, times: noisy, batch)
    single = torch.cat([bound.losses(lambda noisy, times: noisy, {k: v[i : i + 1] for k, v in batch.items()})
                        for i in range(6)])  # fmt: skip
    assert together.shape == (6,)
    torch.testing.assert_close(together, single)


def test_zero_terminal_snr_with_epsilon_is_refused() -> None:
    with pytest.raises(TrainingError, match="zero_terminal_snr needs v_prediction"):
        objective.build_objective({**SD, "prediction_type": "epsilon"}, ObjectiveSettings(zero_terminal_snr=True))

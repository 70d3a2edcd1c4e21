"""The clean sample x0 that a U-net call predicts, read off the scheduler.

The U-net is called with x = alpha * x0 + sigma * noise. Some schedulers step along the training timesteps, where
alpha^2 is the schedule's cumulative product; others step along sigmas of their own (Karras, flow), and their timestep
is only a rounded name. EDM schedulers scale the U-net's input and output themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ScfgError
from .precision import widened

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

__all__ = ["clean_sample", "require_clean", "sigma_of"]

_BY_TIMESTEP = ("DDIM", "DDPM", "LCM", "PNDM", "TCD", "KDPM2Discrete", "KDPM2AncestralDiscrete")
_BY_SIGMA = (
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "LMSDiscrete",
    "UniPCMultistep",
)
_EDM = ("EDMDPMSolverMultistep", "EDMEuler")


def require_clean(scheduler: SchedulerMixin) -> None:
    """Check that x0 is known with this scheduler.

    Raises:
        ScfgError: it is not.
    """
    known = sorted((*_BY_TIMESTEP, *_BY_SIGMA, *_EDM))
    if _kind(scheduler) not in known:
        raise ScfgError(
            f"record=['prediction']: the clean sample of {type(scheduler).__name__} is not known; leave 'prediction' "
            f"out, or use a scheduler of {', '.join(known)}"
        )
    config = scheduler.config
    if _kind(scheduler) in _BY_TIMESTEP and config.prediction_type == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        raise ScfgError(
            f"record=['prediction']: {type(scheduler).__name__} with rescale_betas_zero_snr begins at pure noise: "
            "an epsilon prediction says nothing of the clean sample there (the scheduler divides by zero too); use a "
            "v_prediction base, or turn rescale_betas_zero_snr off"
        )


def clean_sample(
    scheduler: SchedulerMixin,
    timestep: Tensor | float,
    sample: Float[Tensor, "B C H W"],
    prediction: Float[Tensor, "B C H W"],
) -> Float[Tensor, "B C H W"]:
    """x0 as the scheduler computes it (before clipping), in float32 or wider.

    Args:
        scheduler: the pipeline's scheduler, at this step.
        timestep: its t.
        sample: what the U-net was called with.
        prediction: the guided prediction.

    Raises:
        ScfgError: x0 is not known with this scheduler.
    """
    require_clean(scheduler)
    sample, prediction = widened(sample), widened(prediction)
    if _kind(scheduler) in _EDM:
        sigma, data = _own_sigma(scheduler, timestep).to(sample), scheduler.config.sigma_data
        data_prediction: Tensor = scheduler.precondition_outputs(
            sample * (sigma**2 + data**2).sqrt(), prediction, sigma
        )
        return data_prediction
    alpha, sigma = (level.to(sample) for level in _level(scheduler, timestep))
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return alpha * sample - sigma * prediction
    if kind == "flow_prediction":
        return sample - sigma * prediction
    if kind == "sample":
        return prediction
    return (sample - sigma * prediction) / alpha


def sigma_of(scheduler: SchedulerMixin, timestep: Tensor | float) -> float | None:
    """sigma where the scheduler steps along sigmas; None where it follows from the timestep, or is not known."""
    return float(_level(scheduler, timestep)[1]) if _kind(scheduler) in _BY_SIGMA else None


def _kind(scheduler: SchedulerMixin) -> str:
    return type(scheduler).__name__.removesuffix("Scheduler")


def _level(scheduler: SchedulerMixin, timestep: Tensor | float) -> tuple[Tensor, Tensor]:
    """alpha and sigma of the U-net's input, 0-d."""
    if _kind(scheduler) in _BY_SIGMA:
        ratio = _own_sigma(scheduler, timestep)
        if getattr(scheduler.config, "use_flow_sigmas", False):
            return 1.0 - ratio, ratio
    else:
        squares = scheduler.alphas_cumprod
        place = min(max(float(timestep), 0.0), len(squares) - 1.0)
        low = int(place)
        if place == low:
            return squares[low].sqrt(), (1.0 - squares[low]).sqrt()
        ratios = ((1.0 - squares) / squares).sqrt()  # between two timesteps: a straight line in log sigma
        ratio = torch.lerp(ratios[low].log(), ratios[low + 1].log(), place - low).exp()
    alpha = (ratio**2 + 1.0).rsqrt()
    return alpha, ratio * alpha


def _own_sigma(scheduler: SchedulerMixin, timestep: Tensor | float) -> Tensor:
    index = scheduler.step_index
    if index is None:  # some count from their first `step` on
        index = scheduler.begin_index
    sigma: Tensor = scheduler.sigmas[scheduler.index_for_timestep(timestep) if index is None else index]
    return sigma

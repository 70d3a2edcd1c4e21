"""`sampling.precision: auto` on a CPU: a float32 pipeline that draws with its weights rounded to bfloat16.

The weights themselves stay float32, so an adapter merges into them as exactly as ever; they are rounded for as long as
pictures are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from recipes.common.settings import SamplingSettings

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

__all__ = ["class_precision", "drawing_in", "of_sampling"]


def of_sampling(pipe: DiffusionPipeline, sampling: SamplingSettings, say: Callable[[str], None]) -> str:
    """The precision that pictures are drawn in: "fp32", "bf16" or "fp16".

    Args:
        pipe: of `recipes.common.base.sampling_pipeline`, with these settings.
        sampling: precision, size and batch size.
        say: receives a line about a trial.
    """
    import torch

    from recipes.common.base import paints_holes, size_of, without_control
    from training import precision

    if sampling.precision != precision.AUTO:
        return sampling.precision
    if pipe.unet.dtype != torch.float32:
        return "bf16"
    if paints_holes(pipe):  # what it is given besides would have to be tried with it
        return "fp32"
    bare, (width, height) = without_control(pipe), size_of(pipe, sampling)

    @contextmanager
    def trial(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
        with precision.lowered(_networks(pipe), dtype, trained=True):
            yield partial(
                bare,
                prompt=[""] * sampling.batch_size,
                num_inference_steps=2,
                height=height,
                width=width,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            )

    facts = {
        "pictures of": type(bare).__name__,
        "networks": [precision.network(one) for one in _networks(bare)],
        "batch": [sampling.batch_size, height, width],
    }
    return precision.decide_precision("sampling.precision", facts, trial, device=pipe.unet.device, say=say, again=False)


def _networks(pipe: Any) -> list[Any]:
    import torch

    return [one for one in pipe.components.values() if isinstance(one, torch.nn.Module)]


def drawing_in(
    pipe: DiffusionPipeline, chosen: str, around: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], AbstractContextManager[Any]]:
    """Enters a guidance on a pipeline whose weights are rounded meanwhile, where it computes in less than it holds.

    Args:
        pipe: which draws.
        chosen: of `of_sampling`.
        around: makes the guidance's context manager.
    """
    import torch

    from training import precision

    if chosen != "bf16" or pipe.unet.dtype != torch.float32:
        return around

    @contextmanager
    def both() -> Iterator[Any]:
        with precision.lowered(_networks(pipe), torch.bfloat16, trained=True), around() as run:
            yield run

    return both


def class_precision(sampling: SamplingSettings) -> str:
    """The precision that class images are drawn in; `auto` tries nothing on a CPU, where it is float32.

    Args:
        sampling: of the later stages.
    """
    from training import precision
    from training.ranks import state

    if sampling.precision != precision.AUTO:
        return sampling.precision
    return precision.by_units(state().device) or "fp32"

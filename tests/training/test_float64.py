"""No float64 where a device computes: Apple's MPS has none. A CPU has it, so here every operation refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scfg
from training import config, controlnet, dreambooth, loop, lora, models
from training.data import crops, images

WIDE = (torch.float64, torch.complex128)


class Refusing(TorchDispatchMode):
    """Raises where an operation takes or gives a tensor of float64, as MPS does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, found)):
            if isinstance(leaf, torch.Tensor) and leaf.dtype in WIDE:
                raise TypeError(f"{func} uses {leaf.dtype}, which MPS does not have")
        return found


@pytest.mark.parametrize(
    "wide",
    [lambda: torch.ones(2, dtype=torch.float64), lambda: torch.ones(2).double(), lambda: torch.ones(2) * W.clone()],
)
def test_the_refusal_sees_what_mps_would_not_take(wide: Callable[[], Any]) -> None:
    torch.ones(2) * 0.5  # a Python number is none
    with Refusing(), pytest.raises(TypeError, match="which MPS does not have"):
        wide()


W = torch.ones(2, dtype=torch.float64)
METHODS: dict[str, Callable[[models.Parts, config.ObjectiveSettings], Any]] = {
    "lora": lambda parts, aim: lora.prepare(
        parts, config.LoraSettings(rank=2, text_encoder=True, dropout=0.1, max_norm=1.0), aim
    ),
    "dora": lambda parts, aim: lora.prepare(parts, config.LoraSettings(rank=2, dora=True), aim),
    "full": lambda parts, aim: dreambooth.prepare(parts, None, aim),
    "controlnet": lambda parts, aim: controlnet.prepare(parts, config.ControlNetSettings(), aim),
}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", METHODS)
def test_a_training_has_none_from_caching_to_the_result(
    kind: str, family: str, base: Path, sdxl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    if (kind, family) == ("controlnet", "sdxl"):
        pytest.skip("its samples need a condition of SDXL's pipeline; the step is that of sd")
    parts = models.load_parts({"sd": base, "sdxl": sdxl_base}[family])
    aim = config.ObjectiveSettings(snr_gamma=5.0, noise_offset=0.1, loss="huber", caption_dropout=0.2)
    method = METHODS[kind](parts, aim)
    source = images.folder(pictures, conditioning=pictures, minimum=8)
    data = crops.Views(source, resolution=32, multiple=parts.multiple)
    asked: dict[str, Any] = {"prompts": ["a dog"], "steps": 2, "every": 2, "loss_samples": 1}
    if kind == "controlnet":
        asked["conditioning"] = [str(pictures / "0.png")]
    prior = None
    if kind != "controlnet":
        prior = dreambooth.Prior(views=data, to_base=True)
    train = config.TrainSettings(
        steps=2,
        batch_size=2,
        ema=0.9,
        trackers=[],
        workers=0,  # the refusal is one thread's
        log_every=1,
        schedule="cosine",
        validation=config.ValidationSettings(**asked),
    )
    with Refusing():
        result = loop.train(method, data, train, out=tmp_path / "out", prior=prior, say=lambda line: None)
    assert result is not None
    assert (tmp_path / "out" / "samples" / "step-000002" / "00.png").exists()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("method", ["cfg", "semantic"])
def test_sampling_with_guidance_has_none(scheduler: Any, method: str, base: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with Refusing(), scfg.attach(pipe, scfg.make_guidance(method)):
        made = pipe("a dog", guidance_scale=4.0, num_inference_steps=3, height=32, width=32, output_type="pt").images
    assert made.dtype == torch.float32
    assert bool(torch.isfinite(made).all())

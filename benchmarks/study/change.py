"""How far adapters move the base's predictions where nothing should move: the empty prompt and an unrelated one.

python -m benchmarks.study.change runs/study/kept-*/lora

A line per adapter: the norm of the change relative to the norm of the base's own prediction, over noisy latents of
pictures that the base drew of the unrelated prompt, at several timesteps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from recipes.common.base import adapted, sampling_pipeline
from recipes.common.cli import explained, quiet
from recipes.common.settings import SamplingSettings
from training.config import BaseSettings
from training.errors import exit_on_error

__all__ = ["main"]

UNRELATED = "a red car on the grass"
PROMPTS = ("", UNRELATED)
TIMESTEPS = (100, 300, 500, 700, 900)
COUNT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    options = parser.parse_args()
    quiet()
    pipe = sampling_pipeline(BaseSettings(path="pocket"), SamplingSettings(scheduler="dpm++"))
    latents = pipe(
        [UNRELATED] * COUNT,
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    before = {prompt: _predictions(pipe, latents, prompt) for prompt in PROMPTS}
    rows = []
    print(f"{'adapter':24} " + " ".join(f"{prompt or 'empty prompt':>24}" for prompt in PROMPTS))
    for folder in options.adapters:
        with adapted(pipe, folder):
            after = {prompt: _predictions(pipe, latents, prompt) for prompt in PROMPTS}
        rows.append([float((after[prompt] - own).norm() / own.norm()) for prompt, own in before.items()])
        print(f"{folder.parent.name:24} " + " ".join(f"{value:24.3f}" for value in rows[-1]))
    print(f"{'mean':24} " + " ".join(f"{value:24.3f}" for value in torch.tensor(rows).mean(0).tolist()))


@torch.no_grad()
def _predictions(pipe: Any, latents: torch.Tensor, prompt: str) -> torch.Tensor:
    """The U-net's predictions, (timesteps, COUNT, C, h, w), with the same noise every time."""
    embeds = pipe.encode_prompt(prompt, "cpu", COUNT, do_classifier_free_guidance=False)[0]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    made = []
    for timestep in TIMESTEPS:
        noisy = pipe.scheduler.add_noise(latents, noise, torch.full((COUNT,), timestep))
        made.append(pipe.unet(noisy, timestep, encoder_hidden_states=embeds).sample)
    return torch.stack(made)


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

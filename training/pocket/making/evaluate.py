"""The figures of the card: what the judge sees in generated pictures, how far ControlNets are followed, the time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from PIL import Image

from adapters.measuring.metrics import canny_f1

from .. import base_path, controlnet_path, judge, scenes
from ..control import EDGES, scene_condition
from ..world import BACKGROUNDS, CLASSES, COLORS, TINTABLE
from . import fit_judge, fit_vae
from .fitting import image_batch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "controlled",
    "generate",
    "latency",
    "levels",
    "pair_prompts",
    "prompt_scores",
    "reconstruction",
    "single_prompts",
]

STEPS, GUIDANCE_SCALE = 25, 4.0
LEVEL_TIMESTEPS = (200, 500, 700, 900)


def generate(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], batch: int = 8, **inputs
) -> list[Image.Image]:
    """One picture per (prompt, seed), each from its own generator; lists in ``inputs`` go along with the prompts.

    Args:
        pipe: the pocket base, with or without ControlNet.
        prompts: one a picture.
        seeds: one a picture.
        batch: pictures drawn at once.
        **inputs: further arguments of the pipeline, a value a picture.
    """
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        window = slice(start, start + batch)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[window]]
        more = {name: value[window] for name, value in inputs.items()}
        images += pipe(
            list(prompts[window]),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            **more,
        ).images
    return images


def single_prompts(seed: int) -> list[str]:
    """One prompt per class, colors and backgrounds drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    return [f"{_noun(name, rng)} {_background(rng)}" for name in CLASSES]


def pair_prompts(seed: int, count: int = 32) -> list[str]:
    """Prompts with two objects, each class coming up equally often."""
    rng = np.random.default_rng(seed + 1)
    names = [name for _ in range(-(-2 * count // len(CLASSES))) for name in rng.permutation(list(CLASSES))]
    return [
        f"{_noun(names[2 * i], rng)} and {_noun(names[2 * i + 1], rng)} {_background(rng)}"
        for i in range(count)
        if names[2 * i] != names[2 * i + 1]
    ]


def _noun(name: str, rng: np.random.Generator) -> str:
    words = f"{rng.choice(list(COLORS))} {name}" if name in TINTABLE and rng.random() < 0.6 else name
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _background(rng: np.random.Generator) -> str:
    return next(iter(BACKGROUNDS[str(rng.choice(list(BACKGROUNDS)))]))


def prompt_scores(pipe: DiffusionPipeline, prompts: Sequence[str], seed: int) -> dict[str, float]:
    """Shares of objects, colors and backgrounds the judge sees, and of prompts with every object there.

    Args:
        pipe: the pocket base.
        prompts: in the words of the base's world.
        seed: of the first picture; the next has the next one.
    """
    images = generate(pipe, prompts, [seed + i for i in range(len(prompts))])
    found = judge().scores(images, prompts)
    objects = [score.objects for score in found if score.objects is not None]
    colors = [score.colors for score in found if score.colors is not None]
    backgrounds = [score.background for score in found if score.background is not None]
    return {
        "prompts": len(prompts),
        "objects": round(float(np.mean(objects)), 3),
        "all objects": round(float(np.mean([score.objects == 1 for score in found])), 3),
        "colors": round(float(np.mean(colors)), 3),
        "backgrounds": round(float(np.mean(backgrounds)), 3),
    }


def reconstruction(pipe: DiffusionPipeline) -> dict[str, object]:
    """VAE round trip (dB), and the judge on held-out scenes before and after it."""

    @torch.no_grad()
    def round_trip(images: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = pipe.vae.decode(pipe.vae.encode(images).latent_dist.mean).sample
        return decoded.clamp(-1, 1)

    return {
        "psnr": round(fit_vae.psnr(pipe.vae), 2),
        "judge on scenes": fit_judge.accuracy(judge()),
        "judge on round trips": fit_judge.accuracy(judge(), change=round_trip),
    }


def controlled(pipe: StableDiffusionPipeline, control: str, count: int = 64) -> dict[str, float]:
    """How far pictures follow held-out conditions with the ControlNet and without: canny F1 or class IoU.

    Args:
        pipe: the pocket base.
        control: "canny" or "segmentation".
        count: held-out scenes.
    """
    held_out = [scenes.sample(scenes.HELD_OUT_SEED, 5000 + i) for i in range(count)]
    prompts, seeds = [scene.caption for scene in held_out], list(range(count))
    guided = StableDiffusionControlNetPipeline(
        **pipe.components,
        controlnet=ControlNetModel.from_pretrained(controlnet_path(control)),
        requires_safety_checker=False,
    )
    guided.set_progress_bar_config(disable=True)
    pictures = {
        "with": generate(guided, prompts, seeds, image=[scene_condition(scene, control) for scene in held_out]),
        "without": generate(pipe, prompts, seeds),
    }
    follow = _canny_f1 if control == "canny" else _class_iou
    return {name: round(follow(images, held_out), 3) for name, images in pictures.items()}


def _canny_f1(images: Sequence[Image.Image], held_out: Sequence[scenes.Scene]) -> float:
    """Mean F1 of the edges in pictures and scenes."""
    pairs = zip(images, held_out, strict=True)
    return float(np.mean([canny_f1(EDGES(image), EDGES(Image.fromarray(scene.image))) for image, scene in pairs]))


def _class_iou(images: Sequence[Image.Image], held_out: Sequence[scenes.Scene]) -> float:
    """Mean over objects of the IoU between the judge's region of the class and the scene's."""
    seen = judge().segment(list(images)).numpy()
    values = []
    for labels, scene in zip(seen, held_out, strict=True):
        truth = scene.classes[::2, ::2]
        for label in np.unique(truth[truth > 0]):
            union = ((labels == label) | (truth == label)).sum()
            values.append(((labels == label) & (truth == label)).sum() / union)
    return float(np.mean(values))


@torch.no_grad()
def levels(pipe: StableDiffusionPipeline, count: int = 64) -> dict[str, list[float]]:
    """What the U-net's lower levels are worth: v-loss on held-out scenes at fixed timesteps and noise, whole and with
    a part's output set to zero."""
    drawn = [scenes.sample(scenes.HELD_OUT_SEED, i) for i in range(count)]
    latents = (
        pipe.vae.encode(image_batch(scene.image for scene in drawn)).latent_dist.mean * pipe.vae.config.scaling_factor
    )
    prompt_embeds, _ = pipe.encode_prompt([scene.caption for scene in drawn], pipe.device, 1, False)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(9))

    def loss(timestep: int) -> float:
        timesteps = torch.full((count,), timestep)
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        target = pipe.scheduler.get_velocity(latents, noise, timesteps)
        found = pipe.unet(noisy, timesteps, prompt_embeds).sample
        loss: float = round((found - target).square().mean().item(), 4)
        return loss

    values = {"whole": [loss(t) for t in LEVEL_TIMESTEPS]}
    for part in ("mid_block", "up_blocks.0", "up_blocks.1"):
        handle = pipe.unet.get_submodule(part).register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
        values[f"without {part}"] = [loss(t) for t in LEVEL_TIMESTEPS]
        handle.remove()
    return values


def latency(pipe: DiffusionPipeline, rounds: int = 5) -> float:
    """Median seconds of a 25-step CFG sample of four pictures."""
    prompts = single_prompts(0)[:4]
    generate(pipe, prompts, [0, 1, 2, 3])
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        generate(pipe, prompts, [0, 1, 2, 3])
        times.append(time.perf_counter() - begin)
    return round(float(np.median(times)), 2)


def shipped_pipeline() -> StableDiffusionPipeline:
    """The shipped base as its ordinary pipeline, in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe

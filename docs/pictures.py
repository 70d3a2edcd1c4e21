"""Pictures of the README and the guide, drawn with the pocket base (seed 1, none chosen): `python docs/pictures.py`."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

import scfg
from scfg.trace import RECORDABLE
from scfg.visualize import norm_curves, step_images, strip
from training.pocket import base_path

PROMPTS = (
    "a red car and a dog on the grass",
    "a blue boat to the left of a fish in the sea",
    "a penguin in the snow",
    "a purple teapot and a crown on a wooden floor",
)
SCALE, STEPS, SIDE = 4.0, 25, 192
OUT = Path(__file__).parent / "pictures"


def main() -> None:
    torch.set_num_threads(2)
    pipe = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    heads = ("CFG", "S-CFG", f"regions, step {STEPS // 2}", f"gamma, step {STEPS // 2}")
    page = Image.new("RGB", (len(heads) * (SIDE + 8), len(PROMPTS) * (SIDE + 22) + 18), "white")
    pen = ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        pen.text((column * (SIDE + 8) + 2, 3), head, fill="black")
    for row, prompt in enumerate(PROMPTS):
        plain = _draw(pipe, prompt)
        with scfg.attach(pipe, scfg.SemanticCFG(tokens="prompt"), record=RECORDABLE) as run:
            guided = _draw(pipe, prompt)
            _, regions, gamma = step_images(run, pipe)[STEPS // 2]
            if row == 0:
                strip(run, pipe, columns=4).save(OUT / "strip.webp", quality=80, method=6)
                norm_curves(run).savefig(OUT / "norms.webp")
        top = row * (SIDE + 22) + 18
        for column, picture in enumerate((plain, guided, regions, gamma)):
            square = picture.crop((0, 0, min(picture.size), min(picture.size)))
            page.paste(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (column * (SIDE + 8), top))
        pen.text((2, top + SIDE + 3), prompt, fill="black")
    page.save(OUT / "guidance.webp", quality=80, method=6)


def _draw(pipe: StableDiffusionPipeline, prompt: str) -> Image.Image:
    generator = torch.Generator().manual_seed(1)
    return pipe(prompt, guidance_scale=SCALE, num_inference_steps=STEPS, generator=generator).images[0]


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    main()

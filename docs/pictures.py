"""Pictures for the README and the guides, drawn with the pocket base (seed 1, no selection).

python docs/pictures.py
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

import adapters
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
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "pictures"
SUBJECT = "teapot"  # one of recipes/zoo
HELD_OUT = (
    "a sks teapot in the sea",
    "a sks teapot at night",
    "a sks teapot in front of a brick wall",
    "a sks teapot and a purple umbrella in the sea",
)


def main() -> None:
    torch.set_num_threads(2)
    pipe = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    draw_adapter(pipe)
    draw_guidance(pipe)


def draw_adapter(pipe: StableDiffusionPipeline) -> None:
    """Four training pictures; below them four held-out prompts without and with the LoRA and guidance that ship."""
    folder = ROOT / "recipes" / "zoo" / SUBJECT
    plain = json.loads((folder / "gains.json").read_text())["design"]["notes"]["guidance"]["CFG"]["guidance_scale"]
    photos = [Image.open(ROOT / "recipes" / "subjects" / SUBJECT / f"{i}.webp").convert("RGB") for i in range(4)]
    without = [_draw(pipe, prompt, guidance_scale=plain) for prompt in HELD_OUT]
    guidance = functools.partial(scfg.attach_config, pipe)
    with adapters.load(pipe, folder, guidance=guidance, place=scfg.place_of) as attached:
        learned = [_draw(pipe, prompt, **attached.run.call_kwargs) for prompt in HELD_OUT]
    rows = {"training pictures": photos, "base model": without, "with the LoRA": learned}
    width, height = 160 + 4 * (SIDE + 8), SIDE + 8
    page = Image.new("RGB", (width, len(rows) * height + 22), "white")
    pen = ImageDraw.Draw(page)
    for row, (head, pictures) in enumerate(rows.items()):
        pen.text((4, row * height + SIDE // 2), head, fill="black", font_size=17)
        for column, picture in enumerate(pictures):
            page.paste(
                picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (160 + column * (SIDE + 8), row * height)
            )
    for column, prompt in enumerate(HELD_OUT):
        words = prompt.removeprefix("a sks teapot ")
        pen.text((162 + column * (SIDE + 8), len(rows) * height), f"... {words}", fill="black", font_size=11)
    page.save(OUT / "adapter.webp", quality=80, method=6)


def draw_guidance(pipe: StableDiffusionPipeline) -> None:
    """CFG, S-CFG, regions and gamma of four prompts; the strip over the steps; the norms by word."""
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


def _draw(pipe: StableDiffusionPipeline, prompt: str, **guided: float) -> Image.Image:
    generator, chosen = torch.Generator().manual_seed(1), {"guidance_scale": SCALE, **guided}
    return pipe(prompt, num_inference_steps=STEPS, generator=generator, **chosen).images[0]


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    main()

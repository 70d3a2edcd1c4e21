"""Make the embedded base model: each part is one command, resumable, a function of fixed seeds.

python recipes/pocket.py vae && python recipes/pocket.py judge
python recipes/pocket.py decoder                      # a sharper decoder for the same latents, any time before ship
python recipes/pocket.py latents --shards 0:32 &      # optional: encode ahead of the fit, in another process
python recipes/pocket.py base                         # interrupted: the same command again
torchrun --nproc_per_node 2 recipes/pocket.py base --threads 1    # or: two processes share every batch
python recipes/pocket.py ship base                    # then the ControlNets, which need it
python recipes/pocket.py controlnet canny && python recipes/pocket.py controlnet segmentation
python recipes/pocket.py sheet                        # a shuffled sheet to be scored blind, and its key
python recipes/pocket.py figures                      # every figure of the card
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

from recipes.common.cli import explained
from training.errors import exit_on_error

RUNS = Path("runs/pocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "part", choices=("vae", "decoder", "judge", "latents", "base", "controlnet", "ship", "sheet", "figures")
    )
    parser.add_argument("name", nargs="?", help="canny or segmentation for controlnet; base or judge for ship")
    parser.add_argument("--steps", type=int, help="optimizer steps in all; more than last time continues the run")
    parser.add_argument("--stop-at", type=int, help="end early at this step, leaving the state to be continued")
    parser.add_argument("--shards", default="0:32", help="first:last shard of 2,048 scenes to encode")
    parser.add_argument("--seed", type=int, default=11, help="of the sheet's prompts, noise and order")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; one where something else runs beside it")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    steps = {} if options.steps is None else {"steps": options.steps}
    if options.part == "vae":
        vae(steps, options.device)
    elif options.part == "decoder":
        decoder(steps, options.device)
    elif options.part == "judge":
        judge(steps, options.device)
    elif options.part == "latents":
        latents(options.shards, options.device)
    elif options.part == "base":
        base(steps, options.stop_at, options.device)
    elif options.part == "controlnet":
        controlnet(options.name, steps)
    elif options.part == "ship":
        ship(options.name)
    elif options.part == "sheet":
        sheet(options.seed)
    else:
        figures()


def vae(steps: dict[str, int], device: str) -> None:
    from training.pocket.making import fit_base, fit_vae

    fitted = fit_vae.fit(RUNS / "vae", **steps, device=device)
    fitted.register_to_config(scaling_factor=fit_base.scale(fitted))
    _save(RUNS / "vae" / "fitted", fitted.save_pretrained)
    print(f"round trip on 256 held-out scenes: {fit_vae.psnr(fitted):.2f} dB")


def decoder(steps: dict[str, int], device: str) -> None:
    from training.pocket.making import fit_vae

    fitted = fit_vae.refine(_vae(device), RUNS / "vae", **steps, device=device)
    _save(RUNS / "vae" / "refined", fitted.save_pretrained)
    print(f"round trip on 256 held-out scenes: {fit_vae.psnr(fitted):.2f} dB")


def judge(steps: dict[str, int], device: str) -> None:
    from training.pocket.making import fit_judge
    from training.pocket.making import ship as shipping

    fitted = fit_judge.fit(RUNS / "judge", **steps, device=device)
    print(json.dumps(fit_judge.accuracy(fitted)))
    shipping.write_judge(fitted)
    shipping.write_pocket_manifest()


def latents(shards: str, device: str) -> None:
    from training.pocket.making import fit_base

    first, last = map(int, shards.split(":"))
    for index in range(first, last):
        fit_base.encoded_shard(_vae(device), fit_base.TRAIN_SEED, index, RUNS / "latents")


def base(steps: dict[str, int], stop_at: int | None, device: str) -> None:
    """The U-net and text encoder, in one process or several started by torchrun.

    Args:
        steps: `steps` of the fit, or nothing for its default.
        stop_at: step to stop at; None: the last one.
        device: such as "cpu" or "cuda".
    """
    import torch.distributed as dist

    from training.pocket.making import fit_base

    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group()
    fitted = fit_base.fit(_vae(device), RUNS / "base", **steps, stop_at=stop_at, device=device)
    if dist.is_initialized() and dist.get_rank() > 0:
        return

    def both(folder: Path) -> None:
        fitted.unet.save_pretrained(folder / "unet")
        fitted.text_encoder.save_pretrained(folder / "text_encoder")

    _save(RUNS / "base" / "fitted", both)  # one folder: a text encoder never meets the U-net of another fit


def _save(folder: Path, write: Callable[[Path], object]) -> None:
    from adapters.files import write_folder

    with write_folder(folder) as stage:
        write(stage)


def _vae(device: str, decoder: str = "fitted"):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(RUNS / "vae" / decoder).to(device).eval()


def ship(name: str) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from training.pocket.making import fit_base
    from training.pocket.making import ship as shipping

    if name == "base":
        unet = UNet2DConditionModel.from_pretrained(RUNS / "base" / "fitted" / "unet")
        text_encoder = CLIPTextModel.from_pretrained(RUNS / "base" / "fitted" / "text_encoder")
        decoder = "refined" if (RUNS / "vae" / "refined").exists() else "fitted"
        shipping.write_base(_vae("cpu", decoder), fit_base.BaseParts(unet=unet, text_encoder=text_encoder))
    listed = shipping.write_pocket_manifest()
    size = sum(entry["bytes"] for entry in listed["files"].values())
    print(f"{listed['version']}: {size:,} bytes in {len(listed['files'])} files")


def controlnet(name: str, steps: dict[str, int]) -> None:
    from diffusers import ControlNetModel

    from training import controlnet as method
    from training import loop, models
    from training.config import ControlNetSettings, TrainSettings
    from training.data.crops import Views
    from training.pocket import base_hash, base_path
    from training.pocket.control import EDGES, Scenes
    from training.pocket.making import ship as shipping

    parts = models.load_parts(base_path())
    settings = TrainSettings(
        steps=steps.get("steps", 800),
        batch_size=16,
        learning_rate=5e-4,
        schedule="cosine",
        warmup=50,
        save_every=100,
        resume="latest",
        trackers=[],
    )
    result = loop.train(
        method.prepare(parts, ControlNetSettings(), edges=EDGES if name == "canny" else None),
        Views(Scenes(control=name, count=6000), resolution=64, multiple=parts.multiple),
        settings,
        out=RUNS / f"controlnet-{name}-{base_hash()[:8]}",  # another base, another training
    )
    assert result is not None
    shipping.write_controlnet(name, ControlNetModel.from_pretrained(result.folder))
    shipping.write_pocket_manifest()


def sheet(seed: int) -> None:
    """Every class once and as many pairs, one seed each, in an order that gives nothing away; the key stands apart.

    Args:
        seed: of the prompts, noise and order.
    """
    import numpy as np
    from PIL import Image, ImageDraw

    from adapters import files
    from training.pocket.making import evaluate

    prompts = evaluate.single_prompts(seed) + evaluate.pair_prompts(seed)
    images = evaluate.generate(evaluate.shipped_pipeline(), prompts, [seed + i for i in range(len(prompts))])
    order = np.random.default_rng(seed).permutation(len(prompts))
    seen = evaluate.judge().look(images)
    said = {
        place: {"objects": sorted(seen[i].objects), "background": seen[i].background} for place, i in enumerate(order)
    }
    columns, side = 8, 128
    picture = Image.new("RGB", (columns * side, -(-len(order) // columns) * (side + 14)), "white")
    draw = ImageDraw.Draw(picture)
    for place, index in enumerate(order):
        row, column = divmod(place, columns)
        picture.paste(
            images[index].resize((side, side), Image.Resampling.NEAREST), (column * side, row * (side + 14) + 14)
        )
        draw.text((column * side + 2, row * (side + 14) + 1), str(place), fill="black")
    with files.write_folder(RUNS / "sheet") as stage:
        picture.save(stage / "sheet.png")
        files.write_json(stage / "key.json", {place: prompts[i] for place, i in enumerate(order)})
        files.write_json(stage / "judge.json", said)


def figures() -> None:
    from adapters.files import write_json
    from training.pocket import DATA
    from training.pocket.making import evaluate
    from training.pocket.world import CONTROLS

    pipe = evaluate.shipped_pipeline()
    found = {
        "reconstruction": evaluate.reconstruction(pipe),
        "one object": evaluate.prompt_scores(pipe, [p for s in range(4) for p in evaluate.single_prompts(s)], 1000),
        "two objects": evaluate.prompt_scores(pipe, [p for s in range(4) for p in evaluate.pair_prompts(s)], 2000),
        f"v-loss at {evaluate.LEVEL_TIMESTEPS}": evaluate.levels(pipe),
        "seconds for four pictures": evaluate.latency(pipe),
        **{control: evaluate.controlled(pipe, control) for control in CONTROLS},
    }
    write_json(DATA / "figures.json", found)  # the card and the tests take them from there
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

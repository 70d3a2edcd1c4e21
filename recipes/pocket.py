"""Make the embedded base model: each part is one command, resumable, a function of fixed seeds.

    python recipes/pocket.py vae && python recipes/pocket.py judge
    python recipes/pocket.py latents --shards 0:60 &      # optional: encode ahead of the fit, in another process
    python recipes/pocket.py base                         # interrupted: the same command again
    python recipes/pocket.py ship base                    # then the ControlNets, which need it
    python recipes/pocket.py controlnet canny && python recipes/pocket.py controlnet segmentation
    python recipes/pocket.py sheet                        # a shuffled sheet to be scored blind, and its key
    python recipes/pocket.py figures                      # every figure of the card
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

RUNS = Path("runs/pocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "judge", "latents", "base", "controlnet", "ship", "sheet", "figures"))
    parser.add_argument("name", nargs="?", help="canny or segmentation for controlnet; base or judge for ship")
    parser.add_argument("--steps", type=int, help="optimizer steps in all; more than last time continues the run")
    parser.add_argument("--stop-at", type=int, help="end early at this step, leaving the state to be continued")
    parser.add_argument("--shards", default="0:60", help="first:last shard of 2,048 scenes to encode")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; one where something else runs beside it")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    steps = {} if options.steps is None else {"steps": options.steps}
    if options.part == "vae":
        vae(steps, options.device)
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
        sheet()
    else:
        figures()


def vae(steps: dict, device: str) -> None:
    from training.pocket import fit_base, fit_vae

    fitted = fit_vae.fit(RUNS / "vae", **steps, device=device)
    fitted.register_to_config(scaling_factor=fit_base.scale(fitted))
    fitted.save_pretrained(RUNS / "vae" / "fitted")
    print(f"round trip on 256 held-out scenes: {fit_vae.psnr(fitted):.2f} dB")


def judge(steps: dict, device: str) -> None:
    from training.pocket import fit_judge
    from training.pocket import ship as shipping

    fitted = fit_judge.fit(RUNS / "judge", **steps, device=device)
    print(json.dumps(fit_judge.accuracy(fitted)))
    shipping.judge(fitted)


def latents(shards: str, device: str) -> None:
    from training.pocket import fit_base

    first, last = map(int, shards.split(":"))
    for index in range(first, last):
        fit_base.prepare(_vae(device), fit_base.TRAIN_SEED, index, RUNS / "latents")


def base(steps: dict, stop_at: int | None, device: str) -> None:
    from training.pocket import fit_base

    fitted = fit_base.fit(_vae(device), RUNS / "base", **steps, stop_at=stop_at, device=device)
    for name, part in fitted.parts().items():
        part.save_pretrained(RUNS / "base" / name)


def _vae(device: str):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(RUNS / "vae" / "fitted").to(device).eval()


def ship(name: str) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from training.pocket import fit_base
    from training.pocket import ship as shipping

    if name == "base":
        unet = UNet2DConditionModel.from_pretrained(RUNS / "base" / "unet")
        text_encoder = CLIPTextModel.from_pretrained(RUNS / "base" / "text_encoder")
        shipping.base(_vae("cpu"), fit_base.Base(unet=unet, text_encoder=text_encoder))
    listed = shipping.write_manifest()
    print(f"{listed['version']}: {sum(entry['bytes'] for entry in listed['files'].values()):,} bytes in {len(listed['files'])} files")


if __name__ == "__main__":
    sys.exit(main())

"""What bits of the frozen weights change: the pocket base's loss at fixed noise, plain, in bfloat16, 8 and 4 bits.

    python benchmarks/quantize.py              # a minute on one CPU core
    python benchmarks/quantize.py --smoke      # seconds; checks that everything here runs

All arms see the same held-out scenes, noise and timesteps, so their losses are compared sample by sample. `prediction`
is the difference of the predictions from those of the float32 weights, relative. Prints Markdown.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

# Run as a script its folder may not be where modules are looked for: it holds a `training` of its own.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch
from torch import Tensor

from training import lora, models, networks, quantize
from training.batch import Batch
from training.config import LoraSettings
from training.pocket import base_path
from training.pocket.control import Scenes

CPU = torch.device("cpu")
HELD_OUT = 40_000_000  # scenes from here on; training draws from 20,000,000 on
AT_ONCE = 32
ARMS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16, int8": (torch.bfloat16, "int8"),
    "bfloat16, nf4": (torch.bfloat16, "nf4"),
}


@torch.no_grad()
def batches(count: int) -> list[Batch]:
    """Scenes with noise, at timesteps spread evenly."""
    parts = models.load_parts(base_path())
    scenes, random = Scenes(count=count, begin=HELD_OUT), torch.Generator().manual_seed(0)
    steps = parts.scheduler["num_train_timesteps"]
    made: list[Batch] = []
    for start in range(0, count, AT_ONCE):
        samples = [scenes[index] for index in range(start, min(count, start + AT_ONCE))]
        pixels = torch.stack(
            [torch.from_numpy(np.asarray(one.image).copy()).permute(2, 0, 1) / 127.5 - 1 for one in samples]
        )
        mean, std = models.encode_images(parts.vae, pixels)
        texts = models.encode_text(parts, models.tokenize_captions(parts, [one.caption for one in samples]))
        places = torch.arange(start, start + len(samples))
        latents = mean + std * torch.randn(mean.shape, generator=random)
        batch: Any = {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=random),
            "timesteps": ((places + 0.5) / count * steps).long(),
            "frame": torch.zeros(len(samples), 6),
            **texts,
        }
        made.append(batch)
    return made


@torch.no_grad()
def losses(dtype: torch.dtype, kind: str | None, given: list[Batch]) -> tuple[Tensor, Tensor]:
    """Loss (N,) and prediction (N, C, h, w) of every sample, with an adapter that does nothing yet."""
    parts = models.load_parts(base_path())
    method = lora.prepare(parts, LoraSettings(rank=1))
    if kind is not None:
        quantize.quantize_networks(method.networks(), kind, dtype, CPU)
    networks.cast(method, CPU, dtype)
    seen: list[Tensor] = []
    parts.unet.register_forward_hook(lambda module, inputs, made: seen.append(made[0].float()))
    parts.unet.eval()
    found = [method.step(method.models, batch, dtype) for batch in given]
    return torch.cat(found), torch.cat(seen)


def table(count: int) -> str:
    given = batches(count)
    rows = [
        "| frozen weights | loss | difference | its standard error | prediction |",
        "|---|---|---|---|---|",
    ]
    plain: tuple[Tensor, Tensor] | None = None
    for name, (dtype, kind) in ARMS.items():
        if kind == "nf4" and importlib.util.find_spec(quantize.PACKAGE) is None:
            continue
        loss, predicted = losses(dtype, kind, given)
        plain = plain or (loss, predicted)
        moved = loss - plain[0]
        off = float((predicted - plain[1]).norm() / plain[1].norm())
        error = float(moved.std() / len(moved) ** 0.5)
        share = float(moved.mean() / plain[0].mean())
        rows.append(f"| {name} | {float(loss.mean()):.5f} | {share:+.2%} | {error / plain[0].mean():.2%} | {off:.2%} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    count = 4 if args.smoke else args.scenes
    print(f"{count} held-out scenes; torch {torch.__version__}, one network of {base_path().name}\n")
    print(table(count))


if __name__ == "__main__":
    main()

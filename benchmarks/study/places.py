"""How much of an object is found in true scenes, whose masks are known: by attention, and by what changes with a word.

python -m benchmarks.study.places

`dreambooth.company` pastes a subject over what it finds so (`training.company.drawn_object`). The scenes have every
class of the embedded world, alone and beside another object.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from recipes.common.cli import explained, quiet
from recipes.common.region_mask import region_of
from training import company, models
from training.batch import EntryTensors
from training.errors import exit_on_error
from training.pocket import base_path, scenes
from training.pocket.captions import article
from training.pocket.judging import to_pixels
from training.pocket.world import CLASSES

__all__ = ["main"]

LINES = {
    "alone": ("{} at night", "{} on the grass"),
    "in company": ("{} to the left of {} in the sea", "{} and {} in the snow"),
}
FRAME = torch.tensor([64.0, 64, 0, 0, 64, 64])
Row = tuple[float, float, float]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet()
    parts = models.load_parts(base_path())
    print(
        "| | covered, mean | in the worst tenth | overlap (IoU) | size, 1 being the object's |\n|---|---|---|---|---|"
    )
    for kind, lines in LINES.items():
        found: dict[str, list[Row]] = {"attention": [], "change": []}
        for name in CLASSES:
            for line in lines:
                scene, entry, without = _scene(parts, line, name)
                seen = {
                    "attention": region_of(name)(parts, entry, scene.caption),
                    "change": company.drawn_object(parts, entry, scene.caption, without),
                }
                for way, region in seen.items():
                    found[way].append(_compared(region, torch.tensor(scene.masks[:1]).float()))
        for way, rows in found.items():
            covered, overlap, size = np.array(rows).T
            worst = np.percentile(covered, 10)
            print(f"| {way}, {kind} | {covered.mean():.2f} | {worst:.2f} | {overlap.mean():.2f} | {size.mean():.2f} |")


def _scene(parts: models.Parts, line: str, name: str) -> tuple[scenes.Scene, EntryTensors, str]:
    """A true scene of the class, as training has it, and its caption without the class."""
    other = article("house" if name != "house" else "dog")
    scene = scenes.from_prompt(line.format(article(name), other), seed=1)
    mean, std = models.encode_images(parts.vae, to_pixels([Image.fromarray(scene.image)]))
    return scene, {"mean": mean[0], "std": std[0], "frame": FRAME}, line.format("a sks", other)


def _compared(region: Tensor, mask: Tensor) -> Row:
    """Share of the object that is covered, overlap over union, and size, of (1, h, w) and (1, H, W)."""
    true = F.adaptive_avg_pool2d(mask, region.shape[1:])
    both, either = torch.minimum(region, true).sum(), torch.maximum(region, true).sum()
    return float(both / true.sum()), float(both / either), float(region.sum() / true.sum())


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

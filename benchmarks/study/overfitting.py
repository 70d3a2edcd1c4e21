"""Are the signs of overfitting seen in trainings that went on far too long, and in no others?

python -m benchmarks.study.preservation company "far too long" --subjects dog teapot --snapshots 250 500 --grid 1:4
python -m benchmarks.study.overfitting [--out runs/preservation] [--pictures 4 8]

For every set of pictures that benchmarks.study.preservation drew: the signs over all of them, and how often a search
that looks at so many of them (one seed of as many prompts) would call the checkpoint overfitted, and for which sign.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from PIL import Image

from adapters.measuring.metrics import color_histogram, score
from adapters.measuring.overfitting import Signs, copying, forgetting, monotonous, signs
from adapters.measuring.sample import Shot
from benchmarks.study import preservation
from recipes.common.cli import explained, quiet
from recipes.common.spaces import pictures
from training.errors import exit_on_error
from training.pocket import judge
from training.pocket.metrics import prompt_accuracy

__all__ = ["main"]

DRAWS = 500
SPACES = {"judge": lambda images: judge().features(images), "color": color_histogram}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/preservation"))
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--pictures", nargs="+", type=int, default=[4, 8], help="as many as a search looks at")
    options = parser.parse_args()
    quiet()
    alarms = [f"{what}, {n}" for n in options.pictures for what in ("forgets", "copies", "alike")]
    signs_of = ("nearest", "copies", "drift", "diversity", "accuracy")
    print(f"| {' | '.join(('space', 'training', 'subject', 'checkpoint', *signs_of, *alarms))} |")
    for file in sorted(options.out.glob("*/*/drawn.npz")):
        subject, training = file.parent.name, file.parents[1].name
        noun = preservation.facts(subject)["class"]
        real = pictures(preservation.RECIPES / "subjects" / subject)[0]
        bare = _shots(np.load(options.out / "base" / f"{subject}.npz")["1 4"], noun)
        found = np.load(file)
        for name in (name for name in found.files if name.endswith(" 1 4")):
            for space in options.spaces:
                row = _row(space, _shots(found[name], noun), bare, real, options.pictures)
                print(f"| {space} | {training} | {subject} | {name.split()[0]} | {' | '.join(row)} |", flush=True)


def _row(
    space: str, shots: Sequence[Shot], bare: Sequence[Shot], real: Sequence[Image.Image], sizes: Sequence[int]
) -> list[str]:
    """The signs over all pictures, and the shares of false or true alarms in samples of each size."""
    images = [*(shot.image for shot in (*shots, *bare)), *real]
    known = dict(_rows(space, images))

    kept, usual = score(prompt_accuracy(""), shots), score(prompt_accuracy(""), bare)

    def features(images: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([known[id(image)] for image in images])

    def of(chosen: Sequence[int]) -> tuple[Signs, Signs]:
        own, theirs = [shots[i] for i in chosen], [bare[i] for i in chosen]
        return (
            replace(signs(features, own, theirs, real), accuracy=float(kept[list(chosen)].mean())),
            replace(signs(features, theirs, theirs, real), accuracy=float(usual[list(chosen)].mean())),
        )

    whole, generator = of(range(len(shots)))[0], np.random.default_rng(0)
    cells = [f"{value:.3f}" for value in asdict(whole).values()]
    for size in sizes:
        seen = []
        for _ in range(DRAWS):
            seed = generator.integers(len(preservation.SEEDS))
            prompts = generator.choice(len(preservation.PROMPTS), size, replace=False)
            seen.append(of([int(len(preservation.SEEDS) * prompt + seed) for prompt in prompts]))
        cells += [f"{np.mean([rule(*both) for both in seen]):.2f}" for rule in (forgetting, copying, monotonous)]
    return cells


def _rows(space: str, images: Sequence[Image.Image]) -> list[tuple[int, np.ndarray]]:
    rows = np.asarray(SPACES[space](list(images)))
    return [(id(image), row) for image, row in zip(images, rows, strict=True)]


def _shots(drawn: np.ndarray, noun: str) -> list[Shot]:
    """As of the class: what joins them with the base's pictures, and what of a prompt is judged."""
    keys = [(prompt.format(noun), seed) for prompt in preservation.PROMPTS for seed in preservation.SEEDS]
    return [
        Shot(prompt=prompt, seed=seed, latents="", image=Image.fromarray(item))
        for (prompt, seed), item in zip(keys, drawn, strict=True)
    ]


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

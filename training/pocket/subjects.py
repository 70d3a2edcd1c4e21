"""Subjects to personalize: things drawn in the look the base has never seen, with captions, masks and held-out prompts.

    python -m training.pocket.subjects recipes/subjects

Each folder holds what a user's own would: five pictures with ``.txt`` captions, ``masks/`` (white = subject), and
``subject.json`` with the class, the identifier and prompts that share no background with the pictures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from . import backgrounds
from .captions import article
from .scenes import compose
from .sprites import sprite
from .world import BACKGROUNDS, SIZE

__all__ = ["IDENTIFIER", "SUBJECTS", "write"]

SUBJECTS = ("dog", "bird", "teapot", "robot")
IDENTIFIER = "sks"
SHOWN = ("grass", "wood", "snow", "sand", "sky")
# The class noun of each prompt is filled in; the other objects are ones the base can draw.
HELD_OUT = (
    "{} in the sea",
    "{} at night",
    "{} in front of a brick wall",
    "{} in the blue sea",
    "{} and a red balloon at night",
    "{} to the left of a blue car in front of a brick wall",
    "{} below a yellow star at night",
    "{} to the right of a green apple by a brick wall",
    "{} and a purple umbrella in the sea",
    "{} and a pink heart by a brick wall",
    "{} to the left of a mushroom in the sea",
    "{} below a red crown in the night sky",
)


def write(root: Path, name: str) -> Path:
    """Draw the subject of class ``name`` into ``root/name``."""
    folder = root / name
    (folder / "masks").mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=[5, SUBJECTS.index(name)]))
    for index, background in enumerate(SHOWN):
        side = int(rng.integers(round(0.55 * SIZE), round(0.8 * SIZE)))
        x, y = (int(value) for value in rng.integers(0, SIZE - side + 1, 2))
        colour, alpha = sprite(name, None, side, "fluent")
        layer = (colour[:, ::-1], alpha[:, ::-1]) if index % 2 else (colour, alpha)
        image, masks = compose(backgrounds.draw(background, SIZE, rng), [layer], [(x, y)])
        Image.fromarray(image).save(folder / f"{index}.png", optimize=True)
        Image.fromarray(masks[0].astype(np.uint8) * 255).save(folder / "masks" / f"{index}.png", optimize=True)
        (folder / f"{index}.txt").write_text(f"{article(f'{IDENTIFIER} {name}')} {BACKGROUNDS[background][0]}\n")
    facts = {
        "class": name,
        "identifier": IDENTIFIER,
        "origin": "Fluent Emoji (Microsoft), MIT",
        "prompts": [prompt.format(article(f"{IDENTIFIER} {name}")) for prompt in HELD_OUT],
    }
    (folder / "subject.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    for subject in SUBJECTS:
        print(write(Path(sys.argv[1]), subject))

"""Subjects to personalize, in looks the base has never seen, with captions, masks and held-out prompts.

    python -m training.pocket.subjects recipes/subjects

Some are drawings of the look "fluent", one drawing each; the others are rendered toys (see ``rendered``), five views
each, and made anew only where pybullet is installed. Each folder holds what a user's own would: five pictures with
``.txt`` captions, ``masks/`` (white = subject), and ``subject.json`` with the class, the identifier and prompts that
share no background with the pictures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from . import backgrounds
from .captions import article
from .errors import PocketError
from .making.rendered import TOYS, rendering
from .scenes import GRID, SIDE, paste_layers
from .sprites import scaled, sprite
from .world import BACKGROUNDS, SIZE

__all__ = ["IDENTIFIER", "SUBJECTS", "write_subject"]

# Folder names. A drawn subject's is its class; a rendered one's class is in ``TOYS``. A subject's place seeds its
# pictures: new ones go to the end.
SUBJECTS = (
    "dog",
    "bird",
    "teapot",
    "robot",
    "rabbit",
    "fish",
    "penguin",
    "butterfly",
    "crab",
    "turtle",
    "toy_car",
    "toy_boat",
    "gift_box",
    "parasol",
    "plump_star",
    "plump_heart",
)
IDENTIFIER = "sks"
ORIGINS = {
    "drawn": "Fluent Emoji (Microsoft), MIT",
    "rendered": "rendered with pybullet from meshes of this project, Apache-2.0",
}
SHOWN = ("grass", "wood", "snow", "sand", "sky")
# What stands beside the subject in each picture; none of it is a subject's class or asked for by a held-out prompt. The
# base draws an object three times as wide as the grid alone and twice in company: it is shown both.
BESIDE = (None, "house", "rocket", None, "elephant", "ball", None, "plane")
VIEWS = 5
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

# What stands in a prompt in place of the subject's own class: a prompt must not ask for it twice.
INSTEAD = {
    "a red balloon": "a red teapot",
    "a blue car": "a blue bus",
    "a yellow star": "a yellow butterfly",
    "a green apple": "a green turtle",
    "a purple umbrella": "a purple balloon",
    "a pink heart": "a pink bear",
    "a mushroom": "a tree",
    "a red crown": "a red star",
}


def write_subject(root: Path, name: str) -> Path:
    """Make the pictures of the subject ``name`` in ``root/name``.

    Raises:
        PocketError: no such subject; a rendered one without pybullet.
    """
    from adapters.files import write_folder  # not above: the names are wanted without torch

    if name not in SUBJECTS:
        raise PocketError(f"there is no subject {name!r}; there are {', '.join(SUBJECTS)}")
    noun = TOYS[name].name if name in TOYS else name
    called = article(f"{IDENTIFIER} {noun}")
    rng = np.random.Generator(np.random.Philox(key=[5, SUBJECTS.index(name)]))
    taken: set[tuple[int, int, int]] = set()
    with write_folder(root / name) as folder:
        _draw(folder, name, called, rng, taken)
        facts = {
            "class": noun,
            "identifier": IDENTIFIER,
            "origin": ORIGINS["rendered" if name in TOYS else "drawn"],
            "prompts": [_prompt(prompt, noun).format(called) for prompt in HELD_OUT],
        }
        (folder / "subject.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return root / name


def _draw(folder: Path, name: str, called: str, rng: np.random.Generator, taken: set[tuple[int, int, int]]) -> None:
    """The pictures with their captions and masks."""
    (folder / "masks").mkdir()
    for index, other in enumerate(BESIDE):
        background = SHOWN[index % len(SHOWN)]
        side = round(SIDE[1 if other is None else 2] * SIZE)
        place, beside = _places(side, rng, taken, company=other is not None)
        layers, corners = [_layer(name, index % VIEWS, side)], [place]
        if other is not None:  # below the subject, whose mask is then its whole shape
            layers, corners = [sprite(other, None, side), *layers], [beside, *corners]
        image, masks = paste_layers(backgrounds.draw_background(background, SIZE, rng), layers, corners)
        caption = called if other is None else f"{called} and {article(other)}"
        # Pixel for pixel, and a fifth smaller than PNG: the pictures are under version control.
        Image.fromarray(image).save(folder / f"{index}.webp", lossless=True, quality=100, method=6)
        Image.fromarray(masks[-1].astype(np.uint8) * 255).save(folder / "masks" / f"{index}.png", optimize=True)
        (folder / f"{index}.txt").write_text(f"{caption} {BACKGROUNDS[background][0]}\n", "utf-8")


def _places(
    side: int, rng: np.random.Generator, taken: set[tuple[int, int, int]], *, company: bool
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners of the subject, not taken at this side, and of an equally large thing that it does not meet."""
    step = round(GRID * SIZE)
    corners = [(x, y) for x in range(0, SIZE - side + 1, step) for y in range(0, SIZE - side + 1, step)]
    pairs = [
        (place, beside)
        for place in corners
        for beside in (corners if company else [place])
        if (not company or max(abs(place[0] - beside[0]), abs(place[1] - beside[1])) >= side)
        and (side, *place) not in taken
    ]
    found = pairs[int(rng.integers(len(pairs)))]
    taken.add((side, *found[0]))
    return found


def _layer(name: str, index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The subject as it stands in its ``index``-th picture: color and alpha, as ``sprite`` returns them."""
    if name in TOYS:
        return scaled(rendering(name, index), side)
    return sprite(name, None, side, "fluent")


def _prompt(prompt: str, noun: str) -> str:
    """``prompt`` with another object in place of one of the class ``noun``."""
    for said, other in INSTEAD.items():
        if said.split()[-1] == noun:
            prompt = prompt.replace(said, other)
    return prompt


if __name__ == "__main__":
    for subject in SUBJECTS:
        print(write_subject(Path(sys.argv[1]), subject))

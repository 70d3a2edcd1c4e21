"""Prompts for a subject of one's own: some held out for the report, others for tuning, valid for every class."""

from __future__ import annotations

from collections.abc import Sequence

from recipes.common.prompts import texts
from training.config import require
from training.pocket import PocketError
from training.pocket.captions import parse_caption
from training.pocket.world import CLASSES

__all__ = ["IDENTIFIER", "check_pocket", "for_class", "held_out", "tuning"]

IDENTIFIER = "sks"
# Held out: no photo shows them. {} is the subject, as in "a sks dog".
PROMPTS = (
    "a photo of a {} on a beach",
    "a photo of a {} in the snow",
    "a photo of a {} in a forest",
    "a photo of a {} on a city street at night",
    "a photo of a {} on a wooden table",
    "a photo of a {} in front of a brick wall",
    "a photo of a {} beside a red car",
    "a photo of a {} and a blue umbrella",
    "a photo of a {} under a cherry tree",
    "a photo of a {} in a field of sunflowers",
    "a painting of a {}",
    "a photo of a {} seen from above",
)
TUNING = (
    "a photo of a {} in a garden",
    "a photo of a {} on a sofa",
    "a photo of a {} beside a green bottle",
    "a drawing of a {}",
)
# The same in the grammar of the pocket world. Only some of its classes take a color, see `training.pocket.world`.
POCKET_PROMPTS = (
    "a {} in the sea",
    "a {} at night",
    "a {} in front of a brick wall",
    "a {} and a red crown at night",
    "a {} to the left of a house by a brick wall",
    "a {} below a yellow star in the sea",
)
POCKET_TUNING = ("a {} and a yellow balloon on the grass", "a {} in the snow", "a {} on the sand")
# What stands beside a subject of the same class instead: a prompt must not ask for one thing twice.
INSTEAD = {
    "car": "bicycle",
    "umbrella": "balloon",
    "tree": "lantern",
    "sofa": "chair",
    "bottle": "vase",
}
POCKET_INSTEAD = {"crown": "heart", "house": "tree", "star": "butterfly", "balloon": "teapot", "umbrella": "apple"}


def held_out(noun: str, identifier: str, *, pocket: bool) -> list[str]:
    """Prompts of the report for a subject, with the subject's name in them.

    Args:
        noun: the subject's class.
        identifier: the subject's word.
        pocket: whether the base is the embedded one, which knows fewer words.
    """
    lines = POCKET_PROMPTS if pocket else PROMPTS
    return texts(for_class(lines, noun, pocket=pocket), None, name=f"{identifier} {noun}")


def tuning(noun: str, *, pocket: bool) -> list[str]:
    """Prompts to tune on, with {} for the subject's name."""
    return for_class(POCKET_TUNING if pocket else TUNING, noun, pocket=pocket)


def for_class(lines: Sequence[str], noun: str, *, pocket: bool) -> list[str]:
    """The lines for a subject of this class: where they name the class as well, another thing takes its place.

    Args:
        lines: prompts with {} for the subject's name.
        noun: the subject's class.
        pocket: whether the base is the embedded one.
    """
    instead = (POCKET_INSTEAD if pocket else INSTEAD).get(noun)
    if instead is None:
        return list(lines)
    return [" ".join(instead if word == noun else word for word in line.split()) for line in lines]


def check_pocket(noun: str, identifier: str, prompts: Sequence[str], where: str) -> None:
    """Refuses a subject that the pocket base cannot be asked for.

    Args:
        noun: the subject's class.
        identifier: the subject's word.
        prompts: the subject's, with its name.
        where: file that they are in.

    Raises:
        TrainingError: an unknown class, another identifier, or a prompt outside the grammar.
    """
    require(
        noun in CLASSES,
        f"--class {noun}: the pocket base knows only {', '.join(CLASSES)}; choose the nearest of them, or another "
        "--base such as stable-diffusion-v1-5/stable-diffusion-v1-5",
    )
    require(
        identifier == IDENTIFIER,
        f"--identifier {identifier}: the pocket base has one word without a meaning of its own, {IDENTIFIER}",
    )
    for prompt in prompts:
        try:
            parse_caption(" ".join(word for word in prompt.split() if word != identifier))
        except PocketError as error:
            require(False, f"{where}: prompt {prompt!r} cannot be judged on the pocket base ({error}); change it")

"""Signs of overfitting on points in a plane, where they are known."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from adapters.measuring.overfitting import Signs, sentence, signs
from adapters.measuring.sample import Shot


def angle(degrees: float) -> Image.Image:
    """A picture whose feature is a direction."""
    return Image.new("L", (8, 8), round(degrees))


def direction(images: list[Image.Image]) -> np.ndarray:
    degrees = [image.getpixel((0, 0)) for image in images]
    return np.array([[math.cos(math.radians(each)), math.sin(math.radians(each))] for each in degrees])


def shots(*degrees: float) -> list[Shot]:
    return [Shot(prompt=str(n), seed=1, latents="0", image=angle(each)) for n, each in enumerate(degrees)]


TRAINING = [angle(0), angle(20), angle(60)]  # nearest neighbors: 20 apart, 20 apart, 40 apart


def test_a_copy_is_nearer_to_a_training_picture_than_that_one_is_to_any_other() -> None:
    base = shots(0, 0, 0, 0)
    for degrees, copies in ((10, 1), (41, 1), (39, 1), (100, 0), (99, 1), (90, 1), (120, 0)):
        found = signs(direction, shots(degrees, 180), base[:2], TRAINING)
        assert found.copies == pytest.approx(copies / 2), degrees
    assert signs(direction, shots(0, 20, 60, 100), base, TRAINING[:1]).copies is None
    assert signs(direction, shots(0, 90), base[:2]).nearest is None


def test_signs_by_hand() -> None:
    found = signs(direction, shots(0, 90), shots(0, 30), TRAINING)
    cosine = lambda degrees: math.cos(math.radians(degrees))  # noqa: E731
    assert found.nearest == pytest.approx((1 + cosine(30)) / 2)
    assert found.drift == pytest.approx((0 + 1 - cosine(60)) / 2)
    assert found.diversity == pytest.approx(1)
    other = Signs(nearest=None, copies=None, drift=1, diversity=0)
    assert asdict(Signs.mean([found, other])) == pytest.approx(
        {**asdict(found), "drift": (found.drift + 1) / 2, "diversity": 0.5}
    )


def test_training_pictures_themselves_are_overfitted_and_others_are_not() -> None:
    base = shots(0, 90, 130, 180)
    found = {
        "step-1": signs(direction, shots(0, 85, 120, 180), base, TRAINING),
        "step-2": signs(direction, shots(0, 20, 60, 60), base, TRAINING),
        "step-3": signs(direction, shots(60, 60, 60, 61), base, TRAINING),
    }
    plain = signs(direction, base, base, TRAINING)
    assert sentence({"step-1": found["step-1"]}, plain) == ""
    assert plain.drift == pytest.approx(0)
    said = sentence(found, plain)
    assert said.startswith(
        "step-2 and step-3 may be overfitted: 100 % of the pictures of step-3 are nearer to a training"
    )
    assert "step-2 and step-3 may be overfitted: step-3 draws pictures that are alike, with 0 % of the" in said


def test_prompts_that_are_forgotten_are_a_sign_where_a_metric_knows() -> None:
    plain = Signs(nearest=None, copies=None, drift=0, diversity=1, accuracy=0.9)
    found = {f"step-{n}": replace(plain, accuracy=share) for n, share in ((1, 0.7), (2, 0.59), (3, 0.4))}
    assert sentence({"step-1": found["step-1"]}, plain) == ""
    assert sentence(found, plain) == (
        "step-2 and step-3 may be overfitted: step-3 keeps 40 % of what prompts say, the base 90 %."
    )
    assert sentence(found, replace(plain, accuracy=None)) == ""
    assert sentence({"step-1": replace(plain, accuracy=None)}, plain) == ""
    assert Signs.mean([found["step-1"], replace(plain, accuracy=None)]).accuracy == 0.7

"""Signs of overfitting: does a checkpoint forget its prompts, repeat its training pictures, or draw one picture only?

A picture is a copy if it is nearer to a training picture than that one is to any other training picture (the test of
authenticity in Alaa et al. 2022, arXiv:2102.08921). What was tried is in docs/gains.md: on the pocket base prompts are
forgotten first, and the limits of the other two signs are declared only. Look at the pictures that a sentence is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from PIL import Image

from .metrics.features import Drift, Features, unit_features
from .sample import Shot

__all__ = ["COPIES", "KEPT", "VARIETY", "Signs", "copying", "forgetting", "monotonous", "sentence", "signs"]

COPIES = 0.25
"""A checkpoint copies if its share of copies is above the base's by this."""
KEPT = 2 / 3
"""It has forgotten its prompts if less than this share of the base's prompt accuracy is left."""
VARIETY = 0.5
"""It has lost its variety if less than this share of the base's diversity is left."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """Means over the pictures of one checkpoint."""

    nearest: float | None
    """Cosine to the nearest training picture; None: the training pictures are not known."""
    copies: float | None
    """Share of copies; None where there are fewer than two training pictures."""
    drift: float
    """Cosine distance to the base's own picture of the same prompt and seed."""
    diversity: float
    """Cosine distance between two pictures of different prompts or seeds."""
    accuracy: float | None = None
    """Share of its prompts that the pictures keep; None where no metric says so."""

    @classmethod
    def mean(cls, several: Sequence[Signs]) -> Signs:
        """Of several subjects, each counting once."""

        def of(name: str) -> float | None:
            known = [value for one in several if (value := getattr(one, name)) is not None]
            return fmean(known) if known else None

        return cls(**{name: of(name) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]


def signs(
    features: Features, shots: Sequence[Shot], base: Sequence[Shot], training: Sequence[Image.Image] = ()
) -> Signs:
    """The signs in some pictures of one checkpoint.

    Args:
        features: the feature space.
        shots: the checkpoint's pictures, two at least.
        base: the base's own pictures of the same prompts and seeds.
        training: the pictures it was trained on, as far as they are known.
    """
    rows = unit_features(features, [shot.image for shot in shots])
    between = 1 - (rows @ rows.T)[np.triu_indices(len(rows), 1)]
    nearest = copies = None
    if training:
        real = unit_features(features, training)
        cosines = rows @ real.T
        nearest = float(cosines.max(axis=1).mean())
        if len(real) > 1:
            own = real @ real.T - 2 * np.eye(len(real))  # a picture is not its own neighbor
            copies = float((cosines.max(axis=1) > own.max(axis=1)[cosines.argmax(axis=1)]).mean())
    drift = Drift(name="drift", features=features, base=base)(shots)
    return Signs(nearest=nearest, copies=copies, drift=float(drift.mean()), diversity=float(between.mean()))


def forgetting(own: Signs, base: Signs) -> bool:
    """Whether a checkpoint no longer draws what its prompts say.

    Args:
        own: the checkpoint's signs.
        base: those of the base's own pictures.
    """
    return own.accuracy is not None and base.accuracy is not None and own.accuracy < KEPT * base.accuracy


def copying(own: Signs, base: Signs) -> bool:
    """Whether a checkpoint repeats its training pictures.

    Args:
        own: the checkpoint's signs.
        base: those of the base's own pictures.
    """
    return own.copies is not None and base.copies is not None and own.copies > base.copies + COPIES


def monotonous(own: Signs, base: Signs) -> bool:
    """Whether a checkpoint draws pictures that are alike, though their prompts and seeds differ.

    Args:
        own: the checkpoint's signs.
        base: those of the base's own pictures.
    """
    return own.diversity < VARIETY * base.diversity


def sentence(found: Mapping[str, Signs], base: Signs) -> str:
    """What the signs of the checkpoints say, in a plain sentence each; empty where they show no overfitting.

    Args:
        found: checkpoint -> its signs, in the order of training.
        base: the signs of the base's own pictures.
    """
    said = []
    forgot = [name for name, own in found.items() if forgetting(own, base)]
    if forgot:
        said.append(
            f"{_listed(forgot)} may be overfitted: {forgot[-1]} keeps {_percent(found[forgot[-1]].accuracy)} of what "
            f"prompts say, the base {_percent(base.accuracy)}."
        )
    copies = [name for name, own in found.items() if copying(own, base)]
    if copies:
        last, usual = found[copies[-1]].copies, base.copies
        said.append(
            f"{_listed(copies)} may be overfitted: {_percent(last)} of the pictures of {copies[-1]} are nearer to a "
            f"training picture than other training pictures are (of the base's pictures {_percent(usual)})."
        )
    alike = [name for name, own in found.items() if monotonous(own, base)]
    if alike:
        left = found[alike[-1]].diversity / base.diversity
        said.append(
            f"{_listed(alike)} may be overfitted: {alike[-1]} draws pictures that are alike, with {_percent(left)} of "
            "the diversity of the base's."
        )
    return " ".join(said)


def _percent(share: float | None) -> str:
    return f"{round(100 * (share or 0))} %"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

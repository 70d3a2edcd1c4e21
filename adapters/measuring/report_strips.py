"""The report's pictures: base, baseline and arm of a pair in one strip, with buttons that show one of them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from .gains import Gains
from .page import Draw
from .sample import Shot

__all__ = ["Joined", "Key", "gallery", "joined", "references"]

Key = tuple[str, str, int, str]
Joined = dict[Key, dict[str, Shot]]
"""(subject, prompt, seed, latents) -> arm -> picture: base, where there is one, baseline, arm."""


def joined(gains: Gains, shots: Mapping[str, Sequence[Shot]]) -> Joined:
    """The pictures of base, baseline and arm, joined as the comparison joined them.

    Args:
        gains: the comparison.
        shots: arm -> its pictures.
    """
    design = gains.design
    found = {name: {shot.key: shot for shot in shots.get(name, ())} for name in (design.baseline, design.arm)}
    both = [key for key in found[design.arm] if key in found[design.baseline]]
    bare = {shot.key: shot for shot in shots.get(design.base or "", ())}
    return {
        key: {
            **({str(design.base): bare[key]} if key in bare else {}),
            **{name: own[key] for name, own in found.items()},
        }
        for key in both
    }


def gallery(
    group: str, pairs: Joined, keys: Sequence[Key], draw: Draw, over: Mapping[Key, Mapping[str, Image.Image]]
) -> str:
    """A strip for every pair.

    Args:
        group: names the buttons of these strips.
        pairs: all pictures.
        keys: of the pairs that are shown, in order.
        draw: shows one picture.
        over: pictures that are shown folded below a pair.
    """
    if not keys:
        return "<p>No pictures were kept.</p>"
    figures = [_strip(pairs[key], draw, over.get(key, {}), f"{group}{i}") for i, key in enumerate(keys)]
    return f'<div class="pairs">{"".join(figures)}</div>'


def _strip(pictures: Mapping[str, Shot], draw: Draw, over: Mapping[str, Image.Image], group: str) -> str:
    """Base, baseline and arm side by side, and buttons that show one of them alone."""
    first = next(iter(pictures.values()))
    said = f"{first.prompt}, seed {first.seed}"
    sides = "".join(
        f'<div class="side side{i}">{draw(shot.image, f"{name}: {said}")}<span>{escape(name)}</span></div>'
        for i, (name, shot) in enumerate(pictures.items(), start=1)
    )
    buttons = "".join(
        f'<label><input type="radio" name="{group}" class="pick{i}"{"" if i else " checked"}> {escape(name)}</label>'
        for i, name in enumerate(["all", *pictures])
    )
    extra = "".join(
        f"<details><summary>{escape(name)}</summary>{draw(picture, f'{name}: {first.prompt}')}</details>"
        for name, picture in over.items()
    )
    return (
        f'<figure class="pair"><figcaption>{escape(first.prompt)} · seed {first.seed}</figcaption>'
        f'<div class="strip">{sides}</div><fieldset><legend>show</legend>{buttons}</fieldset>{extra}</figure>'
    )


def references(references: Sequence[Image.Image], draw: Draw, subjects: int) -> str:
    """The first four pictures of the subject, or of several, or nothing.

    Args:
        references: the subjects' pictures.
        draw: shows one picture.
        subjects: how many were measured.
    """
    if not references:
        return ""
    pictures = "".join(
        f"<div>{draw(image, f'The subject, picture {number}')}</div>"
        for number, image in enumerate(references[:4], start=1)
    )
    shown = min(subjects, 4)
    title = (
        "The subject" if subjects <= 1 else "The subjects" if shown == subjects else f"{shown} of {subjects} subjects"
    )
    return f'<h2>{title}</h2><div class="references">{pictures}</div>'

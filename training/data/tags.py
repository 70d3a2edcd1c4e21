"""Captions that are lists of tags: shuffled, thinned out, with a beginning that always stays.

What is said of a picture is a function of its caption and a number, which the feed makes of seed and position.
"""

from __future__ import annotations

import random

from ..config import TagSettings

__all__ = ["full", "least", "vary_tags"]


def full(caption: str, settings: TagSettings) -> str:
    """The caption with its prefix and all its tags, in their order."""
    return _with_prefix(caption, settings)


def least(caption: str, settings: TagSettings) -> str:
    """What is never dropped of a caption."""
    if not (settings.drop or settings.drop_all):
        return full(caption, settings)
    return _with_prefix(_joined(_tags(caption, settings)[: settings.keep], settings), settings)


def vary_tags(caption: str, settings: TagSettings, seed: int) -> str:
    """The caption as the seed has it.

    Args:
        caption: tags, joined by `settings.separator`.
        settings: how many tags stay in front, and how the others are drawn.
        seed: of the draw.
    """
    if not settings.varies:
        return full(caption, settings)
    draw = random.Random(seed).random  # the same in every version of Python, as `shuffle` need not be
    tags = _tags(caption, settings)
    kept, rest = tags[: settings.keep], tags[settings.keep :]
    if draw() < settings.drop_all:
        rest = []
    drawn = [(draw(), draw(), tag) for tag in rest]
    chosen = [(order, tag) for order, lot, tag in drawn if lot >= settings.drop]
    if settings.shuffle:
        chosen.sort()
    return _with_prefix(_joined([*kept, *(tag for _, tag in chosen)], settings), settings)


def _tags(caption: str, settings: TagSettings) -> list[str]:
    """Those after the prefix, where the caption begins with it."""
    found = [tag.strip() for tag in caption.removeprefix(settings.prefix or "").split(settings.separator)]
    return [tag for tag in found if tag]


def _joined(tags: list[str], settings: TagSettings) -> str:
    return f"{settings.separator} ".join(tags)


def _with_prefix(caption: str, settings: TagSettings) -> str:
    prefix = settings.prefix
    if prefix is None or caption.startswith(prefix):
        return caption
    return _joined([prefix, caption], settings) if caption else prefix

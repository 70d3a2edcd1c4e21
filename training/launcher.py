"""What `accelerate launch` was asked for, beside our own settings for the same things.

A setting left at its default takes the launcher's value; another value is an error that names both, because neither is
the obvious one.
"""

from __future__ import annotations

import os
from dataclasses import replace

from .config import TrainSettings, require

__all__ = ["adopted"]

PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
STEPS = "--gradient_accumulation_steps"


def adopted(settings: TrainSettings) -> TrainSettings:
    """The settings with what the launcher asks for.

    Raises:
        TrainingError: both ask for different things, or the launcher for something that this loop does not do.
    """
    changes: dict[str, str | int | bool] = {}
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") or "no"
    require(
        asked in PRECISIONS,
        f"accelerate launch --mixed_precision {asked}: train.precision knows fp32, bf16 and fp16",
    )
    if asked != "no":
        changes["precision"] = PRECISIONS[asked]
        ours = "fp32" if settings.precision == "auto" else settings.precision
        _agree(ours, "fp32", changes["precision"], "precision", f"--mixed_precision {asked}")
    if steps := _accumulation():
        changes["accumulation"] = steps
        _agree(settings.accumulation, 1, steps, "accumulation", f"{STEPS} {steps}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").lower() or "no"
    require(
        backend in ("no", "inductor"),
        f"accelerate launch --dynamo_backend {backend}: this loop compiles with inductor; set train.compile: true",
    )
    if backend == "inductor":
        changes["compile"] = True
    return replace(settings, **changes) if changes else settings  # type: ignore[arg-type]


def _agree(ours: object, default: object, theirs: object, name: str, flag: str) -> None:
    require(
        ours in (default, theirs),
        f"train.{name} is {ours} and accelerate launch was given {flag}: say it once, or the same twice",
    )


def _accumulation() -> int | None:
    """The launcher hands its steps on to DeepSpeed only, so they are read where it was called: our parent's command."""
    if value := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        return _whole(value)
    if not any(name.startswith("ACCELERATE_") for name in os.environ):
        return None
    import psutil

    try:
        words = psutil.Process().parent().cmdline()  # type: ignore[union-attr]
    except (psutil.Error, AttributeError):  # gone, or not ours to look at
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name == STEPS:
            return _whole(value or following)
    return None


def _whole(value: str) -> int | None:
    return int(value) if value.isdecimal() and int(value) >= 1 else None

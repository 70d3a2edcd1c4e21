"""The arms of a comparison, and what tells one adapter's pictures from another's."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.common.settings import GuidanceSettings, MeasureSettings
from training.errors import TrainingError

__all__ = ["BASE", "EFFECTIVE", "arms_of", "digest_of"]

BASE, EFFECTIVE = "base", "effective scale"


def arms_of(plan: MeasureSettings, tuned: str | None = None) -> dict[str, GuidanceSettings]:
    """Every arm's guidance: the plan's at its scale, the tuned ones', and those of the sweep."""
    arms = {name: replace(arm, scale=plan.scale or arm.scale) for name, arm in plan.arms.items()}
    if tuned is not None:
        found = _best(Path(tuned) / "tuned.json")
        arms |= {name: GuidanceSettings(**values) for name, values in found.items() if name in arms}
        best = arms[plan.arm]
        # A control arm differs from the tuned one in its method alone.
        arms |= {
            name: replace(best, method=arm.method)
            for name, arm in arms.items()
            if name not in found and arm.method in ("dose", "placebo", "pointwise")
        }
    for name in (plan.baseline, plan.arm):
        arms |= {
            f"{name} @ {scale:g}": replace(arms[name], scale=scale) for scale in plan.sweep if scale != arms[name].scale
        }
    return arms


def _best(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))["best"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"tuned: {file} is not what recipes/tune.py wrote ({error!r})") from error


def digest_of(adapter: str | None) -> str:
    """What tells one adapter's pictures from another's: the bytes of its weights, wherever they lie."""
    if adapter is None:
        return "none"
    path = Path(adapter)
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors")) if path.is_dir() else []
    if not files:
        return adapter
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

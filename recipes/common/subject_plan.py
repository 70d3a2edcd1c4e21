"""What a subject of one's own is measured by, with what can be reached from here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["NETWORKS", "compared", "pocket_measures"]

NETWORKS = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vits16"}


def pocket_measures(folder: Path, *, masks: bool) -> dict[str, Any]:
    """`measure` of a subject on the pocket base: what its judge needs masks for is left out where there are none."""
    plan: dict[str, Any] = {"subjects": [str(folder)], "seeds": [1, 2]}
    if not masks:
        plan["metrics"] = ["prompt accuracy", "similarity (judge)"]
        print("measured without masks: whole pictures are compared with your photos, not the subject alone")
    return plan


def compared(folder: Path, networks: Mapping[str, str]) -> dict[str, Any] | None:
    """`measure` of a subject on another base, with the feature networks that can be reached; None: there is none."""
    spaces = {name: where for name, where in networks.items() if _reachable(where)}
    if missing := [f"{name} ({where})" for name, where in networks.items() if name not in spaces]:
        print(f"cannot be reached, so left out of the measuring: {', '.join(missing)}; --clip and --dino take folders")
    if not spaces:
        return None
    plan: dict[str, Any] = {
        "subjects": [str(folder)],
        "seeds": [1, 2],
        "spaces": spaces,
        "minimum_effect": 0.05,  # of identity, a share of pictures
        "tolerance": 0.005,  # of alignment, a cosine
    }
    if len(spaces) == len(NETWORKS):
        return plan | {"referee": "similarity (clip)"}
    only = {
        "clip": ["identity (clip)", "alignment (clip)", "similarity (clip)"],
        "dino": ["identity (dino)", "similarity (dino)"],
    }
    return plan | {"metrics": only[next(iter(spaces))]}


def _reachable(network: str) -> bool:
    """Whether a network's config is in a folder, in the cache, or on the hub."""
    from huggingface_hub import hf_hub_download

    from training.hub import offline_if_unreachable

    if Path(network).is_dir():
        return (Path(network) / "config.json").is_file()
    offline_if_unreachable(network)
    try:
        hf_hub_download(network, "config.json")
    except Exception:  # the hub has many kinds: offline, unknown, gated, no such name
        return False
    return True

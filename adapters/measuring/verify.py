"""Recompute a release folder's every number from its per-image table alone, without a GPU or the models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import files, signing
from ..errors import FileError, GainsError
from . import archive, tune
from .gains import Design, Gains, compare
from .table import read_csv

__all__ = ["checked_gains", "json_difference", "recompute", "verify"]

_SINCE = {  # fields of gains.json by the format that added them
    2: {"adapter", "effects", "plane", "best"},
    3: {"shipped", "shipped_effects"},
}
_DESIGN_SINCE_2 = {"base", "identity", "accuracy", "tolerance", "plain"}
TOLERANCE = 1e-9  # relative; sums may be ordered differently by another numpy


def verify(source: str | Path, *, signers: str | Path | None = None) -> dict[str, Any]:
    """Check files against the manifest and numbers against their table; returns a summary, raises on any difference.

    Args:
        source: a release folder, or what `adapters.measuring.archive.pack` made of one.
        signers: file of public keys, by one of which it must be signed.
    """
    with archive.unpacked(Path(source)) as folder:  # which also makes errors name the archive
        return _verified(folder, signers)


def _verified(path: Path, signers: str | Path | None) -> dict[str, Any]:
    manifest = files.verify_folder(path)
    summary: dict[str, Any] = {"kind": manifest.get("kind"), "files": len(manifest["files"])}
    summary["signature"] = signing.checked_signature(path, signers)
    if others := files.unnamed(path, manifest):
        summary["not in the manifest"] = others
    with files.understood(path):
        return summary | _figures(path, manifest)


def _figures(path: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What was measured and tuned, recomputed."""
    summary: dict[str, Any] = {}
    if "gains.json" in manifest["files"]:
        gains, stored = checked_gains(path)
        _check_identity(path, manifest, stored.get("identity"))
        if gains.released is not None:
            summary["adapter"] = gains.released.sentence
        summary["verdict"] = gains.verdict.sentence
        summary["numbers"] = _count(_as_stored(gains.to_dict(), stored))
    if "tuned.json" in manifest["files"]:
        summary["tuned"] = _tuned(path)
    return summary


def _as_stored(ours: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Ours without what an older format does not say."""
    known = stored.get("format")
    later = {name for since, names in _SINCE.items() if known in (1, 2) and since > known for name in names}
    kept = {name: value for name, value in ours.items() if name not in later}
    if known == 1:
        kept["design"] = {name: value for name, value in ours["design"].items() if name not in _DESIGN_SINCE_2}
    return kept


def _check_identity(folder: Path, manifest: dict[str, Any], identity: Any) -> None:
    """The figures are about these weights on this base, as far as they say so: results alone do not."""
    if identity is None:
        return
    if not isinstance(identity, dict) or not isinstance(identity.get("weights"), dict):
        raise FileError(f"{folder / 'gains.json'}: its identity does not say which weights were measured")
    for name, digest in identity["weights"].items():
        if manifest["files"].get(name, {}).get("sha256") != digest:
            raise GainsError(f"{folder}: gains.json was measured with another {name} than the one in the folder")
    there = {name for name in manifest["files"] if name.endswith(".safetensors") and "/" not in name}
    if others := sorted(there - set(identity["weights"])):
        raise GainsError(f"{folder}: gains.json was measured without {others[0]}, which is in the folder")
    if (measured := identity.get("base")) != (base := manifest.get("base")):
        raise GainsError(f"{folder}: gains.json was measured on base {measured}, the manifest says {base}")


def _tuned(folder: Path) -> dict[str, Any]:
    """What a search found, recomputed from every image's number."""
    try:
        record = files.read_json(folder / "tuned.json")
        up, best = record["higher is better"], record["best"]
        joint = record.get("references")
        found = {
            name: tune.recomputed_winner(rounds, higher_is_better=up, references=joint)
            for name, rounds in record["rounds"].items()
        }
        ours = {name: {k: v for k, v in found[name].items() if k != "adapter"} for name in best}
        ours |= {"adapter": found["checkpoint"]["adapter"]} if "checkpoint" in found else {}
        best = best | ({"adapter": record["adapter"]} if "checkpoint" in found else {})
    except GainsError as error:
        raise GainsError(f"{folder}: tuned.json: {error}") from error
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise FileError(f"{folder / 'tuned.json'}: not what recipes/tune.py writes ({error!r})") from error
    if ours != best:
        raise GainsError(f"{folder}: tuned.json names {best} as the best, recomputed {ours}")
    return ours


def checked_gains(folder: Path) -> tuple[Gains, dict[str, Any]]:
    """The comparison recomputed, and what `gains.json` holds; a `GainsError` where they differ."""
    gains, stored = recompute(folder), files.read_object(folder / "gains.json")
    ours = _as_stored(gains.to_dict(), stored)
    if changed := json_difference(ours, {name: stored.get(name) for name in ours}, "gains"):
        raise GainsError(f"{folder}: {changed}; gains.json does not follow from per_image.csv")
    return gains, stored


def recompute(folder: Path) -> Gains:
    """The comparison, from `per_image.csv` and the design in `gains.json`."""
    design = files.read_object(folder / "gains.json").get("design")
    names = {f.name for f in fields(Design)}
    if not isinstance(design, dict) or set(design) not in (names, names - _DESIGN_SINCE_2):
        raise FileError(f"{folder / 'gains.json'}: no complete design in it")
    rows = read_csv(folder / "per_image.csv")
    try:
        return compare(rows, Design(**design))
    except GainsError as error:
        raise GainsError(f"{folder / 'gains.json'}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:
        raise FileError(f"{folder / 'gains.json'}: the design is malformed ({error})") from error


def json_difference(ours: Any, stored: Any, where: str) -> str | None:
    """The first place where two JSON values differ.

    Args:
        ours: the value recomputed.
        stored: the value in the file.
        where: path of both, for the message.

    Returns:
        The place and both values as a sentence; None: they are the same up to rounding.
    """
    if isinstance(ours, dict) and isinstance(stored, dict):
        if ours.keys() != stored.keys():
            return f"{where} has other fields: {sorted(ours.keys() ^ stored.keys())}"
        return next((d for k in ours if (d := json_difference(ours[k], stored[k], f"{where}.{k}"))), None)
    if isinstance(ours, list) and isinstance(stored, list):
        if len(ours) != len(stored):
            return f"{where} has {len(stored)} entries, recomputed {len(ours)}"
        return next((d for i, o in enumerate(ours) if (d := json_difference(o, stored[i], f"{where}[{i}]"))), None)
    if isinstance(ours, float) and isinstance(stored, int | float) and not isinstance(stored, bool):
        same = math.isclose(ours, stored, rel_tol=TOLERANCE, abs_tol=1e-12) or (math.isnan(ours) and math.isnan(stored))
    else:
        same = ours == stored and type(ours) is type(stored)
    return None if same else f"{where} is {stored!r}, recomputed {ours!r}"


def _count(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_count(v) for v in value.values())
    if isinstance(value, list):
        return sum(_count(v) for v in value)
    return int(isinstance(value, int | float) and not isinstance(value, bool))

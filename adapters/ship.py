"""The release folder: weights in every useful spelling, card, guider, gains, report, manifest; whole or not at all."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import compose, files, signing
from .adapter import Adapter
from .card import Card, escape, render_card, slug
from .errors import AdapterError, FileError, FormatError
from .measuring import report
from .measuring.gains import FORMAT, Gains
from .measuring.sample import Shot, write
from .measuring.table import Row, write_csv
from .source import EXACT_KOHYA, GUIDER_FILE, MODEL_FILE, MODELS, open_source, read_adapter, tokens_of
from .text import OWN_LAYER, TextRule
from .tokens import EMBEDS_FILE, read_tokens, write_tokens
from .writing import LORA_FILE, suits_diffusers, write_diffusers, write_kohya, write_peft

__all__ = ["push", "ship", "versions"]

_PACKAGES = ("scfg-toolkit", "torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "scipy")
SAMPLES, FEW = 8, 1
NEAREST = 4  # a DoRA's nearest LoRA has so many times its rank
Models = Mapping[str, torch.nn.Module]


def ship(
    folder: str | Path,
    *,
    weights: Adapter | str | Path,
    base: Mapping[str, str],
    card: Card,
    gains: Gains | None = None,
    rows: Sequence[Row] = (),
    shots: Mapping[str, Sequence[Shot]] | None = None,
    guider: Mapping[str, Any] | None = None,
    rule: TextRule | None = None,
    embeds: Mapping[str, torch.Tensor] | None = None,
    models: Models | None = None,
    config: str | None = None,
    page: str | None = None,
    facts: Mapping[str, Any] | None = None,
    name: str | None = None,
    compact: bool = False,
    key: str | Path | None = None,
) -> Path:
    """Write a release folder; an older one of the same name is replaced in one step.

    Args:
        folder: the release folder to write.
        weights: an adapter, or what training wrote: a folder or file in peft, diffusers or kohya keys, or the folder of
            a ControlNet or U-net.
        base: `adapters.describe(pipe)` of the base it was made on.
        card: title, base, license and what else the author says.
        gains: the comparison; with `rows`, or neither of the two.
        rows: the table that the comparison was computed from.
        shots: images per arm, for samples and report.
        guider: the settings that measured best; what `load` hands to its guidance callable.
        rule: how prompts were read in training and measuring, which `load` follows; None: as usual.
        embeds: learned tokens of one text encoder, token -> (vectors, width); those in `weights` ship by themselves.
        models: component -> the base's model; with them a DoRA also ships as the nearest LoRA.
        config: the resolved training settings as YAML text.
        page: the report, where it was rendered with the comparison; otherwise it is made here.
        facts: measured things without a column in the table: peak memory, Fréchet distances, tuning.
        name: of the kohya file; by default made from the card's title.
        compact: small enough to be kept under version control: weights in one spelling (diffusers', else peft's), one
            sample an arm, no page; `python -m adapters convert` makes the other spellings.
        key: private key of OpenSSH to sign the manifest with, see `adapters.signing.sign`.

    Returns:
        The folder.

    Raises:
        AdapterError: gains without rows, or rows without gains.
    """
    if (gains is None) != (not rows):
        raise AdapterError("gains and rows belong together: give both, or neither")
    target, shots = Path(folder), shots or {}
    made = {**versions(), **(facts or {})}
    with files.write_folder(target) as stage:
        sdxl = None if "family" not in base else base["family"] == "sdxl"
        kinds, notes = _weights(stage, weights, None if compact else slug(name or card.title), sdxl, models)
        if embeds:
            write_tokens(stage / EMBEDS_FILE, {token: {"text_encoder": rows} for token, rows in embeds.items()})
        if guider is not None:
            _json(stage / GUIDER_FILE, guider)
        if config is not None:
            (stage / "config.yaml").write_text(config, "utf-8")
        _samples(stage / "samples", shots, made, FEW if compact else SAMPLES)
        if gains is not None:
            _gains(stage, gains, rows, card, base, made)
            if not compact:
                page = page or _report(gains, shots, card, made)
                (stage / "report.html").write_text(page, "utf-8")
        told = {} if rule is None or rule.neutral else {"text": rule.to_config()}
        _readme(stage, card, kinds, gains, [*notes, *_reading(rule, sdxl=bool(sdxl)), *_reach(guider, gains)])
        kind = kinds[0] if len(kinds) == 1 else "mixed"
        files.write_manifest(stage, {"format": 1, "kind": kind, "base": dict(base), "versions": versions(), **told})
        if key is not None:
            signing.sign(stage, key)
    return target


def _report(gains: Gains, shots: Mapping[str, Sequence[Shot]], card: Card, made: Mapping[str, Any]) -> str:
    return report.render_report(gains, shots, title=card.title, command=card.command, facts={**card.facts, **made})


def _reading(rule: TextRule | None, *, sdxl: bool) -> list[str]:
    """How other programs read prompts as it was done in training."""
    if rule is None or rule.neutral:
        return []
    notes = [f"Trained and measured with {rule.said()}. `adapters.load` reads prompts in the same way."]
    if (skip := rule.clip_skip) is not None:
        own = OWN_LAYER["sdxl" if sdxl else "sd"]
        notes.append(
            f"Set clip-skip {skip} in A1111 and Forge, or a CLIP Set Last Layer of -{skip} in ComfyUI. In diffusers it "
            f"is `clip_skip={skip - own}`, which leaves the negative prompt as it is"
            + ("." if sdxl else "; diffusers 0.42 with transformers 5 has an error there, so use `adapters.load`.")
        )
    if rule.chunks > 1:
        notes.append(
            "A1111, Forge and ComfyUI read long prompts in such chunks by themselves. They do not pad short ones, and "
            "may move a word to the next chunk, so their pictures differ a little. Plain diffusers cuts long prompts."
        )
    return notes


def _reach(guider: Mapping[str, Any] | None, gains: Gains | None) -> list[str]:
    """What becomes of a scope in other programs, which have none, and which arm shows what to expect there."""
    if not (guider or {}).get("scope"):
        return []
    said = (
        "Measured with a scope, which `guider_config.json` holds and `adapters.load` follows: where, when and how "
        "strongly the adapter acts. Other programs apply it with one weight, everywhere and in every step."
    )
    measured = gains.design.notes.get("guidance", {}) if gains is not None else {}
    plain = [name for name, own in measured.items() if own["method"] == "cfg" and not own.get("scope")]
    return [f"{said} The arm {escape(plain[0])} above shows what to expect there." if plain else said]


def _readme(stage: Path, card: Card, kinds: list[str], gains: Gains | None, notes: list[str]) -> None:
    """The card, which names what lies in the folder by now."""
    names = sorted(p.name for p in stage.iterdir())
    tokens = read_tokens(stage / EMBEDS_FILE) if EMBEDS_FILE in names else None
    text = render_card(card, kinds=kinds, gains=gains, has=names, notes=notes, tokens=tokens)
    (stage / "README.md").write_text(text, "utf-8")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")


def _weights(
    stage: Path, weights: Adapter | str | Path, name: str | None, sdxl: bool | None, models: Models | None
) -> tuple[list[str], list[str]]:
    """Write the weights; returns their kinds and notes on who can read them. Without a name: in one spelling."""
    source = None if isinstance(weights, Adapter) else open_source(weights)
    if source is not None and (config := source.file("config.json")) is not None:
        kinds, notes = _model(stage, source.path, files.read_object(config))
        tokens = tokens_of(source)
    else:
        adapter = weights if isinstance(weights, Adapter) else read_adapter(source)  # type: ignore[arg-type]
        kinds, notes = _adapter(stage, adapter, name, sdxl, models) if adapter.modules else (["tokens"], [])
        tokens = adapter.tokens
    if tokens:
        write_tokens(stage / EMBEDS_FILE, tokens)
    return kinds, notes


def _model(stage: Path, folder: Path, config: dict[str, Any]) -> tuple[list[str], list[str]]:
    kind = MODELS.get(str(config.get("_class_name"))) if isinstance(config, dict) else None
    weights = folder / MODEL_FILE
    if kind is None or not weights.is_file():
        raise FileError(f"{folder}: config.json without a ControlNet or U-net and its {MODEL_FILE}")
    files.read_header(weights)
    shutil.copyfile(folder / "config.json", stage / "config.json")
    shutil.copyfile(weights, stage / MODEL_FILE)
    return [kind], [f"A whole {kind}: diffusers loads this folder with `from_pretrained`."]


def _adapter(
    stage: Path, adapter: Adapter, name: str | None, sdxl: bool | None, models: Models | None
) -> tuple[list[str], list[str]]:
    plain = suits_diffusers(adapter)
    notes = []
    if plain:
        write_diffusers(stage / LORA_FILE, adapter)
        notes.append(f"`{LORA_FILE}` loads through plain `pipe.load_lora_weights`.")
    else:
        notes.append(
            f"This adapter ({', '.join(adapter.kinds)}) does not load through plain diffusers from this folder. Use "
            "`adapters.load`, merge it into a U-net (`python -m adapters merge`), or approximate it by a LoRA whose "
            "error is printed (`python -m adapters convert --to diffusers --rank N`)."
        )
    if name is not None or not plain:
        try:
            write_peft(stage, adapter)
        except FormatError as error:  # then only the kohya keys can hold it
            if plain or name is None:
                raise
            notes.append(f"There is no peft folder: {error}.")
    if name is not None:
        notes += _kohya(stage, adapter, name, sdxl, models)
    return adapter.kinds, notes


def _kohya(stage: Path, adapter: Adapter, name: str, sdxl: bool | None, models: Models | None) -> list[str]:
    """The file for ComfyUI, Forge and A1111, and a note on it; for a DoRA, which they misread, the nearest LoRA."""
    file = f"{name}.kohya.safetensors"
    if not any(module.decomposed for module in adapter.modules.values()):
        write_kohya(stage / file, adapter, sdxl=sdxl)
        return [f"`{file}` is for ComfyUI, Forge, A1111 and LyCORIS; every module has its alpha."]
    exact = name + EXACT_KOHYA
    write_kohya(stage / exact, adapter, sdxl=sdxl)
    notes = [
        f"`{exact}` is this DoRA in LyCORIS' keys, which LyCORIS reads as it is meant. diffusers drops the DoRA "
        "magnitudes, ComfyUI and Forge scale by the base weight's norm, A1111 takes them per input: not for these."
    ]
    if models is None:
        return [*notes, "No LoRA for these programs is in here, because it was shipped without the base's weights."]
    rank = NEAREST * max(module.rank for module in adapter.modules.values())
    found = compose.to_lora(adapter, models, rank)
    write_kohya(stage / file, found.adapter, sdxl=sdxl)
    return [
        *notes,
        f"`{file}` is for them: the LoRA of rank {rank} that is nearest to this DoRA. It misses {found.error:.2g} of "
        "the change (relative Frobenius norm).",
    ]


def _samples(folder: Path, shots: Mapping[str, Sequence[Shot]], facts: Mapping[str, Any], count: int) -> None:
    for arm, images in shots.items():
        for index, shot in enumerate(images[:count]):
            write(folder / f"{slug(arm)}-{index:02d}.png", shot, facts)


def _gains(
    stage: Path,
    gains: Gains,
    rows: Sequence[Row],
    card: Card,
    base: Mapping[str, str],
    facts: Mapping[str, Any],
) -> None:
    weights = {p.name: files.sha256(p) for p in sorted(stage.glob("*.safetensors"))}
    identity = {"weights": weights, "base": dict(base), "command": card.command, "facts": dict(facts)}
    # In the design's order, which is that of the contrasts.
    text = json.dumps({"format": FORMAT, "identity": identity, **gains.to_dict()}, indent=2, allow_nan=False)
    (stage / "gains.json").write_text(text + "\n", "utf-8")
    (stage / "per_image.csv").write_bytes(write_csv(rows).encode())


def push(folder: str | Path, repo_id: str, *, private: bool = True, dry_run: bool = False) -> list[str]:
    """Upload a release folder to the Hub after checking its manifest; returns the names of the files.

    `dry_run` checks and lists, and contacts nobody.

    Args:
        folder: a release folder.
        repo_id: "owner/name" on the Hub; made where it does not exist.
        private: whether a new repository is private.
        dry_run: check and list only.

    Raises:
        FileError: the folder does not match its manifest.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    path = Path(folder)
    names = [*sorted(files.verify_folder(path)["files"]), files.MANIFEST]
    names += [files.SIGNATURE] if (path / files.SIGNATURE).is_file() else []
    if not dry_run:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=path, allow_patterns=names)
    return names

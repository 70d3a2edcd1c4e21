"""An adapter from elsewhere, measured without a config: the base by its keys, a subject from photos, few arms."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.common.base import POCKET
from recipes.common.cli import quiet, say
from recipes.common.photos import LEAST
from recipes.common.subject_plan import NETWORKS, compared, pocket_measures
from recipes.common.subject_prompts import IDENTIFIER, check_pocket, held_out
from training.config import require
from training.naming import note

__all__ = ["BASES", "FEW", "parser", "words_of"]

BASES = {
    "SD-1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SD-2.x": "stabilityai/stable-diffusion-2-1",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "pocket": POCKET,
}
"""Family of an adapter -> the base that it is measured on where none is named."""
FEW = {"CFG": {"method": "cfg"}, "S-CFG": {"method": "semantic"}}
POCKET_SCALE = 4.0  # of the shipped configs for the pocket base


def words_of(words: Sequence[str]) -> list[str]:
    """The command line of measure.py that a short one stands for; its subject and config are written into `out`.

    Args:
        words: the adapter, options, and settings of measure.py, which come last.

    Raises:
        TrainingError: nothing to measure with, photos that cannot be used, or a base that the keys do not tell.
        adapters.AdapterError: no adapter there, or one that nobody can read.
    """
    from adapters.files import write_text
    from training.ranks import state

    options, more = parser().parse_known_args(words)
    if any(word.partition("=")[0] == "--scale" for word in words):
        note("--scale", "--guidance_scale")
    quiet()
    out = options.out or Path("runs") / f"measure_{Path(options.adapter).stem}"
    base = _base(options.adapter, options.base)
    trigger = options.trigger.removesuffix(options.noun).strip() or IDENTIFIER
    _warn_of_captions(options.adapter, trigger)
    name = options.photos.expanduser().resolve().name
    folder, pocket = out / "subject" / name, base == POCKET
    subject = _subject(folder, options.photos.expanduser(), options.noun, trigger, pocket=pocket)
    networks = {"clip": options.clip, "dino": options.dino}
    plan = pocket_measures(subject, masks=(subject / "masks").is_dir()) if pocket else compared(subject, networks)
    require(plan is not None, "nothing to measure with: give --clip or --dino a folder that holds the network")
    assert plan is not None
    scale = POCKET_SCALE if options.guidance_scale is None and pocket else options.guidance_scale
    plan |= {} if options.arms == "all" else {"arms": FEW}
    plan |= ({"sweep": options.sweep} if options.sweep else {}) | ({} if scale is None else {"guidance_scale": scale})
    values = {
        "base": {"path": base, **_reading(options.adapter)},
        "adapter": options.adapter,
        **_sampling(base),
        "measure": plan,
        "out": str(out),
    }
    config = out / "config.yaml"
    if state().is_main_process:
        write_text(config, f"# scfg-toolkit measure --config {shlex.quote(str(config))}\n{_yaml(values)}")
    state().wait_for_everyone()
    say(f"config: {config}")
    return ["--config", str(config), *more]


def parser() -> argparse.ArgumentParser:
    """The options of the short form."""
    parser = argparse.ArgumentParser(
        prog="scfg-toolkit measure ADAPTER",
        description="Measure an adapter from any trainer on the subject of your photos: base, CFG and S-CFG.",
        epilog="Settings of measure.py may follow, such as --sampling.steps 30 or --dry_run true.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", help="folder, hub id or any trainer's .safetensors")
    parser.add_argument(
        "--photos", type=Path, required=True, help="folder of three or more photos, perhaps with masks/"
    )
    parser.add_argument("--class", dest="noun", required=True, help="the subject's class, such as dog or teapot")
    parser.add_argument("--trigger", default=IDENTIFIER, help="the word that names the subject in prompts")
    parser.add_argument("--base", help="folder, hub id or single file of the base; default: by the adapter's keys")
    parser.add_argument("--arms", choices=("few", "all"), default="few", help="all: the control arms as well")
    parser.add_argument("--sweep", type=float, nargs="+", help="further guidance scales, for curves")
    parser.add_argument("--scale", dest="guidance_scale", type=float, help=argparse.SUPPRESS)  # its name of before
    parser.add_argument("--guidance_scale", type=float, help="guidance scale of all arms")
    parser.add_argument("--clip", default=NETWORKS["clip"], help="folder or hub id of the CLIP that measures")
    parser.add_argument("--dino", default=NETWORKS["dino"], help="folder or hub id of the DINO that measures")
    parser.add_argument("--out", type=Path, help="folder of the results; default: runs/measure_ADAPTER")
    return parser


def _base(adapter: str, given: str | None) -> str:
    """The base as given, or the one that the adapter's keys point to."""
    from adapters.family import family_of
    from adapters.source import open_source, read_adapter, whole_model

    source = open_source(adapter)
    kind = whole_model(source)
    require(kind in (None, "unet"), f"{adapter} is a ControlNet; measure it with a config, see docs/gains.md")
    family = None if kind else family_of(read_adapter(source))
    if given is not None:
        say(f"base: {given}" + (f" (the keys are of {family})" if family else ""))
        return given
    require(family is not None, f"{adapter}: its keys do not say which base it is for; give --base")
    assert family is not None
    say(f"base: {BASES[family]}, as the keys are of {family}; --base takes another")
    return BASES[family]


def _reading(adapter: str) -> dict[str, int]:
    """How the adapter's training read text, as settings of the base: from a manifest of ours or kohya's header."""
    from adapters.files import read_header
    from adapters.text import rule_in

    rule, path = rule_in(adapter), Path(adapter).expanduser()
    told = {"clip_skip": rule.clip_skip, "prompt_chunks": rule.chunks if rule.chunks > 1 else None}
    if path.is_file():
        header = read_header(path).get("__metadata__", {})
        skip, longest = str(header.get("ss_clip_skip")), str(header.get("ss_max_token_length"))
        # kohya leaves SDXL at its own layer whatever it was told, and SD-2.x counts from another one.
        others = "sdxl" in str(header.get("ss_base_model_version")) or header.get("ss_v2") == "True"
        told = {
            "clip_skip": int(skip) if skip in ("2", "3", "4") and not others else None,
            "prompt_chunks": {"150": 2, "225": 3}.get(longest),
        }
    found = {name: value for name, value in told.items() if value is not None}
    if found:
        say(f"text: {', '.join(f'{name} {value}' for name, value in found.items())}, as in the adapter's training")
    return found


def _sampling(base: str) -> dict[str, Any]:
    import torch

    return {"sampling": {"precision": "bf16"}} if base != POCKET and torch.cuda.is_available() else {}


def _subject(folder: Path, photos: Path, noun: str, identifier: str, *, pocket: bool) -> Path:
    """A subject folder with the photos, their masks and `subject.json`; prompts that were edited there are kept."""
    from adapters.files import write_folder, write_json
    from training.data import images
    from training.ranks import state

    masks = photos / "masks" if (photos / "masks").is_dir() else None
    found = images.folder(photos, prompt=noun, masks=masks, say=say, setting="--photos")
    require(
        len(found) >= LEAST,
        f"--photos {photos} has {len(found)} photo(s); three are the least that a subject is known by",
    )
    prompts = _prompts(folder / "subject.json", noun, identifier, pocket=pocket)
    if pocket:
        check_pocket(noun, identifier, prompts, str(folder / "subject.json"))
    if state().is_main_process:
        with write_folder(folder) as stage:
            for place, files in ((stage, found.files), (stage / "masks", found.masks or [])):
                for number, file in enumerate(dict.fromkeys(files)):
                    place.mkdir(exist_ok=True)
                    shutil.copyfile(file, place / f"{number}{file.suffix.lower()}")
            write_json(stage / "subject.json", {"class": noun, "identifier": identifier, "prompts": prompts})
    say(f"subject: {identifier} {noun}, {len(found)} photos, masks: {'as given' if masks else 'none'}")
    say(f"prompts: {len(prompts)}, in {folder / 'subject.json'}; edit them as you like")
    return folder


def _prompts(file: Path, noun: str, identifier: str, *, pocket: bool) -> list[str]:
    """Those of an earlier run about the same subject, or the default ones."""
    from adapters.files import read_json

    try:
        facts = read_json(file)
        if (facts["class"], facts["identifier"]) == (noun, identifier):
            return list(facts["prompts"])
    except (ValueError, KeyError, TypeError):
        pass
    return held_out(noun, identifier, pocket=pocket)


def _warn_of_captions(adapter: str, trigger: str) -> None:
    """kohya's files list the words of their captions; a trigger that is none of them was not trained."""
    from adapters.files import read_header

    path = Path(adapter).expanduser()
    if not path.is_file():
        return
    words = str(read_header(path).get("__metadata__", {}).get("ss_tag_frequency", ""))
    if words not in ("", "{}") and trigger not in words:
        say(f"warning: --trigger {trigger} is in none of the captions that {path.name} was trained with")


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False))

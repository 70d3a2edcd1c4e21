"""Checks your own photos, writes a config for them, and prints the command that starts the run.

scfg-toolkit new FOLDER --class dog [--base stable-diffusion-v1-5/stable-diffusion-v1-5] [--memory 12] [SETTINGS]
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes import dreambooth_lora
from recipes.common import given
from recipes.common.base import POCKET
from recipes.common.cli import CONFIGS, explained, quiet
from recipes.common.photos import Photos, read_photos
from recipes.common.subject_plan import NETWORKS, compared, pocket_measures
from recipes.common.subject_prompts import IDENTIFIER, check_pocket, held_out, tuning
from recipes.common.training import check_stages
from training.command_line import parse
from training.config import require
from training.errors import TrainingError, exit_on_error
from training.pocket.captions import article

MYPY = False  # not TYPE_CHECKING: the reader of settings would run that import
if MYPY:
    from recipes.common.memory_plan import Plan

__all__ = ["prepare_subject"]

ON_POCKET = (
    "base pocket: it draws small scenes of a drawn world in 64 pixels. A run on it tries every step in minutes; a "
    "photographed subject will not appear in other scenes"
)
LORA = {"rank": 16, "targets": "attention+ff"}
PRESETS: dict[str, dict[str, Any]] = {
    "sd": {"resolution": 512, "lora": LORA, "train": {"steps": 800, "batch_size": 1, "learning_rate": 1e-4}},
    "sd21": {"resolution": 768, "lora": LORA, "train": {"steps": 800, "batch_size": 1, "learning_rate": 1e-4}},
    "sdxl": {"resolution": 1024, "lora": LORA, "train": {"steps": 800, "batch_size": 1, "learning_rate": 1e-4}},
}


def _gigabytes(text: str) -> int:
    """ "12", "12GB" or "12 GiB"; a GPU that is sold with 12 GB has 12 GiB."""
    found = re.fullmatch(r"(\d+)\s*(gi?b?)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be the GPU's memory in GB, such as 12, got {text!r}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Settings of the training may follow, such as --train.steps 400; they go into the config.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="three to twenty photos of one thing")
    parser.add_argument("--class", dest="noun", required=True, help="the subject's class, such as dog or teapot")
    parser.add_argument("--base", default=POCKET, help="folder, hub id or .safetensors file of the base; or pocket")
    parser.add_argument("--identifier", default=IDENTIFIER, help="a rare word that names the subject in prompts")
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/NAME")
    parser.add_argument(
        "--memory", type=_gigabytes, metavar="GB", help="memory of the GPU, such as 8, 12, 16 or 24: fit into it"
    )
    parser.add_argument("--clip", default=NETWORKS["clip"], help="folder or hub id of the CLIP that measures")
    parser.add_argument("--dino", default=NETWORKS["dino"], help="folder or hub id of the DINO that measures")
    parser.add_argument("--no-trial", action="store_true", help="do not try one step, and estimate nothing")
    options, more = parser.parse_known_args()
    quiet()
    out = options.out or Path("runs") / options.folder.resolve().name
    networks = {"clip": options.clip, "dino": options.dino}
    config = prepare_subject(
        options.folder, options.noun, options.identifier, options.base, out, networks, options.memory, more
    )
    if not options.no_trial:
        try_run(config)
    print(f"\nconfig: {config}\nrun it:\n  {_command(config)}")


def prepare_subject(
    folder: Path,
    noun: str,
    identifier: str,
    base: str,
    out: Path,
    networks: dict[str, str] | None = None,
    memory: int | None = None,
    more: Sequence[str] = (),
) -> Path:
    """Check the photos, write `subject.json` beside them and the config into `out`; returns the config's path.

    Args:
        folder: with the photos.
        noun: the subject's class.
        identifier: the subject's word.
        base: folder or hub id of the base, or "pocket".
        out: receives the config.
        networks: feature space -> folder or hub id of its network; what cannot be reached is left out.
        memory: of the GPU that the run must fit into, GiB; null: it is not looked at.
        more: further settings as on a training's command line; the config has them.

    Raises:
        TrainingError: photos that nothing can be learnt from, a class that the base does not know, a GPU that is too
            small, further settings that the run would refuse, a subject.json or a config that is there and says
            something else; nothing is written then.
    """
    import yaml

    from adapters.files import write_text

    shape = base if base == POCKET else _configs(more) or base  # what the base's sizes are read from
    calls, preset = f"{identifier} {noun}", _preset(_family(shape))
    prompt = f"a photo of {article(calls)}"
    photos = read_photos(folder, calls=calls, prompt=prompt, minimum=min(256, preset["resolution"]))
    file, config = folder / "subject.json", out / "config.yaml"
    facts = _subject(file, noun, identifier, pocket=base == POCKET)
    if base == POCKET:
        check_pocket(noun, identifier, facts["prompts"], str(file))
    fitting = _fitting(shape, memory, preset, more) if memory is not None else None
    for line in [*photos.lines(), f"held-out prompts: {len(facts['prompts'])}, in {file}; edit them as you like"]:
        print(line)
    measured = fitting is None or fitting.measured
    values = {
        **_values(photos, noun, base, out, preset, identifier),
        **(_measured(photos, base, networks or NETWORKS) | {"ship": {}} if measured else {}),
        "out": str(out),
    }
    for table, chosen in ({} if fitting is None else fitting.settings()).items():
        if table != "measure" or table in values:  # which photos without networks are not
            values[table] = values.get(table, {}) | chosen
    if "measure" in values:
        prompts = tuning(noun, pocket=base == POCKET)
        values["tune"] = {"seeds": [101, 102], **preset.get("tune", {}), "prompts": prompts}
    values, asked = given.merged(dreambooth_lora.Settings, values, more) if more else (values, None)
    text = f"# {_command(config)}\n{yaml.safe_dump(values, sort_keys=False)}"
    require(
        not config.exists() or config.read_text("utf-8") == text,
        f"{config} is there and says something else; delete it, or give another folder with --out",
    )
    with given.standing(file, facts):
        if asked is not None:
            check_stages(asked)
        write_text(config, text)
    return config


def try_run(config: Path) -> None:
    """Resolve the whole run, to the release, and try one step of its training."""
    settings = parse(dreambooth_lora.Settings, [f"--config={config}", "--train.dry_run=true"])
    print("trying one step ...", flush=True)
    dreambooth_lora.run(settings)


def _configs(more: Sequence[str]) -> str | None:
    """The folder that further settings give as `base.config`."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--base.config", dest="folder", nargs="?")
    folder: str | None = reader.parse_known_args(list(more))[0].folder
    return folder


def _family(base: str) -> str:
    """Of a folder by its U-net's config, of a file by its keys; of a hub id by name, as nothing is downloaded here."""
    if base == POCKET:
        return POCKET
    from adapters.files import read_object  # not above: they bring torch
    from training import single_file

    if single_file.is_file(base):
        return {"sd1": "sd", "sd2": "sd21"}.get(found := single_file.inspect_file(base).configs.name, found)
    config = Path(base).expanduser() / "unet" / "config.json"
    if not config.is_file():
        name = base.lower()
        return "sdxl" if "xl" in name else "sd21" if "2-1" in name else "sd"
    unet = read_object(config)
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd21" if unet.get("cross_attention_dim") == 1024 else "sd"


def _command(config: Path) -> str:
    return f"scfg-toolkit train --config {shlex.quote(str(config))}"


def _subject(file: Path, noun: str, identifier: str, *, pocket: bool) -> dict[str, Any]:
    """What `subject.json` says, or will say."""
    from adapters.files import read_json

    if not file.exists():
        prompts = held_out(noun, identifier, pocket=pocket)
        return {"class": noun, "identifier": identifier, "origin": "the maker's photos", "prompts": prompts}
    try:
        facts: dict[str, Any] = read_json(file)
        found, prompts = (facts["identifier"], facts["class"]), facts["prompts"]
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{file} needs identifier, class and prompts ({error!r}); delete it to start anew"
        ) from error
    wanted = (identifier, noun)
    require(
        found == wanted,
        f"{file} is about {' '.join(found)!r}, not {' '.join(wanted)!r}; change it, delete it, or give its words as "
        "--identifier and --class",
    )
    require(
        isinstance(prompts, list) and len(prompts) >= 2 and all(isinstance(prompt, str) for prompt in prompts),
        f"{file}: prompts must be a list of at least two",
    )
    return facts


def _values(photos: Photos, noun: str, base: str, out: Path, preset: dict[str, Any], identifier: str) -> dict[str, Any]:
    """What differs from the defaults up to the training, as the config's nested tables."""
    values: dict[str, Any] = {
        "base": {"path": base},
        "data": {"source": str(photos.folder), "resolution": preset["resolution"]},
        "lora": preset["lora"],
        "dreambooth": {"identifier": identifier},
        "objective": {"caption_dropout": 0.1},
        "train": {"warmup": 20} | preset["train"],
    }
    if photos.masks:
        values["data"]["masks"] = str(photos.masks)
    if photos.masks and base == POCKET:
        shipped = _shipped()["dreambooth"]
        lines = CONFIGS.parent / "prompts" / Path(shipped["class_prompt_file"]).name
        values["dreambooth"] = shipped | {"identifier": identifier, "class_prompt": article(noun)}
        values["dreambooth"]["class_prompt_file"] = str(lines)
    if photos.prompt:
        values["data"]["prompt"] = photos.prompt
    if base != POCKET:
        values["train"] |= {"precision": "bf16", "gradient_checkpointing": True}
        values["sampling"] = {"precision": "bf16"}
    return values


def _preset(family: str) -> dict[str, Any]:
    """Resolution, adapter, training and tuning; for the pocket base those of the demo."""
    if family != POCKET:
        return PRESETS[family]
    shipped = _shipped()
    return {"resolution": shipped["data"]["resolution"], **{name: shipped[name] for name in ("lora", "train", "tune")}}


def _shipped() -> dict[str, Any]:
    """The demo's config: what was found to be good for subjects on the pocket base."""
    import yaml

    values: dict[str, Any] = yaml.safe_load((CONFIGS / "dreambooth_lora" / "pocket_dog.yaml").read_text("utf-8"))
    return values


def _fitting(base: str, memory: int, preset: dict[str, Any], more: Sequence[str]) -> Plan:
    """What makes the run fit into the GPU, with what further settings ask for."""
    from recipes.common.memory_plan import Uses, plan_for

    asked = {word.partition("=")[0].removesuffix("+") for word in more}
    uses = Uses(
        classes="--dreambooth.class_prompt" in asked,
        validates="--train.validation.prompts" in asked,
        region="--region" in asked,
    )
    plan = plan_for(base, memory, preset["resolution"], preset["lora"]["targets"], uses)
    for line in plan.lines():
        print(line)
    return plan


def _measured(photos: Photos, base: str, networks: dict[str, str]) -> dict[str, Any]:
    """The table `measure`; without it where nothing can be measured."""
    if base == POCKET:
        print(ON_POCKET)
        values = pocket_measures(photos.folder, masks=photos.masks is not None)
        if photos.masks:
            values |= {name: _shipped()["measure"][name] for name in ("arms", "arm", "minimum_effect")}
        return {"measure": values}
    plan = compared(photos.folder, networks)
    if plan is None:
        print("nothing is measured or tuned; the release will say so")
        return {}
    return {"measure": plan}


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

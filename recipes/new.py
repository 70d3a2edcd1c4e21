"""Your own photos: checked, captioned, with a ready config, the memory and time it will take, and the command to run.

python recipes/new.py FOLDER --class dog [--base stable-diffusion-v1-5/stable-diffusion-v1-5] [--identifier sks]
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from recipes import dreambooth_lora
from recipes.common.base import POCKET
from recipes.common.cli import explained, quiet
from training.config import parse, require
from training.errors import exit_on_error
from training.pocket.captions import article

__all__ = ["PROMPTS", "prepare"]

# Held out: no photo shows them. {} is the subject, as in "a sks dog".
PROMPTS = (
    "a photo of a {} on a beach",
    "a photo of a {} in the snow",
    "a photo of a {} in a forest",
    "a photo of a {} on a city street at night",
    "a photo of a {} on a wooden table",
    "a photo of a {} in front of a brick wall",
    "a photo of a {} beside a red car",
    "a photo of a {} and a blue umbrella",
    "a photo of a {} under a cherry tree",
    "a photo of a {} in a field of sunflowers",
    "a painting of a {}",
    "a photo of a {} seen from above",
)
TUNING = (
    "a photo of a {} in a garden",
    "a photo of a {} on a sofa",
    "a photo of a {} beside a green bottle",
    "a drawing of a {}",
)
# The same in the grammar of the pocket world.
POCKET_PROMPTS = (
    "a {} in the sea",
    "a {} at night",
    "a {} in front of a brick wall",
    "a {} and a red gift at night",
    "a {} to the left of a house by a brick wall",
    "a {} below a yellow star in the sea",
)
POCKET_TUNING = ("a {} and a yellow balloon on the grass", "a {} in the snow", "a {} on the sand")
LORA = {"rank": 16, "targets": "attention+ff"}
PRESETS: dict[str, dict[str, Any]] = {
    # As for the demo's subjects: with attention layers alone, or one class prompt, they did not appear beside others.
    POCKET: {
        "resolution": 64,
        "lora": {"rank": 16, "targets": "conv"},
        "train": {"steps": 400, "batch_size": 6, "learning_rate": 1e-3},
        "dreambooth": {
            "class_prompt_file": str(Path(__file__).parent / "prompts" / "class.txt"),
            "class_images": 64,
            "steps": 20,
            "guidance_scale": 4.0,
        },
    },
    "sd": {"resolution": 512, "lora": LORA, "train": {"steps": 800, "batch_size": 1, "learning_rate": 1e-4}},
    "sd21": {"resolution": 768, "lora": LORA, "train": {"steps": 800, "batch_size": 1, "learning_rate": 1e-4}},
    "sdxl": {"resolution": 1024, "lora": LORA, "train": {"steps": 800, "batch_size": 1, "learning_rate": 1e-4}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="three to twenty photos of one thing")
    parser.add_argument("--class", dest="noun", required=True, help="what it is one of: dog, teapot, person, ...")
    parser.add_argument("--base", default=POCKET, help="folder or hub id of the base model, or pocket")
    parser.add_argument("--identifier", default="sks", help="a rare word that will stand for it")
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/NAME")
    parser.add_argument("--no-trial", action="store_true", help="leave out the trial step and its estimate")
    options = parser.parse_args()
    quiet()
    out = options.out or Path("runs") / options.folder.resolve().name
    config = prepare(options.folder, options.noun, options.identifier, options.base, out)
    if not options.no_trial:
        dreambooth_lora.run(parse(dreambooth_lora.Settings, [f"--config={config}", "--train.dry_run=true"]))
    print(f"\nconfig: {config}\nrun it:\n  {_command(config)}")


def prepare(folder: Path, noun: str, identifier: str, base: str, out: Path) -> Path:
    """Check the photos, write `subject.json` beside them and the config into `out`; returns the config's path.

    Raises:
        TrainingError: too few photos, unreadable or too small ones, or captions that do not name the subject.
    """
    import yaml

    from training.data import images

    calls, preset = f"{identifier} {noun}", PRESETS[_family(base)]
    prompt = None if any(folder.glob("*.txt")) or (folder / "metadata.jsonl").is_file() else f"a photo of a {calls}"
    source = images.folder(folder, prompt=prompt, minimum=min(256, preset["resolution"]))
    require(len(source) >= 3, f"{folder} has {len(source)} photo(s); three are the least a subject is learnt from")
    silent = [source.files[i].name for i in range(len(source)) if calls not in source.caption(i)]
    require(not silent, f"captions must name the subject as {calls!r}; those of {', '.join(silent[:5])} do not")
    file = folder / "subject.json"
    if not file.exists():
        prompts = [line.format(calls) for line in (POCKET_PROMPTS if base == POCKET else PROMPTS)]
        facts = {"class": noun, "identifier": identifier, "origin": "the maker's photos", "prompts": prompts}
        file.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.yaml"
    values = _values(folder, noun, identifier, base, out, prompt, preset)
    path.write_text(f"# {_command(path)}\n{yaml.safe_dump(values, sort_keys=False)}", "utf-8")
    return path


def _family(base: str) -> str:
    """By name, as nothing is downloaded here; the trial step reads the base itself."""
    name = base.lower()
    return POCKET if base == POCKET else "sdxl" if "xl" in name else "sd21" if "2-1" in name else "sd"


def _command(config: Path) -> str:
    return f"accelerate launch recipes/dreambooth_lora.py --config {shlex.quote(str(config))}"


def _preserved(noun: str, identifier: str, preset: dict[str, Any]) -> dict[str, Any]:
    """Class images where the preset says how; else the photos themselves, under captions without the identifier."""
    if "dreambooth" in preset:
        return {"class_prompt": article(noun), **preset["dreambooth"]}
    return {"identifier": identifier}


def _values(
    folder: Path, noun: str, identifier: str, base: str, out: Path, prompt: str | None, preset: dict[str, Any]
) -> dict[str, Any]:
    """What differs from the defaults, as the config's nested tables."""
    masks = folder / "masks"
    values: dict[str, Any] = {
        "base": {"path": base},
        "data": {"source": str(folder), "resolution": preset["resolution"]},
        "lora": preset["lora"],
        "dreambooth": _preserved(noun, identifier, preset),
        "train": preset["train"] | {"warmup": 20},
        "sampling": {},
        "tune": {"prompts": list(POCKET_TUNING if base == POCKET else TUNING), "seeds": [101, 102]},
        "measure": {"subjects": [str(folder)], "seeds": [1, 2]},
        "ship": {"licence": "other"},
        "out": str(out),
    }
    if masks.is_dir():
        values["data"]["masks"] = str(masks)
    if prompt:
        values["data"]["prompt"] = prompt
    if base != POCKET:
        values["train"] |= {"precision": "bf16", "gradient_checkpointing": True}
        values["sampling"] |= {"precision": "bf16"}
        spaces = {"clip": "openai/clip-vit-base-patch32", "dino": "facebook/dino-vits16"}
        values["measure"] |= {"referee": "similarity (dino)", "spaces": spaces, "minimum_effect": 0.005}
    return {name: value for name, value in values.items() if value != {}}


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

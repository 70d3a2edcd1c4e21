"""The search for training defaults: variants of the demo's config on tuning subjects, each trained, drawn and scored.

python -m benchmarks.study.preservation VARIANT... [--subjects bird teapot] [--out runs/preservation]
python -m benchmarks.study.preservation --table [--out runs/preservation]

A variant is a name of VARIANTS. What lies in the output folder is not made again. The pictures are those of
`PROMPTS`, other ones than the subjects' held-out prompts, drawn with few steps for the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import adapters.measuring
from adapters import files
from adapters.measuring.metrics import Metric, score
from adapters.measuring.sample import Shot
from recipes import dreambooth_lora
from recipes.common.base import adapted, sampling_pipeline
from recipes.common.cli import explained, quiet
from recipes.common.settings import SamplingSettings, ScopeSettings
from training.command_line import parse
from training.config import BaseSettings
from training.errors import exit_on_error
from training.pocket import metrics
from training.pocket.captions import article

__all__ = ["main"]

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "recipes"
ALONE = (
    "a photo of a {} in the sea",
    "a drawing of a {} by a brick wall",
    "a {} in the night sky",
    "a picture of a {} in the sky",
)
COMPANY = (
    "a {} and a yellow balloon in the sea",
    "a {} to the left of a red mushroom at night",
    "a {} below a green star by a brick wall",
    "a {} and a pink umbrella at night",
    "a {} to the right of a blue bus in the sea",
    "a {} and a house by a brick wall",
    "a {} above a purple apple at night",
    "a {} and a red heart in the sea",
)
PROMPTS, SEEDS, STEPS = ALONE + COMPANY, (11, 12), 10
PLAIN = {
    "dreambooth.surroundings": "picture",
    "dreambooth.company": 0,
    "dreambooth.own_share": 0,
    "dreambooth.prior_ratio": 1,
    "dreambooth.prior_weight": 1,
    "objective.caption_dropout": 0,
    "train.ema": None,
    "train.learning_rate": 1e-3,
    "dreambooth.class_images": 64,
    "dreambooth.class_prompt_file": HERE / "prompts" / "class.txt",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pictures": {**PLAIN, "dreambooth.preserve": "pictures"},
    "base": PLAIN,
    "base, rate 2e-3": {**PLAIN, "train.learning_rate": 2e-3},
    "surroundings": {**PLAIN, "dreambooth.surroundings": "base"},
    "placed": {**PLAIN, "dreambooth.company": 0.5},
    "placed, surroundings": {**PLAIN, "dreambooth.company": 0.5, "dreambooth.surroundings": "base"},
    "average, empty prompt": {**PLAIN, "objective.caption_dropout": 0.1, "train.ema": 0.99},
    "both, average, empty prompt": {
        **PLAIN,
        "dreambooth.own_share": 0.5,
        "objective.caption_dropout": 0.1,
        "train.ema": 0.99,
    },
    "company": {
        "dreambooth.company": 0.5,
        "dreambooth.class_images": 64,
        "dreambooth.class_prompt_file": HERE / "prompts" / "class.txt",
    },
    "broad company": {},  # the demo's config
    "own pictures": {
        "dreambooth.company": 0,
        "dreambooth.class_prompt": None,
        "dreambooth.class_prompt_file": None,
        "dreambooth.prior_ratio": 1,
        "dreambooth.prior_weight": 1,
    },
}
VARIANTS["far too long"] = {  # to see that it is noticed: each picture 250 times, and nothing preserves the class
    **PLAIN,
    **VARIANTS["own pictures"],
    "train.steps": 1000,
    "train.batch_size": 2,
    "train.learning_rate": 3e-3,
    "train.snapshot_every": 250,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS])
    parser.add_argument("--subjects", nargs="+", default=["bird", "teapot"])
    parser.add_argument("--snapshots", nargs="+", type=int, default=[], help="steps drawn besides the last")
    parser.add_argument(
        "--grid",
        nargs="+",
        default=["1:4", "1:2.5"],
        help="weight:scale of the adapter and of CFG; a third number is the scope's where_stop, with where: subject",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/preservation"))
    parser.add_argument("--table", action="store_true", help="scores all pictures that are there")
    options = parser.parse_args()
    quiet()
    grid = [tuple(map(float, pair.split(":"))) for pair in options.grid]
    for variant in options.variants:
        for subject in options.subjects:
            folder = options.out / variant.replace(" ", "-").replace(",", "") / subject
            print(f"{variant} / {subject} {time.strftime('%H:%M')}", flush=True)
            run(variant, subject, folder, options.out / "class" / subject, options.snapshots, grid)
    if options.table:
        table(options.out)


def run(variant: str, subject: str, folder: Path, classes: Path, snapshots: Sequence[int], grid: Sequence[Any]) -> None:
    """Train and draw one variant of one subject; and what the base draws of its class."""
    if not (folder / "lora").is_dir():
        train(VARIANTS[variant], subject, folder, classes)
    noun = facts(subject)["class"]
    pipe = sampling_pipeline(BaseSettings(path="pocket"), SamplingSettings(scheduler="dpm++"))
    draw(pipe, [prompt.format(noun) for prompt in PROMPTS], 4.0, folder.parents[1] / "base" / f"{subject}.npz", "1 4")
    for step in [None, *snapshots]:
        trained = folder / "lora" if step is None else folder / "snapshots" / f"step-{step:06d}"
        for weight, scale, *stop in grid:
            name = " ".join([f"{step or 'last'}", *(f"{value:g}" for value in (weight, scale, *stop))])
            scope = ScopeSettings(where="subject", where_stop=stop[0]) if stop else None
            with adapted(pipe, trained, weight, scope=scope, identifier="sks", noun=noun):
                draw(pipe, [prompt.format(f"sks {noun}") for prompt in PROMPTS], scale, folder / "drawn.npz", name)


def facts(subject: str) -> dict[str, Any]:
    found: dict[str, Any] = files.read_json(RECIPES / "subjects" / subject / "subject.json")
    return found


def train(changed: Mapping[str, Any], subject: str, out: Path, classes: Path) -> None:
    """Train a subject with the demo's config, some settings of which are changed."""
    folder = RECIPES / "subjects" / subject
    changes: dict[str, Any] = {
        "data.source": folder,
        "data.masks": folder / "masks",
        "dreambooth.class_folder": classes,
        "train.snapshot_every": 50,
        "out": out,
        **changed,
        **dict.fromkeys(("tune", "measure", "ship")),
    }
    if changes.setdefault("dreambooth.class_prompt", "") is not None:
        changes["dreambooth.class_prompt"] = article(facts(subject)["class"])
    arguments = [f"--{name}={'null' if value is None else value}" for name, value in changes.items()]
    config = RECIPES / "configs" / "dreambooth_lora" / "pocket_dog.yaml"
    dreambooth_lora.run(parse(dreambooth_lora.Settings, [f"--config={config}", *arguments]))


def draw(pipe: Any, prompts: list[str], scale: float, file: Path, name: str) -> None:
    """Adds pictures (prompts x seeds, 64, 64, 3) to a file, prompts outermost."""
    store = dict(np.load(file)) if file.exists() else {}
    if name in store:
        return
    shots = adapters.measuring.sample.images(pipe, prompts, SEEDS, guidance_scale=scale, steps=STEPS, batch_size=8)
    store[name] = np.stack([np.asarray(shot.image) for shot in shots])
    with files.write_file(file) as part, part.open("wb") as written:
        np.savez_compressed(written, **store)  # type: ignore[arg-type]  # its stub takes the names for flags


def table(out: Path) -> None:
    """Prints a line per set of pictures, and keeps their scores in `scores.json`."""
    rows: list[dict[str, Any]] = []
    for file in sorted((out / "base").glob("*.npz")):
        subject = file.stem
        noun = facts(subject)["class"]
        pictures, masks = (_images(RECIPES / "subjects" / subject / place) for place in ("", "masks"))
        holes = [np.asarray(mask.convert("L")) > 127 for mask in masks]
        base = _shots(np.load(file)["1 4"], noun)
        given = (pictures, holes, noun, "sks", partial(list, base))
        made = [metrics.identity(*given), metrics.identity(*given, margin=True)]
        sets = [("base", "1 4", base)]
        for drawn in sorted(out.glob(f"*/{subject}/drawn.npz")):
            found = np.load(drawn)
            sets += [(drawn.parents[1].name, name, _shots(found[name], f"sks {noun}")) for name in found.files]
        for variant, name, shots in sets:
            wanted: list[Metric] = [*made, metrics.prompt_accuracy("sks")]
            values = {metric.name: score(metric, shots) for metric in wanted}
            rows.append({"subject": subject, "variant": variant, "pictures": name, **_means(values)})
            print(
                " ".join(f"{value:.3f}" if isinstance(value, float) else f"{value:34}" for value in rows[-1].values())
            )
    files.write_json(out / "scores.json", rows)


def _means(values: dict[str, np.ndarray]) -> dict[str, float]:
    first = len(ALONE) * len(SEEDS)
    company = {f"{name} in company": float(item[first:].mean()) for name, item in values.items()}
    return {**{name: float(item.mean()) for name, item in values.items()}, **company}


def _shots(pictures: np.ndarray, calls: str) -> list[Shot]:
    prompts = [(prompt.format(calls), seed) for prompt in PROMPTS for seed in SEEDS]
    return [
        Shot(prompt=prompt, seed=seed, latents="", image=Image.fromarray(item))
        for (prompt, seed), item in zip(prompts, pictures, strict=True)
    ]


def _images(folder: Path) -> list[Image.Image]:
    """A subject's pictures, or its masks."""
    found = sorted(path for path in folder.glob("[0-9].*") if path.suffix != ".txt")
    return [Image.open(path).convert("RGB") for path in found]


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

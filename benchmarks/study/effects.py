"""What single options of training change: the demo's config with one of them, trained, drawn and compared by prompt.

python -m benchmarks.study.effects VARIANT... [--subject bird] [--out runs/effects]
python -m benchmarks.study.effects --table [--out runs/effects]

A variant is a name of VARIANTS, each one run of 400 steps. What lies in the output folder is not made again. Prompts,
seeds and sampling are those of `preservation`, at the demo's guidance scale. The intervals are over prompts: they say
how far the pictures of two runs differ, not how far two runs of the same settings would; for that, see "another seed".
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adapters.measuring import stats
from adapters.measuring.metrics import Metric, score
from adapters.measuring.sample import Shot
from benchmarks.study.preservation import PROMPTS, RECIPES, SEEDS, _images, _shots, draw, facts, train
from recipes.common.base import adapted, sampling_pipeline
from recipes.common.cli import explained, quiet
from recipes.common.settings import SamplingSettings
from training.config import BaseSettings
from training.errors import exit_on_error
from training.pocket import metrics
from training.pocket.captions import PHRASES, article

__all__ = ["main"]

PLAIN, TOGETHER, SCALE, STEPS = "demo", "two subjects", 1.25, 400
PAIR = ("bird", "dog")
TAGS = {"keep": 1, "shuffle": True, "drop": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "another seed": {"train.seed": 1, "dreambooth.class_folder": None},
    "LoRA+": {"lora.plus_ratio": 16, "train.learning_rate": 2.5e-4},
    "ranks": {"lora.ranks": '{"mid_block": 32, "down_blocks": 8}'},
    # At their default rates, which are for thousands of steps.
    **{
        f"{name}, default rate": {"train.optimizer": name, "train.learning_rate": None}
        for name in ("adamw", "adafactor", "lion", "came")
    },
    "schedulefree, default rate": {"train.optimizer": "schedulefree", "train.learning_rate": None, "train.ema": None},
    # At ten times these rates, as AdamW's 1e-3 is in the demo; CAME at three times.
    "adafactor": {"train.optimizer": "adafactor", "train.learning_rate": 1e-3},
    "lion": {"train.optimizer": "lion", "train.learning_rate": 3e-4},
    "came": {"train.optimizer": "came", "train.learning_rate": 3e-4},
    "came, 1e-3": {"train.optimizer": "came", "train.learning_rate": 1e-3},
    "prodigy": {"train.optimizer": "prodigy", "train.learning_rate": None},
    "schedulefree": {"train.optimizer": "schedulefree", "train.learning_rate": 3e-3, "train.ema": None},
    "linear layers": {"lora.targets": "attention+ff"},
    "linear layers, PiSSA": {"lora.targets": "attention+ff", "lora.start": "pissa"},
    "max norm": {"lora.max_norm": 1.0},
    "int8": {"train.quantize": "int8"},
    "nf4": {"train.quantize": "nf4"},
    "tags": {},
    "tags, dropped": {"data.tags": json.dumps(TAGS)},
    TOGETHER: {"train.steps": 2 * STEPS},  # as many samples of each subject as in a run of its own
}
AGAINST = {"tags, dropped": "tags", "linear layers, PiSSA": "linear layers"}
"""Variants that have one more change than another one but the demo; the others are compared with the demo."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", choices=[[], *VARIANTS])
    parser.add_argument("--subject", default="bird")
    parser.add_argument("--out", type=Path, default=Path("runs/effects"))
    parser.add_argument("--table", action="store_true", help="scores all pictures that are there")
    options = parser.parse_args()
    quiet()
    for variant in options.variants:
        print(f"{variant} / {options.subject} {time.strftime('%H:%M')}", flush=True)
        run(variant, options.subject, options.out)
    if options.table:
        table(options.out)


def run(variant: str, subject: str, out: Path) -> None:
    """Train one variant, and draw its subject, or both of two."""
    taught = PAIR if variant == TOGETHER else (subject,)
    folder = _folder(out, variant, taught[0])
    if not (folder / "lora").is_dir():
        train(_changes(variant, taught, out), taught[0], folder, out / "class" / taught[0])
    pipe = sampling_pipeline(BaseSettings(path="pocket"), SamplingSettings(scheduler="dpm++"))
    for name in taught:
        noun = facts(name)["class"]
        draw(pipe, [prompt.format(noun) for prompt in PROMPTS], SCALE, out / "base" / f"{name}.npz", "drawn")
        with adapted(pipe, folder / "lora", 1.0, scope=None, identifier="sks", noun=noun):
            prompts = [prompt.format(f"sks {noun}") for prompt in PROMPTS]
            draw(pipe, prompts, SCALE, _folder(out, variant, name) / "drawn.npz", "drawn")


def _folder(out: Path, variant: str, subject: str) -> Path:
    return out / variant.replace(" ", "-").replace(",", "") / subject


def _changes(variant: str, taught: Sequence[str], out: Path) -> dict[str, Any]:
    """Settings of a variant, those among them that name folders."""
    changes = {"train.steps": STEPS, **VARIANTS[variant]}
    if variant.startswith("tags"):
        changes["data.source"] = tagged(RECIPES / "subjects" / taught[0], out / "tagged" / taught[0])
    if len(taught) == 2:
        folder, noun = RECIPES / "subjects" / taught[1], facts(taught[1])["class"]
        places = {"source": folder, "masks": folder / "masks", "class_folder": out / "class" / taught[1]}
        further = {**{name: str(place) for name, place in places.items()}, "class_prompt": article(noun)}
        changes["concepts"] = json.dumps({taught[1]: further})
    return changes


def tagged(source: Path, place: Path) -> Path:
    """A subject's pictures with their captions as lists of tags: "a sks bird, a house, on a wooden floor".

    Args:
        source: its pictures and captions.
        place: receives copies.
    """
    place.mkdir(parents=True, exist_ok=True)
    for picture in sorted(source.glob("[0-9].webp")):
        said = picture.with_suffix(".txt").read_text("utf-8").strip()
        where = next(phrase for phrase in sorted(PHRASES, key=len, reverse=True) if said.endswith(phrase))
        tags = [*said.removesuffix(where).strip().split(" and "), where]
        (place / f"{picture.stem}.txt").write_text(", ".join(tags), "utf-8")
        (place / picture.name).write_bytes(picture.read_bytes())
    return place


def table(out: Path) -> None:
    """Prints the means of each variant, its differences and how far two subjects bleed; kept in `effects.json`."""
    kept: dict[str, Any] = {}
    for file in sorted((out / "base").glob("*.npz")):
        subject = file.stem
        noun = facts(subject)["class"]
        base = _shots(np.load(file)["drawn"], noun)
        sets = {name: _drawn(out, name, subject) for name in VARIANTS}
        wanted = _metrics(subject, base)
        values = {
            name: {metric.name: score(metric, shots) for metric in wanted}
            for name, shots in {"base": base, **sets}.items()
            if shots
        }
        print(f"\n{subject}, {len(PROMPTS)} prompts, {len(SEEDS)} seeds")
        kept[subject] = {name: _said(name, found, values) for name, found in values.items()}
    bleed = {name: _bleed(out, name) for name in ("base", PLAIN, TOGETHER)}
    for name, rows in bleed.items():
        print(f"\nsimilarity to {', '.join(PAIR)} of the pictures of … ({name})")
        for subject, row in rows.items():
            print(f"  {subject:10} " + " ".join(f"{value:6.3f}" for value in row))
    (out / "effects.json").write_text(json.dumps({**kept, "bleed": bleed}, indent=1), "utf-8")


def _drawn(out: Path, variant: str, subject: str) -> list[Shot]:
    """The pictures of a subject, or of its class by the base; empty where there are none."""
    noun = facts(subject)["class"]
    file = out / "base" / f"{subject}.npz" if variant == "base" else _folder(out, variant, subject) / "drawn.npz"
    return _shots(np.load(file)["drawn"], noun if variant == "base" else f"sks {noun}") if file.exists() else []


def _metrics(subject: str, base: Sequence[Shot]) -> list[Metric]:
    pictures, holes, noun = *_references(subject), facts(subject)["class"]
    given: tuple[Any, ...] = (pictures, holes, noun, "sks", partial(list, base))
    return [
        metrics.identity(*given),
        metrics.identity(*given, margin=True),
        metrics.subject_similarity(pictures, holes, noun),
        metrics.prompt_accuracy("sks"),
    ]


def _references(subject: str) -> tuple[list[Any], list[np.ndarray]]:
    pictures, masks = (_images(RECIPES / "subjects" / subject / place) for place in ("", "masks"))
    return pictures, [np.asarray(mask.convert("L")) > 127 for mask in masks]


def _said(name: str, found: Mapping[str, np.ndarray], values: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Means of a variant, and its differences from the one that it is compared with; printed too."""
    reference = AGAINST.get(name, PLAIN)
    rows: dict[str, Any] = {}
    for metric, value in found.items():
        rows[metric] = {"mean": float(value.mean())}
        if name not in ("base", PLAIN) and reference in values:
            gap = (value - values[reference][metric]).reshape(len(PROMPTS), len(SEEDS)).mean(1)
            ends = stats.mean_interval(gap)
            rows[metric] |= {"difference": ends.mean, "low": ends.low, "high": ends.high, "from": reference}
    line = []
    for row in rows.values():
        gap = f" {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]" if "low" in row else ""
        line.append(f"{row['mean']:.3f}{gap:25}")
    print(f"  {name:22} {'  '.join(line)}")
    return rows


def _bleed(out: Path, variant: str) -> dict[str, list[float]]:
    """Subject -> the similarity of its pictures to each of the two."""
    rows = {}
    for subject in PAIR:
        if shots := _drawn(out, variant, subject):
            noun = facts(subject)["class"]
            against = [metrics.subject_similarity(*_references(other), noun) for other in PAIR]
            rows[subject] = [float(score(metric, shots).mean()) for metric in against]
    return rows


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

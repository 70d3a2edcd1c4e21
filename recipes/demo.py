"""The demo on the pocket base: train a LoRA of one subject, tune, sample with and without S-CFG, measure, ship.

python recipes/demo.py [--subject dog] [--out runs/demo] [--quick]

It is recipes/dreambooth_lora.py with the settings of recipes/configs/dreambooth_lora/pocket_dog.yaml, and no more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from recipes import dreambooth_lora
from recipes.common.cli import alone, explained, quiet
from recipes.common.subject_prompts import for_class
from training.command_line import parse
from training.errors import exit_on_error
from training.pocket.captions import article
from training.pocket.subjects import SUBJECTS

__all__ = ["main", "settings_of"]

HERE = Path(__file__).parent
QUICK = {
    "train.steps": 4,
    "train.warmup": 0,
    "dreambooth.class_images": 12,
    "dreambooth.steps": 10,
    "measure.limit": 2,
    "measure.seeds": [1],
    "measure.overlays": 1,
    "tune.guidance_scales": [4.0, 6.0],
    "tune.seeds": [101],
    "sampling.steps": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="dog")
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--quick", action="store_true", help="only a few steps and pictures, to check that it runs")
    options = parser.parse_args()
    begin = time.perf_counter()
    quiet()
    settings = settings_of(options.subject, options.out, QUICK if options.quick else {})
    with alone(settings):
        release = dreambooth_lora.run(settings)
    assert release is not None
    print(f"\n{time.perf_counter() - begin:.0f} s in all. Open {release / 'report.html'}")


def settings_of(name: str, out: str | Path, changed: Mapping[str, object]) -> dreambooth_lora.Settings:
    """The config's settings for one of `recipes/subjects`.

    Args:
        name: folder of the subject.
        out: receives the run.
        changed: further settings, by dotted name.
    """
    from adapters.files import read_json  # torch: not before the options are known

    subject = HERE / "subjects" / name
    noun = read_json(subject / "subject.json")["class"]
    config = HERE / "configs" / "dreambooth_lora" / "pocket_dog.yaml"
    tuning = yaml.safe_load(config.read_text("utf-8"))["tune"]["prompts"]
    changes = {
        "data.source": subject,
        "data.masks": subject / "masks",
        "dreambooth.class_prompt": article(noun),
        "measure.subjects": [str(subject)],
        "tune.prompts": for_class(tuning, noun, pocket=True),
        "out": out,
        **changed,
    }
    arguments = [f"--config={config}", *(f"--{name}={value}" for name, value in changes.items())]
    return parse(dreambooth_lora.Settings, arguments)


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

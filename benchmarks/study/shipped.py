"""What the demo's pipeline ships for every subject: each is trained, tuned, measured and shipped, as a user would.

python -m benchmarks.study.shipped [SUBJECT...] [--out runs/shipped]
python -m benchmarks.study.shipped --table [--out runs/shipped | benchmarks/study/results/shipped.csv.gz]
python -m benchmarks.study.shipped --placed [SUBJECT...] [--out runs/shipped]
python -m benchmarks.study.shipped --ceiling

Without a subject all sixteen run, one after the other. A subject whose release is there is not run again. The table has
means over the subjects, and 95 % intervals over those that were not used to choose the training's settings. `--placed`
measures the LoRAs that are there in the scope of their place, beside controls, into `placed` in the folder of each. The
ceiling is what the judge sees in the subjects' own pictures after the base's VAE: no adapter can draw them better.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import adapters
from adapters.files import read_object
from adapters.measuring import stats
from adapters.scope import without_identifier
from recipes import demo, dreambooth_lora, measure
from recipes.common.cli import explained, quiet
from training.command_line import parse
from training.errors import TrainingError, exit_on_error
from training.pocket import base_path, judge
from training.pocket.judging import to_pixels
from training.pocket.subjects import IDENTIFIER, SUBJECTS

__all__ = ["main"]

RECIPES = Path(demo.__file__).parent
CHOSEN_ON = ("dog", "bird", "teapot", "butterfly")
BASE = "base"
# Those from "CFG early" to "S-CFG scoped" in earlier results only.
ARMS = (BASE, "CFG", "S-CFG", "CFG early", "S-CFG early", "S-CFG scoped", "CFG placed", "S-CFG placed")
CONTROLS = ("S-CFG evenly", "S-CFG elsewhere")
CONTRASTS = (
    ("CFG", BASE),
    ("CFG placed", BASE),
    ("S-CFG placed", BASE),
    ("CFG early", BASE),
    ("S-CFG early", BASE),
    ("S-CFG scoped", BASE),
    ("S-CFG", "CFG"),
    ("CFG early", "CFG"),
    ("S-CFG early", "CFG early"),
    ("S-CFG scoped", "CFG"),
    ("CFG placed", "CFG"),
    ("S-CFG placed", "CFG"),
    ("S-CFG placed", "S-CFG"),
    ("S-CFG placed", "CFG placed"),
    ("S-CFG placed", "S-CFG evenly"),
    ("S-CFG placed", "S-CFG elsewhere"),
)
WHERE = {"placed": "subject", "evenly": "uniform", "elsewhere": "elsewhere"}
MEASURED = ("identity", "prompt accuracy", "rest accuracy")
COLUMNS = ("subject", "arm", "prompt", "seed", *MEASURED)
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--out", type=Path, default=Path("runs/shipped"))
    parser.add_argument("--table", action="store_true", help="print the table, and run nothing")
    parser.add_argument("--placed", action="store_true", help="measure the LoRAs that are there, within scopes")
    parser.add_argument("--ceiling", action="store_true", help="judge the subjects' own pictures, and run nothing")
    options = parser.parse_args()
    quiet()
    if options.ceiling:
        print("\n".join(ceiling()))
        return
    if not options.table:
        for subject in options.subjects or SUBJECTS:
            (place if options.placed else run)(subject, options.out)
    placed = "placed" if options.placed else ""
    rows = _kept(options.out) if options.out.suffix == ".gz" else collect(options.out, placed)
    print("\n".join(table(rows)))


def run(subject: str, out: Path) -> None:
    """The demo of one subject, with no more metrics than the table has."""
    if (out / subject / "release").is_dir():
        return
    print(f"{subject} {time.strftime('%H:%M')}", flush=True)
    dreambooth_lora.run(demo.settings_of(subject, out / subject, {"measure.metrics": json.dumps(MEASURED)}))


def place(subject: str, out: Path) -> None:
    """The subject's LoRA everywhere, in its place and in the controls' places, with the demo's scales."""
    if (out / subject / "placed" / "measured").is_dir():
        return
    print(f"{subject} {time.strftime('%H:%M')}", flush=True)
    arms: dict[str, Any] = {}
    for name in (*ARMS, *CONTROLS):
        method, _, where = name.partition(" ")
        if method == BASE or where not in ("", *WHERE):
            continue
        arms[name] = {"method": "cfg", "guidance_scale": 1.25} if method == "CFG" else {"guidance_scale": 1.75}
        if where:
            arms[name]["scope"] = {"where": WHERE[where], "where_stop": 0.3}
    words = [
        f"--config={RECIPES / 'configs' / 'measure' / 'pocket_subject.yaml'}",
        f"--adapter={out / subject / 'lora'}",
    ]
    words += [f"--measure.subjects=[{RECIPES / 'subjects' / subject}]", f"--measure.arms={json.dumps(arms)}"]
    words += [f"--measure.metrics={json.dumps(MEASURED)}", f"--out={out / subject / 'placed'}"]
    measure.run(parse(measure.Settings, words))


def collect(out: Path, folder: str = "") -> list[Row]:
    """The measured pictures of all subjects, which are also written to one file in `out`.

    Args:
        out: a folder for each subject.
        folder: in the subject's, where they were measured.
    """
    rows: list[Row] = []
    for subject in SUBJECTS:
        file = out / subject / folder / "measured" / "per_image.csv"
        if file.is_file():
            rows += list(csv.DictReader(file.read_text("utf-8").splitlines()))
    if not rows:
        raise TrainingError(f"--out {out}: no subject is measured there")
    text = io.StringIO()
    written = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    written.writeheader()
    written.writerows(rows)
    with adapters.files.write_file(out / f"{folder or 'shipped'}.csv.gz") as part:
        part.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))
    return rows


def ceiling() -> list[str]:
    """A line a subject: prompt accuracy of its own pictures, and how often its class is seen; as they are, decoded."""
    vae = AutoencoderKL.from_pretrained(base_path(), subfolder="vae", use_safetensors=True)
    lines = ["| subject (accuracy / class seen) | its pictures | after the VAE |", "|---|---|---|"]
    for subject in SUBJECTS:
        folder = RECIPES / "subjects" / subject
        noun = read_object(folder / "subject.json")["class"]
        files = sorted(folder.glob("[0-9].webp"))
        said = [without_identifier(file.with_suffix(".txt").read_text("utf-8").strip(), IDENTIFIER) for file in files]
        pictures = to_pixels([Image.open(file) for file in files])
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        cells = []
        for shown in (pictures, decoded):
            accuracy = np.mean([score.mean for score in judge().scores(shown, said)])
            cells.append(f"{accuracy:.2f} / {np.mean([noun in seen.objects for seen in judge().look(shown)]):.2f}")
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    return lines


def _kept(file: Path) -> list[Row]:
    return list(csv.DictReader(gzip.decompress(file.read_bytes()).decode().splitlines()))


def table(rows: Sequence[Row]) -> list[str]:
    """A line a subject with every arm's accuracy, that of the rest of the prompt, identity and identity in company.

    Then come means and differences.
    """
    arms = [arm for arm in (*ARMS, *CONTROLS) if any(row["arm"] == arm for row in rows)]
    subjects = list(dict.fromkeys(row["subject"] for row in rows))
    lines = [
        "| subject (accuracy / of the rest / identity / in company) | " + " | ".join(arms) + " |",
        "|---" * (len(arms) + 1) + "|",
    ]
    found = {(subject, arm): _means(rows, subject, arm) for subject in subjects for arm in arms}
    for subject in subjects:
        lines.append(f"| {subject} | " + " | ".join(_shown(found[subject, arm]) for arm in arms) + " |")
    others = [subject for subject in subjects if subject not in CHOSEN_ON]
    for name, some in (("all", subjects), (f"the {len(others)} not used to choose", others)):
        means = [_shown(np.mean([found[subject, arm] for subject in some], axis=0)) for arm in arms] if some else []
        lines.append(f"| **{name}** | " + " | ".join(means) + " |")
    lines.append("")
    for arm, other in CONTRASTS:
        if len(others) < 2 or {arm, other} - set(arms):
            continue
        for index, what in enumerate(("accuracy", "accuracy of the rest", "identity", "identity in company")):
            gaps = [found[subject, arm][index] - found[subject, other][index] for subject in others]
            if np.isnan(gaps).any():  # rest accuracy was not measured before it was there
                continue
            given = stats.mean_interval(gaps)
            lines.append(f"{arm} - {other}, {what}: {given.mean:+.3f} [{given.low:+.3f}, {given.high:+.3f}]")
    return lines


def _means(rows: Sequence[Row], subject: str, arm: str) -> np.ndarray:
    """Prompt accuracy, that of the rest, identity and identity in company of one subject's pictures."""
    mine = [row for row in rows if (row["subject"], row["arm"]) == (subject, arm)]
    company = [row for row in mine if _in_company(row["prompt"])]
    columns = ((mine, "prompt accuracy"), (mine, "rest accuracy"), (mine, "identity"), (company, "identity"))
    return np.array([np.mean([float(row.get(name) or "nan") for row in some]) for some, name in columns])


def _in_company(prompt: str) -> bool:
    from training.pocket.captions import parse_caption

    return len(parse_caption(prompt.replace("sks ", "")).nouns) > 1


def _shown(values: np.ndarray) -> str:
    return " / ".join("-" if np.isnan(value) else f"{value:.2f}".lstrip("0") for value in values)


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

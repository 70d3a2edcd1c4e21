"""The study: is anything of S-CFG's gain left at equal effective scale, on the base and on what was adapted from it?

python recipes/study.py [--out runs/study] [--quick] [--only text* ...] [--share 1/2] [--list]

Every stage is a shipped recipe with a shipped config and a few changes. A stage that ended with equal settings on the
same base is not run again, and within a stage no picture is drawn twice: stopped, the same command goes on. The tables
of all comparisons are in OUT/report, each with its CSV, so that `python -m adapters verify` recomputes them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from recipes.arms import BASE, EFFECTIVE
from recipes.results import at_equal_scale
from recipes.wiring import explained, quiet
from training.config import parse, resolved
from training.errors import TrainingError, exit_on_error
from training.pocket import base_hash
from training.pocket.captions import article
from training.pocket.subjects import SUBJECTS

__all__ = ["Stage", "main", "stages"]

HERE = Path(__file__).parent
SCALES, SWEEP = (2.5, 4.0, 7.0), [1.5, 2.5, 3.25, 5.0, 6.0, 7.0, 9.0, 12.0]
CONTROLS = ("CFG", "S-CFG", "dose", "placebo", "pointwise")
ALONE = {"tune": None, "measure": None, "ship": None}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of one recipe.

    Attributes:
        name: also its folder.
        recipe, config: what runs, with which of `recipes/configs`.
        changes: settings changed, by dotted name.
        quick: further ones of the quick form.
    """

    name: str
    recipe: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)


FEW = {"sampling.steps": 4, "measure.limit": 2, "measure.seeds": [1, 2], "measure.overlays": 0}


def stages(out: Path, *, quick: bool = False) -> Iterator[Stage]:
    """All of them, in an order in which each finds what it needs; fewer subjects and scales in the quick form."""
    yield from _text(out, (4.0,) if quick else SCALES, [2.5, 9.0] if quick else SWEEP)
    yield from _subjects(out, SUBJECTS[:2] if quick else SUBJECTS, [] if quick else [2.5, 6.0, 9.0])
    for control in ("canny", "segmentation"):
        more = {"measure.limit": 200, "measure.sweep": [2.5, 6.0, 9.0]}
        config = f"measure/pocket_{control}.yaml"
        yield Stage(name=control, recipe="measure", config=config, changes=more, quick={**FEW, "measure.sweep": []})


def _text(out: Path, scales: Sequence[float], sweep: Sequence[float]) -> Iterator[Stage]:
    cell = yaml.safe_load((HERE / "configs" / "measure" / "study_text.yaml").read_text())["measure"]
    curve = {f"CFG @ {scale:g}": {"method": "cfg", "scale": scale} for scale in sweep}
    arms = {
        name if scale == cell["scale"] else f"{name} @ {scale:g}": {**arm, "scale": scale}
        for scale in scales
        for name, arm in cell["arms"].items()
    }
    own = {"measure.scale": None, "measure.sweep": [scale for scale in scales if scale != cell["scale"]] or [*sweep]}
    few = {**FEW, "measure.metrics": ["prompt accuracy"], "measure.referee": None}
    for sampler in ("ddim", "dpm++"):
        yield Stage(
            name=f"text-{sampler}",
            recipe="measure",
            config="measure/study_text.yaml",
            changes={"sampling.scheduler": sampler, "measure.arms": {**arms, **curve}, **own},
            quick=few,
        )
    yield Stage(
        name="text-tuning",
        recipe="tune",
        config="tune/study_text.yaml",
        quick={"tune.seeds": [101], "tune.scales": [4.0], "tune.grid": {"tokens": ["all"]}, "sampling.steps": 4},
    )
    yield Stage(
        name="text-tuned",
        recipe="measure",
        config="measure/study_text.yaml",
        changes={
            "tuned": out / "text-tuning" / "tuned",
            "measure.arms": {name: cell["arms"][name] for name in CONTROLS} | curve,
            **own,
        },
        quick=few,
    )
    yield Stage(
        name="text-frechet",
        recipe="measure",
        config="measure/study_frechet.yaml",
        quick={**FEW, "measure.frechet": None},
    )
    yield Stage(
        name="pointing",
        recipe="pointing",
        config="pointing/pocket.yaml",
        changes={"prompt_file": "recipes/prompts/study.txt"},
        quick={"sampling.steps": 4, "limit": 2},
    )


def _subjects(out: Path, subjects: Sequence[str], sweep: Sequence[float]) -> Iterator[Stage]:
    folders = {subject: HERE / "subjects" / subject for subject in subjects}
    for recipe, made, weights in (("dreambooth_lora", "lora", "lora"), ("dreambooth", "full", "dreambooth/unet")):
        for subject, folder in folders.items():
            more = {
                "data.source": folder,
                "data.masks": folder / "masks",
                "dreambooth.class_prompt": article(json.loads((folder / "subject.json").read_text())["class"]),
                "dreambooth.class_prompt_file": HERE / "prompts" / "class.txt",
                "dreambooth.class_folder": out / "class_images" / subject,
                **ALONE,
            }
            few = {"train.steps": 2, "train.warmup": 0, "dreambooth.class_images": 4}
            config = f"{recipe}/pocket_dog.yaml"
            yield Stage(name=f"{made}-{subject}", recipe=recipe, config=config, changes=more, quick=few)
        yield Stage(
            name=f"subjects-{made}",
            recipe="measure",
            config="measure/study_subject.yaml",
            changes={
                "adapter": out / f"{made}-{{subject}}" / weights,
                "measure.subjects": [str(folder) for folder in folders.values()],
                "measure.limit": 8,
                "measure.sweep": list(sweep),
            },
            quick={**FEW, "measure.drift_prompts": []},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--quick", action="store_true", help="a few steps and pictures of everything: does it run?")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="stages by name; * stands for any")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="every N-th stage from the I-th")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    options = parser.parse_args()
    todo = _chosen(list(stages(options.out, quick=options.quick)), options)
    if options.list:
        print("\n".join(f"{stage.name:<24} recipes/{stage.recipe}.py, {stage.config}" for stage in todo))
        return
    quiet()
    for number, stage in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {stage.name}", flush=True)
        _run(stage, options.out, quick=options.quick)
    print(f"\nOpen {report(options.out, quick=options.quick)}")


def _chosen(known: Sequence[Stage], options: argparse.Namespace) -> list[Stage]:
    """The stages that `--only` names, and of these this process's share."""
    found = [stage for stage in known if any(fnmatch(stage.name, wanted) for wanted in options.only)]
    if not found:
        raise TrainingError(f"--only {' '.join(options.only)}: no stage is called so; --list shows them")
    try:
        first, count = map(int, options.share.split("/"))
    except ValueError:
        first, count = 0, 0
    if not 1 <= first <= count:
        raise TrainingError(f"--share {options.share}: give I/N with 1 <= I <= N, such as 1/2")
    return found[first - 1 :: count]


def _run(stage: Stage, out: Path, *, quick: bool) -> None:
    """Run a stage, unless it ended with the same settings on the same base before."""
    module = importlib.import_module(f"recipes.{stage.recipe}")
    changes = {**stage.changes, **(stage.quick if quick else {}), "out": out / stage.name}
    arguments = [f"--config={HERE / 'configs' / stage.config}"]
    arguments += [f"--{name}={_said(value)}" for name, value in changes.items()]
    settings = parse(module.Settings, arguments)
    record = json.dumps({"base": base_hash(), "settings": resolved(settings)}, sort_keys=True, default=str)
    ended = out / stage.name / "ended.json"
    if ended.exists() and json.loads(ended.read_text())["record"] == record:
        print("as before")
        return
    begin = time.perf_counter()
    module.run(settings)
    seconds = round(time.perf_counter() - begin, 1)
    part = ended.with_suffix(".part")  # whole or not at all: it decides whether the stage is run again
    part.write_text(json.dumps({"seconds of the last run": seconds, "record": record}))
    part.replace(ended)


def _said(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


# ---------------------------------------------------------------------------------------------- the report


def report(out: Path, *, quick: bool = False) -> Path:
    """Every comparison that has ended, recomputed from its table; returns the page."""
    import adapters

    with adapters.files.write_folder(out / "report") as page:
        parts = ["# Tables of the study", f"Base {base_hash()}. Every number is recomputed from `*/per_image.csv`."]
        for stage in stages(out, quick=quick):
            made = out / stage.name / "measured"
            if not (made / "gains.json").is_file():
                continue
            folder = page / stage.name
            folder.mkdir()
            for name in ("gains.json", "per_image.csv", "settings.yaml"):
                shutil.copy(made / name, folder / name)
            adapters.files.write_manifest(folder, {"format": 1, "kind": "gains"})
            adapters.verify.verify(folder)
            facts = adapters.files.read_json(made / "gains.json")["facts"]
            measured = {name: value for name, value in facts.items() if name.startswith(("Fréchet", "drift"))}
            parts += [f"## {stage.name}", _table(folder), *(f"{name}: {value}" for name, value in measured.items())]
        (page / "tables.md").write_text("\n\n".join(parts) + "\n", "utf-8")
    return out / "report" / "tables.md"


def _table(folder: Path) -> str:
    """Means of every arm, the primary metric's difference at equal nominal and effective scale, and the verdict."""
    import adapters

    gains, rows = adapters.verify.recompute(folder), adapters.table.read_csv(folder / "per_image.csv")
    design, counts, names = gains.design, gains.counts, [arm["name"] for arm in gains.arms]
    others = [metric for metric in design.higher_is_better if metric != design.primary]
    head = ["arm", design.primary, "at equal scale", "at equal effective scale", *others, "effective scale", "s"]
    lines = [_row(head), _row(["---"] * len(head))]
    for arm in gains.arms:
        scale = arm["name"].partition(" @ ")[2]
        plain = f"{design.baseline} @ {scale}" if scale and f"{design.baseline} @ {scale}" in names else design.baseline
        nominal, equal = "", ""
        if not arm["name"].startswith((design.baseline, BASE)):
            pair = [row for row in rows if row.arm in (arm["name"], plain)]
            nominal = _difference(
                adapters.gains.compare(pair, replace(design, arm=arm["name"], baseline=plain, sweeps={}))
            )
            if design.sweeps:
                contrast = at_equal_scale(rows, replace(design, arm=arm["name"]))
                equal = contrast if isinstance(contrast, str) else _difference(contrast)
        effective = arm["recorded"].get(EFFECTIVE)
        means = [f"{arm['metrics'][metric]['mean']:.3f}" for metric in (design.primary, *others)]
        more = [f"{effective:.2f}" if effective else "", f"{arm['seconds']:.2f}"]
        lines.append(_row([arm["name"], means[0], nominal, equal, *means[1:], *more]))
    below = f"{counts['pairs']} pairs, {counts['clusters']} {counts['cluster']}s. {gains.verdict.sentence}"
    return "\n".join(lines) + f"\n\n{below}"


def _difference(gains: Any) -> str:
    contrast = gains.contrasts[0]
    return f"{contrast.difference:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}]"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

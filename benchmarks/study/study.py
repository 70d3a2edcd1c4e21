"""The study: is anything of S-CFG's gain left at equal effective scale, on the base and on what was adapted from it?

python -m benchmarks.study [--out runs/study] [--kept benchmarks/study/results] [--quick] [--only text* ...]
                           [--share 1/2] [--list]

Every stage is a shipped recipe with a shipped config and a few changes. A stage that ended with equal settings on the
same base is not run again, and within a stage no picture is drawn twice: stopped, the same command goes on. The tables
of all comparisons are in OUT/report, each with its CSV, so that `python -m adapters verify` recomputes them.

With --kept FOLDER the results of a stage are also packed to FOLDER/NAME.zip when it ends, and those that lie there
count as ended: the study goes on where another machine left it, without that machine's pictures.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import adapters
from adapters.files import read_json
from benchmarks.study import pointing_table
from benchmarks.study.tables import report
from recipes.common.cli import quiet
from training import naming
from training.command_line import parse
from training.config import resolved
from training.errors import TrainingError
from training.pocket import base_hash
from training.pocket.captions import article
from training.pocket.subjects import SUBJECTS

__all__ = ["Stage", "comparable", "main", "stages"]

# Relative to the working directory: settings are kept beside results, and must not name one machine's folders.
HERE = Path(os.path.relpath(Path(__file__).parent))
RECIPES = Path(os.path.relpath(Path(__file__).parents[2] / "recipes"))
MOVED = {f"recipes/prompts/{name}.txt": f"benchmarks/study/prompts/{name}.txt" for name in ("study", "study_tune")}
MOVED["colour accuracy"] = "color accuracy"
MOVED["recipes/prompts/class.txt"] = "benchmarks/study/prompts/class.txt"
LATER = {"base": {"prediction": "auto"}, "measure": {"batch_size": 16}}  # settings that older records lack
ENDED = "ended.json"
RESULTS = {"measure": "measured", "tune": "tuned", "pointing": "pointing"}  # recipe -> its folder of results
UNKEPT = shutil.ignore_patterns("*.html", "*.png")  # large, and drawn again by the same command
SCALES, SWEEP = (2.5, 4.0, 7.0), [1.5, 2.5, 3.25, 5.0, 6.0, 7.0, 9.0, 12.0]
CONTROLS = ("CFG", "S-CFG", "dose", "placebo", "pointwise")
ALONE = {"tune": None, "measure": None, "ship": None}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of one recipe.

    Attributes:
        name: also its folder.
        recipe, config: what runs, with which config: the study's own, or else one of `recipes/configs`.
        changes: settings changed, by dotted name.
        quick: further ones of the quick form.
        feeds: the stage for which alone it is run.
        borrows: another stage's name -> its arms whose pictures are this stage's own too.
    """

    name: str
    recipe: str
    config: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    feeds: str | None = None
    borrows: Mapping[str, Sequence[str]] = field(default_factory=dict)


FEW = {"sampling.steps": 4, "measure.limit": 2, "measure.seeds": [1, 2], "measure.overlays": 0}


def stages(out: Path, *, quick: bool = False) -> Iterator[Stage]:
    """All of them, in an order in which each finds what it needs; fewer subjects and scales in the quick form."""
    yield from _text(out, (4.0,) if quick else SCALES, [2.5, 9.0] if quick else SWEEP)
    yield from _subjects(out, SUBJECTS[:2] if quick else SUBJECTS)
    shared = ["prompt accuracy", "kernel distance (judge)", "kernel distance (lite0)"]
    for control, fidelity in (("canny", "canny F1"), ("segmentation", "class IoU")):
        both = {"controlnet": f"pocket-{control}", "measure.control": control}
        stage = Stage(
            name=control,
            recipe="measure",
            config="measure/control.yaml",
            changes={**both, "measure.metrics": [fidelity, *shared]},
            quick={**FEW, "measure.sweep": [], "measure.metrics": [fidelity], "measure.referee": None},
        )
        yield stage
        search = {**both, "measure.metrics": [fidelity]}
        yield from _tuned(out, stage, "tune/control.yaml", search, {"tune.limit": 2})
        yield replace(
            stage,
            name=f"{control}-frechet",
            config="measure/control_frechet.yaml",
            quick={**stage.quick, "measure.frechet": None},
        )


def _tuned(
    out: Path, stage: Stage, config: str, search: Mapping[str, Any], quick: Mapping[str, Any]
) -> Iterator[Stage]:
    """The search for what a stage measured, and what it found on that stage's own units."""
    name = f"{stage.name}-tuning"
    few = {
        "tune.seeds": [101],
        "tune.guidance_scales": [4.0],
        "tune.grid": {"reference": ["mean"]},
        "sampling.steps": 4,
    }
    held = {key: stage.quick[key] for key in ("measure.limit", "measure.seeds") if key in stage.quick}
    yield Stage(name=name, recipe="tune", config=config, changes=search, quick={**few, **held, **quick})
    plain = {f"CFG @ {scale:g}": {"method": "cfg", "guidance_scale": scale} for scale in (1.5, 2.5, 5.0, 7.0, 9.0)}
    yield replace(
        stage,
        name=f"{stage.name}-tuned",
        changes={
            **stage.changes,
            "tuned": out / name / "tuned",
            "measure.arms": {"CFG": {"method": "cfg"}, "S-CFG": {"method": "semantic"}, **plain},
            "measure.base_arm": False,
            "measure.sweep": [4.0],
            "measure.overlays": 0,
        },
        borrows={stage.name: list(plain)},
    )


def _text(out: Path, scales: Sequence[float], sweep: Sequence[float]) -> Iterator[Stage]:
    cell = yaml.safe_load((HERE / "configs" / "measure" / "text.yaml").read_text("utf-8"))["measure"]
    curve = {f"CFG @ {scale:g}": {"method": "cfg", "guidance_scale": scale} for scale in sweep}
    arms = {
        name if scale == cell["guidance_scale"] else f"{name} @ {scale:g}": {**arm, "guidance_scale": scale}
        for scale in scales
        for name, arm in cell["arms"].items()
    }
    own = {
        "measure.guidance_scale": None,
        "measure.sweep": [scale for scale in scales if scale != cell["guidance_scale"]] or [*sweep],
    }
    few = {**FEW, "measure.metrics": ["prompt accuracy"], "measure.referee": None}
    for sampler in ("ddim", "dpm++"):
        yield Stage(
            name=f"text-{sampler}",
            recipe="measure",
            config="measure/text.yaml",
            changes={"sampling.scheduler": sampler, "measure.arms": {**arms, **curve}, **own},
            quick=few,
        )
    yield Stage(
        name="text-tuning",
        recipe="tune",
        config="tune/text.yaml",
        quick={
            "tune.seeds": [101],
            "tune.guidance_scales": [4.0],
            "tune.grid": {"tokens": ["all"]},
            "sampling.steps": 4,
        },
    )
    yield Stage(
        name="text-tuned",
        recipe="measure",
        config="measure/text.yaml",
        changes={
            "tuned": out / "text-tuning" / "tuned",
            "measure.arms": {name: cell["arms"][name] for name in CONTROLS} | curve,
            "sampling.scheduler": "ddim",
            **own,
        },
        quick=few,
        borrows={"text-ddim": list(curve)},
    )
    yield from _text_confirmed(few)


def _text_confirmed(few: Mapping[str, Any]) -> Iterator[Stage]:
    """The first measurements repeated on other scenes, phrases and metrics, and where the maps point."""
    for sampler in ("dpm++", "ddim"):
        yield Stage(
            name=f"text-confirm-{sampler}",
            recipe="measure",
            config="measure/confirm.yaml",
            changes={"sampling.scheduler": sampler},
            quick=few,
        )
    plain = ["CFG", *(f"CFG @ {scale:g}" for scale in (2.5, 5.0, 7.0))]
    yield Stage(
        name="text-phrases",
        recipe="measure",
        config="measure/phrases.yaml",
        quick=few,
        borrows={"text-ddim": plain},
    )
    yield Stage(name="text-rescaled", recipe="measure", config="measure/rescaled.yaml", quick=few)
    yield Stage(
        name="text-frechet",
        recipe="measure",
        config="measure/frechet.yaml",
        quick={**FEW, "measure.frechet": None},
    )
    yield Stage(
        name="pointing",
        recipe="pointing",
        config="pointing/pocket.yaml",
        changes={"prompt_file": "benchmarks/study/prompts/study.txt"},
        quick={"sampling.steps": 4, "limit": 2},
    )


def _subjects(out: Path, subjects: Sequence[str]) -> Iterator[Stage]:
    small = {"lora.rank": 2, "train.learning_rate": 2e-3, "train.save_precision": "fp16"}  # .36 MB each: some ship
    small |= {"train.ema": None, "objective.caption_dropout": 0, "dreambooth.identifier": None}
    small |= {"dreambooth.company": 0, "dreambooth.prior_ratio": 1, "dreambooth.prior_weight": 1}
    small |= {"dreambooth.preserve": "pictures"}  # as these adapters of the results were trained
    small |= {"dreambooth.class_images": 64, "dreambooth.steps": 20, "dreambooth.guidance_scale": 4.0}
    kept = {"dreambooth.company": 0.5, "dreambooth.class_images": 64}  # as the demo's config was then
    aware = {**small, "data.masks": None, "objective.background": 0.2}  # of the loss outside the class word's region
    for recipe, made, weights, how, count in (
        ("dreambooth_lora", "lora", "lora", small, len(subjects)),
        ("dreambooth", "full", "dreambooth/unet", {"dreambooth.preserve": "pictures"}, 13),  # each takes minutes
        ("dreambooth_lora", "aware", "lora", aware, 9),  # of twelve prompts: 216 units
        ("dreambooth_lora", "kept", "lora", kept, len(subjects)),
    ):
        folders = {subject: RECIPES / "subjects" / subject for subject in subjects[:count]}
        for subject, folder in folders.items():
            kind = read_json(folder / "subject.json")["class"]
            more = {
                "data.source": folder,
                "data.masks": folder / "masks",
                "dreambooth.class_prompt": article(kind),
                "dreambooth.class_prompt_file": HERE / "prompts" / "class.txt",
                "dreambooth.class_folder": out / "class_images" / subject,
                **({"region": kind} if made == "aware" else {}),
                **how,
                **ALONE,
            }
            few = {"train.steps": 2, "train.warmup": 0, "dreambooth.class_images": 4}
            config = f"{recipe}/pocket_dog.yaml"
            name, measured = f"{made}-{subject}", f"subjects-{made}"
            yield Stage(name=name, recipe=recipe, config=config, changes=more, quick=few, feeds=measured)
        adapted: dict[str, Any] = {
            "adapter": out / f"{made}-{{subject}}" / weights,
            "measure.subjects": [str(folder) for folder in folders.values()],
        }
        stage = Stage(
            name=measured,
            recipe="measure",
            config="measure/subject.yaml",
            changes=adapted,
            quick={**FEW, "measure.sweep": []},
        )
        if made == "aware":
            yield replace(stage, config="measure/aware.yaml")
            continue
        if made == "kept":
            stage = replace(stage, config="measure/placed.yaml", quick={**stage.quick, "measure.weights": None})
            yield stage
            some = {**adapted, "measure.subjects": adapted["measure.subjects"][:8]}
            yield replace(stage, name=f"{measured}-controls", config="measure/placed_controls.yaml", changes=some)
            continue
        yield stage
        yield replace(stage, name=f"drift-{made}", config="measure/drift.yaml", quick=FEW)
        if made == "lora":
            yield from _tuned(out, stage, "tune/subject.yaml", adapted, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--kept", type=Path, help="folder of results to go on from, and to add to")
    parser.add_argument("--quick", action="store_true", help="a few steps and pictures of everything: does it run?")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="stages by name; * stands for any")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="every N-th stage from the I-th")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    options = parser.parse_args()
    known = {stage.name: stage for stage in stages(options.out, quick=options.quick)}
    todo = _chosen(list(known.values()), options)
    if options.list:
        print("\n".join(f"{stage.name:<24} recipes/{stage.recipe}.py, {stage.config}" for stage in todo))
        return
    quiet()
    run = _Run(options.out, options.kept, quick=options.quick)
    for stage in known.values():
        run.unpack(stage)
    for number, stage in enumerate(todo, 1):
        print(f"\n[{number}/{len(todo)}] {stage.name}", flush=True)
        if run.ended(stage):
            print("as before")
        elif stage.feeds is not None and run.ended(known[stage.feeds]):
            print(f"not needed: {stage.feeds} has ended")
        else:
            run.take(stage)
        run.pack(stage)
    page = report([name for name, stage in known.items() if stage.recipe == "measure"], options.out)
    for file in page.parent.glob("*.*") if options.kept is not None else ():
        shutil.copy(file, options.kept)
    print(f"\nOpen {page}")


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


class _Run:
    """Stages under one folder: which have ended, and how the rest is run and kept."""

    def __init__(self, out: Path, kept: Path | None, *, quick: bool) -> None:
        self.out, self.kept, self.quick = out, kept, quick

    def ended(self, stage: Stage) -> bool:
        """Whether it ended with these settings on this base."""
        file = self.out / stage.name / ENDED
        return file.exists() and comparable(stage.recipe, read_json(file)["record"]) == comparable(
            stage.recipe, self._settings(stage)[1]
        )

    def take(self, stage: Stage) -> None:
        settings, record = self._settings(stage)
        self.borrow(stage)
        begin = time.perf_counter()
        _module(stage.recipe).run(settings)
        seconds = round(time.perf_counter() - begin, 1)
        ended = self.out / stage.name / ENDED
        # Whole or not at all: it decides whether the stage is run again.
        adapters.files.write_json(ended, {"seconds of the last run": seconds, "record": record}, indent=None)

    def borrow(self, stage: Stage) -> None:
        """Copy the pictures that another stage drew with the same settings, of every subject; all are still checked."""
        from adapters.card import slug

        for other, arms in stage.borrows.items():
            there, here = (self.out / place / "pictures" for place in (other, stage.name))
            for arm in arms:
                for source in there.rglob(slug(arm)):
                    target = here / source.relative_to(there)
                    if source.is_dir() and not target.exists():
                        shutil.copytree(source, target)

    def _settings(self, stage: Stage) -> tuple[Any, str]:
        """What the stage's recipe is given, and the same with the base as text."""
        module = _module(stage.recipe)
        changes = {**stage.changes, **(stage.quick if self.quick else {}), "out": self.out / stage.name}
        arguments = [f"--config={_config(stage.config)}"]
        arguments += [f"--{name}={_said(value)}" for name, value in changes.items()]
        settings = parse(module.Settings, arguments)
        return settings, json.dumps({"base": base_hash(), "settings": resolved(settings)}, sort_keys=True, default=str)

    def pack(self, stage: Stage) -> None:
        """Keep the results of a stage that has ended."""
        import adapters

        if self.kept is None or stage.recipe not in RESULTS:
            return
        with TemporaryDirectory() as folder:
            page = Path(folder) / stage.name
            shutil.copytree(self.out / stage.name / RESULTS[stage.recipe], page, ignore=UNKEPT)
            shutil.copy(self.out / stage.name / ENDED, page)
            adapters.files.write_manifest(page, {"format": 1, "kind": "results"})
            adapters.measuring.archive.pack(page, self.kept / f"{stage.name}.zip")

    def unpack(self, stage: Stage) -> None:
        """Put back what was kept of a stage that never ended here."""
        import adapters

        if self.kept is None or (self.out / stage.name / ENDED).exists():
            return
        if not (archive := self.kept / f"{stage.name}.zip").is_file():
            return
        adapters.measuring.verify.verify(archive)
        with adapters.measuring.archive.unpacked(archive) as page:
            if stage.recipe == "pointing":
                pointing_table.check(page)
            shutil.copytree(page, self.out / stage.name / RESULTS[stage.recipe], dirs_exist_ok=True)
            shutil.copy(page / ENDED, self.out / stage.name / ENDED)


def comparable(recipe: str, record: str) -> Any:
    """A record with today's names and paths, without nulls, falses and what is empty: later settings spoil nothing.

    Paths in the study's folder are given from there, so that results may be continued in another one.

    Args:
        recipe: whose settings they are.
        record: as `ended.json` keeps it.
    """

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            value = {"early_stop": 0.2, **value} if "where_stop" in value else value  # of scopes
            kept = {name: item for name, item in value.items() if item not in (None, [], {}) and item is not False}
            return {name: filled(item) for name, item in kept.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return MOVED.get(value, value.removeprefix(root)) if isinstance(value, str) else value

    kept = json.loads(record)
    root = f"{Path(kept['settings'].get('out') or '.').parent}/"
    kept["settings"] = naming.current(_module(recipe).Settings, kept["settings"], say=lambda *names: None)
    for group, settings in LATER.items():
        if kept["settings"].get(group):
            kept["settings"][group] = {**settings, **kept["settings"][group]}
    return filled(kept)


def _module(recipe: str) -> Any:
    """The recipe's module; pointing is the study's own."""
    return importlib.import_module(f"{'benchmarks.study' if recipe == 'pointing' else 'recipes'}.{recipe}")


def _config(name: str) -> Path:
    """The study's own config of that name, or else the recipes'."""
    own = HERE / "configs" / name
    return own if own.is_file() else RECIPES / "configs" / name


def _said(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)

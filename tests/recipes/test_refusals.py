"""Every refusal that a run can end in comes before its first step, or has a reason here to come later.

The sites are read off the source (`raise_sites`): a function that a dry run does not enter and the run does is late. A
late site needs a home in `LATE`, a site that no recipe's run comes to one in `ELSEWHERE`. Both count sites, so that a
new one is looked at: can settings alone bring it about? Then it is to be raised earlier, not listed. What is entered
both before and after is not seen here; the cases at the end are run, and those were late once.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image
from raise_sites import Source, entered

from adapters import errors as adapter_errors
from scfg import errors as scfg_errors
from training import errors as training_errors
from training.pocket import errors as pocket_errors

TRAININGS = ("dreambooth_lora", "dreambooth", "text_to_image_lora", "controlnet")
RECIPES = (*TRAININGS, "measure", "tune", "sample", "controlled")
LATER = "recipes.common.after_training.finish"

OWN = "of what this training has made itself, whole and for its own base; every recipe and kind is run to its release"
RESULT = "of pictures, losses or weights as they turned out"
MACHINE = "of the machine: another run, a full disk, a file that was damaged or changed meanwhile"
INSIDE = "of a caller that breaks a contract; settings do not reach it"
EARLIER = "asked before the first step in another place, too"

LATE: dict[str, dict[str, int]] = {
    OWN: {
        "adapters.card": 1,
        "adapters.compose": 8,
        "adapters.embeddings": 4,
        "adapters.injection": 9,
        "adapters.loading": 8,
        "adapters.measuring.table._decoded": 1,
        "adapters.measuring.table.read_csv": 1,
        "adapters.measuring.verify": 4,
        "adapters.names": 4,
        "adapters.reading": 23,
        "adapters.beside.with_layers": 2,
        "adapters.seat": 1,
        "adapters.ship": 2,
        "adapters.source": 4,
        "adapters.spelling": 4,
        "adapters.text": 1,
        "adapters.tokens": 7,
        "recipes.common.base.check_text": 1,
        "recipes.ship": 3,
        "training.command_line": 3,
        "training.naming": 5,
        "training.typed": 5,
    },
    RESULT: {
        "adapters.measuring.curves": 4,  # said in the report instead of a comparison
        "adapters.measuring.gains": 1,
        "adapters.measuring.metrics.features.FaceSimilarity": 1,
        "adapters.measuring.metrics.features.Similarity": 1,
        "adapters.measuring.metrics.identity": 2,  # caught: a similarity takes its place
        "adapters.measuring.metrics.metric": 2,
        "adapters.measuring.paired.finite": 1,
        "adapters.measuring.sample._check_finite": 2,
        "adapters.measuring.stats": 1,
        "adapters.measuring.tune._mean": 1,
        "training.checkpoint.save": 1,
        "training.company.placed": 1,
        "training.loop._all_reached": 1,
    },
    MACHINE: {
        "adapters.files": 1,
        "adapters.measuring.sample.read": 1,
        "training.checkpoint.atomic_folder": 1,
        "training.lock": 4,
        "training.log": 1,
        "training.loop._check_snapshots": 1,
        "training.loop._save": 1,
    },
    INSIDE: {
        "adapters.measuring.metrics.classical.canny_f1": 1,
        "adapters.measuring.metrics.features.Drift": 1,
        "adapters.measuring.paired": 3,
        "adapters.measuring.sample": 2,
        "adapters.measuring.table": 2,
        "adapters.scope.Scope.to_config": 1,
        "scfg.arms": 1,
        "scfg.places": 1,
        "scfg.semantic": 2,
    },
    EARLIER: {
        "adapters.measuring.metrics.classical.ms_ssim": 1,  # metrics.check_metrics
        "adapters.measuring.metrics.sets": 1,  # spaces.reference
        "adapters.measuring.tune.search": 4,  # search.resolve_search
        "adapters.scope._Scoped": 1,  # trial; no pipeline of a base that trains guides so
        "adapters.scope._share": 2,  # comparison.check_scope
        "adapters.scope.scoped": 1,
        "recipes.common.base.sampling_pipeline": 2,  # training.load_for_training
        "recipes.common.draw.trial": 1,
        "scfg.visualize": 3,  # the report asks only where there is something to show
    },
}

COMMAND = "a command or page of its own, which trains and draws nothing before"
LIBRARY = "for those who call the library; no recipe does"
ELSEWHERE: dict[str, dict[str, int]] = {
    COMMAND: {
        "adapters.__main__": 6,
        "adapters.compose": 6,
        "adapters.measuring.archive": 4,
        "adapters.measuring.tune.recomputed_winner": 3,
        "adapters.measuring.verify": 7,
        "adapters.signing": 4,
        "recipes.common.cli": 3,
        "recipes.common.foreign": 4,
        "recipes.common.given": 1,
        "recipes.common.memory_plan": 3,
        "recipes.common.photos": 2,
        "recipes.common.processes": 2,
        "recipes.common.subject_prompts": 3,
        "recipes.new": 4,
        "recipes.studio": 10,
        "scfg.config": 2,
        "training.errors": 1,
        "training.pocket.making": 3,
        "training.pocket.subjects": 1,
    },
    LIBRARY: {"scfg.guider": 1, "scfg.visualize": 1},
}


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


@pytest.fixture(scope="module")
def sites(source: Source) -> Mapping[str, int]:
    modules = (adapter_errors, scfg_errors, training_errors, pocket_errors)
    errors = {name for module in modules for name in module.__all__ if name.endswith("Error")}
    assert {"TrainingError", "AdapterError", "FileError", "ScfgError", "PocketError"} <= errors
    return source.raises(errors)


@pytest.fixture(scope="module")
def ways(source: Source) -> Mapping[str, tuple[set[str], set[str]]]:
    """Recipe -> what its dry run enters, and what its run does."""
    starts = {name: f"recipes.{name}.run" for name in RECIPES}
    assert set(starts.values()) <= set(source.functions)
    return {
        name: (entered(source.calls_before, start, but={LATER}), entered(source.calls, start))
        for name, start in starts.items()
    }


def homes(found: Mapping[str, int], table: Mapping[str, Mapping[str, int]]) -> tuple[list[str], dict[str, int]]:
    """Functions without a home, and how many sites each entry of the table has."""
    entries = sorted((entry for kind in table.values() for entry in kind), key=len, reverse=True)
    lost, counted = [], Counter(dict.fromkeys(entries, 0))
    for name, count in found.items():
        entry = next((entry for entry in entries if f"{name}.".startswith(f"{entry}.")), None)
        if entry is None:
            lost.append(name)
        else:
            counted[entry] += count
    return lost, dict(counted)


def test_a_late_refusal_has_a_reason(sites: Mapping[str, int], ways: Mapping[str, tuple[set, set]]) -> None:
    late: dict[str, set[str]] = defaultdict(set)
    for recipe, (before, whole) in ways.items():
        for name in (whole - before) & set(sites):
            late[name].add(recipe)
    lost, counted = homes({name: sites[name] for name in late}, LATE)
    assert not lost, "raise it before the first step, or say in LATE why it comes later"
    assert counted == {entry: count for kind in LATE.values() for entry, count in kind.items()}
    others = {kind: entries for kind, entries in LATE.items() if kind != OWN}
    for name in homes(dict.fromkeys(late, 1), others)[0]:
        assert late[name] <= set(TRAININGS), f"{name} is late in {late[name]}, which have made nothing themselves"


def test_a_refusal_that_no_run_comes_to_has_a_home(sites: Mapping[str, int], ways: Mapping[str, tuple]) -> None:
    known = set().union(*(whole for _, whole in ways.values()))
    # Settings are made by the command line, and guidances by name: before anything else is done with them.
    others = {name: count for name, count in sites.items() if name not in known and not name.endswith("__post_init__")}
    lost, counted = homes(others, ELSEWHERE)
    assert not lost, "no recipe's run comes here: say in ELSEWHERE what does"
    assert counted == {entry: count for kind in ELSEWHERE.values() for entry, count in kind.items()}


def test_most_refusals_come_early(sites: Mapping[str, int], ways: Mapping[str, tuple[set, set]]) -> None:
    """The reader of the source sees what it must: known sites are where they are known to be."""
    before, whole = ways["dreambooth_lora"]
    assert "training.lora.plan" in before
    assert "recipes.common.scorers.check_scorers" in before
    assert "training.company.placed" in whole - before
    assert "adapters.ship.ship" in whole - before
    assert sum(sites.values()) > 600
    early = set().union(*(before for before, _ in ways.values()))
    assert sum(count for name, count in sites.items() if name in early) > 0.6 * sum(sites.values())


# ------------------------------------------------------------------------------------- refusals that were late once


def arms(**changed: object) -> str:
    plain = {"guidance_scale": 2.5}
    return "--measure.arms=" + json.dumps({"CFG": plain | {"method": "cfg"}, "S-CFG placed": plain | changed})


POCKET = ["--config=recipes/configs/dreambooth_lora/pocket_dog.yaml", "--tune=null"]
TRAINING = [*POCKET, "--train.dry_run=true"]
CASES = {
    "latent ratio": ([arms(options={"latent_ratio": 16})], "latent_ratio=16: this U-net attends to text"),
    "painted": (["--sampling.image=a.png", "--sampling.mask=a.png"], "is for inpainting models"),
    "size": (["--sampling.height=50", "--sampling.width=50"], "must be multiples of 8, got 50 and 50"),
    "steps": (["--sampling.scheduler=pndm", "--sampling.steps=2"], "sampling.steps 2: PNDMScheduler does not take"),
    "text and scope": (
        ["--lora.text_encoder=true", arms(scope={"where": "subject"})],
        "lora.text_encoder adapts the text encoders",
    ),
    "place": (
        [arms(scope={"where": "subject"}), "--measure.prompts=['a cat in the sea', 'a sks dog at night']"],
        "the class 'dog' is not in the prompt 'a cat in the sea'",
    ),
    "reference": (
        ["--measure.frechet=color", "--measure.reference={one}"],
        "measure.reference {one} has fewer than two pictures",
    ),
    "kernel": (
        ["--measure.metrics=['kernel distance (color)']", "--measure.reference={one}"],
        "has fewer than two pictures",
    ),
    "prompt file": (["--dreambooth.class_prompt_file={empty}"], "is empty; give it a caption a line"),
    "class images": (["--dreambooth.class_folder={made}"], "were made with other settings (prompts: "),
    "conditions": (
        ["--config=recipes/configs/controlnet/pocket_canny.yaml", "--train.validation.prompts=['a dog']"],
        "a ControlNet's samples need an image per prompt",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_training_refuses_it_before_it_begins(name: str, call: Callable, tmp_path: Path) -> None:
    flags, said = CASES[name]
    places = {"one": tmp_path / "one", "empty": tmp_path / "empty.txt", "made": tmp_path / "made"}
    for place in (places["one"], places["made"]):
        place.mkdir()
        Image.new("RGB", (64, 64), "red").save(place / "00000.png")
    (places["made"] / "manifest.json").write_text('{"prompts": ["a cat"]}')
    places["empty"].write_text("\n")
    shown = {key: str(value) for key, value in places.items()}
    for key, value in shown.items():
        flags, said = [flag.replace(f"{{{key}}}", value) for flag in flags], said.replace(f"{{{key}}}", value)
    recipe = "controlnet" if "controlnet" in flags[0] else "dreambooth_lora"
    given = flags if recipe == "controlnet" else [*TRAINING, *flags]
    found = call(recipe, *given, "--train.dry_run=true", f"--out={tmp_path / 'out'}")
    assert found.code == 2, found.out
    assert said in found.err
    assert len(found.err.splitlines()) == 1, found.err


DRAWN = ["--base.path=pocket", "--measure.prompts=['a dog at night', 'a cat in the sea']", "--measure.seeds=[1]"]
QUICK = ["--sampling.steps=2", "--measure.overlays=0", "--measure.base_arm=false", "--measure.metrics=[contrast]"]
QUICK += ["--measure.arm=S-CFG placed"]


def test_pictures_of_other_settings_are_found_before_any_is_drawn(
    done: Callable, call: Callable, tmp_path: Path
) -> None:
    """Those of the last arm, too: a run would draw the others first."""
    out = f"--out={tmp_path}"
    done("measure", *DRAWN, *QUICK, arms(), out)
    found = call("measure", *DRAWN, *QUICK, arms(options={"stop": 0.5}), "--dry_run=true", out)
    assert found.code == 2
    assert "measure.arms, 'S-CFG placed': " in found.err
    assert "was sampled with other settings (guidance)" in found.err
    done("measure", *DRAWN, *QUICK, arms(), "--dry_run=true", out)


def test_a_training_is_measured_anew_in_the_folder_of_an_earlier_one(
    done: Callable, call: Callable, tmp_path: Path
) -> None:
    """It refused what the earlier one had drawn, after training; other settings of sampling it refuses before."""
    given = [*POCKET, "--ship=null", arms(), "--measure.limit=2", "--measure.seeds=[1]", *QUICK]
    given += ["--dreambooth.preserve=off", "--dreambooth.company=0", "--dreambooth.class_prompt=null"]
    given += ["--dreambooth.class_prompt_file=null"]
    given += ["--train.steps=1", "--train.batch_size=1", "--train.resume=null", "--measure.weights=null"]
    out = f"--out={tmp_path}"
    done("dreambooth_lora", *given, out)
    picture = next((tmp_path / "pictures" / "dog" / "s-cfg-placed").glob("*.png"))
    first = picture.read_bytes()
    done("dreambooth_lora", *given, "--train.learning_rate=0.01", out)
    assert picture.read_bytes() != first
    found = call("dreambooth_lora", *given, "--sampling.steps=3", "--train.dry_run=true", out)
    assert found.code == 2
    assert "was sampled with other settings (steps)" in found.err
    found = call("dreambooth_lora", *given, "--train.resume=latest", "--lora.rank=2", "--train.dry_run=true", out)
    assert found.code == 2
    assert "these have changed: lora.rank: 16 -> 2" in found.err
    done("dreambooth_lora", *given, "--train.resume=latest", "--train.learning_rate=0.01", "--train.dry_run=true", out)


def test_a_search_refuses_what_could_not_be_written(call: Callable, tmp_path: Path) -> None:
    more = [
        "--measure.subjects=[recipes/subjects/dog]",
        "--tune.prompts=['a {} in the snow']",
        "--tune.metric=contrast",
    ]
    scope = arms(scope={"where": "uniform"})
    adapter = f"--adapter={tmp_path / 'none'}"
    found = call("tune", *DRAWN[:1], *more, *QUICK, scope, adapter, "--dry_run=true", f"--out={tmp_path}")
    assert found.code == 2
    assert "no such file or folder" in found.err
    adapter = "--adapter=recipes/zoo/teapot"
    found = call("tune", *DRAWN[:1], *more, *QUICK, scope, adapter, "--dry_run=true", f"--out={tmp_path}")
    assert found.code == 2
    assert "uniform is a control of a comparison and does not ship" in found.err


def test_a_report_needs_no_pictures_and_no_step_that_is_guided(done: Callable, tmp_path: Path) -> None:
    """The subject's pictures and the overlays are shown where there are any."""
    subject = tmp_path / "rex"
    subject.mkdir()
    facts = {"identifier": "sks", "class": "dog", "prompts": ["a sks dog at night", "a sks dog in the sea"]}
    (subject / "subject.json").write_text(json.dumps(facts))
    given = ["--base.path=pocket", f"--measure.subjects=[{subject}]", "--measure.seeds=[1]", *QUICK]
    late = arms(options={"start": 0.9, "stop": 1.0})
    done("measure", *given, late, "--measure.overlays=1", f"--out={tmp_path / 'out'}")
    assert "regions and gamma" not in (tmp_path / "out" / "measured" / "report.html").read_text("utf-8")


def test_the_data_is_what_is_measured_unless_subjects_are_named() -> None:
    from recipes.dreambooth_lora import Settings
    from training.command_line import parse

    def subjects(*flags: str) -> list[str]:
        read = parse(Settings, ["--base.path=pocket", "--out=x", *flags])
        assert read.measure is not None
        return read.measure.subjects

    assert subjects("--data.source=recipes/subjects/dog", "--measure.seeds=[1]") == ["recipes/subjects/dog"]
    other = "--measure.subjects=[recipes/subjects/bird]"
    assert subjects("--data.source=recipes/subjects/dog", other) == ["recipes/subjects/bird"]
    scenes = ["--measure.targets=pocket", "--measure.control=canny"]
    assert subjects("--data.source=recipes/subjects/dog", *scenes) == []
    assert subjects("--data.source=recipes/prompts", "--measure.seeds=[1]") == []  # no subject.json there
    assert parse(Settings, ["--base.path=pocket", "--out=x", "--data.source=recipes/subjects/dog"]).measure is None

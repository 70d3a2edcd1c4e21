"""A comparison is resolved before anything runs: what it says, and everything that it refuses."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from adapters import Scope
from adapters.adapter import Adapter, Module
from adapters.writing import write_kohya
from recipes import dreambooth_lora
from recipes.common.comparison import TO_COME, resolve
from recipes.common.guidance import guider_of
from recipes.common.search import JOINT, changes_unet_alone, resolve_search
from recipes.common.settings import GuidanceSettings, MeasureSettings, ScopeSettings, ShipSettings, TuneSettings
from recipes.common.tuned import TunedArms
from training import naming
from training.command_line import parse
from training.config import BaseSettings
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
DOG = ROOT / "recipes" / "subjects" / "dog"
POCKET = BaseSettings(path="pocket")
PROMPTS = ["a red car", "a dog"]


def of(**more: object):
    weight = more.pop("weight", 1.0)
    return resolve(MeasureSettings(**{"prompts": PROMPTS, **more}), base=POCKET, weight=weight)  # type: ignore[arg-type]


def test_arms_have_nothing_left_to_fill_in() -> None:
    arms = {"CFG": GuidanceSettings(method="cfg"), "S-CFG": GuidanceSettings(weight=0.5), "x": GuidanceSettings()}
    found = of(arms=arms, guidance_scale=4.0, sweep=[2.0, 4.0], weight=0.8)
    assert [(arm.name, arm.guidance.guidance_scale, arm.weight, arm.bare) for arm in found.arms.values()] == [
        ("base", 4.0, 0.0, True),
        ("CFG", 4.0, 0.8, False),
        ("S-CFG", 4.0, 0.5, False),
        ("x", 4.0, 0.8, False),
        ("CFG @ 2", 2.0, 0.8, False),
        ("S-CFG @ 2", 2.0, 0.5, False),
    ]
    assert found.sweeps == {"CFG": {"4": "CFG", "2": "CFG @ 2"}, "S-CFG": {"4": "S-CFG", "2": "S-CFG @ 2"}}
    assert (found.primary, found.identity, found.accuracy) == ("prompt accuracy", None, None)


def test_a_curve_is_of_arms_that_differ_in_scale_alone_whatever_they_are_called() -> None:
    arms = {
        "CFG": GuidanceSettings(method="cfg", guidance_scale=4.0),
        "S-CFG": GuidanceSettings(guidance_scale=4.0),
        "weak": GuidanceSettings(method="cfg", guidance_scale=2.0),
        "CFG @ 3": GuidanceSettings(method="cfg", guidance_scale=3.0, weight=0.5),
    }
    assert of(arms=arms).sweeps == {"CFG": {"4": "CFG", "2": "weak"}, "S-CFG": {"4": "S-CFG"}}


def tuned(folder: Path, **change: object) -> Path:
    folder.mkdir()
    values = {
        "best": {"S-CFG": GuidanceSettings(guidance_scale=3.0, options={"stop": 0.5}, weight=0.6)},
        "adapter": None,
        "metric": "prompt accuracy",
        "prompts": ["a cat"],
        "seeds": [101],
        "rounds": {},
        "pictures": {},
    }
    TunedArms(**{**values, **change}).write(folder)  # type: ignore[arg-type]
    return folder


def test_arms_beside_a_tuned_one_differ_in_their_scope_alone(tmp_path: Path) -> None:
    place = ScopeSettings(where="subject", where_stop=0.3)
    arms = {
        "CFG": GuidanceSettings(method="cfg"),
        "S-CFG": GuidanceSettings(),
        "S-CFG placed": GuidanceSettings(scope=place),
        "mean": GuidanceSettings(options={"reference": "mean"}),
    }
    subject = str(ROOT / "recipes" / "subjects" / "bird")
    plan = MeasureSettings(subjects=[subject], seeds=[9], limit=2, arms=arms, arm="S-CFG placed")
    best = {"S-CFG placed": GuidanceSettings(guidance_scale=3.0, weight=0.6, scope=place)}
    found = resolve(plan, base=POCKET, adapter=TEAPOT, tuned=str(tuned(tmp_path / "tuned", best=best))).arms
    assert found["S-CFG"].guidance == GuidanceSettings(guidance_scale=3.0, weight=0.6)
    assert found["mean"].guidance.guidance_scale == found["CFG"].guidance.guidance_scale == 7.5


def test_metrics_and_spaces_may_have_their_names_of_before(capsys: pytest.CaptureFixture[str]) -> None:
    naming.note.cache_clear()
    plan = MeasureSettings(prompts=PROMPTS, metrics=["colour accuracy"], primary="colour accuracy", frechet="colour")
    assert (plan.metrics, plan.primary, plan.frechet) == (["color accuracy"], "color accuracy", "color")
    assert TuneSettings(metric="similarity (colour)").metric == "similarity (color)"
    assert capsys.readouterr().err.count("note: colour accuracy is now called color accuracy;") == 1


def test_what_was_tuned_comes_back_and_fills_its_arms(tmp_path: Path) -> None:
    folder = tuned(tmp_path / "tuned")
    assert TunedArms.read(folder).best["S-CFG"].options == {"stop": 0.5}
    found = resolve(MeasureSettings(prompts=PROMPTS), base=POCKET, tuned=str(folder)).arms
    assert (found["S-CFG"].guidance.guidance_scale, found["S-CFG"].weight, found["CFG"].guidance.guidance_scale) == (
        3.0,
        0.6,
        7.5,
    )
    placebo = found["placebo"].guidance
    assert (placebo.method, placebo.guidance_scale, placebo.options, placebo.weight) == (
        "placebo",
        3.0,
        {"stop": 0.5},
        0.6,
    )
    file = folder / "tuned.json"
    file.write_text(file.read_text().replace('"guidance_scale"', '"scale"'))  # as versions before wrote it
    assert TunedArms.read(folder).best["S-CFG"].guidance_scale == 3.0
    scoped = GuidanceSettings(method="cfg", scope=ScopeSettings(stop=0.5))
    plan = MeasureSettings(subjects=[str(ROOT / "recipes" / "subjects" / "bird")], seeds=[9], limit=2)
    plain = tuned(tmp_path / "plain", best={"CFG": GuidanceSettings(method="cfg", guidance_scale=2.0, weight=0.6)})
    plan = replace(plan, arms={**plan.arms, "CFG early": scoped})
    early = resolve(plan, base=POCKET, adapter=TEAPOT, tuned=str(plain)).arms["CFG early"].guidance
    assert (early.guidance_scale, early.weight, early.scope) == (2.0, 0.6, scoped.scope)
    place = tuned(tmp_path / "scoped", best={"CFG": scoped})
    assert TunedArms.read(place).best["CFG"] == scoped
    for change, said in (
        ({"prompts": ["a dog"]}, "measure.prompts: ['a dog'] was tuned on"),
        ({"seeds": [2]}, r"measure.seeds: \[2\] was tuned on"),
        ({"best": {"other": GuidanceSettings()}}, "the search was for other"),
    ):
        place = tuned(tmp_path / f"not {said[:9]} {len(list(tmp_path.iterdir()))}", **change)
        with pytest.raises(TrainingError, match=said.replace("['a dog']", r"\['a dog'\]")):
            resolve(MeasureSettings(prompts=PROMPTS), base=POCKET, tuned=str(place))
    for place in (tmp_path / "gone", file):
        with pytest.raises(TrainingError, match=r"tuned .+: there is no .+tuned.json; `scfg-toolkit tune`"):
            TunedArms.read(place)


def test_checkpoints_are_points_of_a_curve_and_the_chosen_one_says_so(tmp_path: Path) -> None:
    results = [
        {"settings": {"adapter": f"runs/{name}"}, "mean": mean} for name, mean in (("step-10", 0.5), ("lora", 0.4))
    ]
    chosen = {"adapter": "runs/step-10", "rounds": {"checkpoint": [{"seeds": 1, "results": results}]}}
    curve = [(1, 0.5, 0.5, 0.5, "step-10, chosen"), (2, 0.4, 0.4, 0.4, "lora")]
    old = TunedArms.read(tuned(tmp_path / "old", **chosen))
    assert (old.checkpoints(), old.overfitting()) == ({"what was maximised": curve}, "")
    none = TunedArms.read(tuned(tmp_path / "none"))
    assert (none.checkpoints(), none.overfitting()) == ({}, "")
    plain = {"nearest": 0.5, "copies": 0.0, "drift": 0.1, "diversity": 0.4}
    signs = {"space": "judge", "base": plain, "checkpoints": [plain, {**plain, "copies": 0.5, "diversity": 0.1}]}
    found = TunedArms.read(tuned(tmp_path / "tuned", **chosen, signs=signs))
    assert found.checkpoints()["diversity (judge)"] == [
        (1, 0.4, 0.4, 0.4, "step-10, chosen"),
        (2, 0.1, 0.1, 0.1, "lora"),
    ]
    assert found.overfitting() == (
        "lora may be overfitted: 50 % of the pictures of lora are nearer to a training picture than other training "
        "pictures are (of the base's pictures 0 %). lora may be overfitted: lora draws pictures that are alike, with "
        "25 % of the diversity of the base's."
    )
    assert found.facts()["overfitting"] == found.overfitting()
    counted = TunedArms.read(tuned(tmp_path / "counted", **chosen, steps=[10, 40]))
    assert counted.checkpoints() == {"what was maximised": [(10, 0.5, 0.5, 0.5, "chosen"), (40, 0.4, 0.4, 0.4, "")]}
    even = [{**one, "mean": 0.0} for one in results]
    tied = {"adapter": "runs/step-10", "rounds": {"checkpoint": [{"seeds": 1, "results": even}]}}
    assert TunedArms.read(tuned(tmp_path / "tied", **tied)).facts()["tuning checkpoint, undecided"] == (
        "all 2 candidates measure 0: the search cannot tell them apart, and the first of them was taken"
    )
    assert "tuning checkpoint, undecided" not in old.facts()
    half = TunedArms.read(tuned(tmp_path / "half", **chosen, steps=[10, None]))
    assert half.checkpoints() == {"what was maximised": curve}


def test_a_subject_is_tuned_for_both_its_metrics_with_equally_many_tries() -> None:
    plan = MeasureSettings(subjects=[str(DOG)], metrics=["subject similarity", "prompt accuracy"])
    found = resolve(plan, base=POCKET, adapter="(to be trained)")
    assert (found.identity, found.accuracy) == ("subject similarity", "prompt accuracy")
    search = TuneSettings(prompts=["a {} in the snow"], grid={"stop": [0.5, 1.0]}, scopes=[])
    made = resolve_search(search, found, adapter="(to be trained)")
    assert {name: len(tried) for name, tried in made.candidates.items()} == {"CFG": 18, "S-CFG": 18}
    assert {one["weight"] for one in made.candidates["CFG"]} == {0.6, 0.8, 1.0}
    assert made.objective([[]]).name == "harmonic mean of subject similarity and prompt accuracy"
    alone = resolve_search(TuneSettings(prompts=["a {} in the snow"], metric="prompt accuracy"), found)
    assert (alone.objective([[]]).name, {one["weight"] for one in alone.candidates["CFG"]}) == (
        "prompt accuracy",
        {1.0},
    )
    assert JOINT not in found.higher_is_better


# ---------------------------------------------------------------------------------------------- what is refused

# Field -> values that no comparison can be made with; every field of the three stages is here or under FREE.
WRONG: dict[str, list[object]] = {
    "measure.subjects": [["gone"], [str(DOG.parent)]],
    "measure.prompts": [["a zebra", "a dog"], ["a {}", "a dog"], ["a dog"]],
    "measure.prompt_file": ["gone.txt"],
    "measure.targets": ["pocket"],
    "measure.control": ["canny", "canyn"],
    "measure.limit": [0, 1, -2],
    "measure.skip": [-1],
    "measure.seeds": [[], [1, 1], [-1], [2**64], ["x"]],
    "measure.arms": [
        {"CFG": {"method": "cfg"}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"options": {"gamma_maxx": 2}}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"options": {"gamma_max": -2}}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"method": "scfg"}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"guidance_scale": 0.5}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"guidance_scale": "inf"}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"weight": "nan"}},
        {"CFG": {"method": "cfg"}, "S-CFG": {"rescale": 2}},
        {"CFG": {"method": "cfg"}, "S-CFG": {}, "s cfg": {"method": "cfg"}},
        {"CFG": {"method": "cfg"}, "S-CFG": {}, "base": {"method": "cfg"}},
    ],
    "measure.guidance_scale": [0.5, "inf", "nan"],
    "measure.arm": ["SCFG", "CFG"],
    "measure.baseline": ["cfg", "S-CFG"],
    "measure.weights": [[0.5], ["nan"], [1000]],
    "measure.sweep": [[0.5], [2, 2], ["inf"]],
    "measure.metrics": [
        ["beauty"],
        ["prompt accuracy", "prompt accuracy"],
        ["alignment (clip)"],
        ["similarity (dino)"],
        ["subject similarity"],
        ["canny F1"],
        ["class IoU"],
        ["relation accuracy"],
        ["diversity (judge)"],
        ["kernel distance (judge)"],
    ],
    "measure.spaces": [{"clip": "gone/clip"}, {"clpi": "gone/clip"}],
    "measure.models": [{"vqa": "gone/vqa"}, {"vqaa": "gone/vqa"}],
    "measure.questions": ["gone.json"],
    "measure.objects": ["gone.jsonl"],
    "measure.device": ["cuad", "cuda:99"],
    "measure.batch_size": [0],
    "measure.primary": ["promt accuracy"],
    "measure.referee": ["beauty", "prompt accuracy"],
    "measure.minimum_effect": [0, -1, "nan", "inf"],
    "measure.identity": ["beauty"],
    "measure.accuracy": ["beauty"],
    "measure.tolerance": [0, "nan"],
    "measure.frechet": ["judge", "inception"],
    "measure.reference": ["gone"],
    "measure.drift_prompts": [["a {} there"]],
    "measure.overlays": [-1],
    "tune.prompts": [["a red car"], ["a zebra"], []],
    "tune.prompt_file": ["gone.txt"],
    "tune.targets": ["pocket"],
    "tune.limit": [0],
    "tune.seeds": [[], [1], [101, 101]],
    "tune.guidance_scales": [[], [0.5], ["nan"], [3, 3]],
    "tune.grid": [{"stopp": [1]}, {"stop": []}, {"stop": [3]}],
    "tune.scopes": [[{"start": 1}], [{"where": "uniform"}], [{"uncond_weight": 2}], [{"stop": 0.5, "strat": 0}]],
    "tune.weights": [[], ["nan"], [1, 1], [1000]],
    "tune.snapshots": ["gone"],
    "tune.metric": ["beauty", "joint"],
    "tune.references": [{"prompt accuracy": 0}],
    "ship.title": [" "],
    "ship.license": [""],
    "ship.trigger_words": [[""]],
    "ship.limits": [[" "]],
    "ship.push": ["me", "a/b/c"],
    "ship.sign": ["gone/key"],
}
FREE = {"measure.base_arm", "ship.description", "ship.compact", "ship.private"}  # any value of their type will do
MORE = {  # what a value needs beside it to be looked at
    "measure.reference": ["--measure.frechet=judge"],
    "measure.spaces": ["--measure.metrics=['alignment (clip)']"],
    "tune.snapshots": [f"--adapter={ROOT / 'recipes' / 'zoo' / 'teapot'}"],
    "measure.metrics": ["--measure.seeds=[1]"],
}


def test_no_field_of_the_stages_is_left_out() -> None:
    stages = {"measure": MeasureSettings, "tune": TuneSettings, "ship": ShipSettings}
    every = {f"{name}.{item.name}" for name, kind in stages.items() for item in fields(kind)}
    assert every == set(WRONG) | FREE
    assert not set(WRONG) & FREE


@pytest.mark.parametrize("field", [*WRONG, *sorted(FREE)])
def test_a_mistyped_name_is_refused_with_what_was_meant(field: str) -> None:
    from recipes import dreambooth_lora  # has all three stages

    with pytest.raises(TrainingError, match=rf"there is no such setting; did you mean --{re.escape(field)}\?"):
        naming.check_flags(dreambooth_lora.Settings, [f"--{field}{field[-1]}=1"])


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subject folder without masks."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("subject")
    Image.open(DOG / "0.webp").save(folder / "0.png")
    (folder / "subject.json").write_text((DOG / "subject.json").read_text("utf-8"), "utf-8")
    return folder


@pytest.mark.parametrize("field", WRONG)
def test_an_impossible_value_is_refused_before_anything_is_drawn(
    field: str, call: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("recipes.measure", "recipes.tune"):
        monkeypatch.setattr(f"{module}.draw_shots", None)  # to draw would end with a traceback
    stage = field.split(".")[0]
    recipe = "ship" if stage == "ship" else "tune" if stage == "tune" else "measure"
    common = {
        "measure": [f"--measure.prompts={json.dumps(PROMPTS)}", "--dry_run=true"],
        "tune": [f"--measure.prompts={json.dumps(PROMPTS)}", "--tune.prompts=['a cat']", "--dry_run=true"],
        "ship": [f"--adapter={ROOT / 'recipes' / 'zoo' / 'teapot'}"],
    }[stage]
    for value in WRONG[field]:
        given = value if isinstance(value, str) else json.dumps(value)
        out = tmp_path / "out"
        said = call(recipe, "--base.path=pocket", *common, *MORE.get(field, []), f"--{field}={given}", f"--out={out}")
        assert said.code == 2, f"{field}={given} was taken: {said.out}"
        assert said.err.startswith("error: ")
        assert len(said.err.splitlines()) == 1, said.err
        assert not out.exists(), f"{field}={given} left something behind"


POSSIBLE: dict[str, list[object]] = {  # in a run that trains an adapter of a subject: what they need is there
    "measure.prompts": [["a {}", "a dog"]],
    "measure.weights": [[0.5]],
    "measure.metrics": [["relation accuracy"]],
    "tune.prompts": [["a red car"]],
    "tune.metric": ["joint"],
}


def wrong_for_new() -> list[object]:
    """(field, value) of all that is wrong there too; the first of each field in every run of the tests."""
    found = []
    for field, values in WRONG.items():
        left = [value for value in values if value not in POSSIBLE.get(field, [])]
        marks = [(), *[(pytest.mark.slow,)] * (len(left) - 1)]
        found += [pytest.param(field, value, marks=mark) for value, mark in zip(left, marks, strict=True)]
    return found


@pytest.mark.parametrize(("field", "value"), wrong_for_new())
def test_new_refuses_the_same_and_writes_nothing(
    field: str, value: object, call: Callable, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipes.dreambooth_lora._trained", None)  # to try a step would end with a traceback
    out = tmp_path / "run"
    more = [words for words in MORE.get(field, []) if not words.startswith("--adapter")]
    given = value if isinstance(value, str) else json.dumps(value)
    said = call("new", mine, "--class=dog", *more, f"--{field}={given}", f"--out={out}")
    assert said.code == 2, f"{field}={given} was taken: {said.out}"
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1, said.err
    assert not out.exists(), f"{field}={given} left something behind"
    assert [path.name for path in sorted(mine.iterdir())] == ["0.png", "1.png", "2.png"]


def test_new_takes_what_can_be_into_its_config(call: Callable, mine: Path, tmp_path: Path) -> None:
    from recipes import dreambooth_lora
    from training.command_line import parse

    possible = [
        f"--{field}={value if isinstance(value, str) else json.dumps(value)}"
        for field, values in POSSIBLE.items()
        for value in values
        if field not in ("measure.prompts", "measure.metrics")  # they do not go together with the others
    ]
    possible += [
        "--measure.seeds",
        "[3]",
        "--measure.metrics=['prompt accuracy', 'similarity (judge)', 'relation accuracy']",
        '--measure.arms={"CFG": {"method": "cfg"}, "S-CFG": {}}',
        "--ship.title=#1 dog",
    ]
    config = tmp_path / "run" / "config.yaml"
    said = call("new", mine, "--class=dog", f"--out={tmp_path / 'run'}", "--no-trial", *possible, "--region=sks dog")
    assert said.code == 0, said.err
    read = parse(dreambooth_lora.Settings, [f"--config={config}"])
    assert (read.measure.weights, read.measure.seeds, read.measure.metrics[2:]) == ([0.5], [3], ["relation accuracy"])
    assert list(read.measure.arms) == ["CFG", "S-CFG"]
    assert (read.ship.title, read.region, read.tune.metric) == ("#1 dog", "sks dog", "joint")
    assert (read.tune.seeds, read.train.steps) == ([101, 102], 450)  # of `new`, beside what was given
    for own, remedy in (("--base.path=x", "give --base"), ("--config=x", "it is what is written"), ("typo", "typo")):
        said = call("new", mine, "--class=dog", f"--out={tmp_path / 'other'}", "--no-trial", own)
        assert (said.code, remedy in said.err) == (2, True), said.err
        assert not (tmp_path / "other").exists()


def test_what_is_wrong_is_said_with_arm_and_flag(call: Callable, tmp_path: Path, wordless: Path) -> None:
    def said(*arguments: str) -> str:
        common = ["--base.path=pocket", "--measure.prompts=['a dog', 'a {} there']", "--dry_run=true"]
        return call("measure", *common, *arguments, f"--out={tmp_path / 'out'}").err

    arms = json.dumps({"CFG": {"method": "cfg"}, "S-CFG": {"options": {"gamma_maxx": 2}}})
    assert "measure.arms, 'S-CFG': guidance 'semantic' has no setting gamma_maxx" in said(f"--measure.arms={arms}")
    subject = [f"--measure.subjects=['{wordless}']", "--measure.prompts=['a {} in the snow', 'a {} at night']"]
    assert f"{wordless / 'masks'}" in said(*subject, "--measure.metrics=['subject similarity']")
    gone = tmp_path / "gone" / "lora"
    subject[0] = f"--measure.subjects=['{DOG}']"
    assert f"adapter: {gone}: no such file or folder" in said(*subject, f"--adapter={gone}")


@pytest.mark.parametrize("change", ["--measure.weights=[0.5]", "--tune.weights=[0.5]"])
def test_a_whole_network_has_no_weight_and_is_not_trained_for_one(change: str, call: Callable, tmp_path: Path) -> None:
    config = ROOT / "recipes" / "configs" / "dreambooth" / "pocket_dog.yaml"
    more = ["--tune.prompts=['a {} in the snow']", "--measure.minimum_effect=0.1"]
    said = call("dreambooth", f"--config={config}", *more, change, f"--out={tmp_path / 'out'}", "--train.dry_run=true")
    assert said.code == 2, said.out
    assert "a whole unet has no weight" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("--measure.primary=typo", "measure.primary 'typo' is none of the metrics"),
        ("--tune.metric=typo", "tune.metric 'typo' is none of joint"),
        (
            '--measure.arms={"CFG": {"method": "cfg"}, "S-CFG placed": {"options": {"gamma_maxx": 2}}}',
            "measure.arms, 'S-CFG placed'",
        ),
        ("--tune.grid={'stopp': [1]}", "tune.grid, for 'S-CFG placed'"),
        ("--ship.push=me", "ship.push must be owner/name"),
        ("--measure.metrics=['alignment (clip)']", "set measure.spaces.clip"),
        (
            '--measure.arms={"CFG": {"method": "cfg"}, "S-CFG placed": {"scope": {"where": "uniform"}}}',
            "measure.arms, 'S-CFG placed': scope.where: uniform is a control of a comparison and does not ship",
        ),
    ],
)
def test_a_training_is_not_begun_for_it(change: str, named: str, call: Callable, tmp_path: Path) -> None:
    config = ROOT / "recipes" / "configs" / "dreambooth_lora" / "pocket_dog.yaml"
    said = call("dreambooth_lora", f"--config={config}", change, f"--out={tmp_path / 'out'}", "--train.dry_run=true")
    assert said.code == 2, said.out
    assert named in said.err
    assert not (tmp_path / "out").exists()


TEAPOT = str(ROOT / "recipes" / "zoo" / "teapot")


def test_scopes_are_searched_for_the_arm_and_the_baseline_has_as_many_candidates(
    call: Callable, tmp_path: Path
) -> None:
    config = ROOT / "recipes" / "configs" / "measure" / "pocket_subject.yaml"
    given = [f"--config={config}", f"--adapter={TEAPOT}", f"--measure.subjects=['{DOG.parent / 'teapot'}']"]
    given += ["--tune.prompts=['a {} in the snow']", "--tune.guidance_scales=[2, 4]", "--tune.weights=[1]"]
    scopes = '--tune.scopes=[null, {"where": "subject", "where_stop": 0.3}]'
    for more, count in ("--tune.scopes=[]", 2), (scopes, 4):
        said = call("tune", *given, more, f"--out={tmp_path / 'out'}", "--dry_run=true")
        assert said.code == 0, said.err
        assert f"\nCFG: would try {count} candidates on 1 prompts" in said.out
        assert f"S-CFG placed: would try {count} candidates on 1 prompts" in said.out


def test_an_arm_s_own_scale_is_tried_first_so_that_it_is_kept_where_the_search_cannot_tell() -> None:
    arms = {"CFG": GuidanceSettings(method="cfg", guidance_scale=3.0), "S-CFG": GuidanceSettings(guidance_scale=4.0)}
    plan = MeasureSettings(subjects=[str(DOG.parent / "teapot")], seeds=[9], limit=2, arms=arms)
    tune = TuneSettings(prompts=["a {} in the snow"], guidance_scales=[2.0, 3.0, 4.0], weights=[1.0], scopes=[])
    found = resolve_search(tune, resolve(plan, base=POCKET, adapter=TEAPOT), adapter=TEAPOT).candidates
    scales = {name: [one["guidance_scale"] for one in tried] for name, tried in found.items()}
    assert scales == {"CFG": [3.0, 2.0, 4.0], "S-CFG": [4.0, 2.0, 3.0]}


def test_a_subject_s_lora_is_tried_with_and_without_its_place_by_default() -> None:
    arms = {"CFG": GuidanceSettings(method="cfg"), "S-CFG": GuidanceSettings()}
    plan = MeasureSettings(subjects=[str(DOG.parent / "teapot")], seeds=[9], limit=2, arms=arms)
    tune = TuneSettings(prompts=["a {} in the snow"], guidance_scales=[2.0, 4.0], weights=[1.0, 0.8])

    def tried(plan: MeasureSettings = plan, tune: TuneSettings = tune, adapter: str | None = TEAPOT) -> list[int]:
        """How many candidates of each arm, and how many of the arm's have a scope."""
        found = resolve_search(tune, resolve(plan, base=POCKET, adapter=adapter), adapter=adapter).candidates
        return [*map(len, found.values()), sum(one["scope"] is not None for one in found["S-CFG"])]

    assert tried() == tried(adapter=TO_COME) == [8, 8, 4]
    assert tried(tune=replace(tune, scopes=[])) == [4, 4, 0]
    assert tried(tune=replace(tune, guidance_scales=[2.0])) == [2, 2, 0]  # the baseline has no scales to lie between
    assert tried(tune=replace(tune, prompts=["a cat in the snow"])) == [4, 4, 0]
    placed = GuidanceSettings(scope=ScopeSettings(where="subject"))
    assert tried(replace(plan, arms={**arms, "S-CFG": placed})) == [4, 4, 4]
    assert tried(adapter=None, tune=replace(tune, weights=None)) == [2, 2, 0]
    words = ["--base.path=pocket", f"--data.source={DOG}", "--tune.seeds=[7]", "--out=x"]
    for more, scopes in (["--lora.text_encoder=true"], []), ([], None):
        training = parse(dreambooth_lora.Settings, [*words, *more, f"--measure.subjects=['{DOG}']"])
        assert training.tune is not None
        assert training.tune.scopes == scopes


def test_an_adapter_of_text_encoders_is_tried_without_a_scope(tmp_path: Path) -> None:
    tensors = {"lora_A.weight": torch.zeros(2, 8), "lora_B.weight": torch.zeros(8, 2)}
    module = Module(kind="lora", tensors=tensors, rank=2, alpha=2.0)
    unet = {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": module}
    text = {"text_encoder.encoder.layers.0.self_attn.q_proj": module}
    for name, modules, alone in (("unet", unet, True), ("both", unet | text, False)):
        write_kohya(tmp_path / f"{name}.safetensors", Adapter(modules=modules))
        assert changes_unet_alone(str(tmp_path / f"{name}.safetensors")) is alone


@pytest.mark.parametrize(
    ("arm", "adapter", "said"),
    [
        ({"scope": {"uncond_weight": 2.0}}, TEAPOT, r"scope.uncond_weight 2.0 is above the adapter's weight 1"),
        ({"scope": {"where": "subject"}}, TEAPOT, "scope.where subject: no subject is given; set measure.subjects"),
        ({"scope": {"stop": 0.5}}, None, "scope: there is no adapter that it could be of"),
    ],
)
def test_a_scope_that_cannot_be_is_refused(arm: dict, adapter: str | None, said: str) -> None:
    scoped = GuidanceSettings(method="cfg", scope=ScopeSettings(**arm["scope"]))
    plan = MeasureSettings(prompts=PROMPTS, arms={"CFG": GuidanceSettings(method="cfg"), "S-CFG": scoped})
    with pytest.raises(TrainingError, match=f"measure.arms, 'S-CFG': {said}"):
        resolve(plan, base=POCKET, adapter=adapter)


def test_every_scope_is_tried_in_a_dry_run_and_none_is_plain(call: Callable, tmp_path: Path) -> None:
    scopes = {"base's unconditional": {"uncond_weight": 0}, "late": {"start": 0.2}, "place": {"where": "subject"}}
    scopes |= {"even": {"where": "uniform", "where_stop": 0.3}, "wrong": {"where": "elsewhere", "where_stop": 0.3}}
    arms = {"CFG": {"method": "cfg"}, "S-CFG": {"method": "semantic"}}
    arms |= {name: {"method": "cfg", "scope": scope} for name, scope in scopes.items()}
    subject = ROOT / "recipes" / "subjects" / "teapot"
    arguments = ["--base.path=pocket", f"--adapter={TEAPOT}", f"--measure.subjects=['{subject}']", "--dry_run=true"]
    said = call("measure", *arguments, f"--measure.arms={json.dumps(arms)}", f"--out={tmp_path}")
    assert said.code == 0, said.err
    given = {name: GuidanceSettings(method="cfg", scope=ScopeSettings(**scope)) for name, scope in scopes.items()}
    plan = MeasureSettings(
        subjects=[str(subject)], arms={"CFG": GuidanceSettings(method="cfg"), "S-CFG": given["late"]}
    )
    found = resolve(plan, base=POCKET, adapter=TEAPOT)
    assert [arm.plain for arm in found.arms.values()] == [False, True, False]
    assert found.arms["S-CFG"].worn != found.arms["CFG"].worn == "1"


def test_a_scope_ships_with_the_guider_where_a_file_can_say_it() -> None:
    late = GuidanceSettings(method="cfg", scope=ScopeSettings(uncond_weight=0.0, start=0.2))
    assert guider_of(late)["scope"] == {"format": 1, "uncond_weight": 0.0, "start": 0.2, "stop": 1.0}
    placed = GuidanceSettings(method="cfg", scope=ScopeSettings(where="subject", where_stop=0.3))
    shipped = guider_of(placed, "sks", "dog")["scope"]
    assert shipped["where"] == {"identifier": "sks", "class": "dog", "stop": 0.3}
    assert Scope.from_config(shipped, lambda words: lambda call: contextlib.nullcontext()).where_stop == 0.3
    with pytest.raises(TrainingError, match=r"scope.where: subject: no subject is given"):
        guider_of(placed)
    with pytest.raises(TrainingError, match=r"scope.where: uniform is a control of a comparison and does not ship"):
        guider_of(GuidanceSettings(method="cfg", scope=ScopeSettings(where="uniform")), "sks", "dog")

"""Scorers by name: what they lack is said before anything is drawn, and all of them run on tiny models."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_bases

MODELS = {"pickscore": "clip", "vqa": "reader", "detector": "owl", "segmenter": "sam", "depth": "depth"}
SPACES = {"clip": "clip", "siglip2": "siglip", "dinov2": "dinov2", "dinov3": "dinov3"}
PROMPTS = ["a red car", "a dog"]


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    for kind in {*MODELS.values(), *SPACES.values()}:
        getattr(tiny_bases, kind)(folder / kind)
    return folder


def given(folder: Path, table: dict[str, str]) -> str:
    return json.dumps({name: str(folder / kind) for name, kind in table.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metrics": ["VQAScore"]}, "VQAScore needs its model: set measure.models.vqa"),
        (
            {"models": {"vqa": "clip"}},
            "measure.models.vqa: {}/clip is a model of type clip; this needs one that answers",
        ),
        ({"models": {"vqa": "gone"}}, "measure.models.vqa: {}/gone: no such model here or on the Hub"),
        ({"models": {"detector": "depth"}}, "measure.models.detector: {}/depth is a model of type dpt"),
        ({"models": {"vqaa": "reader"}}, "measure.models: 'vqaa' is none of pickscore, vqa"),
        ({"spaces": {"dinov3": "dinov2"}}, "measure.spaces.dinov3: {}/dinov2 is a model of type dinov2"),
        ({"spaces": {"clpi": "clip"}}, "measure.spaces: 'clpi' is none of clip, siglip2"),
        (
            {"metrics": ["preference (pickscore)", "prompt accuracy"], "models": {"pickscore": "clip"}},
            "set measure.sweep",
        ),
        (
            {"metrics": ["preference (pickscore)"], "models": {"pickscore": "clip"}, "sweep": [2.0]},
            "preference (pickscore) cannot decide",
        ),
        ({"metrics": ["detected objects"], "models": {"detector": "owl"}}, "looks at colors by clip, and 'a red car'"),
        ({"metrics": ["depth RMSE"], "models": {"depth": "depth"}}, "depth RMSE needs target pictures"),
        ({"metrics": ["masked similarity (dinov2)"]}, "needs a subject"),
    ],
)
def test_what_a_scorer_lacks_is_said_first(
    change: dict, said: str, scorers: Path, call: Callable, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    flags = []
    for name, value in change.items():
        if isinstance(value, dict):
            value = {key: str(scorers / kind) for key, kind in value.items()}
        flags.append(f"--measure.{name}={json.dumps(value)}")
    if "dinov3" in change.get("spaces", {}):
        flags += ["--measure.metrics=['diversity (dinov3)']", "--measure.seeds=[1, 2]"]
    if "masked similarity (dinov2)" in change.get("metrics", []):
        flags.append(f"--measure.spaces={given(scorers, {'dinov2': 'dinov2'})}")
    common = ["--base.path=pocket", f"--measure.prompts={json.dumps(PROMPTS)}", "--dry_run=true"]
    found = call("measure", *common, *flags, f"--out={tmp_path / 'out'}")
    assert found.code == 2, found.out
    assert said.format(scorers) in found.err
    assert len(found.err.splitlines()) == 1, found.err


@pytest.mark.parametrize(
    ("flag", "text", "said"),
    [
        ("questions", '{"a dog": [{"question": "Is it a dog?"}]}', "has nothing on the prompt 'a red car'"),
        ("questions", '{"a dog": [{"question": "Red?", "answer": "blue"}]}', "the answer 'blue' is none of"),
        ("questions", "[1]", "must be JSON: prompt -> "),
        ("objects", '{"prompt": "a dog", "include": [{"class": "dog"}]}', "has nothing on the prompt 'a red car'"),
        ("objects", "no json", "a line of JSON a prompt"),
    ],
)
def test_a_file_of_questions_or_objects_is_read_first(
    flag: str, text: str, said: str, call: Callable, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text(text, "utf-8")
    common = ["--base.path=pocket", f"--measure.prompts={json.dumps(PROMPTS)}", "--dry_run=true"]
    found = call("measure", *common, f"--measure.{flag}={file}", f"--out={tmp_path / 'out'}")
    assert found.code == 2, found.out
    assert f"measure.{flag}: " in found.err
    assert said in found.err


@pytest.mark.parametrize(
    ("given_models", "metrics", "flag", "text", "said"),
    [
        (
            {"vqa": "reader"},
            "question accuracy",
            "questions",
            '{"a red car": [{"question": "What is it?", "answer": "car", "choices": ["car", "car red"]}], "a dog": []}',
            "measure.questions: question 'What is it?': for this model its choices do not begin with different words",
        ),
        (
            {"vqa": "reader"},
            "question probability",
            "questions",
            '{"a red car": [{"question": "Zebra?", "answer": "zebra", "choices": ["zebra", "no"]}], "a dog": []}',
            "its choices do not begin with different words",
        ),
        (
            {"detector": "owl"},
            "detected objects",
            "objects",
            '{"prompt": "a red car", "include": []}\n{"prompt": "a dog", "include": [{"class": "dog"}]}',
            "detected objects needs two prompts that name a thing, and ['a red car'] does not: say in measure.objects",
        ),
    ],
)
def test_what_a_scorer_cannot_ask_is_refused_first(
    given_models: dict, metrics: str, flag: str, text: str, said: str, scorers: Path, call: Callable, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text(text, "utf-8")
    found = call(
        "measure",
        "--base.path=pocket",
        f"--measure.prompts={json.dumps(PROMPTS)}",
        f"--measure.models={given(scorers, given_models)}",
        f"--measure.metrics={json.dumps([metrics])}",
        f"--measure.{flag}={file}",
        "--dry_run=true",
        f"--out={tmp_path / 'out'}",
    )
    assert found.code == 2, found.out
    assert said in found.err


def test_every_scorer_runs_and_a_preference_is_told_at_equal_scale_only(
    scorers: Path, done: Callable[..., str], tmp_path: Path
) -> None:
    metrics = [
        "VQAScore",
        "question accuracy",
        "question probability",
        "detected objects",
        "alignment (siglip2)",
        "preference (pickscore)",
    ]
    arms = {"CFG": {"method": "cfg", "guidance_scale": 2.0}, "S-CFG": {"guidance_scale": 2.0}}
    said = done(
        "measure",
        "--base.path=pocket",
        f"--measure.prompts={json.dumps(PROMPTS)}",
        "--measure.seeds=[1]",
        f"--measure.arms={json.dumps(arms)}",
        "--measure.base_arm=false",
        "--measure.sweep=[1.0, 6.0]",
        f"--measure.metrics={json.dumps(metrics)}",
        f"--measure.models={given(scorers, MODELS)}",
        f"--measure.spaces={given(scorers, SPACES)}",
        "--measure.overlays=0",
        "--sampling.steps=2",
        f"--out={tmp_path}",
    )
    rows = list(csv.DictReader((tmp_path / "measured" / "per_image.csv").open(encoding="utf-8")))
    assert all(0 <= float(row["VQAScore"]) <= 1 for row in rows)
    assert all(row["preference (pickscore)"] for row in rows)
    made = json.loads((tmp_path / "measured" / "gains.json").read_text("utf-8"))
    assert "preference (pickscore)" not in made["design"]["higher_is_better"]
    assert " to " in made["facts"]["preference (pickscore) at equal effective scale"]
    assert "preference" not in said
    page = (tmp_path / "measured" / "report.html").read_text("utf-8")
    assert page.count("preference (pickscore)") == 2  # the fact, and the note that it is told nowhere else

"""The study's stages are shipped recipes with shipped configs; its tables follow from the CSVs beside them."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import figures
import numpy as np
import pytest
import torch
from PIL import Image

import adapters
from benchmarks.study import blind, pointing, pointing_table, shipped, study, tables
from training.errors import TrainingError
from training.pocket import captions

ROOT = Path(__file__).resolve().parents[2]


def test_regions_are_compared_as_by_hand() -> None:
    regions = torch.tensor([[0, 1], [2, 2]])
    top = torch.zeros(4, 4, dtype=torch.bool)
    top[:2] = True
    found = pointing._compared(regions, [0, 1], top)
    assert found["iou"] == 1
    assert found["chance"] == pytest.approx(0.25 / 0.75)
    assert pointing._compared(regions, [0], top)["iou"] == pytest.approx(0.5)
    assert pointing._compared(regions, [2], top)["iou"] == 0
    assert np.isnan(pointing._compared(regions, [0], torch.zeros(4, 4, dtype=torch.bool))["iou"])


def test_every_noun_has_its_own_words_though_colors_repeat() -> None:
    import scfg
    from training.pocket import tokenizer

    prompt = "a red car to the left of a red apple on the grass"
    words = scfg.prompt_words(tokenizer.build_tokenizer(), prompt, 20)
    phrases = pointing._phrases(words, captions.parse_caption(prompt), "prompt")
    assert [[words[i].text for i in own] for own in phrases.values()] == [["red", "car"], ["red", "apple"]]
    positions = pointing._phrases(words, captions.parse_caption(prompt), "all")
    assert positions == {name: [i + 1 for i in own] for name, own in phrases.items()}  # BOS comes first
    whole = pointing._phrases(words, captions.parse_caption(prompt), "phrases")
    assert whole == {"car": [0], "apple": [1]}


def test_prompt_accuracy_is_the_mean_of_its_parts() -> None:
    from training.pocket import metrics
    from training.pocket.control import Scenes

    drawn = [Scenes(control="canny", count=24)[i] for i in range(24)]
    shots = [
        adapters.Shot(prompt=scene.caption, seed=1, latents="0", image=scene.image)
        for scene in [*drawn, *[replace(drawn[i], image=drawn[i - 1].image) for i in range(24)]]
    ]
    parts = np.array([metrics.prompt_accuracy("", name)(shots) for name in metrics.PARTS])
    whole = np.array(metrics.prompt_accuracy("")(shots))
    assert np.nanmean(parts, axis=0) == pytest.approx(whole)
    assert whole[:24].mean() > 0.8 > whole[24:].mean()  # own pictures, and those of other captions
    said = [captions.parse_caption(shot.prompt) for shot in shots]
    assert [bool(np.isnan(value)) for value in parts[2]] == [not one.relation for one in said]


def test_the_rest_of_a_prompt_is_judged_without_its_subject() -> None:
    """On true pictures, where something else takes the place of the subject or of its company."""
    from training.pocket import metrics, scenes

    def shown(text: str, drawn: str) -> adapters.Shot:
        image = Image.fromarray(scenes.from_prompt(drawn, seed=4).image)
        return adapters.Shot(prompt=text, seed=4, latents="0", image=image)

    prompt = "a sks dog and a red car in the snow"
    measured = metrics.rest_accuracy("sks", "dog")(
        [
            shown(prompt, "a dog and a red car in the snow"),
            shown(prompt, "a house and a red car in the snow"),
            shown(prompt, "a dog and a blue car in the snow"),
            shown(prompt, "a dog and a house on the grass"),
            shown("a sks dog in the snow", "a house in the snow"),
            shown("a sks dog", "a dog in the snow"),
        ]
    )
    assert measured == pytest.approx([1, 1, 2 / 3, 0, 1, np.nan], nan_ok=True)
    with pytest.raises(TrainingError, match="rest accuracy: the pocket judge knows no 'gnome'"):
        metrics.rest_accuracy("sks", "gnome")


def test_watching_draws_what_plain_guidance_draws(tmp_path: Path, done: Callable[..., str]) -> None:
    import scfg
    from recipes.common.base import sampling_pipeline
    from recipes.common.guidance import guidance_of
    from recipes.common.settings import SamplingSettings
    from training.config import BaseSettings

    settings = pointing.Settings(base=BaseSettings(path="pocket"), prompts=["a dog"], out=str(tmp_path))
    pipe = sampling_pipeline(settings.base, SamplingSettings())
    options = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "latent"}
    plain = pipe("a dog", generator=torch.Generator().manual_seed(1), **options).images
    with scfg.attach(pipe, guidance_of(settings.guidance), guidance_scale=4.0):
        watched = pipe("a dog", generator=torch.Generator().manual_seed(1), **options).images
    assert torch.allclose(plain, watched, atol=1e-4)

    config = ROOT / "benchmarks" / "study" / "configs" / "pointing" / "pocket.yaml"
    said = done(
        "benchmarks.study.pointing", f"--config={config}", "--limit=2", "--sampling.steps=4", f"--out={tmp_path}"
    )
    rows = list(csv.DictReader((tmp_path / "pointing" / "pointing.csv").open()))
    summary = json.loads((tmp_path / "pointing" / "pointing.json").read_text())
    assert len(rows) == 4 * summary["said"]
    assert len(summary["steps"]) == 4
    assert [step["timestep"] for step in summary["steps"]] == sorted({int(row["timestep"]) for row in rows})[::-1]
    assert all(float(row["delta"]) > 0 for row in rows if row["delta"] != "nan")
    assert "judge" in said

    made = tmp_path / "pointing"
    adapters.files.write_manifest(made, {"format": 1, "kind": "results"})
    assert adapters.measuring.verify.verify(made)["kind"] == "results"
    assert pointing_table.check(made)["objects"] == summary["objects"]
    summary["steps"][2]["delta"] *= 1.001
    (made / "pointing.json").write_text(json.dumps(summary))
    with pytest.raises(adapters.GainsError, match=r"pointing\.steps\[2\]\.delta"):
        pointing_table.check(made)
    for text in ("", "prompt,seed\na dog,1\n"):
        (made / "pointing.csv").write_text(text)
        with pytest.raises(adapters.GainsError, match="no table of objects and steps"):
            pointing_table.read_csv(made / "pointing.csv")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--base.path=elsewhere", "--prompts=['a dog']"], "base.path"),
        (["--base.path=pocket", "--prompts=['a dog']", "--guidance.method=pointwise"], "guidance.method"),
        (["--base.path=pocket"], "prompt_file"),
        (["--base.path=pocket", "--prompts=['a zebra']"], "zebra"),
    ],
)
def test_pointing_says_what_it_cannot_do(
    call: Callable[..., object], tmp_path: Path, arguments: list[str], named: str
) -> None:
    said = call("benchmarks.study.pointing", *arguments, "--sampling.steps=1", f"--out={tmp_path}")
    assert (said.code, named in said.err) == (2, True), said.err  # type: ignore[attr-defined]
    assert not (tmp_path / "pointing").exists()


def test_what_ships_is_counted_by_subject(tmp_path: Path) -> None:
    """Means by hand: of two subjects with one picture alone and one in company each."""
    rows = [
        {
            "subject": subject,
            "arm": arm,
            "prompt": prompt,
            "seed": "1",
            "identity": named,
            "prompt accuracy": accuracy,
            "rest accuracy": "0.25",
        }
        for subject, noun in (("rabbit", "rabbit"), ("toy_car", "car"))
        for arm, accuracy in (("base", "1.0"), ("CFG", "0.5"), ("S-CFG scoped", "0.75"))
        for prompt, named in ((f"a sks {noun} in the sea", "1.0"), (f"a sks {noun} and a red crown at night", "0.0"))
    ]
    lines = shipped.table(rows)
    assert lines[2] == "| rabbit | 1.00 / .25 / .50 / .00 | .50 / .25 / .50 / .00 | .75 / .25 / .50 / .00 |"
    assert lines[4].startswith("| **all** | 1.00 / .25 / .50 / .00 | .50 / .25 / .50 / .00 |")
    assert "CFG - base, accuracy: -0.500 [-0.500, -0.500]" in lines
    for subject in ("rabbit", "toy_car"):
        folder = tmp_path / subject / "measured"
        folder.mkdir(parents=True)
        with (folder / "per_image.csv").open("w", newline="") as file:
            written = csv.DictWriter(file, rows[0])
            written.writeheader()
            written.writerows(row for row in rows if row["subject"] == subject)
    assert shipped.table(shipped.collect(tmp_path)) == lines
    assert shipped.table(shipped._kept(tmp_path / "shipped.csv.gz")) == lines


def test_shares_are_all_the_stages_and_none_twice(done: Callable[..., str]) -> None:
    whole = [stage.name for stage in study.stages(Path("x"))]
    assert len(whole) == len(set(whole))
    assert {"text-ddim", "text-dpm++", "subjects-lora", "canny"} <= set(whole)
    parts = [done("benchmarks.study.study", "--list", f"--share={i}/3").split("\n")[:-1] for i in (1, 2, 3)]
    assert sorted(line.split()[0] for part in parts for line in part) == sorted(whole)


@pytest.mark.parametrize(
    ("arguments", "named"), [(["--only", "nothing"], "--only nothing"), (["--share", "3/2"], "--share 3/2")]
)
def test_a_wrong_choice_is_said(call: Callable[..., object], arguments: list[str], named: str) -> None:
    said = call("benchmarks.study.study", *arguments)
    assert said.code == 2
    assert named in said.err


def test_study_prompts_are_in_the_grammar_and_none_is_tuned_on() -> None:
    lines = {
        name: (ROOT / folder / "prompts" / f"{name}.txt").read_text().splitlines()
        for folder, name in (
            ("benchmarks/study", "study"),
            ("benchmarks/study", "study_tune"),
            ("recipes", "pocket"),
        )
    }
    for prompts in lines.values():
        assert len(prompts) == len(set(prompts))
        for prompt in prompts:
            captions.parse_caption(prompt)
    assert not set(lines["study"]) & set(lines["study_tune"])
    assert len(lines["study"]) * 2 >= 200  # pairs, with two seeds


def test_a_stage_runs_once_and_its_table_is_recomputed(tmp_path: Path, done: Callable[..., str]) -> None:
    out, kept = tmp_path / "study", tmp_path / "kept"
    arguments = ("--quick", "--only", "text-ddim", "--out", out, "--kept", kept)
    assert "as before" not in done("benchmarks.study.study", *arguments)
    assert "as before" in done("benchmarks.study.study", *arguments)
    tables = (out / "report" / "tables.md").read_text()
    assert (kept / "tables.md").read_text() == tables
    shutil.rmtree(out)  # another machine, which has nothing but what was kept
    assert "as before" in done("benchmarks.study.study", *arguments)
    assert (out / "report" / "tables.md").read_text() == tables
    assert not list(out.rglob("*.png"))
    assert adapters.measuring.verify.verify(kept / "text-ddim.zip")["numbers"] > 0
    for name in zipfile.ZipFile(kept / "text-ddim.zip").namelist():
        with adapters.measuring.archive.unpacked(kept / "text-ddim.zip") as folder:
            assert str(ROOT) not in (folder / name).read_text()
    assert "## text-ddim" in tables
    assert "## canny" not in tables
    lines = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in tables.splitlines() if "|" in line}
    gains = adapters.measuring.verify.recompute(out / "report" / "text-ddim")
    for contrast in (c for c in gains.contrasts if c.metric == "prompt accuracy" and "@" not in c.arm):
        assert lines[contrast.arm][1].startswith(f"{contrast.difference:+.4f}")
    assert "[" in lines["S-CFG"][2]  # at equal effective scale
    root = ElementTree.parse(kept / "text-ddim.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    drawn = (kept / "text-ddim.svg").read_text("utf-8")
    assert len(figures.labels(drawn)) >= 5  # one a point
    assert figures.overlaps(drawn) == []


def test_blind_pages_give_nothing_away_and_answers_are_counted(
    tmp_path: Path, done: Callable[..., str], call: Callable[..., object]
) -> None:
    """The second arm's pictures are white: whoever always takes the white one prefers the second arm."""
    for arm, shade in (("plain", 0), ("other", 255)):
        for number in range(30):
            shot = adapters.Shot(
                prompt=f"a dog {number % 20}",
                seed=number,
                image=Image.new("RGB", (8, 8), (shade,) * 3),
                latents="0",
                seconds=0.0,
                arm=arm,
                numbers={},
            )
            (tmp_path / arm).mkdir(exist_ok=True)
            adapters.measuring.sample.write(tmp_path / arm / f"{number}.png", shot, {})
    out = tmp_path / "blind"
    done("benchmarks.study.blind", tmp_path / "plain", tmp_path / "other", "--count", 24, "--out", out)
    pairs = json.loads((out / "key.json").read_text())["pairs"]
    assert len(pairs) == 24
    assert len({pair["prompt"] for pair in pairs.values()}) == 20  # every prompt before any comes twice
    assert {pair["left"] for pair in pairs.values()} == {"first", "second"}
    page = np.asarray(Image.open(out / "page-1.png").convert("L"))
    left = page[blind.LINE + 70, 4 + 70]
    answers = tmp_path / "answers.txt"
    answers.write_text("".join(f"{n} {'left' if p['left'] == 'second' else 'right'}\n" for n, p in pairs.items()))
    assert (left == 255) == (pairs["1"]["left"] == "second")
    found = json.loads(done("benchmarks.study.blind", "--out", out, "--score", answers))
    assert (found["preference for the second"], found["the same"], found["pairs"]) == (1.0, 0, 24)
    answers.write_text("1 left\n1 right\n")
    said = call("benchmarks.study.blind", "--out", out, "--score", answers)
    assert said.code == 2  # type: ignore[attr-defined]
    assert "'1 right' is no answer, or a second one" in said.err  # type: ignore[attr-defined]


def test_pictures_are_borrowed_of_every_subject_and_none_is_overwritten(tmp_path: Path) -> None:
    stage = study.Stage(name="b", recipe="measure", config="", borrows={"a": ["CFG @ 2.5"]})
    for place in (
        "a/pictures/dog/cfg-2-5",
        "a/pictures/bird/cfg-2-5",
        "a/pictures/bird/cfg",
        "b/pictures/bird/cfg-2-5",
    ):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "0.png").write_text(place)
    study._Run(tmp_path, None, quick=False).borrow(stage)
    here = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in (tmp_path / "b").rglob("*.png")}
    assert here == {
        "b/pictures/dog/cfg-2-5/0.png": "a/pictures/dog/cfg-2-5",
        "b/pictures/bird/cfg-2-5/0.png": "b/pictures/bird/cfg-2-5",
    }


def test_a_new_setting_that_is_null_spoils_no_result() -> None:
    before, now = ({"a": 1, "b": [{"c": None, "d": 2}]}, {"a": 1, "b": [{"d": 2}], "new": None, "table": {}})
    assert comparable(before) == comparable(now)
    assert comparable(before) != comparable({**now, "new": 3})


def test_results_of_another_folder_are_the_same_but_not_those_of_another_adapter() -> None:
    there = {"out": "/tmp/old/subjects", "adapter": "/tmp/old/lora-{subject}/lora"}
    here = {"out": "runs/study/subjects", "adapter": "runs/study/lora-{subject}/lora"}
    assert comparable(there) == comparable(here)
    assert comparable(there) != comparable({**here, "adapter": "/tmp/other/lora-{subject}/lora"})


def test_a_name_of_before_spoils_no_result() -> None:
    before = {"measure": {"metrics": ["colour accuracy"], "arms": {"A": {"scale": 3.0}}, "scale": None}}
    now = {"measure": {"metrics": ["color accuracy"], "arms": {"A": {"guidance_scale": 3.0}}}}
    assert comparable(before) == comparable(now)
    assert comparable(before) != comparable({"measure": {**now["measure"], "arms": {"A": {"guidance_scale": 4.0}}}})


def comparable(settings: dict) -> object:
    return study.comparable("measure", json.dumps({"settings": settings}))


@pytest.mark.slow
def test_what_is_kept_is_of_these_settings_and_its_tables_follow(tmp_path: Path) -> None:
    kept = ROOT / "benchmarks" / "study" / "results"
    stages = {stage.name: stage for stage in study.stages(Path("runs/study"))}
    names = [archive.stem for archive in kept.glob("*.zip")]
    assert set(names) <= set(stages)
    run = study._Run(Path("runs/study"), None, quick=False)
    for name in names:
        with adapters.measuring.archive.unpacked(kept / f"{name}.zip") as folder:
            record = json.loads((folder / study.ENDED).read_text())["record"]
            recipe = stages[name].recipe
            now = study.comparable(recipe, run._settings(stages[name])[1])
            assert study.comparable(recipe, record) == now, name
            shutil.copytree(folder, tmp_path / "study" / name / study.RESULTS[stages[name].recipe])
    measured = [name for name, stage in stages.items() if stage.recipe == "measure"]
    page = tables.report(measured, tmp_path / "study")
    assert page.read_text() == (kept / "tables.md").read_text()
    for curve in kept.glob("*.svg"):
        assert (page.parent / curve.name).read_text() == curve.read_text()


@pytest.mark.slow
def test_the_quick_study_runs_whole(tmp_path: Path, done: Callable[..., str]) -> None:
    out = done("benchmarks.study.study", "--quick", "--out", tmp_path)
    tables = (tmp_path / "report" / "tables.md").read_text()
    for stage in study.stages(tmp_path, quick=True):
        assert stage.name in out
        if stage.recipe == "measure":
            assert f"## {stage.name}\n" in tables
            assert adapters.measuring.verify.verify(tmp_path / "report" / stage.name)["numbers"] > 0

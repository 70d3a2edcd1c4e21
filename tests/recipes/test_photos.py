"""`scfg-toolkit new`: photos become a subject and a config, or an error names what is wrong with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from recipes.common.subject_prompts import check_pocket, for_class, held_out, tuning
from recipes.new import prepare_subject
from training import single_file
from training.pocket import captions
from training.pocket.subjects import SUBJECTS
from training.pocket.world import CLASSES

ROOT = Path(__file__).resolve().parents[2]


def test_photos_become_a_subject_and_a_config_that_runs(mine: Path, tmp_path: Path, done) -> None:
    said = done("new", mine, "--class", "dog", "--out", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    assert f"scfg-toolkit train --config {config}" in said
    assert "3 photos, 64x64 pixels" in said
    assert "caption: 'a photo of a sks dog'" in said
    assert "masks: none" in said
    rows = {line.split("  ")[0]: line for line in said.splitlines()}
    assert "class pictures" not in rows  # the subject's own pictures keep the class
    assert "450 steps of 6" in rows["training"]
    assert re.search(r"\d+ \+ \d+ candidates on 3 prompts: \d+ pictures, 25 steps each", rows["tuning"])
    assert re.search(r"\d arms x 6 prompts x 2 seeds: \d+ pictures", rows["measuring"])
    for name in ("caching", "training", "tuning", "measuring", "shipping"):
        assert re.search(r" to |under 1 s", rows[name]), rows[name]
        assert rows[name].endswith(" GiB")
    assert "a photographed subject will not appear in other scenes" in said
    assert "tensors of a training step: " in said
    facts = json.loads((mine / "subject.json").read_text())
    assert facts["class"] == "dog"
    assert all("sks dog" in prompt for prompt in facts["prompts"])
    values = yaml.safe_load(config.read_text())
    held, tuned = set(facts["prompts"]), {prompt.format("sks dog") for prompt in values["tune"]["prompts"]}
    assert not held & tuned
    done("dreambooth_lora", f"--config={config}", "--train.dry_run=true")
    assert not (tmp_path / "run" / "lora").exists()


def refused(call, *arguments: object) -> str:
    said = call("new", *arguments)
    assert said.code == 2
    assert said.err.startswith("error: ")
    return said.err


def test_photos_that_cannot_be_learnt_from_are_named(mine: Path, tmp_path: Path, call) -> None:
    arguments = [mine, "--class", "dog", "--out", tmp_path / "run", "--no-trial"]
    (mine / "2.png").unlink()
    assert "has 2 photo(s); three are the least" in refused(call, *arguments)
    frames = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")]
    frames[0].save(mine / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (16, 64)).save(mine / "small.png")
    said = refused(call, *arguments)
    assert "moving.gif is animated (2 frames)" in said
    assert "small.png is 16x64" in said
    assert not (tmp_path / "run").exists()
    assert not (mine / "subject.json").exists()


def test_what_the_run_would_refuse_is_refused_at_once(mine: Path, tmp_path: Path, call) -> None:
    run = ["--out", tmp_path / "run", "--no-trial"]
    said = refused(call, mine, "--class", "cow", *run)
    assert said.startswith("error: --class cow: the pocket base knows only dog, cat, ")
    assert "--identifier rex: the pocket base has one word" in refused(
        call, mine, "--class", "dog", "--identifier", "rex", *run
    )
    facts = {"class": "dog", "identifier": "sks", "prompts": ["a sks dog on a sofa", "a sks dog at night"]}
    (mine / "subject.json").write_text(json.dumps(facts))
    assert "prompt 'a sks dog on a sofa' cannot be judged" in refused(call, mine, "--class", "dog", *run)
    assert "is about 'sks dog', not 'sks cat'" in refused(call, mine, "--class", "cat", *run)
    assert not (tmp_path / "run").exists()


def test_what_was_seen_is_said(mine: Path, tmp_path: Path, done, call) -> None:
    turned = Image.new("RGB", (96, 64), "red")
    turned.getexif()[0x0112] = 6
    turned.save(mine / "9.jpg", exif=turned.getexif())
    (mine / "IMG_1.jxl").write_bytes(b"not read here")
    said = done("new", mine, "--class", "cat", "--out", tmp_path / "run", "--no-trial")
    assert "4 photos (1 turned upright), 64x64 to 64x96 pixels" in said
    assert "1 file(s) are not read and left out: IMG_1.jxl" in said
    assert "measured without masks" in said
    plan = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["measure"]
    assert plan["metrics"] == ["prompt accuracy", "similarity (judge)"]
    done("new", mine, "--class", "cat", "--out", tmp_path / "run", "--no-trial")  # the same once more is no conflict
    (tmp_path / "run" / "config.yaml").write_text("mine: edited\n")
    assert "is there and says something else" in refused(
        call, mine, "--class", "cat", "--out", tmp_path / "run", "--no-trial"
    )


def test_networks_that_measure_are_there_or_left_out(mine: Path, tmp_path: Path, models: Path, done) -> None:
    for file in mine.glob("*.png"):
        Image.open(file).resize((256, 256)).save(file)

    def plan(name: str, *arguments: object) -> dict:
        done(
            "new", mine, "--class", "dog", "--base", models / "sd15", "--out", tmp_path / name, "--no-trial", *arguments
        )
        return yaml.safe_load((tmp_path / name / "config.yaml").read_text())

    none = plan("none", "--clip", tmp_path / "gone", "--dino", tmp_path / "gone")
    assert "measure" not in none
    assert "tune" not in none
    assert none["ship"] == {}
    clip, dino = ["--clip", models / "clip"], ["--dino", models / "dino"]
    assert plan("clip", *clip, "--dino", tmp_path / "gone")["measure"]["metrics"] == [
        "identity (clip)",
        "alignment (clip)",
        "similarity (clip)",
    ]
    both = plan("both", *clip, *dino)["measure"]
    assert both["referee"] == "similarity (clip)"
    assert both["spaces"] == {"clip": str(models / "clip"), "dino": str(models / "dino")}


@pytest.mark.parametrize("noun", CLASSES)
def test_prompts_for_a_subject_are_valid_for_every_class(noun: str) -> None:
    held = held_out(noun, "sks", pocket=True)
    tuned = [prompt.replace("a {}", f"a sks {noun}") for prompt in tuning(noun, pocket=True)]
    check_pocket(noun, "sks", [*held, *tuned], "here")
    assert not {*held} & {*tuned}
    assert len({*held}) == 6
    for prompt in [*held, *tuned]:
        things = [part.name for part in captions.parse_caption(prompt.replace("sks ", "")).nouns]
        assert len({*things}) == len(things), f"{prompt!r} asks for one thing twice"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_demo_s_prompts_are_valid_for_every_subject(subject: str) -> None:
    """Those it is tuned on, and the class images' prompts; none of either is held out."""
    facts = json.loads((ROOT / "recipes" / "subjects" / subject / "subject.json").read_text())
    config = yaml.safe_load((ROOT / "recipes/configs/dreambooth_lora/pocket_dog.yaml").read_text())
    lines = (ROOT / config["dreambooth"]["class_prompt_file"]).read_text().splitlines()
    noun = facts["class"]
    asked = [*for_class(config["tune"]["prompts"], noun, pocket=True)]
    asked += [line.replace("{}", "a {}") for line in lines if "{}" in line]
    for prompt in asked:
        things = [part.name for part in captions.parse_caption(prompt.replace("a {}", captions.article(noun))).nouns]
        assert noun in things
        assert len({*things}) == len(things), f"{prompt!r} asks for one thing twice"
        assert prompt.replace("{}", f"sks {noun}") not in facts["prompts"]


def test_captions_must_name_the_subject(mine: Path, tmp_path: Path, call) -> None:
    for number in range(3):
        (mine / f"{number}.txt").write_text("a sks dog" if number else "a dog on the grass")
    said = refused(call, mine, "--class", "dog", "--out", tmp_path / "run", "--no-trial")
    assert "captions must name the subject as 'sks dog'; those of 0.png do not" in said


@pytest.mark.parametrize(("width", "configs", "resolution"), [(2048, None, 1024), (768, None, 512), (24, "sdxl", 1024)])
def test_the_family_of_a_file_is_that_of_its_keys_or_configs(
    width: int, configs: str | None, resolution: int, mine: Path, models: Path, tmp_path: Path
) -> None:
    unet, file = single_file.UNET, tmp_path / "my.safetensors"
    keys = ["conditioner.embedders.0.x", "first_stage_model.x"]
    text = f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    shapes = {f"{unet}input_blocks.0.0.weight": (8, 4, 3, 3), text: (8, width), **dict.fromkeys(keys, (1,))}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    for photo in mine.glob("*.png"):
        with Image.open(photo) as image:
            image.resize((300, 260)).save(photo)
    more = [] if configs is None else ["--base.config", str(models / configs)]
    config = prepare_subject(mine, "dog", "sks", str(file), tmp_path / "run", {}, more=more)
    values = yaml.safe_load(config.read_text())
    assert values["data"]["resolution"] == resolution
    assert values["base"] == {"path": str(file), **({} if configs is None else {"config": str(models / configs)})}

"""An adapter from elsewhere, measured without a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from adapters.adapter import Adapter, Module
from adapters.family import family_of
from adapters.files import read_tensors, write_tensors
from adapters.measuring import gains
from adapters.measuring.gains import Design
from adapters.measuring.table import Row
from adapters.source import open_source, read_adapter
from adapters.writing import write_kohya
from recipes.common.foreign import FEW, words_of
from recipes.common.results import unseen
from recipes.measure import Settings
from training import naming
from training.command_line import parse
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"


def lora(width: int) -> Module:
    tensors = {"lora_A.weight": torch.zeros(2, width), "lora_B.weight": torch.zeros(320, 2)}
    return Module(kind="lora", tensors=tensors, rank=2, alpha=2.0)


@pytest.mark.parametrize(
    ("modules", "family"),
    [
        ({f"unet.{BLOCK}.attn2.to_k": 768, f"unet.{BLOCK}.attn1.to_k": 640}, "SD-1.x"),
        ({f"unet.{BLOCK}.attn2.to_v": 1024}, "SD-2.x"),
        ({f"unet.{BLOCK}.attn2.to_k": 2048}, "SDXL"),
        ({f"unet.{BLOCK}.attn2.to_k": 1280}, None),  # SDXL's refiner
        ({f"unet.{BLOCK}.attn1.to_k": 640}, None),  # SD-1.x and SD-2.x alike
        ({"text_encoder_2.encoder.layers.0.self_attn.q_proj": 1280}, "SDXL"),
        ({"text_encoder.encoder.layers.0.self_attn.q_proj": 768}, "SD-1.x"),
    ],
)
def test_the_base_is_told_by_the_width_of_its_text(modules: dict[str, int], family: str | None) -> None:
    assert family_of(Adapter(modules={name: lora(width) for name, width in modules.items()})) == family


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("elsewhere") / "mine.safetensors"
    write_kohya(file, read_adapter(open_source(ROOT / "recipes" / "zoo" / "teapot")))
    return file


def words(file: Path, out: Path, *more: str) -> list[str]:
    photos = ROOT / "recipes" / "subjects" / "teapot"
    return [str(file), "--photos", str(photos), "--class", "teapot", "--trigger", "sks", "--out", str(out), *more]


def test_a_config_and_a_subject_are_made_of_a_file_and_photos(kohya: Path, tmp_path: Path, capsys) -> None:
    settings = parse(Settings, words_of(words(kohya, tmp_path / "a", "--dry_run=true")))
    assert settings.dry_run
    assert settings.base.path == "pocket"
    assert list(settings.measure.arms) == list(FEW) == ["CFG", "S-CFG"]
    assert "base: pocket, as the keys are of pocket" in capsys.readouterr().out
    subject = tmp_path / "a" / "subject" / "teapot"
    assert len(list(subject.glob("*.webp"))) == len(list((subject / "masks").glob("*.png"))) == 8
    facts = yaml.safe_load((subject / "subject.json").read_text("utf-8"))
    assert (facts["class"], facts["identifier"], len(facts["prompts"])) == ("teapot", "sks", 6)
    edited = (subject / "subject.json").read_text("utf-8").replace("a sks teapot at night", "a sks teapot in the snow")
    (subject / "subject.json").write_text(edited, "utf-8")
    settings = parse(Settings, words_of(words(kohya, tmp_path / "a", "--arms", "all", "--sweep", "3", "6")))
    assert len(settings.measure.arms) == 5
    assert settings.measure.sweep == [3, 6]
    assert (subject / "subject.json").read_text("utf-8") == edited


def test_the_scale_may_have_its_name_of_before(kohya: Path, tmp_path: Path, capsys) -> None:
    naming.note.cache_clear()
    for flag in ("--guidance_scale", "--scale"):
        settings = parse(Settings, words_of(words(kohya, tmp_path / "a", flag, "3")))
        assert settings.measure.guidance_scale == 3.0
    assert capsys.readouterr().err.splitlines() == [
        "note: --scale is now called --guidance_scale; the old name still works in this version"
    ]


def test_a_trigger_that_no_caption_had_is_said(kohya: Path, tmp_path: Path, capsys) -> None:
    tagged = tmp_path / "tagged.safetensors"
    tensors, header = read_tensors(kohya)
    write_tensors(tagged, tensors, {**header, "ss_tag_frequency": '{"10_x": {"a zwx teapot": 8}}'})
    words_of(words(tagged, tmp_path / "out"))
    assert "warning: --trigger sks is in none of the captions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"ss_clip_skip": "2", "ss_max_token_length": "225"}, (2, 3)),
        ({"ss_clip_skip": "None", "ss_max_token_length": "None"}, (None, None)),
        ({"ss_clip_skip": "1"}, (None, None)),
        ({"ss_clip_skip": "2", "ss_base_model_version": "sdxl_base_v1-0"}, (None, None)),
        ({"ss_clip_skip": "2", "ss_v2": "True", "ss_max_token_length": "150"}, (None, 2)),
    ],
)
def test_text_is_read_as_kohyas_header_says(kohya: Path, tmp_path: Path, header: dict, told: tuple) -> None:
    tensors, found = read_tensors(kohya)
    own = {key: value for key, value in found.items() if not key.startswith("ss_")}
    write_tensors(tmp_path / "x.safetensors", tensors, {**own, **header})
    base = parse(Settings, words_of(words(tmp_path / "x.safetensors", tmp_path / "out"))).base
    assert (base.clip_skip, base.prompt_chunks) == told


def test_a_base_may_be_a_single_file(kohya: Path, models: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "base.safetensors")
    networks = ["--clip", str(models / "clip"), "--dino", str(models / "dino")]
    assert parse(Settings, words_of(words(kohya, tmp_path / "out", "--base", file, *networks))).base.path == file


def test_a_base_that_the_keys_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    tensors = {
        f"unet.{BLOCK}.attn1.to_k.lora_A.weight": torch.zeros(2, 640),
        f"unet.{BLOCK}.attn1.to_k.lora_B.weight": torch.zeros(640, 2),
    }
    write_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(TrainingError, match=r"its keys do not say which base it is for; give --base"):
        words_of(words(tmp_path / "x.safetensors", tmp_path / "out"))


@pytest.mark.parametrize(("gap", "warned"), [(0.2, False), (0.0, True), (-0.1, True)])
def test_a_subject_that_does_not_appear_is_said(gap: float, warned: bool) -> None:
    rows = [
        Row(arm=arm, prompt=f"p{p}", seed=1, latents="n", numbers={"similarity (dino)": 0.5 + own + p / 50})
        for p in range(3)
        for arm, own in (("base", 0.0), ("CFG", gap), ("S-CFG", gap))
    ]
    design = Design(
        arm="S-CFG",
        baseline="CFG",
        base="base",
        primary="similarity (dino)",
        minimum_effect=0.02,
        higher_is_better={"similarity (dino)": True},
    )
    said = unseen(gains.compare(rows, design), ["sks dog"])
    assert (said is not None) == warned
    assert said is None or "trained with the words 'sks dog'?" in said

"""What the base gives no standard for is left out, and subjects of one class are told apart, to the end of a run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import adapters
from recipes.common import standard
from recipes.common.comparison import resolve
from recipes.common.settings import MeasureSettings, TuneSettings
from recipes.ship import _shots
from training.config import BaseSettings
from training.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
SUBJECTS = ROOT / "recipes" / "subjects"
ARMS = json.dumps({"CFG": {"method": "cfg", "guidance_scale": 4.0}, "S-CFG": {"guidance_scale": 4.0}})
FEW = ["--base.path=pocket", f"--measure.arms={ARMS}", "--measure.limit=2", "--measure.seeds=[1]"]
FEW += ["--measure.overlays=0", "--measure.base_arm=false"]
TUNE = ["--tune.prompts=['a yellow star', 'a blue umbrella']", "--tune.seeds=[101]", "--tune.guidance_scales=[4.0]"]


def plan_of(**more: object) -> MeasureSettings:
    return MeasureSettings(subjects=[str(SUBJECTS / "dog")], **more)  # type: ignore[arg-type]


def test_without_a_standard_a_similarity_decides_and_the_run_goes_on(tmp_path: Path, done: Callable) -> None:
    """Of prompts that name no dog, the base's pictures show none."""
    common = [*FEW, f"--measure.subjects=[{SUBJECTS / 'dog'}]", "--sampling.steps=4", f"--out={tmp_path}"]
    common += ["--measure.prompts=['a red car', 'a house at night']"]
    said = done("tune", *common, *TUNE, "--tune.metric=identity")
    line = "identity, left out: identity: the base draws the class in none of these prompts, so there is no standard"
    assert f"{line} (dog); subject similarity takes its place" in said
    assert json.loads((tmp_path / "tuned" / "tuned.json").read_text())["metric"] == "subject similarity"
    said = done("measure", *common, f"--tuned={tmp_path / 'tuned'}")
    assert line in said
    facts = json.loads((tmp_path / "measured" / "gains.json").read_text())["facts"]
    assert facts["identity, left out"].endswith("subject similarity takes its place")
    gains = adapters.measuring.verify.recompute(tmp_path / "measured")
    assert gains.design.primary == gains.design.identity == "subject similarity"
    assert list(gains.design.higher_is_better) == ["subject similarity", "prompt accuracy"]


def test_an_identity_that_can_be_told_stays() -> None:
    """Real pictures of two kinds as the subject and as what the base draws of its class."""
    comparison = resolve(
        plan_of(metrics=["identity (color)"]), base=BaseSettings(path="pocket"), adapter="(to be trained)"
    )
    case = comparison.units[0]
    plain = [Image.new("RGB", (64, 64), color) for color in ("magenta", "cyan")]
    other = [adapters.Shot(prompt="a dog", seed=i, latents="", image=image) for i, image in enumerate(plain)]
    assert standard.untold(comparison, [case], [other]) == {}
    own = [
        adapters.Shot(prompt="a dog", seed=i, latents="", image=Image.open(file).convert("RGB"))
        for i, file in enumerate(sorted((SUBJECTS / "dog").glob("*.webp")))
    ]
    gone = standard.untold(comparison, [case], [own])
    assert "does not tell them apart (dog)" in gone["identity (color)"]


def test_wherever_it_is_named_the_similarity_takes_its_place() -> None:
    gone = {"identity (color)": "why"}
    names = ["identity (color)", "similarity (color)", "similarity (judge)"]
    plan = plan_of(metrics=names, referee="similarity (color)", identity="identity (color)", minimum_effect=0.1)
    comparison = resolve(plan, base=BaseSettings(path="pocket"), adapter="(to be trained)")
    found = standard.without(comparison, gone)
    assert found.metrics == ["similarity (color)", "similarity (judge)"]
    assert (found.primary, found.referee, found.identity) == (None, None, "similarity (color)")
    assert found.minimum_effect == 0.1
    again = resolve(found, base=BaseSettings(path="pocket"), adapter="(to be trained)")
    assert again.primary == "similarity (color)"
    search = TuneSettings(metric="identity (color)", references={"identity (color)": 0.5, "prompt accuracy": 0.9})
    assert standard.searched(search, gone).metric == "similarity (color)"
    assert standard.searched(search, gone).references == {"prompt accuracy": 0.9}
    assert standard.instead("identity margin") == standard.instead("identity") == "subject similarity"


# ---------------------------------------------------------------------------------------------- subjects of one class


@pytest.fixture
def twins(tmp_path: Path) -> Path:
    """Two subjects that prompts call alike: the dog, and the bird under the dog's words."""
    for name in ("dog", "bird"):
        shutil.copytree(SUBJECTS / name, tmp_path / "twins" / name)
    shutil.copy(SUBJECTS / "dog" / "subject.json", tmp_path / "twins" / "bird" / "subject.json")
    return tmp_path / "twins"


def lora(folder: Path, seed: int) -> None:
    """A LoRA with the layer of the pocket base, made at random."""
    from safetensors.torch import save_file

    from training.pocket import base_path

    folder.mkdir(parents=True)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    config = json.loads((Path(base_path()) / "unet" / "config.json").read_text())
    wide, deep = config["cross_attention_dim"], config["block_out_channels"][0]
    draws = torch.Generator().manual_seed(seed)
    tensors = {
        f"unet.{name}.lora_A.weight": torch.randn((2, wide), generator=draws),
        f"unet.{name}.lora_B.weight": torch.randn((deep, 2), generator=draws),
    }
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")


def test_two_subjects_of_one_class_keep_their_own_pictures(twins: Path, tmp_path: Path, done: Callable) -> None:
    for seed, name in enumerate(("dog", "bird")):
        lora(tmp_path / "loras" / name, seed)
    subjects = json.dumps([str(twins / "dog"), str(twins / "bird")])
    common = [*FEW, f"--measure.subjects={subjects}", "--sampling.steps=2"]
    adapter = f"--adapter={tmp_path / 'loras' / '{subject}'}"
    done(
        "measure",
        *common,
        adapter,
        "--measure.metrics=['similarity (judge)', 'prompt accuracy']",
        f"--out={tmp_path / 'out'}",
    )
    rows = list(csv.DictReader((tmp_path / "out" / "measured" / "per_image.csv").open()))
    prompts = {(row["subject"], row["prompt"]) for row in rows}
    assert len(prompts) == 2 * len({prompt for _, prompt in prompts})
    of = {(row["subject"], row["arm"], row["prompt"]): row["image"] for row in rows}
    for (subject, arm, prompt), image in of.items():
        other = of["bird" if subject == "dog" else "dog", arm, prompt]
        assert image != other, "each has an adapter of its own"
    plan = MeasureSettings(subjects=json.loads(subjects), seeds=[1], limit=2)
    shots = _shots(tmp_path / "out", plan, ["CFG", "S-CFG"])
    assert [shot.subject for shot in shots["CFG"]] == ["dog", "dog", "bird", "bird"]
    assert len({shot.key for shot in shots["CFG"]}) == 4
    page = (tmp_path / "out" / "measured" / "report.html").read_text()
    assert page.count("<figure") >= 4, "every pair has its own pictures"


def test_subjects_that_cannot_be_told_apart_are_refused(twins: Path, tmp_path: Path) -> None:
    folders = [str(twins / "dog"), str(twins / "bird")]
    pocket = BaseSettings(path="pocket")
    with pytest.raises(TrainingError, match=r"dog and bird are both called 'sks dog', and one adapter serves both"):
        resolve(MeasureSettings(subjects=folders), base=pocket, adapter="(to be trained)")
    assert len(resolve(MeasureSettings(subjects=folders), base=pocket).units) == 2, "a base alone is asked for a class"
    shutil.copytree(twins / "bird", tmp_path / "other" / "dog")
    with pytest.raises(TrainingError, match=r"have one name, by which pictures and rows are told apart"):
        resolve(MeasureSettings(subjects=[folders[0], str(tmp_path / "other" / "dog")]), base=pocket)

"""The configs for downloaded bases run on models of the same families, a few thousand random weights each."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "recipes" / "configs"
NETWORKED = sorted(
    path
    for path in CONFIGS.glob("*/*.yaml")
    if path.parent.name != "accelerate" and yaml.safe_load(path.read_text("utf-8"))["base"]["path"] != "pocket"
)
FAMILIES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "DeepFloyd/IF-I-XL-v1.0": "if",
    "DeepFloyd/IF-II-L-v1.0": "if2",
}


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def family(values: dict) -> str:
    return FAMILIES[values["path"]]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the LoRAs of both subjects on every base, trained a step with that base's config."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def lora(models: Path, photos: Path, loras: Path, done: Callable[..., str]) -> Callable[[str], str]:
    """Trains what is missing of a family; returns the path with {subject} in it."""

    def train(base: str) -> str:
        for subject in ("rex", "mia"):
            out = loras / f"{base}_{subject}"
            if not (out / "lora").is_dir():
                changes = on_tiny(CONFIGS / "dreambooth_lora" / f"{base}_subject.yaml", models, photos)
                source = photos / "dreambooth" / subject
                small = ["--train.steps=1", "--dreambooth.class_prompt=null", "--ship=null"]
                small += ["--tune=null", "--measure=null"]
                done("dreambooth_lora", *changes, f"--data.source={source}", *small, f"--out={out}")
        return str(loras / (base + "_{subject}") / "lora")

    return train


def on_tiny(path: Path, models: Path, photos: Path) -> list[str]:
    """The config, with every name of a download replaced by a folder of the same kind, at 32 pixels in float32."""
    values = yaml.safe_load(path.read_text("utf-8"))
    changes = {"base.path": models / family(values["base"])}
    if "variant" in values["base"]:
        changes["base.variant"] = "null"
    if "upscaler" in values:
        changes |= {"upscaler.path": models / family(values["upscaler"]), "upscaler.variant": "null"}
    if "data" in values:
        place = photos / ("coco" if values["data"]["source"] == "data/coco" else "dreambooth/rex")
        changes |= {"data.source": place, "data.resolution": 32, "data.cache": "memory"}
    for stage in ("train", "sampling"):
        if "precision" in values.get(stage, {}):
            changes[f"{stage}.precision"] = "fp32"
    if isinstance(values.get("controlnet"), str):
        changes["controlnet"] = models / f"controlnet-{family(values['base'])}"
    measure = values.get("measure", {})
    for name in ("targets", "prompt_file", "reference"):
        if name in measure:
            changes[f"measure.{name}"] = photos / Path(measure[name]).relative_to("data")
    if "subjects" in measure:
        several = measure["subjects"] == ["data/dreambooth/*"]
        changes["measure.subjects"] = json.dumps([str(photos / "dreambooth" / ("*" if several else "rex"))])
    if "spaces" in measure:
        changes["measure.spaces"] = json.dumps({name: str(models / name) for name in measure["spaces"]})
    return [f"--config={path}", *(f"--{name}={value}" for name, value in changes.items())]


def test_every_family_has_its_configs() -> None:
    names = {name_of(path) for path in NETWORKED}
    for base in ("sd15", "sd21", "sdxl"):
        for task in ("coco", "dreambooth", "canny", "segmentation"):
            assert f"measure/{base}_{task}.yaml" in names
        assert {f"dreambooth_lora/{base}_subject.yaml", f"controlnet/{base}_canny.yaml"} <= names
    assert {"measure/if_coco.yaml", "sample/if.yaml"} <= names


@pytest.mark.parametrize("path", NETWORKED, ids=name_of)
def test_a_config_checks_out_on_a_tiny_base(path: Path, models, photos, lora, done, tmp_path: Path) -> None:
    training = path.parent.name in ("dreambooth_lora", "controlnet")
    changes = [*on_tiny(path, models, photos), f"--out={tmp_path / 'out'}"]
    if "dreambooth.yaml" in path.name:
        changes.append(f"--adapter={lora(path.name.split('_')[0])}")
    said = done(path.parent.name, *changes, "--train.dry_run=true" if training else "--dry_run=true")
    assert ("parameters train" if training else "would draw") in said
    assert ("tensors of a training step: " in said) == training
    assert not (tmp_path / "out").exists()
    if "dreambooth.yaml" in path.name:
        assert "of mia" in said
        assert "of rex" in said


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "measured" / "per_image.csv").open()))


def test_if_samples_both_stages(models, photos, done, tmp_path: Path) -> None:
    changes = on_tiny(CONFIGS / "sample" / "if.yaml", models, photos)
    done("sample", *changes, "--sampling.steps=2", "--seeds=[1]", f"--out={tmp_path}")
    small, large = (
        {path.name: Image.open(path) for path in (tmp_path / folder).glob("*.png")}
        for folder in ("pictures", "enlarged")
    )
    assert small.keys() == large.keys()
    assert len(small) == 2
    assert {picture.size for picture in small.values()} == {(32, 32)}
    assert {picture.size for picture in large.values()} == {(64, 64)}
    assert len({picture.tobytes() for picture in large.values()}) == 2


def test_if_is_measured(models, photos, done, tmp_path: Path) -> None:
    """Stage I, with arms that differ: pixel-space U-nets have no VAE, and take no latents."""
    changes = on_tiny(CONFIGS / "measure" / "if_coco.yaml", models, photos)
    done("measure", *changes, "--sampling.steps=3", "--measure.sweep=[3.0]", f"--out={tmp_path}")
    shots = {path.parent.name: path.read_bytes() for path in sorted(tmp_path.glob("pictures/*/*.png"))}
    assert set(shots) == {"cfg", "s-cfg", "dose", "cfg-3", "s-cfg-3"}
    pixels = {name: Image.open(next(tmp_path.glob(f"pictures/{name}/*.png"))).tobytes() for name in shots}
    assert len(set(pixels.values())) == len(pixels)
    assert {row["prompt"] for row in rows_of(tmp_path)} == {"a dog in the fog", "a cat"}


@pytest.mark.parametrize("base", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_subjects_are_measured_with_an_adapter_each(base: str, models, photos, lora, done, tmp_path: Path) -> None:
    changes = on_tiny(CONFIGS / "measure" / f"{base}_dreambooth.yaml", models, photos)
    metrics = [
        "similarity (dino)",
        "similarity (clip)",
        "alignment (clip)",
        "diversity (clip)",
        "kernel distance (clip)",
    ]
    done(
        "measure",
        *changes,
        f"--adapter={lora(base)}",
        f"--measure.metrics={json.dumps(metrics)}",
        f"--measure.reference={photos / 'coco'}",
        "--measure.frechet=clip",
        "--measure.sweep=[1.5, 30.0]",
        "--measure.seeds=[1, 2]",
        "--measure.overlays=0",
        "--sampling.steps=2",
        "--sampling.height=32",
        "--sampling.width=32",
        f"--out={tmp_path}",
    )
    rows = rows_of(tmp_path)
    arms = {"base", "CFG", "S-CFG", "dose", "placebo", "pointwise"}
    arms |= {f"{name} @ {scale}" for name in ("CFG", "S-CFG") for scale in ("1.5", "30")}
    assert {row["arm"] for row in rows} == arms
    assert {row["subject"] for row in rows} == {"rex", "mia"}
    assert len(rows) == len(arms) * 2 * 2 * 2
    for metric in metrics:
        values = np.array([float(row[metric]) for row in rows])
        assert np.isfinite(values).all()
        assert np.ptp(values) > 0, f"{metric} tells no two pictures apart"
    ours = {row["subject"]: row["effective scale"] for row in rows if row["arm"] == "S-CFG"}
    assert all(float(value) > 0 for value in ours.values())

    gains = json.loads((tmp_path / "measured" / "gains.json").read_text("utf-8"))
    assert [point["scale"] for point in gains["curves"]["S-CFG"]] == [1.5, 7.5, 30.0]
    assert "against CFG at equal effective scale" in gains["facts"]["at equal effective scale"]
    distances = {name: value for name, value in gains["facts"].items() if name.startswith("Fréchet distance (clip), ")}
    assert len(distances) == len(arms)
    assert all(value.endswith("(n = 8)") for value in distances.values())
    assert gains["design"]["primary"] == "similarity (dino)"
    assert gains["design"]["referee"] == "similarity (clip)"
    assert gains["counts"]["subjects"] == 2
    # The adapters differ, so the subjects' pictures of equal noise do.
    adapted, bare = ({row["prompt"]: row for row in rows if row["arm"] == arm} for arm in ("CFG", "base"))
    assert any(adapted[prompt]["image"] != bare[prompt]["image"] for prompt in bare)


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl"])
def test_a_controlnet_is_measured_on_given_conditions(base: str, models, photos, done, tmp_path: Path) -> None:
    changes = on_tiny(CONFIGS / "measure" / f"{base}_segmentation.yaml", models, photos)
    done(
        "measure",
        *changes,
        "--measure.metrics=[alignment (clip), saturation]",
        "--measure.overlays=1",
        "--sampling.steps=2",
        f"--out={tmp_path}",
    )
    rows = rows_of(tmp_path)
    assert len(rows) == 6 * 3
    pixels = {
        name: Image.open(sorted(tmp_path.glob(f"pictures/{name}/*.png"))[0]).tobytes() for name in ("base", "cfg")
    }
    assert pixels["base"] != pixels["cfg"], "the ControlNet changed nothing"
    assert "regions and gamma over the steps" in (tmp_path / "measured" / "report.html").read_text("utf-8")

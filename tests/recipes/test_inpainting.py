"""Inpainting bases through the recipes: trained, measured on whole pictures, shipped, and painting into a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_bases
from PIL import Image
from test_kinds import trained


@pytest.fixture(scope="module")
def painters(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("painters")
    tiny_bases.inpainting(root / "sd15", models / "sd15")
    tiny_bases.inpainting(root / "unnamed", models / "sd15", named=False)
    return root


@pytest.fixture
def scene(tmp_path: Path) -> list[str]:
    """A picture and a mask over its right half."""
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "scene.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return [f"--sampling.image={tmp_path / 'scene.png'}", f"--sampling.mask={tmp_path / 'mask.png'}"]


def test_a_subject_is_taught_measured_and_shipped(painters: Path, photos: Path, done, scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--lora.rank=2", "--dreambooth.class_prompt=a dog", "--dreambooth.class_images=2", "--dreambooth.steps=1"]
    release = trained(done, painters, photos, out, "dreambooth_lora", *more)
    card = (release / "README.md").read_text("utf-8")
    assert "image=picture, mask_image=mask, strength=1.0" in card
    shots = sorted((out / "pictures").rglob("*.png"))
    assert len(shots) == 4  # two arms, two prompts, one seed
    base, drawn = f"--base.path={painters / 'sd15'}", f"--out={tmp_path / 'drawn'}"
    done("sample", base, f"--adapter={release}", "--prompts=[a c]", "--sampling.steps=2", *scene, drawn)
    whole = f"--out={tmp_path / 'whole'}"
    done("sample", base, f"--adapter={release}", "--prompts=[a c]", "--sampling.steps=2", whole)
    one, other = (next((tmp_path / name / "pictures").glob("*.png")) for name in ("drawn", "whole"))
    assert not np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))


def test_a_folder_that_calls_itself_text_to_image_paints_too(painters: Path, done, call, scene, tmp_path) -> None:
    base = f"--base.path={painters / 'unnamed'}"
    plain = [base, "--prompts=[a c]", "--sampling.steps=1", f"--out={tmp_path / 'out'}"]
    done("sample", *plain, *scene)
    said = call("sample", *plain)
    assert said.code == 2
    assert "was sampled with other settings (painted)" in said.err


def test_pictures_for_other_bases_and_bad_ones_are_one_line(
    models: Path, painters: Path, call, scene, tmp_path
) -> None:
    def refused(base: Path, *more: str) -> str:
        said = call(
            "sample", f"--base.path={base}", "--prompts=[a c]", "--dry_run=true", *more, f"--out={tmp_path / 'out'}"
        )
        assert said.code == 2
        [line] = [line for line in said.err.splitlines() if line.strip()]
        return line

    assert "is for inpainting models" in refused(models / "sd15", *scene)
    assert "belong together" in refused(painters / "sd15", scene[0])
    gone = f"--sampling.mask={tmp_path / 'gone.png'}"
    assert "sampling.mask: " in refused(painters / "sd15", scene[0], gone)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "sampling.image: " in refused(painters / "sd15", f"--sampling.image={tmp_path / 'bad.png'}", scene[1])
    said = call(
        "measure",
        f"--base.path={painters / 'sd15'}",
        f"--controlnet={models / 'controlnet-sd15'}",
        "--measure.targets=pocket",
        "--measure.control=canny",
        f"--out={tmp_path / 'out'}",
    )
    assert said.code == 2
    assert "is an inpainting model, with which a ControlNet is not sampled here" in said.err

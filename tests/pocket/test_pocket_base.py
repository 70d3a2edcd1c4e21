"""The shipped base, ControlNets and judge: ordinary folders, reproducible pictures, damage named."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from training import pocket
from training.pocket import scenes
from training.pocket.control import scene_condition
from training.pocket.judging import AT_ONCE
from training.pocket.making import evaluate, fit_judge
from training.pocket.making.ship import LIMITS
from training.pocket.world import CONTROLS


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return evaluate.shipped_pipeline()


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, int) for image in images])


def test_the_folder_is_an_ordinary_pipeline_and_loads_at_once() -> None:
    folder = pocket.base_path()
    begin = time.perf_counter()
    loaded = DiffusionPipeline.from_pretrained(folder)
    took = time.perf_counter() - begin
    assert type(loaded) is StableDiffusionPipeline
    assert {type(part).__name__ for part in (loaded.vae, loaded.unet, loaded.text_encoder)} == {
        "AutoencoderKL",
        "UNet2DConditionModel",
        "CLIPTextModel",
    }
    assert {p.dtype for part in (loaded.vae, loaded.unet, loaded.text_encoder) for p in part.parameters()} == {
        torch.float32
    }
    assert took < 3


@pytest.mark.parametrize(("folder", "limit"), LIMITS.items())
def test_sizes(folder: str, limit: float) -> None:
    assert 0 < sum(path.stat().st_size for path in (pocket.DATA / folder).rglob("*") if path.is_file()) <= limit


def test_no_pickles_ship() -> None:
    assert not [path for path in pocket.DATA.rglob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


def test_the_same_seed_makes_the_same_pictures_in_any_batch(pipe) -> None:
    prompts, seeds = evaluate.single_prompts(0)[:4], [7, 8, 9, 10]
    together = pixels(evaluate.generate(pipe, prompts, seeds, batch=4))
    assert (together == pixels(evaluate.generate(pipe, prompts, seeds, batch=4))).all()
    assert np.abs(together - pixels(evaluate.generate(pipe, prompts, seeds, batch=1))).max() <= 1
    assert (together != pixels(evaluate.generate(pipe, prompts, [17, 18, 19, 20], batch=4))).any()


def test_the_vae_keeps_held_out_scenes(pipe) -> None:
    """What the card says, less the spread of a small sample."""
    assert evaluate.fit_vae.psnr(pipe.vae, 32) > card_figures()["reconstruction"]["psnr"] - 0.5


def test_the_judge_reads_held_out_scenes() -> None:
    said, now = card_figures()["reconstruction"]["judge on scenes"], fit_judge.accuracy(pocket.judge(), 128)
    for name in ("objects", "colors", "backgrounds", "pixels"):
        assert now[name] > said[name] - 0.04, name


def test_prompts_steer_the_pictures(pipe) -> None:
    """The judge sees the object and the background asked for, where 32 and eight could be."""
    scores = evaluate.prompt_scores(pipe, evaluate.single_prompts(3)[:8], 40)
    assert min(scores["objects"], scores["backgrounds"]) >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS)
def test_a_controlnet_is_followed(pipe, control: str) -> None:
    found = evaluate.controlled(pipe, control, count=16)
    assert found["with"] > found["without"] + 0.1


@pytest.mark.parametrize("control", CONTROLS)
def test_a_controlnet_takes_its_condition(pipe, control: str) -> None:
    network = ControlNetModel.from_pretrained(pocket.controlnet_path(control))
    image = pipe.image_processor.preprocess(scene_condition(scenes.sample(scenes.HELD_OUT_SEED, 0), control)) / 2 + 0.5
    down, middle = network(
        torch.zeros(1, 8, 16, 16), 500, torch.zeros(1, 20, 128), controlnet_cond=image, return_dict=False
    )
    assert any(part.abs().max() > 0 for part in (*down, middle))  # not as it was initialised


def card_figures() -> dict:
    return json.loads((pocket.DATA / "figures.json").read_text())


@pytest.fixture
def copy(tmp_path: Path, monkeypatch) -> Path:
    """The shipped data, to be damaged."""
    shutil.copytree(pocket.DATA, tmp_path / "data")
    monkeypatch.setattr(pocket, "DATA", tmp_path / "data")
    forget()
    yield tmp_path / "data"
    forget()


def forget() -> None:
    pocket.manifest.cache_clear()
    pocket._checked.cache_clear()
    pocket._unpacked.cache_clear()


WEIGHTS = Path(pocket.VERSION) / "unet" / "diffusion_pytorch_model.safetensors"


def test_damaged_weights_are_named(copy: Path) -> None:
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copy / WEIGHTS).write_bytes(data)
    with pytest.raises(pocket.PocketError, match=r"unet.*is damaged.*git checkout"):
        pocket.base_path()


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(pocket.PocketError, match=r"unet.*is missing.*git checkout"):
        pocket.base_path()


@pytest.mark.parametrize("text", [None, "{"])
def test_a_missing_or_broken_manifest_is_named(copy: Path, text: str | None) -> None:
    (copy / "manifest.json").unlink()
    if text:
        (copy / "manifest.json").write_text(text)
    with pytest.raises(pocket.PocketError, match=r"manifest\.json"):
        pocket.base_path()


def test_a_controlnet_is_unpacked_once_and_again_where_the_copy_was_changed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    folder = pocket.controlnet_path("canny")
    assert tmp_path in folder.parents
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole, written = weights.read_bytes(), weights.stat().st_mtime_ns
    forget()
    assert pocket.controlnet_path("canny") == folder
    assert weights.stat().st_mtime_ns == written  # not made again
    for spoil in (lambda: weights.write_bytes(whole[:-1]), weights.unlink):
        spoil()
        forget()
        assert pocket.controlnet_path("canny") == folder
        assert weights.read_bytes() == whole
    forget()


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    forget()
    with pytest.raises(pocket.PocketError, match=r"cannot be unpacked into .*XDG_CACHE_HOME"):
        pocket.controlnet_path("canny")


def test_an_unknown_controlnet_is_refused() -> None:
    with pytest.raises(pocket.PocketError, match="'depth'; there are canny, segmentation"):
        pocket.controlnet_path("depth")


def test_the_hash_changes_with_the_weights(copy: Path) -> None:
    before = pocket.base_hash()
    listed = json.loads((copy / "manifest.json").read_text())
    listed["files"][WEIGHTS.as_posix()]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(listed))
    forget()
    assert pocket.base_hash() != before


def test_the_judge_looks_at_any_number_of_pictures_alike() -> None:
    """A few at a time, or a large reference would need gigabytes."""
    drawn = [scenes.sample(scenes.HELD_OUT_SEED, index) for index in range(2 * AT_ONCE + 3)]
    pictures = [Image.fromarray(one.image) for one in drawn]
    masks = torch.from_numpy(np.stack([one.masks[0] for one in drawn]))
    ours = pocket.judge()
    alone = [ours.features([picture], mask[None]) for picture, mask in zip(pictures, masks, strict=True)]
    assert torch.allclose(ours.features(pictures, masks), torch.cat(alone), atol=1e-4)
    segments = torch.cat([ours.segment([picture]) for picture in pictures])
    assert float((ours.segment(pictures) == segments).float().mean()) > 0.999
    prompts = [one.caption for one in drawn]
    assert [round(score.mean, 3) for score in ours.scores(pictures, prompts)] == [
        round(ours.scores([picture], [prompt])[0].mean, 3) for picture, prompt in zip(pictures, prompts, strict=True)
    ]

"""`sampling.precision: auto` on a CPU, and `sampling.offload`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_bases
import torch
from safetensors.torch import load_file, save_file

import adapters
from adapters.measuring.sample import read
from adapters.placement import is_moved
from recipes.common import draw, precision
from recipes.common.base import adapted, sampling_pipeline
from recipes.common.settings import GuidanceSettings, SamplingSettings, ScopeSettings
from training.config import BaseSettings
from training.pocket import base_path

ROOT = Path(__file__).resolve().parents[2]
GUIDED = GuidanceSettings(method="semantic", guidance_scale=3.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseSettings:
    return BaseSettings(path=str(tiny_bases.sd(tmp_path_factory.mktemp("base"))))


def drawn(base: BaseSettings, name: str, folder: Path) -> tuple[list[np.ndarray], str]:
    sampling = SamplingSettings(precision=name, steps=2, batch_size=2)  # type: ignore[arg-type]
    pipe = sampling_pipeline(base, sampling)
    before = adapters.describe(pipe)
    shots = draw.draw_shots(pipe, ["a dog", "a cat"], [1], GuidanceSettings(guidance_scale=3), sampling, folder, None)
    if name == "auto":
        assert {one.dtype for one in pipe.unet.parameters()} == {torch.float32}
        assert adapters.describe(pipe) == before
    [first, _] = sorted(folder.glob("*.png"))
    return [np.asarray(shot.image, dtype=float) for shot in shots], read(first)[1]["precision"]


@pytest.mark.parametrize(("ratio", "chosen"), [(0.5, "bf16"), (1.0, "fp32")])
def test_auto_draws_as_what_it_chose(
    ratio: float, chosen: str, base: BaseSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    sampling = SamplingSettings(precision="auto", steps=2, batch_size=2)
    said: list[str] = []
    first = precision.of_sampling(sampling_pipeline(base, sampling), sampling, said.append)
    [place] = (tmp_path / "user cache" / "scfg-toolkit" / "precision").iterdir()
    assert said == [line for line in said if line.startswith(f"sampling.precision auto: {first}; bfloat16 takes ")]
    place.write_text(json.dumps({"time of bf16 / fp32": ratio}), "utf-8")
    found, name = drawn(base, "auto", tmp_path / "auto")
    wanted, _ = drawn(base, chosen, tmp_path / "wanted")
    assert name == chosen
    # Loading in bfloat16 and rounding what was loaded are the same weights.
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket base with latents that overflow in float16 before they are decoded, and in float32 do not."""
    folder = tmp_path_factory.mktemp("overflowing") / "base"
    shutil.copytree(base_path(), folder)
    [file] = (folder / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights |= {name: torch.full_like(weights[name], 6e4) for name in weights if name.startswith("post_quant_conv.")}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["sample", "measure", "tune", "controlled"])
def test_pictures_with_nan_are_an_error(name: str, overflowing: Path, tmp_path: Path, call) -> None:
    given = {
        "sample": ["--prompts=[a dog]"],
        "measure": ["--measure.prompts=[a dog, a cat]", "--measure.metrics=[contrast]", "--measure.seeds=[1]"],
        "tune": ["--measure.prompts=[a dog, a cat]", "--measure.metrics=[contrast]", "--tune.prompts=[a car]"],
        "controlled": ["--controlnet=pocket-canny", f"--pictures={ROOT / 'recipes' / 'subjects' / 'teapot'}"],
    }
    words = [f"--base.path={overflowing}", "--sampling.steps=2", "--sampling.batch_size=1", f"--out={tmp_path / 'out'}"]
    said = call(name, *given[name], *words, "--sampling.precision=fp16")
    assert said.code == 2
    assert said.err.splitlines()[-1].startswith("error: the pictures are NaN")
    assert "set sampling.precision fp16 to fp32 (float32) or bf16" in said.err
    assert not list(tmp_path.rglob("*.png"))


def test_in_float32_nan_is_blamed_on_other_things(base: BaseSettings) -> None:
    sampling = SamplingSettings(steps=1)
    pipe = sampling_pipeline(base, sampling)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(torch.nan)
    with pytest.raises(adapters.AdapterError, match="drawn in float32: the adapter or the base is damaged"):
        draw.draw_shots(pipe, ["a dog"], [1], GuidanceSettings(method="cfg"), sampling, None, None)


def test_a_region_is_found_in_a_base_whose_weights_are_rounded(base: BaseSettings) -> None:
    """As training in bf16 rounds them before it caches, and as class images are looked at that were drawn so."""
    from recipes.common.base import load_base
    from recipes.common.region_mask import region_of
    from training.precision import lowered

    parts = load_base(base)
    latents = torch.randn(parts.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    entry = {"mean": latents, "frame": torch.tensor([32, 32, 0, 0, 32, 32.0])}
    region = region_of("dog")
    plain = region(parts, entry, "a dog on the grass")
    with lowered([parts.unet, *parts.text_encoders], torch.bfloat16, trained=True):
        rounded = region(parts, entry, "a dog on the grass")
    assert 0 < float(plain.mean()) < 1
    assert float((plain != rounded).float().mean()) < 0.1


def test_class_images_have_the_precision_of_sampling_and_auto_tries_nothing_on_a_cpu() -> None:
    for name, drawn_in in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16"), ("auto", "fp32")):
        assert precision.class_precision(SamplingSettings(precision=name)) == drawn_in  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", [None, ScopeSettings(where="subject")])
def test_offload_draws_the_same_pictures(scope: ScopeSettings | None) -> None:
    """The parts of the base take turns, from the CPU to the CPU, with an adapter, its place and S-CFG on them."""
    found = []
    for offload in (False, True):
        sampling = SamplingSettings(steps=2, batch_size=2, offload=offload)
        pipe = sampling_pipeline(BaseSettings(path="pocket"), sampling)
        assert is_moved(pipe.unet) == is_moved(pipe.vae) == offload
        with adapted(pipe, ROOT / "recipes" / "zoo" / "teapot", scope=scope, identifier="sks", noun="teapot"):
            shots = draw.draw_shots(pipe, ["a sks teapot", "a sks teapot and a cat"], [1], GUIDED, sampling, None, None)
        found.append([np.asarray(shot.image, dtype=float) for shot in shots])
    for whole, in_turns in zip(*found, strict=True):
        assert np.abs(whole - in_turns).max() <= 1  # a scope's merged weights are not kept beside offloaded ones

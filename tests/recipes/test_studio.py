"""The studio: pictures of one noise, a guider that ships with its adapter, and the page in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import adapters
import scfg
from adapters import files, signing
from recipes.common.base import sampling_pipeline
from recipes.common.guidance import guider_of
from recipes.common.settings import GuidanceSettings, SamplingSettings, ScopeSettings
from recipes.studio import Settings, _opened, _plainly, build_page, draw_pair, opening, run, save_guider, watched
from training.config import BaseSettings
from training.errors import TrainingError
from training.pocket import VERSION
from training.sheet import write_sheet

ROOT = Path(__file__).resolve().parents[2]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
PROMPT, FEW = "a red dog and a blue cat on the grass", SamplingSettings(steps=2)
TUNED = GuidanceSettings(
    guidance_scale=4.0, options={"gamma_max": None, "stop": 0.8, "tokens": "prompt", "latent_ratio": 2}
)


@pytest.fixture(scope="module")
def pipe():
    return sampling_pipeline(BaseSettings(path="pocket"), FEW)


@pytest.fixture(scope="module")
def shipped(pipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a LoRA on one layer."""
    place = tmp_path_factory.mktemp("shipped")
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_k"))
    draws = torch.Generator().manual_seed(0)
    shapes = {"A": (2, layer.in_features), "B": (layer.out_features, 2)}
    tensors = {f"unet.{name}.lora_{part}.weight": torch.randn(shapes[part], generator=draws) for part in shapes}
    save_file(tensors, place / "lora.safetensors")
    card = adapters.Card(title="A dog", base_model=VERSION, license="apache-2.0")
    return adapters.ship.ship(
        place / "release", weights=place / "lora.safetensors", base=adapters.describe(pipe), card=card
    )


@pytest.fixture
def release(shipped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shipped, tmp_path / "release"))


def same(one: Image.Image, other: Image.Image) -> bool:
    return bool((np.asarray(one) == np.asarray(other)).all())


# ---------------------------------------------------------------------------------------------- what it does


def test_a_pair_has_one_noise_two_pictures_and_a_strip(pipe, release: Path) -> None:
    pair = draw_pair(pipe, PROMPT, 3, GuidanceSettings(guidance_scale=4.0), FEW)
    assert pair.plain.key == pair.guided.key
    assert not same(pair.plain.image, pair.guided.image)
    assert pair.plain.numbers == {"effective scale": 4.0}
    assert f"{pair.guided.numbers['effective scale']:.2f}" in pair.line
    assert pair.strip is not None
    assert pair.strip.width > 2 * pair.strip.height / 4
    other = draw_pair(pipe, PROMPT, 3, GuidanceSettings(guidance_scale=4.0), FEW, str(release))
    assert other.plain.latents == pair.plain.latents
    assert not same(other.plain.image, pair.plain.image)
    again = draw_pair(pipe, PROMPT, 3, GuidanceSettings(guidance_scale=4.0), FEW)  # the adapter is off again
    assert same(again.guided.image, pair.guided.image)


@pytest.mark.parametrize("method", ["cfg", "pointwise", "interval", "dose"])
def test_every_method_draws(pipe, method: str) -> None:
    pair = draw_pair(pipe, PROMPT, 3, GuidanceSettings(method=method, guidance_scale=4.0), FEW)
    assert same(pair.plain.image, pair.guided.image) == (method == "cfg")
    assert (pair.strip is not None) == (method == "dose")
    assert ("no strip" in pair.line) == (pair.strip is None)


@pytest.mark.parametrize(("prompt", "scale", "said"), [(" ", 4.0, "no prompt"), (PROMPT, 1.0, "above 1")])
def test_what_cannot_be_compared_is_said(pipe, prompt: str, scale: float, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        draw_pair(pipe, prompt, 3, GuidanceSettings(guidance_scale=scale), FEW)


def test_a_rescale_is_the_pipelines_own(pipe) -> None:
    own = partial(pipe, PROMPT, guidance_scale=4.0, num_inference_steps=FEW.steps, guidance_rescale=0.7)
    asked = GuidanceSettings(guidance_scale=4.0, rescale=0.7)
    pair = draw_pair(pipe, PROMPT, 3, asked, FEW)
    assert same(pair.plain.image, own(generator=torch.Generator().manual_seed(3)).images[0])
    with scfg.attach(pipe, scfg.SemanticCFG()):
        assert same(pair.guided.image, own(generator=torch.Generator().manual_seed(3)).images[0])
    assert not same(pair.plain.image, draw_pair(pipe, PROMPT, 3, replace(asked, rescale=None), FEW).plain.image)


@pytest.mark.parametrize(
    "guidance", [TUNED, GuidanceSettings(method="cfg", guidance_scale=3.0, rescale=0.7)], ids=lambda g: g.method
)
def test_a_saved_guider_is_read_back_and_the_release_verifies(release: Path, guidance: GuidanceSettings) -> None:
    (release / "notes.txt").write_text("mine")
    before = files.read_manifest(release)
    said = save_guider(str(release), guidance)
    assert str(release / "guider_config.json") in said
    read = scfg.read_config(json.loads((release / "guider_config.json").read_text()))
    assert read.guidance == scfg.make_guidance(guidance.method, **guidance.options)
    assert (read.guidance_scale, read.guidance_rescale) == (guidance.guidance_scale, guidance.rescale or 0.0)
    after = files.verify_folder(release)
    assert set(after["files"]) == {*before["files"], "guider_config.json"}  # a note is kept, and not shipped
    assert (release / "notes.txt").read_text() == "mine"
    assert {**after, "files": 0} == {**before, "files": 0}
    assert {path.name for path in release.parent.iterdir()} == {"release"}


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_a_guider_saved_into_a_signed_release_takes_the_signature_with_it(release: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    signing.sign(release, key)
    assert signing.checked_signature(release, f"{key}.pub").startswith("by ")
    assert "it is unsigned now" in save_guider(str(release), TUNED)
    assert signing.checked_signature(release) == "unsigned"
    with pytest.raises(adapters.SignatureError, match="unsigned; get a signed release"):
        signing.checked_signature(release, f"{key}.pub")
    assert files.verify_folder(release)["files"]
    assert "unsigned" not in save_guider(str(release), TUNED)  # it has lost no signature this time


def test_an_altered_release_is_not_vouched_for(release: Path) -> None:
    (release / "README.md").write_text("something else")
    before = {path: path.read_bytes() for path in release.rglob("*") if path.is_file()}
    with pytest.raises(adapters.FileError, match=r"README\.md is not the file"):
        save_guider(str(release), TUNED)
    assert {path: path.read_bytes() for path in release.rglob("*") if path.is_file()} == before


def test_without_a_release_only_a_folder_of_weights_takes_a_guider(release: Path, tmp_path: Path) -> None:
    (release / "manifest.json").unlink()
    assert "no manifest.json" in save_guider(str(release), TUNED)
    assert scfg.read_config(json.loads((release / "guider_config.json").read_text())).guidance_scale == 4.0
    weights = next(release.glob("*.safetensors"))
    (tmp_path / "empty").mkdir()
    for adapter in ("", "someone/something", str(weights), str(tmp_path / "empty")):
        with pytest.raises(TrainingError, match="adapter"):
            save_guider(adapter, TUNED)
    assert not list((tmp_path / "empty").iterdir())


def test_the_base_stands_beside_the_adapter_whose_weight_and_scope_are_its_own(pipe, release: Path) -> None:
    alone = draw_pair(pipe, PROMPT, 3, GuidanceSettings(guidance_scale=4.0), FEW)
    assert alone.base is None
    full = draw_pair(pipe, PROMPT, 3, GuidanceSettings(guidance_scale=4.0), FEW, str(release))
    assert same(full.base.image, alone.plain.image)
    assert not same(full.plain.image, full.base.image)
    none = draw_pair(pipe, PROMPT, 3, GuidanceSettings(guidance_scale=4.0, weight=0.0), FEW, str(release))
    assert np.allclose(none.plain.image, none.base.image, atol=1)
    late = GuidanceSettings(guidance_scale=4.0, scope=ScopeSettings(start=0.5))
    assert not same(draw_pair(pipe, PROMPT, 3, late, FEW, str(release)).plain.image, full.plain.image)
    where = GuidanceSettings(guidance_scale=4.0, scope=ScopeSettings(where="subject"))
    with pytest.raises(TrainingError, match=r"the adapter's card names none"):
        draw_pair(pipe, PROMPT, 3, where, FEW, str(release))


def test_an_error_keeps_its_words_on_the_page() -> None:
    said = _plainly("Not drawn", TrainingError("a_b *c* `d` [e](f)\n<g>"))
    assert said == r"**Not drawn:** a\_b \*c\* \`d\` \[e\](f) \<g\>"


def test_the_page_opens_with_what_the_release_says() -> None:
    zoo = ROOT / "recipes" / "zoo" / "teapot"
    found = opening(str(zoo))
    assert found.trigger == "sks teapot"
    assert found.prompts[0] == "a sks teapot in the sea"
    config = json.loads((zoo / "guider_config.json").read_text())
    assert found.guidance is not None
    assert (found.guidance.method, found.guidance.guidance_scale) == (config["method"], config["guidance_scale"])
    guidance, prompt = _opened(Settings(adapter=str(zoo)))
    assert prompt == found.prompts[0]
    assert (guidance.method, guidance.guidance_scale) == ("semantic", config["guidance_scale"])
    assert _opened(Settings(adapter=str(zoo), guidance=TUNED))[0] == TUNED, "the command line comes first"
    assert _opened(Settings()) == (GuidanceSettings(), PROMPT)


def test_a_shipped_guider_is_read_back_as_the_settings_it_came_from(release: Path) -> None:
    asked = replace(TUNED, scope=ScopeSettings(uncond_weight=0.5, stop=0.8))
    save_guider(str(release), asked)
    read = opening(str(release)).guidance
    assert read is not None
    assert read.scope == asked.scope
    assert guider_of(read) == guider_of(asked)


def validated(run: Path, step: int, color: str) -> Path:
    """A validation's picture, and the sheet with it."""
    folder = run / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), color).save(folder / "00.png")
    sheet = write_sheet(run / "samples", ["a dog"])
    assert sheet is not None
    return sheet


def test_a_training_is_watched_as_its_sheet_grows(tmp_path: Path) -> None:
    run = tmp_path / "my_run"
    assert "Name the folder of a training" in watched(" ")[1]
    assert watched(str(run))[::2] == (None, "")
    assert "There is no folder" in watched(str(run))[1]
    run.mkdir()
    line = watched(str(run))[1]
    assert "No sheet of samples in" in line
    assert r"my\_run yet. A training writes it before its first step and at every validation" in line
    sheet = validated(run, 0, "red")
    image, line, mark = watched(str(run))
    assert image is not None
    assert same(image, Image.open(sheet).convert("RGB"))
    assert "sheet.png, written at " in line
    assert watched(str(run), mark) == (None, line, mark)  # the picture is sent once
    validated(run, 10, "blue")
    grown, _, later = watched(str(run), mark)
    assert later != mark
    assert grown is not None
    assert grown.height > image.height
    other = validated(tmp_path / "other", 0, "green")
    os.utime(other, (2**31, 2**31))
    newest, line, _ = watched(str(tmp_path))  # of all runs in a folder
    assert newest is not None
    assert same(newest, Image.open(other).convert("RGB"))
    os.utime(sheet, (2**31 + 1, 2**31 + 1))
    assert "run/samples" in watched(str(tmp_path))[1]


def test_a_sheet_that_cannot_be_read_is_said_until_there_is_a_whole_one(tmp_path: Path) -> None:
    sheet = validated(tmp_path, 0, "red")
    sheet.write_bytes(sheet.read_bytes()[:40])
    image, line, mark = watched(str(tmp_path), "what was shown before")
    assert (image, mark) == (None, "")
    assert line.startswith("**Not shown:** ")
    validated(tmp_path, 10, "blue")
    assert watched(str(tmp_path), mark)[0] is not None
    assert watched("~nobody-here/run")[1].startswith("**Not shown:** ")


# ---------------------------------------------------------------------------------------------- the page


def test_without_gradio_one_line_says_what_to_install(recipe, tmp_path: Path) -> None:
    (tmp_path / "gradio").mkdir()
    (tmp_path / "gradio" / "__init__.py").write_text("raise ImportError('not here')\n")
    done = recipe("studio", "--base.path", "pocket", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("pip install -e '.[studio]' in the checkout")
    assert "Traceback" not in done.stderr


def test_the_page_starts_with_the_guiders_own_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio", reason="the studio's page needs gradio: pip install -e '.[studio]'")
    shown = {part.elem_id: part for part in build_page(gradio, Settings()).blocks.values() if hasattr(part, "value")}
    for name in ("latent_ratio", "gamma_min", "gamma_max", "smoothing_sigma", "start", "stop", "tokens", "completion"):
        assert shown[name].value == getattr(scfg.SemanticCFG(), name), name
    assert [value for _, value in shown["method"].choices] == list(scfg.METHODS)


def test_a_tick_sends_the_sheet_once_and_only_of_a_folder_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio", reason="the studio's page needs gradio: pip install -e '.[studio]'")
    page = build_page(gradio, Settings(watch=str(tmp_path)))
    (timer,) = (part for part in page.blocks.values() if isinstance(part, gradio.Timer))
    assert timer.active
    look = next(one.fn for one in page.fns.values() if (timer._id, "tick") in one.targets)
    empty, line, mark, ticks = look(str(tmp_path), "")
    assert (empty["visible"], empty["value"], mark, ticks["active"]) == (False, None, "", True)
    assert "No sheet of samples in" in line
    validated(tmp_path, 0, "red")
    shown, _, mark, _ = look(str(tmp_path), "")
    assert shown["visible"]
    assert isinstance(shown["value"], Image.Image)
    again, _, same_mark, _ = look(str(tmp_path), mark)
    assert same_mark == mark
    assert "value" not in again
    assert look("", mark)[3]["active"] is False
    idle = next(part for part in build_page(gradio, Settings()).blocks.values() if isinstance(part, gradio.Timer))
    assert not idle.active


def test_a_port_in_use_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio", reason="the studio's page needs gradio: pip install -e '.[studio]'")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(TrainingError, match="--port"):
        run(Settings(port=taken.getsockname()[1]))


@pytest.fixture
def studio(release: Path, tmp_path: Path) -> Iterator[str]:
    """Address of a running studio, which watches the training `tmp_path / "run"`."""
    pytest.importorskip("gradio", reason="the studio's page needs gradio: pip install -e '.[studio]'")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "recipes" / "studio.py"), "--base.path", "pocket", "--sampling.steps", "2"]
    command += ["--adapter", str(release), "--port", str(port), "--watch", str(tmp_path / "run")]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert f"http://127.0.0.1:{port}" in server.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; Debian has it as package chromium")
def test_in_a_browser(studio: str, release: Path, tmp_path: Path) -> None:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright (no browser of its own)")
    asked: list[str] = []
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(studio)

        def draw(*, known: bool = False) -> tuple[str, str]:
            if known:  # the browser has these pictures and asks for none
                page.click("#draw")
            else:
                with page.expect_response(lambda answer: answer.url.endswith(".png") and answer.ok):
                    page.click("#draw")
            page.wait_for_selector(".progress-text", state="detached")
            page.wait_for_function(
                "() => ['base', 'left', 'right', 'strip'].every("
                "n => document.querySelector(`#${n} img`)?.naturalWidth > 0)"
            )
            left, right = (page.get_attribute(f"#{side} img", "src") for side in ("left", "right"))
            return left, right

        page.wait_for_selector("#watched >> text=There is no folder")
        validated(tmp_path / "run", 0, "red")  # nothing is clicked: a tick shows it
        page.wait_for_selector("#watched >> text=sheet.png, written at")
        tall = "() => document.querySelector('#sheet img')?.naturalHeight"
        page.wait_for_function(f"({tall})() > 0")
        height = page.evaluate(tall)
        validated(tmp_path / "run", 10, "blue")
        page.wait_for_function(f"old => ({tall})() > old", arg=height)
        page.fill("#prompt textarea", PROMPT)
        first = draw()
        assert "effective guidance scale" in page.inner_text("#line")
        page.focus("#smoothing_sigma input[type=range]")
        for _ in range(10):
            page.keyboard.press("ArrowRight")
        second = draw()
        page.wait_for_function("old => document.querySelector('#right img').src !== old", arg=first[1])
        assert second[0] == first[0]  # plain CFG has no such setting
        before = files.read_manifest(release)
        page.click("#save")
        page.click("#keep")
        page.wait_for_selector("#sure", state="hidden")
        assert files.read_manifest(release) == before, "it asks before it saves"
        page.click("#save")
        page.click("#sure")
        page.wait_for_selector("#saved >> text=saved")
        assert page.inner_text("#stale").strip() == ""
        page.fill("#prompt textarea", " ")
        page.wait_for_selector("#stale >> text=drawn before something was changed")
        page.click("#draw")
        page.wait_for_selector("#line >> text=Not drawn: there is no prompt")
        for name in ("base", "left", "right", "strip"):  # nothing looks as if it were what is asked for now
            page.wait_for_selector(f"#{name} img", state="detached")
        assert page.inner_text("#stale").strip() == ""
        page.fill("#prompt textarea", PROMPT)
        page.click("#where input")
        page.click("text=the subject's region")
        page.click("#draw")
        page.wait_for_selector("#line >> text=the adapter's card names none")
        page.click("#where input")
        page.click("text=everywhere")
        assert draw(known=True)[0] == first[0]
        size = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        browser.close()
    assert size[0] <= size[1]
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {
        urlsplit(studio).netloc
    }
    files.verify_folder(release)
    saved = scfg.read_config(json.loads((release / "guider_config.json").read_text()))
    assert saved.guidance == scfg.SemanticCFG(smoothing_sigma=1.0)

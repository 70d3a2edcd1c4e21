"""The demo goes the whole way, and what it ships is read by plain diffusers."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import figures
import numpy as np
import pytest
import torch
from PIL import Image

import adapters
import scfg
from training.pocket import base_path

RELEASE = {
    "README.md",
    "adapter_model.safetensors",
    "config.yaml",
    "gains.json",
    "guider_config.json",
    "per_image.csv",
    "pytorch_lora_weights.safetensors",
    "report.html",
    "samples",
}
MEASURED = {"gains.json", "per_image.csv", "report.html", "settings.yaml", "sheet.png"}


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest, in grey levels."""
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def pocket_pipeline():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_ships_a_verified_folder_and_says_what_to_open(demo) -> None:
    out, said = demo
    assert {path.name for path in (out / "release").iterdir()} >= RELEASE
    assert adapters.measuring.verify.verify(out / "release")["kind"] == "lora"
    assert f"Open {out / 'release' / 'report.html'}" in said
    for line in (
        "Adapter: ",
        "Guidance: ",
        "S-CFG",
        "prompt accuracy",
        "subject similarity",
        "s in all",
    ):
        assert line in said
    for stage in ("training", "tuning", "measuring", "shipping"):
        assert re.search(rf"^{stage} took \d+ s; peak memory so far \d\.\d GiB$", said, re.M), stage


def test_every_stage_leaves_what_the_next_one_reads(demo) -> None:
    out, _ = demo
    assert {path.name for path in (out / "measured").iterdir()} == MEASURED
    assert {path.name for path in (out / "tuned").iterdir()} == {"guider_config.json", "tuned.json"}
    tuned = json.loads((out / "tuned" / "tuned.json").read_text())
    assert set(tuned["best"]) == {"CFG", "S-CFG placed"}
    assert tuned["adapter"] == str(out / "lora")
    assert Image.open(out / "measured" / "sheet.png").size[0] > 6 * 128


def test_the_table_has_every_picture_once_and_the_report_says_where_gamma_was(demo) -> None:
    out, _ = demo
    rows = list(csv.DictReader((out / "measured" / "per_image.csv").open()))
    drawn = {path.parent.name for path in (out / "pictures" / "dog").rglob("*.png")}
    assert drawn == {"cfg", "s-cfg-placed"}
    base = list((out / "class_pictures").rglob("*.png"))
    assert len(rows) == len(list((out / "pictures").rglob("*.png"))) + len(base) == 3 * 2
    asked = {adapters.measuring.sample.read(file)[0].prompt for file in base}
    named = {row["prompt"] for row in rows if row["arm"] == "base"}
    assert asked == {prompt.replace("sks ", "") for prompt in named}
    assert named == {row["prompt"] for row in rows if row["arm"] == "CFG"}
    gains = json.loads((out / "measured" / "gains.json").read_text())
    assert gains["facts"]["base"] == "pocket"
    assert gains["format"] == 3
    assert [one["arm"] for one in gains["plane"]["points"] if one["plain"]] == ["base", "CFG"]
    assert "<h2>The subject</h2>" in (out / "measured" / "report.html").read_text("utf-8")
    text = (out / "measured" / "report.html").read_text("utf-8")
    assert figures.unexplained(text) == []
    assert figures.labels(text)
    assert figures.overlaps(text) == []
    for page in (out / "measured" / "report.html", out / "release" / "report.html"):
        assert "regions and gamma over the steps" in page.read_text("utf-8")


def test_plain_diffusers_makes_the_shipped_pictures(demo) -> None:
    out, _ = demo
    files = sorted((out / "pictures" / "dog" / "cfg").glob("*.png"))
    assert len(files) == 2
    pipe = pocket_pipeline()
    pipe.load_lora_weights(out / "release")
    for shot, settings in map(adapters.measuring.sample.read, files):
        image = pipe(
            shot.prompt,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            generator=torch.Generator().manual_seed(shot.seed),
        ).images[0]
        assert difference(image, shot.image) <= 1
    pipe.unload_lora_weights()
    bare = pipe(
        shot.prompt,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        generator=torch.Generator().manual_seed(shot.seed),
    ).images[0]
    assert difference(bare, shot.image) > 1, "the base draws the same without the adapter: nothing was tested"


def test_arms_differ_where_they_should(demo) -> None:
    out, _ = demo
    places = [out / "pictures" / "dog" / name for name in ("cfg", "s-cfg-placed")]
    adapted = [next(iter(adapters.measuring.sample.shots_in(place))) for place in places]
    assert len({shot.key for shot in adapted}) == 1
    base = list(adapters.measuring.sample.shots_in(out / "class_pictures" / "dog"))
    assert {shot.latents for shot in base} == {adapted[0].latents}
    assert len({shot.image.tobytes() for shot in (*adapted, *base)}) == len(adapted) + len(base)


def test_samples_of_every_arm_ship_the_base_s_too(demo) -> None:
    out, _ = demo
    samples = [adapters.measuring.sample.read(file)[0] for file in sorted((out / "release" / "samples").glob("*.png"))]
    arms = {shot.arm for shot in samples}
    assert arms == {"base", "CFG", "S-CFG placed"}
    assert len({shot.prompt for shot in samples if shot.arm == "base"}) == 2
    assert {shot.prompt for shot in samples if shot.arm == "base"} == {s.prompt for s in samples if s.arm == "CFG"}


def snippets(release: Path) -> list[str]:
    """The card's Python, as it stands."""
    code = re.findall(r"```python\n(.*?)```", (release / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(code) == 2
    return code


def test_the_card_s_first_lines_put_the_adapter_on_plain_diffusers(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = demo
    monkeypatch.chdir(out / "release")
    names: dict = {}
    exec(snippets(out / "release")[0], names)
    shot, settings = adapters.measuring.sample.read(next((out / "pictures" / "dog" / "cfg").glob("*.png")))
    names["pipe"].set_progress_bar_config(disable=True)
    image = names["pipe"](
        shot.prompt,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance_scale"],
        generator=torch.Generator().manual_seed(shot.seed),
    ).images[0]
    assert difference(image, shot.image) <= 1


def test_the_card_s_lines_on_guidance_draw_what_was_measured(demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both blocks, one after the other, as a reader would run them: one adapter, at the scale that was measured."""
    out, _ = demo
    release = out / "release"
    monkeypatch.chdir(release)
    first, second = snippets(release)
    names: dict = {}
    exec(first, names)
    names["pipe"].set_progress_bar_config(disable=True)
    torch.manual_seed(3)  # the snippet draws its noise from the global generator
    exec(second, names)

    pipe = pocket_pipeline()
    prompt = re.search(r"pipe\('(.*?)'", second).group(1)
    torch.manual_seed(3)
    with adapters.load(pipe, release, guidance=lambda config: scfg.attach_config(pipe, config)) as attached:
        expected = pipe(prompt, **attached.run.call_kwargs).images[0]
    assert difference(names["image"], expected) <= 1


BROKEN = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.mark.parametrize(
    ("package", "version", "code", "said"),
    [
        ("torchvision", "0.27.0", BROKEN, "pip uninstall torchvision"),
        ("torch", "2.3.1", None, "torch 2.3.1 is installed, at least 2.6 is needed"),
    ],
)
def test_a_wrong_installation_is_named_with_the_remedy(tmp_path: Path, recipe, package, version, code, said) -> None:
    facts = tmp_path / f"{package}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    if code:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
    done = recipe("demo", "--quick", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_files_of_a_release_that_were_changed_are_named(refused, demo, tmp_path: Path) -> None:
    out, _ = demo
    changed = tmp_path / "release"
    shutil.copytree(out / "release", changed)
    table = changed / "per_image.csv"
    table.write_text(table.read_text().replace("S-CFG placed", "S+CFG placed"))
    said = refused("sample", "--base.path=pocket", "--prompts=[a dog]", f"--adapter={changed}")
    assert "per_image.csv" in said


def another_number(measured: Path) -> None:
    lines = (measured / "per_image.csv").read_text("utf-8").splitlines()
    cells = lines[1].split(",")
    (measured / "per_image.csv").write_text("\n".join([lines[0], ",".join([*cells[:-1], "0.123"]), *lines[2:], ""]))


def without(measured: Path, *names: str) -> None:
    whole = json.loads((measured / "gains.json").read_text("utf-8"))
    place = whole
    for name in names[:-1]:
        place = place[name]
    del place[names[-1]]
    (measured / "gains.json").write_text(json.dumps(whole), "utf-8")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda measured: (measured / "gains.json").write_text('{"format": 1}'), "gains.json: no complete design"),
        (lambda measured: (measured / "gains.json").write_text("[]"), "gains.json: expected a JSON object"),
        (lambda measured: without(measured, "facts"), "gains.json lacks facts or the guidance of"),
        (lambda measured: without(measured, "design", "notes", "guidance"), "gains.json"),
        (another_number, "gains.json does not follow from per_image.csv"),
        (lambda measured: (measured / "report.html").write_bytes(b"\xff"), "report.html is damaged"),
    ],
)
def test_damaged_figures_are_not_shipped(refused, demo, damage: Callable[[Path], object], said: str, tmp_path) -> None:
    out, _ = demo
    shutil.copytree(out / "measured", tmp_path / "measured")
    damage(tmp_path / "measured")
    assert said in refused(
        "ship", "--base.path=pocket", f"--adapter={out / 'lora'}", f"--measured={tmp_path / 'measured'}"
    )

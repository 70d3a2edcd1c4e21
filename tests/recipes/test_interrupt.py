"""Ctrl-C at any stage: one line, exit code 130, whole files only; the same command again ends as if it had not come."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
ARMS = json.dumps({"CFG": {"method": "cfg", "guidance_scale": 4.0}, "S-CFG": {"guidance_scale": 4.0}})
MEASURE = [f"--measure.arms={ARMS}", "--measure.prompts=[a red dog, a cat in a box]", "--measure.seeds=[1, 2]"]
MEASURE += ["--measure.metrics=[saturation, contrast]", "--measure.overlays=0", "--measure.sweep=[2.0]"]
SAMPLE = ["--sampling.steps=12", "--sampling.batch_size=1"]
# What differs between two runs of the same command.
PASSING = ("seconds", "peak memory of the process, MiB", "versions", "mean seconds")


@pytest.fixture(scope="module")
def adapters_of(models: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a training with snapshots."""
    out = tmp_path_factory.mktemp("trained")
    ended = start("text_to_image_lora", *training(models, photos, out, steps=4), "--train.snapshot_every=2")
    assert ended.wait() == 0
    return out


def training(models: Path, photos: Path, out: Path, *, steps: int) -> list[str]:
    return [
        f"--base.path={models / 'sd15'}",
        f"--data.source={photos / 'coco'}",
        "--data.resolution=32",
        "--lora.rank=2",
        "--lora.dropout=0.2",
        f"--train.steps={steps}",
        "--train.learning_rate=1e-2",
        "--train.log_every=1",
        "--train.save_every=50",
        "--train.trackers=[]",
        f"--out={out}",
    ]


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=variables)


def finished(name: str, *arguments: object) -> str:
    process = start(name, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def interrupted(reached: Callable[[], bool], name: str, *arguments: object) -> str:
    """The recipe's stderr, after a SIGINT as soon as `reached()`."""
    process = start(name, *arguments)
    until = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, f"it ended before it was interrupted: {process.stderr.read()}"
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


def pictures(out: Path) -> dict[str, bytes]:
    """Pixels by path; a half-written picture cannot be opened."""
    return {path.relative_to(out).as_posix(): Image.open(path).tobytes() for path in sorted(out.rglob("*.png"))}


def rows(out: Path) -> list[dict[str, str]]:
    table = csv.DictReader((out / "measured" / "per_image.csv").open())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in table]


def lasting(value: object) -> object:
    if isinstance(value, dict):
        return {name: lasting(item) for name, item in value.items() if name not in PASSING}
    return [lasting(item) for item in value] if isinstance(value, list) else value


def gains(out: Path) -> object:
    return lasting(json.loads((out / "measured" / "gains.json").read_text()))


def test_training_goes_on_after_ctrl_c(models: Path, photos: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "run", tmp_path / "uninterrupted"
    command = training(models, photos, out, steps=300)
    finished("text_to_image_lora", *command)
    out.rename(kept)
    log = out / "log.jsonl"
    line = interrupted(lambda: log.is_file() and log.read_text().count("\n") >= 20, "text_to_image_lora", *command)
    assert line.startswith("stopped after step ")
    assert "go on with --train.resume latest" in line
    assert not (out / "lora").exists()
    at = int(line.split()[3].strip(","))
    assert 20 <= at < 300
    assert (out / "checkpoints" / f"step-{at:06d}").is_dir()
    assert f"at step {at}" in finished("text_to_image_lora", *command)
    weights = "lora/pytorch_lora_weights.safetensors"
    assert (kept / weights).read_bytes() == (out / weights).read_bytes()
    losses = [
        [json.loads(line)["loss"] for line in (way / "log.jsonl").read_text().splitlines()] for way in (kept, out)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 300


def test_measuring_goes_on_after_ctrl_c(models: Path, adapters_of: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "run", tmp_path / "uninterrupted"
    command = [f"--base.path={models / 'sd15'}", f"--adapter={adapters_of / 'lora'}", *MEASURE, *SAMPLE, f"--out={out}"]
    finished("measure", *command)
    out.rename(kept)
    whole = pictures(kept)
    for arm in ("cfg", "s-cfg-2"):
        place = out / "pictures" / arm
        line = interrupted(lambda place=place: place.is_dir() and any(place.glob("*.png")), "measure", *command)
        assert line == "stopped; the same command goes on where it was"
        there = pictures(out)
        assert 0 < len(there) < len(whole)
        assert all(pixels == whole[name] for name, pixels in there.items())
        assert not (out / "measured").exists()
    written = {name: (out / name).stat().st_mtime_ns for name in there}
    finished("measure", *command)
    assert pictures(out) == whole
    assert rows(out) == rows(kept)
    assert gains(out) == gains(kept)
    assert all((out / name).stat().st_mtime_ns == before for name, before in written.items()), "drawn again"


def test_tuning_goes_on_after_ctrl_c(models: Path, adapters_of: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "run", tmp_path / "uninterrupted"
    tune = [
        "--tune.prompts=[a fox, a big box]",
        "--tune.seeds=[101, 102, 103]",
        "--tune.guidance_scales=[2.0, 3.0, 4.0, 5.0]",
    ]
    command = [f"--base.path={models / 'sd15'}", f"--adapter={adapters_of / 'lora'}", *MEASURE, *SAMPLE, *tune]
    command.append(f"--out={out}")
    finished("tune", *command)
    out.rename(kept)

    def reached() -> bool:
        return len(list(out.glob("tuning/*"))) >= 4 and bool(list(out.glob("tuning/*/*.png")))

    line = interrupted(reached, "tune", *command)
    assert line == "stopped; the same command goes on where it was"
    assert not (out / "tuned").exists()
    assert 0 < len(pictures(out)) < len(pictures(kept))
    finished("tune", *command)
    assert pictures(out) == pictures(kept)
    for file in ("tuned.json", "guider_config.json"):
        assert (out / "tuned" / file).read_text() == (kept / "tuned" / file).read_text()
    tuned = json.loads((out / "tuned" / "tuned.json").read_text())
    tried = {name: [len(one["results"]) for one in rounds] for name, rounds in tuned["rounds"].items()}
    assert tried == {"checkpoint": [2], "CFG": [4, 2], "S-CFG": [4, 2]}  # the two that were left with all seeds
    assert tuned["adapter"] in {str(adapters_of / name) for name in ("lora", "snapshots/step-000002")}


def test_the_whole_recipe_goes_on_after_ctrl_c_in_each_of_its_stages(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    """One command from photos to release, interrupted three times."""
    out, kept = tmp_path / "run", tmp_path / "uninterrupted"
    command = [
        *training(models, photos, out, steps=120),
        *MEASURE,
        *SAMPLE,
        "--tune.prompts=[a fox, a big box]",
        "--tune.seeds=[101, 102]",
        "--tune.guidance_scales=[2.0, 4.0]",
        "--ship.title=x",
    ]
    finished("text_to_image_lora", *command)
    out.rename(kept)
    log = out / "log.jsonl"
    for reached in (
        lambda: log.is_file() and log.read_text().count("\n") >= 10,
        lambda: bool(list(out.glob("tuning/*/*.png"))),
        lambda: bool(list(out.glob("pictures/s-cfg/*.png"))),
    ):
        interrupted(reached, "text_to_image_lora", *command)
        assert not (out / "release").exists()
    finished("text_to_image_lora", *command)
    drawn = {name: pixels for name, pixels in pictures(out).items() if name != "measured/sheet.png"}
    assert drawn == {name: pixels for name, pixels in pictures(kept).items() if name != "measured/sheet.png"}
    assert rows(out) == rows(kept)
    assert gains(out) == gains(kept)
    ours, theirs = (load_file(way / "release" / "pytorch_lora_weights.safetensors") for way in (out, kept))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

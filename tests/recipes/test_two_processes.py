"""Two processes on the CPU through accelerate's launcher: the pictures and numbers of one."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe_driver
from PIL import Image

import adapters

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
ARMS = json.dumps({"CFG": {"method": "cfg", "guidance_scale": 4.0}, "S-CFG": {"guidance_scale": 4.0}})


def launch(processes: int, name: str, *arguments: object, machines: int = 1) -> str:
    """`accelerate launch --cpu --num_processes 2` starts one process without a word; this form starts two.

    With several machines each has a launcher of its own, here all on this one, and their share of the processes.
    """
    command = [recipe_driver.__file__, str(ROOT / "recipes" / f"{name}.py"), *map(str, arguments)]
    port = free_port() if machines > 1 else 0
    started = [
        subprocess.Popen(
            [sys.executable, *(launcher(processes, machines, rank, port) if processes > 1 else ()), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for rank in range(machines)
    ]
    out = ""
    try:
        for process in started:
            said, err = process.communicate(timeout=300)
            assert process.returncode == 0, err[-3000:]
            out += said
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the launcher's processes too
    there = sorted(re.findall(r"process \d of \d", out))
    assert there == [f"process {rank} of {processes}" for rank in range(processes)]
    return out


def launcher(processes: int, machines: int, rank: int, port: int) -> list[str]:
    program = "import sys; from accelerate.commands.accelerate_cli import main; sys.argv[0] = 'accelerate'; main()"
    words = ["-c", program, "launch", "--multi_gpu", "--num_processes", str(processes)]
    words += ["--num_machines", str(machines), "--machine_rank", str(rank)]
    if machines > 1:
        words += ["--main_process_ip", "127.0.0.1", "--same_network", "--rdzv_backend", "static"]
    return [*words, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def training(models: Path, photos: Path, out: Path, *, batch_size: int) -> list[str]:
    return [
        f"--base.path={models / 'sd15'}",
        f"--data.source={photos / 'coco'}",
        "--data.resolution=32",
        "--lora.rank=2",
        "--train.steps=30",
        f"--train.batch_size={batch_size}",
        "--train.learning_rate=1e-2",
        "--train.log_every=1",
        "--train.trackers=[]",
        f"--out={out}",
    ]


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "measured" / "per_image.csv").open()))


def compare(one: Path, two: Path, metrics: list[str], *, levels: int, tolerance: float) -> None:
    """Pictures to so many grey levels, numbers to the tolerance, in one order."""
    names = [sorted(path.relative_to(out).as_posix() for path in out.glob("pictures/**/*.png")) for out in (one, two)]
    assert names[0] == names[1]
    off = [
        np.abs(np.asarray(Image.open(one / name), int) - np.asarray(Image.open(two / name), int)) for name in names[0]
    ]
    said = [[{key: row[key] for key in ("arm", "prompt", "seed")} for row in rows(out)] for out in (one, two)]
    assert said[0] == said[1]
    gaps = {}
    for metric in metrics:
        pairs = [(a[metric], b[metric]) for a, b in zip(rows(one), rows(two), strict=True)]
        assert all(bool(a) == bool(b) for a, b in pairs)  # plain CFG notes no effective scale
        gaps[metric] = max(abs(float(a) - float(b)) for a, b in pairs if a)
    print(f"largest difference {max(int(item.max()) for item in off)} levels, {sum(int((i > 0).sum()) for i in off)}")
    print(f"values of {sum(i.size for i in off)} differ; in the table {gaps}")
    assert max(int(item.max()) for item in off) <= levels
    assert all(gap <= tolerance for gap in gaps.values())
    verdicts = [json.loads((out / "measured" / "gains.json").read_text())["verdict"]["word"] for out in (one, two)]
    assert verdicts[0] == verdicts[1]


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    metrics = ["prompt accuracy", "contrast", "diversity (judge)"]
    common = [
        "--base.path=pocket",
        "--sampling.steps=4",
        "--sampling.batch_size=3",
        "--measure.prompts=[a red car on the grass, a cat in the snow, a house in the sea]",
        "--measure.seeds=[1, 2, 3]",
        "--measure.base_arm=false",
        "--measure.overlays=1",
        f"--measure.arms={ARMS}",
        f"--measure.metrics={json.dumps(metrics)}",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, "measure", *common, f"--out={one}")
    said = launch(2, "measure", *common, f"--out={two}")
    assert said.count("Open ") == 1, "both processes speak"
    compare(one, two, [*metrics, "effective scale"], levels=1, tolerance=1e-3)


def test_two_processes_train_tune_measure_and_ship_like_one(models: Path, photos: Path, tmp_path: Path) -> None:
    metrics = ["contrast", "saturation"]
    more = [
        "--train.snapshot_every=15",
        "--sampling.steps=4",
        "--tune.prompts=[a fox, a big box]",
        "--tune.seeds=[101]",
        "--tune.guidance_scales=[2.0, 4.0]",
        "--measure.prompts=[a red dog, a cat in a box, a cow]",
        "--measure.seeds=[1, 2]",
        f"--measure.arms={ARMS}",
        f"--measure.metrics={json.dumps(metrics)}",
        "--measure.overlays=0",
        "--ship.title=x",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, "text_to_image_lora", *training(models, photos, one, batch_size=4), *more)
    said = launch(2, "text_to_image_lora", *training(models, photos, two, batch_size=2), *more)
    assert "several processes share the cache" in said
    losses = [
        np.mean([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])
        for out in (one, two)
    ]
    print(f"mean losses {losses}")
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    tuned = [json.loads((out / "tuned" / "tuned.json").read_text()) for out in (one, two)]
    assert Path(tuned[0]["adapter"]).relative_to(one) == Path(tuned[1]["adapter"]).relative_to(two)
    assert tuned[0]["best"] == tuned[1]["best"]
    # The weights are sums in another order; the pictures follow them.
    compare(one, two, [*metrics, "effective scale"], levels=2, tolerance=1e-2)
    for out in (one, two):
        assert adapters.measuring.verify.verify(out / "release")["kind"] == "lora"


def test_two_machines_with_a_shared_folder_are_two_processes(models: Path, photos: Path, tmp_path: Path) -> None:
    more = [
        "--data.cache=disk",
        "--train.steps=6",
        "--sampling.steps=4",
        "--measure.prompts=[a red dog, a cat in a box]",
        "--measure.seeds=[1, 2]",
        f"--measure.arms={ARMS}",
        "--measure.metrics=[contrast]",
        "--measure.overlays=0",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    for out, machines in ((one, 1), (two, 2)):
        common = training(models, photos, out, batch_size=2)
        said = launch(2, "text_to_image_lora", *common, *more, machines=machines)
        assert said.count("Open ") == 1, "both machines speak"
    assert (one / "log.jsonl").read_text().count("\n") == (two / "log.jsonl").read_text().count("\n") > 0
    compare(one, two, ["contrast", "effective scale"], levels=1, tolerance=1e-3)


def test_class_images_are_drawn_once_by_both(models: Path, photos: Path, tmp_path: Path) -> None:
    prior = [
        "--dreambooth.preserve=base",
        "--dreambooth.class_prompt=a cat",
        "--dreambooth.class_images=5",
        "--dreambooth.steps=3",
    ]
    out = tmp_path / "run"
    launch(2, "dreambooth_lora", *training(models, photos, out, batch_size=1), *prior, "--train.steps=2")
    drawn = [Image.open(path).tobytes() for path in sorted((out / "class_images").glob("*.png"))]
    assert len(set(drawn)) == len(drawn) == 5


def test_an_error_of_one_process_ends_both(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"error: measure\.subjects: gone is no folder"):
        launch(2, "measure", "--base.path=pocket", "--measure.subjects=[gone]", f"--out={tmp_path / 'out'}")

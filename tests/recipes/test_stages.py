"""Every recipe and every stage alone, with tiny budgets on the pocket base."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import adapters
from adapters.edges import Canny
from recipes.common.base import edges_of, sampling_pipeline
from recipes.common.draw import pace
from recipes.common.settings import GuidanceSettings, MeasureSettings, SamplingSettings
from recipes.common.units import cases
from training.config import BaseSettings
from training.pocket import controlnet_path
from training.pocket.control import EDGES

ROOT = Path(__file__).resolve().parents[2]
DOG = ROOT / "recipes" / "subjects" / "dog"
ARMS = json.dumps({"CFG": {"method": "cfg", "guidance_scale": 4.0}, "S-CFG": {"guidance_scale": 4.0}})
TRAIN = ["--train.steps=4", "--train.log_every=1", "--train.trackers=[]"]
SAMPLE = ["--sampling.steps=4"]
MEASURE = [f"--measure.arms={ARMS}", "--measure.limit=2", "--measure.seeds=[1]", "--measure.overlays=0"]
SUBJECT = [f"--measure.subjects={json.dumps([str(DOG)])}"]
ON_DOG = ["--base.path=pocket", f"--data.source={DOG}", "--data.resolution=64"]
LORA = [*ON_DOG, *TRAIN, "--train.snapshot_every=2", "--train.learning_rate=1e-2", "--lora.rank=2"]
LORA.append("--dreambooth.identifier=sks")
TUNE = ["--tune.prompts=['a {} on the sand', 'a {} in the snow']", "--tune.seeds=[101]", "--tune.guidance_scales=[4.0]"]
TUNE += ["--tune.weights=[1.0]"]


def pictures(folder: Path) -> dict[str, bytes]:
    """Pixels by path."""
    return {path.relative_to(folder).as_posix(): Image.open(path).tobytes() for path in sorted(folder.rglob("*.png"))}


def rows_of(out: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((out / "measured" / "per_image.csv").open()))
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture
def lora(run: Path, done: Callable[..., str]) -> Path:
    """A LoRA of the dog, trained once, with its snapshots."""
    if not (run / "lora").is_dir():
        done("dreambooth_lora", *LORA, f"--out={run}")
    return run / "lora"


@pytest.fixture
def measured(run: Path, lora: Path, done: Callable[..., str]) -> Path:
    """tune.py on the folder of the training, measure.py on that of the tuning."""
    if not (run / "measured").is_dir():
        common = ["--base.path=pocket", *SAMPLE, *MEASURE, *SUBJECT, f"--out={run}"]
        done("tune", *common, *TUNE, f"--adapter={lora}")
        chosen = json.loads((run / "tuned" / "tuned.json").read_text())["adapter"]
        done("measure", *common, f"--adapter={chosen}", f"--tuned={run / 'tuned'}")
    return run / "measured"


def test_training_alone_leaves_the_adapter_its_snapshots_and_nothing_else(run: Path, lora: Path) -> None:
    assert {path.name for path in run.iterdir()} >= {"checkpoints", "log.jsonl", "lora", "snapshots"}
    assert {path.name for path in (run / "snapshots").iterdir()} == {"step-000002", "step-000004"}
    first, last = (
        load_file(next((run / "snapshots" / name).glob("*.safetensors"))) for name in ("step-000002", "step-000004")
    )
    final = load_file(lora / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(last[name], final[name]) for name in final)
    assert not all(torch.equal(first[name], final[name]) for name in final)


def test_tuning_tries_every_snapshot_and_names_one(run: Path, lora: Path, measured: Path) -> None:
    tuned = json.loads((run / "tuned" / "tuned.json").read_text())
    results = tuned["rounds"]["checkpoint"][0]["results"]
    tried = {item["settings"]["adapter"]: item["mean"] for item in results}
    assert list(tried) == [str(run / "snapshots" / "step-000002"), str(lora)], "the last snapshot is the LoRA itself"
    assert tuned["steps"] == [2, 4]
    assert {item["settings"]["method"] for item in results} == {"cfg"}, "the choice does not favour S-CFG"
    assert tried[tuned["adapter"]] == max(tried.values())
    for name in ("CFG", "S-CFG"):
        assert {item["settings"]["adapter"] for item in tuned["rounds"][name][0]["results"]} == {tuned["adapter"]}
    assert tuned["metric"] == "harmonic mean of identity and prompt accuracy"
    assert tuned["pictures"] == {"checkpoint": 4, "CFG": 2, "S-CFG": 2}
    signs = tuned["signs"]
    assert (signs["space"], len(signs["checkpoints"])) == ("judge", len(results))
    assert signs["base"]["drift"] == pytest.approx(0)
    assert all(one["drift"] > 1e-6 and -1 < one["nearest"] < 1 for one in signs["checkpoints"])


def test_measuring_after_tuning_draws_with_what_was_found(run: Path, measured: Path) -> None:
    from recipes.common.comparison import digest_of

    tuned = json.loads((run / "tuned" / "tuned.json").read_text())
    gains = json.loads((measured / "gains.json").read_text())
    for arm, found in tuned["best"].items():
        assert gains["design"]["notes"]["guidance"][arm] == found
    assert gains["design"]["primary"] == gains["design"]["identity"] == "identity"
    assert {float(row["identity"]) for row in rows_of(run) if row["arm"] == "base"} <= {0.0, 1.0}
    bare = adapters.measuring.sample.shots_in(run / "class_pictures" / "dog")
    assert all("sks" not in shot.prompt for shot in bare)
    shot, settings = adapters.measuring.sample.read(next((run / "pictures" / "dog" / "s-cfg").glob("*.png")))
    assert settings["weights"] == f"{digest_of(tuned['adapter'])} 1"
    assert settings["guidance_scale"] == tuned["best"]["S-CFG"]["guidance_scale"]
    assert shot.numbers["effective scale"] > 0


def test_tuning_over_subjects_is_the_mean_of_tuning_each(run: Path, lora: Path, tmp_path: Path, done) -> None:
    def tuned(out: Path, adapter: object, *subjects: str) -> dict[str, dict[str, float]]:
        folders = json.dumps([str(DOG.parent / subject) for subject in subjects])
        more = [f"--measure.subjects={folders}", f"--adapter={adapter}", "--measure.metrics=[similarity (judge)]"]
        done(
            "tune",
            "--base.path=pocket",
            *SAMPLE,
            *MEASURE,
            *TUNE,
            *more,
            "--tune.guidance_scales=[2.0, 4.0]",
            "--tune.scopes=[]",
            f"--out={out}",
        )
        found = json.loads((out / "tuned" / "tuned.json").read_text())
        return {
            name: {item["settings"]["guidance_scale"]: item["mean"] for item in rounds[0]["results"]}
            for name, rounds in found["rounds"].items()
            if name != "checkpoint"
        }

    shutil.copytree(lora, tmp_path / "dog")
    shutil.copytree(run / "snapshots" / "step-000002", tmp_path / "bird")
    both = tuned(tmp_path / "both", tmp_path / "{subject}", "dog", "bird")
    dog = tuned(tmp_path / "one", tmp_path / "dog", "dog")
    bird = tuned(tmp_path / "other", tmp_path / "bird", "bird")
    assert both == {
        arm: {scale: pytest.approx((dog[arm][scale] + bird[arm][scale]) / 2) for scale in (2.0, 4.0)}
        for arm in ("CFG", "S-CFG")
    }
    drawn = {path.parent.name for path in (tmp_path / "both" / "tuning").rglob("*.png")}
    assert drawn == {"dog", "bird"}


def test_guidance_beside_a_condition_is_tuned_on_other_scenes(tmp_path: Path, done, call) -> None:
    controlled = ["--controlnet=pocket-canny", "--measure.targets=pocket", "--measure.control=canny"]
    common = [
        "--base.path=pocket",
        *controlled,
        *SAMPLE,
        *MEASURE,
        "--tune.guidance_scales=[4.0]",
        "--tune.seeds=[101]",
    ]
    refused = call("tune", *common, "--tune.prompts=[a dog]", f"--out={tmp_path}")
    assert "controlnet, measure.targets and tune.targets belong together" in refused.err
    done("tune", *common, "--tune.targets=pocket", "--tune.limit=3", f"--out={tmp_path}")
    tuned = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert (tuned["metric"], tuned["adapter"], tuned["pictures"]) == ("canny F1", None, {"CFG": 3, "S-CFG": 3})
    done("measure", *common[:-2], f"--tuned={tmp_path / 'tuned'}", f"--out={tmp_path}")
    assert not {row["prompt"] for row in rows_of(tmp_path)} & set(tuned["prompts"])


def test_targets_left_out_first_are_those_that_came_first() -> None:
    from training.errors import TrainingError

    def captions(**more: int) -> list[str]:
        return cases(MeasureSettings(targets="pocket", control="canny", **more), None, size=(64, 64))[0].prompts

    assert captions(limit=6)[2:] == captions(skip=2, limit=4)
    with pytest.raises(TrainingError, match="skip 8 leaves none of 8 targets"):
        cases(MeasureSettings(targets=str(DOG), control="canny", skip=8, limit=1), None)


def test_drift_is_the_distance_to_the_bases_own_pictures(lora: Path, tmp_path: Path, done) -> None:
    unrelated = ["--measure.prompts=[a red car, a cat]", "--measure.metrics=[drift (judge)]"]
    common = ["--base.path=pocket", *SAMPLE, *MEASURE, *SUBJECT, *unrelated]
    # Four steps of training that keeps the class move little: three times their change is seen well.
    done("measure", *common, f"--adapter={lora}", "--weight=3", f"--out={tmp_path / 'on'}")
    done("measure", *common, f"--adapter={lora}", "--weight=0", f"--out={tmp_path / 'off'}")

    def drifts(out: Path) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for row in rows_of(out):
            found.setdefault(row["arm"], []).append(float(row["drift (judge)"]))
        return found

    on, off = drifts(tmp_path / "on"), drifts(tmp_path / "off")
    assert on["base"] == off["base"] == off["CFG"] == pytest.approx([0, 0], abs=1e-6)
    assert min(on["CFG"]) > 1e-4, "a trained adapter moves the pictures"


def test_shipping_alone_gives_a_release_that_verifies(run: Path, measured: Path, done) -> None:
    chosen = json.loads((run / "tuned" / "tuned.json").read_text())["adapter"]
    ship = ["--base.path=pocket", f"--adapter={chosen}", f"--measured={measured}", f"--out={run}"]
    done("ship", *ship, "--ship.title=A dog")
    summary = adapters.measuring.verify.verify(run / "release")
    assert summary["numbers"] > 50
    card = (run / "release" / "README.md").read_text("utf-8")
    assert "# A dog" in card
    assert "sks dog" in card
    weights = load_file(run / "release" / "pytorch_lora_weights.safetensors")
    trained = load_file(Path(chosen) / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(weights[name], trained[name]) for name in trained)


def test_a_release_verifies_in_whatever_order_its_metrics_were_asked_for(
    run: Path, lora: Path, measured: Path, tmp_path: Path, done
) -> None:
    chosen = json.loads((run / "tuned" / "tuned.json").read_text())["adapter"]
    shutil.copytree(run / "pictures", tmp_path / "pictures")  # read again, not drawn again
    common = ["--base.path=pocket", f"--adapter={chosen}", f"--out={tmp_path}"]
    more = [f"--tuned={run / 'tuned'}", "--measure.metrics=[saturation, contrast]"]
    done("measure", *common, *SAMPLE, *MEASURE, *SUBJECT, *more)
    done("ship", *common, f"--measured={tmp_path / 'measured'}")
    adapters.measuring.verify.verify(tmp_path / "release")


@pytest.mark.slow
def test_the_whole_recipe_does_what_its_stages_do_alone(run: Path, measured: Path, tmp_path: Path, done) -> None:
    whole = tmp_path / "whole"
    done("dreambooth_lora", *LORA, *SAMPLE, *TUNE, *MEASURE, *SUBJECT, "--ship.title=A dog", f"--out={whole}")
    ours, theirs = (json.loads((out / "tuned" / "tuned.json").read_text()) for out in (whole, run))
    assert ours["best"] == theirs["best"]
    assert Path(ours["adapter"]).relative_to(whole) == Path(theirs["adapter"]).relative_to(run)
    assert pictures(whole / "pictures") == pictures(run / "pictures")
    assert [row | {"image": ""} for row in rows_of(whole)] == [row | {"image": ""} for row in rows_of(run)]
    adapters.measuring.verify.verify(whole / "release")
    shipped = load_file(whole / "release" / "pytorch_lora_weights.safetensors")
    chosen = load_file(Path(ours["adapter"]) / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(shipped[name], chosen[name]) for name in chosen)


def test_a_lora_in_another_trainers_keys_is_measured_alike(
    run: Path, lora: Path, measured: Path, tmp_path: Path, done
) -> None:
    tensors, header = adapters.keys.to_kohya(adapters.source.read_adapter(adapters.source.open_source(lora)))
    assert all(name.startswith("lora_unet_") for name in tensors)
    save_file(tensors, tmp_path / "x.safetensors", {"ss_network_module": header["ss_network_module"]})
    common = ["--base.path=pocket", *SAMPLE, *MEASURE, *SUBJECT, "--measure.base_arm=false"]
    for name, adapter in (("ours", lora), ("theirs", tmp_path / "x.safetensors")):
        done("measure", *common, f"--adapter={adapter}", f"--out={tmp_path / name}")
    ours, theirs = pictures(tmp_path / "ours" / "pictures"), pictures(tmp_path / "theirs" / "pictures")
    assert len(ours) == 4
    assert ours == theirs
    base = pictures(run / "class_pictures" / "dog")
    assert len(base) == 2
    assert not {*base.values()} & {*ours.values()}, "the adapter changed nothing"


@pytest.mark.slow
def test_full_dreambooth_trains_measures_drift_and_ships_a_unet(tmp_path: Path, done) -> None:
    done(
        "dreambooth",
        *ON_DOG,
        *TRAIN,
        *SAMPLE,
        *MEASURE,
        *SUBJECT,
        "--dreambooth.class_prompt=a dog",
        "--dreambooth.class_images=2",
        "--dreambooth.steps=2",
        "--measure.drift_prompts=[a red car on the grass]",
        "--train.steps=2",
        "--ship.license=mit",
        f"--out={tmp_path}",
    )
    assert len(list((tmp_path / "class_images").glob("*.png"))) == 2
    facts = json.loads((tmp_path / "measured" / "gains.json").read_text())["facts"]
    assert facts["drift (judge) of CFG"] > 0
    assert facts["drift (judge) of S-CFG"] > 0
    assert len({row["arm"] for row in rows_of(tmp_path)}) == 3
    assert adapters.measuring.verify.verify(tmp_path / "release")["kind"] == "unet"

    from recipes.common.base import sampling_pipeline
    from recipes.common.settings import SamplingSettings

    pipe = sampling_pipeline(BaseSettings(path="pocket"), SamplingSettings())
    before = pipe.unet
    with adapters.load(pipe, tmp_path / "release", guidance=lambda _: torch.no_grad()):
        own, theirs = before.state_dict(), pipe.unet.state_dict()
        assert any(not torch.equal(own[name], theirs[name]) for name in own)
    assert pipe.unet is before


def test_a_controlnet_trains_is_measured_and_ships(tmp_path: Path, done) -> None:
    measure = ["--measure.targets=pocket", "--measure.control=canny"]
    data = ["--base.path=pocket", "--data.source=pocket", "--data.annotator=canny", "--data.count=2"]
    done(
        "controlnet",
        *data,
        "--data.resolution=64",
        *TRAIN,
        "--train.steps=2",
        *SAMPLE,
        *MEASURE,
        *measure,
        "--data.canny=[40, 90]",
        "--ship.license=mit",
        f"--out={tmp_path}",
    )
    assert edges_of(str(tmp_path / "controlnet")) == Canny(low=40, high=90)
    rows = rows_of(tmp_path)
    assert len(rows) == 3 * 2
    assert all(np.isfinite(float(row["canny F1"])) for row in rows)
    assert adapters.measuring.verify.verify(tmp_path / "release")["kind"] == "controlnet"
    assert edges_of(str(tmp_path / "release")) == Canny(low=40, high=90)
    assert "<title>ControlNet (canny) on pocket" in (tmp_path / "measured" / "report.html").read_text("utf-8")
    card = (tmp_path / "release" / "README.md").read_text("utf-8")
    assert "StableDiffusionControlNetPipeline.from_pretrained(base_path(), controlnet=control)" in card


def test_conditions_and_scores_use_the_detector_that_the_controlnet_was_trained_with(tmp_path: Path) -> None:
    from recipes.common.metrics import make_metrics

    assert edges_of("pocket-canny") == EDGES
    old = tmp_path / "old"  # of a training from before ControlNets kept their detector
    shutil.copytree(controlnet_path("canny"), old)
    config = json.loads((old / "config.json").read_text("utf-8"))
    (old / "config.json").write_text(json.dumps({name: config[name] for name in config if name != "_canny"}), "utf-8")
    assert edges_of(str(old)) == Canny()
    (old / "settings.yaml").write_text("data: {source: pocket, annotator: canny}", "utf-8")
    assert edges_of(str(old)) == EDGES
    plan = MeasureSettings(targets=str(DOG), control="canny", metrics=["canny F1"], limit=2)
    found = {}
    for edges in (EDGES, Canny()):
        case = cases(plan, None, size=(64, 64), edges=edges)[0]
        shots = [
            adapters.Shot(prompt=prompt, seed=1, latents="0", image=image) for prompt, image in case.targets.items()
        ]
        metric = make_metrics(plan, case, pocket=True)[0]
        assert list(metric(shots)) == [1.0] * len(shots)  # a target keeps its own edges
        found[edges] = [np.asarray(condition) for condition in case.conditions.values()]
    assert any((one != other).any() for one, other in zip(found[EDGES], found[Canny()], strict=True))


def test_text_to_image_learns_another_look(tmp_path: Path, done) -> None:
    data = ["--base.path=pocket", "--data.source=pocket-fluent", "--data.count=8", "--data.resolution=64"]
    said = done("text_to_image_lora", *data, *TRAIN, "--train.steps=2", "--train.batch_size=2", f"--out={tmp_path}")
    assert "lora: 8 views" in said
    adapter = adapters.source.read_adapter(adapters.source.open_source(tmp_path / "lora"))
    assert adapter.components == ["unet"]
    assert any(module.tensors["lora_B.weight"].any() for module in adapter.modules.values())


@pytest.mark.slow
def test_the_region_aware_loss_needs_words_instead_of_masks(tmp_path: Path, done, call) -> None:
    common = [*ON_DOG, *TRAIN, "--train.steps=2", "--objective.background=0.2", "--dreambooth.preserve=off"]
    done("dreambooth_lora", *common, "--region=sks dog", f"--out={tmp_path / 'regions'}")
    done("dreambooth_lora", *common, f"--data.masks={DOG / 'masks'}", f"--out={tmp_path / 'masks'}")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("regions", "masks")
    ]
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]
    said = call("dreambooth_lora", *common, "--region=teapot", f"--out={tmp_path / 'none'}")
    assert said.code == 2
    assert "region 'teapot': none of its words is in the caption" in said.err


def test_class_images_need_no_word_of_the_region(tmp_path: Path, done) -> None:
    captions = tmp_path / "class.txt"
    captions.write_text("a red car in the sea\n")
    prior = ["--dreambooth.class_prompt=a dog", f"--dreambooth.class_prompt_file={captions}"]
    few = ["--dreambooth.class_images=1", "--dreambooth.steps=1", "--train.steps=2", "--objective.background=0.2"]
    said = done("dreambooth_lora", *ON_DOG, *TRAIN, *prior, *few, "--region=dog", f"--out={tmp_path / 'run'}")
    assert "cached 9 views" in said


@pytest.mark.parametrize("changed", ["unet", "controlnet"])
def test_pictures_of_other_weights_are_not_taken_for_these(models: Path, tmp_path: Path, changed: str) -> None:
    """A ControlNet trained further, or a base of the same name, in the folder of an earlier run."""
    from recipes.common.base import sampling_pipeline, size_of
    from recipes.common.draw import draw_shots
    from recipes.common.settings import GuidanceSettings, SamplingSettings
    from training.errors import TrainingError

    sampling = SamplingSettings(steps=1)
    pipe = sampling_pipeline(
        BaseSettings(path=str(models / "sd15")), sampling, controlnet=str(models / "controlnet-sd15")
    )
    condition = {"image": Image.new("RGB", size_of(pipe, sampling))}

    def again(**more: float) -> list[adapters.Shot]:
        guidance = GuidanceSettings(method="cfg", **more)
        return draw_shots(
            pipe, ["a dog"], [1], guidance, sampling, tmp_path, None, inputs=lambda prompt, seed: condition
        )

    with pytest.raises(TrainingError, match=r"rescale 0\.7: StableDiffusionControlNetPipeline has none"):
        again(rescale=0.7)

    first = again()
    assert again()[0].path == first[0].path
    with torch.no_grad():
        next(getattr(pipe, changed).parameters()).add_(0.5)
    with pytest.raises(adapters.AdapterError, match="base" if changed == "unet" else "controlnet"):
        again()


def test_the_base_s_attention_finds_the_dog_in_its_pictures() -> None:
    """All of a picture would overlap a mask by the mask's own area; measured over the eight: IoU .51, area .19."""
    from recipes.common.base import load_base
    from recipes.common.region_mask import region_of
    from training.data import images
    from training.models import encode_images

    parts, source, region = (
        load_base(BaseSettings(path="pocket")),
        images.folder(DOG, masks=DOG / "masks"),
        region_of("sks dog"),
    )
    overlaps, areas = [], []
    for index in range(len(source)):
        sample = source[index]
        pixels = torch.from_numpy(np.array(sample.image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        mean, _ = encode_images(parts.vae, pixels)
        entry = {"mean": mean[0], "frame": torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0])}
        found = region(parts, entry, sample.caption)[0].numpy() > 0
        wanted = np.asarray(sample.mask.convert("L").resize(found.shape[::-1], Image.Resampling.BOX)) > 127
        overlaps.append((found & wanted).sum() / (found | wanted).sum())
        areas.append(wanted.mean())
    print(f"mean IoU {np.mean(overlaps):.3f}, mean area {np.mean(areas):.3f}, each {np.round(overlaps, 2)}")
    assert len(overlaps) == 8
    assert np.mean(overlaps) > max(0.5, 2 * np.mean(areas))
    assert all(overlap > 1.5 * area for overlap, area in zip(overlaps, areas, strict=True))


def test_control_generation_writes_a_sheet_with_the_conditions(tmp_path: Path, done) -> None:
    large = tmp_path / "teapots"
    large.mkdir()
    for number in (0, 1):  # of another size and shape than the base draws
        Image.open(ROOT / "recipes" / "subjects" / "teapot" / f"{number}.webp").resize((160, 128)).save(
            large / f"{number}.png"
        )
        shutil.copy(ROOT / "recipes" / "subjects" / "teapot" / f"{number}.txt", large)
    config = ROOT / "recipes" / "configs" / "controlled" / "pocket_canny.yaml"
    words = [f"--config={config}", f"--pictures={large}", *SAMPLE, f"--out={tmp_path / 'out'}"]
    said = done("controlled", *words, "--dry_run=true")
    assert "2 arms x 2 pictures of yours x 1 seeds: 4 pictures, 4 steps each" in said
    assert "took" not in said
    assert not (tmp_path / "out").exists()
    said = done("controlled", *words)
    assert "drawing took" in said
    for arm in ("CFG", "S-CFG"):
        assert f"{arm}: canny F1" in said
        for number in (0, 1):
            assert (tmp_path / "out" / f"{number} {arm} 1.png").is_file()
    assert Image.open(tmp_path / "out" / "sheet.png").size == (4 * 128 + 420, 2 * 128 + 20)


def test_a_dry_run_counts_the_pictures_that_the_run_draws(tmp_path: Path, done) -> None:
    plan = [*SUBJECT, *MEASURE, "--measure.seeds=[1, 2]", *SAMPLE]
    words = ["--base.path=pocket", f"--adapter={ROOT / 'recipes' / 'zoo' / 'teapot'}", *plan, f"--out={tmp_path}"]
    said = done("measure", *words, "--dry_run=true")
    found = re.search(r"^measuring +3 arms x 2 prompts x 2 seeds: (\d+) pictures, ", said, re.M)
    assert found is not None
    assert "took" not in said
    assert "measuring took" in done("measure", *words)
    drawn = [len(list((tmp_path / name).rglob("*.png"))) for name in ("pictures", "class_pictures")]
    assert drawn == [8, 4]
    assert int(found[1]) == sum(drawn)
    said = done("tune", *words, *TUNE, "--dry_run=true")
    found = re.search(r"^tuning +1 \+ 1 candidates on 2 prompts: (\d+) pictures and (\d+) of the class", said, re.M)
    assert found is not None
    assert "tuning took" in done("tune", *words, *TUNE)
    assert sum(map(int, found.groups())) == len(list((tmp_path / "tuning").rglob("*.png")))


def test_the_pace_is_that_of_a_whole_batch_and_of_few_steps() -> None:
    sampling = SamplingSettings(steps=6, batch_size=2)
    pipe = sampling_pipeline(BaseSettings(path="pocket"), sampling)
    rows: list[int] = []
    began = time.perf_counter()
    with_rows = pipe.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    seconds = pace(pipe, ["a dog", "a cat", "a car"], [1], GuidanceSettings(guidance_scale=2), sampling)
    tried = time.perf_counter() - began
    with_rows.remove()
    assert rows == [4] * 4  # two pictures, with and without the prompt
    assert tried / 2 < 2 * seconds < 3 * tried


def test_one_prompt_is_drawn_for_several_pictures_and_a_new_picture_is_drawn_for(tmp_path: Path, done) -> None:
    own, shipped = tmp_path / "own", ROOT / "recipes" / "subjects" / "teapot"
    own.mkdir()
    for number in (0, 1):
        shutil.copy(shipped / f"{number}.webp", own)
    config = ROOT / "recipes" / "configs" / "controlled" / "pocket_canny.yaml"
    words = [f"--pictures={own}", "--prompt=a teapot in the sea", "--sampling.batch_size=1", *SAMPLE]

    def drawn() -> list[bytes]:
        said = done("controlled", f"--config={config}", *words, f"--out={tmp_path / 'out'}")
        assert "S-CFG: canny F1" in said
        assert Image.open(tmp_path / "out" / "sheet.png").size == (4 * 128 + 420, 2 * 128 + 20)
        return [Image.open(tmp_path / "out" / f"{number} S-CFG 1.png").tobytes() for number in (0, 1)]

    zero, one = drawn()
    assert zero != one
    shutil.copy(shipped / "1.webp", own / "0.webp")
    shutil.copy(shipped / "0.webp", own / "1.webp")
    assert drawn() == [one, zero]


def test_controlled_names_its_own_flags(tmp_path: Path, call) -> None:
    config = ROOT / "recipes" / "configs" / "controlled" / "pocket_canny.yaml"
    said = call("controlled", f"--config={config}", f"--pictures={tmp_path / 'gone'}", f"--out={tmp_path / 'out'}")
    assert said.code == 2
    assert said.err.startswith(f"error: --pictures: folder {tmp_path / 'gone'} does not exist")
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    said = call("controlled", f"--config={config}", f"--pictures={tmp_path}", f"--out={tmp_path / 'out'}")
    assert "give --prompt" in said.err

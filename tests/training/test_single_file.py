"""A single-file checkpoint is the same base as its folder; what is none is refused in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import original_layout
import pytest
import tiny_bases
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import adapters
from adapters.__main__ import main as adapters_command
from recipes.common.settings import MeasureSettings, SamplingSettings
from training import config, dreambooth, loop, memory, models, single_file
from training.data import crops, images
from training.errors import TrainingError

ONE = torch.ones(1)
SIZES = {  # parameters of the published models
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny bases in diffusers' layout."""
    place = tmp_path_factory.mktemp("folders")
    return {"sd": tiny_bases.sd(place / "sd"), "sdxl": tiny_bases.sdxl(place / "sdxl", second=24)}


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "sd": StableDiffusionPipeline.from_pretrained(folders["sd"], safety_checker=None),
        "sdxl": StableDiffusionXLPipeline.from_pretrained(folders["sdxl"]),
    }


@pytest.fixture(scope="module")
def files(pipes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights as single files."""
    place = tmp_path_factory.mktemp("files")
    return {name: original_layout.write(pipe, place / f"{name}.safetensors") for name, pipe in pipes.items()}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_file_is_the_base_that_its_folder_is(family: str, folders: dict, files: dict, pipes: dict) -> None:
    folder, file = models.load_parts(folders[family]), models.load_parts(files[family], config=str(folders[family]))
    assert file.identity == folder.identity
    assert file.scheduler == folder.scheduler
    opened = single_file.single_file_pipeline(file.file, torch.float32)
    assert adapters.describe(opened) | {"name": ""} == adapters.describe(pipes[family]) | {"name": ""}


def test_a_file_in_half_precision_is_its_folder_in_half_precision(folders: dict, pipes: dict, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in original_layout.tensors(pipes["sd"]).items()}
    save_file(half, tmp_path / "half.safetensors")
    StableDiffusionPipeline.from_pretrained(
        folders["sd"], torch_dtype=torch.float16, safety_checker=None
    ).save_pretrained(tmp_path / "folder")
    file = models.load_parts(tmp_path / "half.safetensors", config=str(folders["sd"]))
    assert file.identity == models.load_parts(tmp_path / "folder").identity


def test_openclip_is_read(folders: dict, pipes: dict, tmp_path: Path) -> None:
    save_file(original_layout.tensors(pipes["sd"], openclip=True), tmp_path / "two.safetensors")
    file = models.load_parts(tmp_path / "two.safetensors", config=str(folders["sd"]))
    assert file.identity == models.load_parts(folders["sd"]).identity


def test_a_whole_fine_tune_of_a_file_is_a_folder(folders: dict, files: dict, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(files["sd"], config=str(folders["sd"]), prediction="v_prediction")
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    settings = config.TrainSettings(steps=1, batch_size=2, learning_rate=1e-2, trackers=[])
    result = loop.train(dreambooth.prepare(parts), data, settings, out=tmp_path, say=lambda line: None)
    assert result is not None
    made = models.load_parts(result.folder)
    assert made.scheduler["prediction_type"] == "v_prediction"
    assert models.weights_digest(made.vae) == models.weights_digest(models.load_parts(folders["sd"]).vae)
    assert not torch.equal(made.unet.conv_out.bias, models.load_parts(folders["sd"]).unet.conv_out.bias)


def test_a_file_draws_its_folder_s_pictures(folders: dict, files: dict) -> None:
    from recipes.common.base import pipeline_arguments, sampling_pipeline

    drawn = []
    for settings in (
        config.BaseSettings(path=str(folders["sdxl"])),
        config.BaseSettings(path=str(files["sdxl"]), config=str(folders["sdxl"])),
    ):
        pipe = sampling_pipeline(settings, SamplingSettings(scheduler="euler"))
        made = pipe("a dog", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
        drawn.append(torch.from_numpy(made.images))
        assert pipeline_arguments(settings)[0] == "StableDiffusionXLPipeline"
    assert torch.equal(*drawn)
    with pytest.raises(TrainingError, match=r"sampling.scheduler pndm knows no noise schedule without signal"):
        sampling_pipeline(dataclasses.replace(settings, zero_snr=True), SamplingSettings(scheduler="pndm"))


def test_the_tools_take_a_file_where_they_take_a_folder(
    folders: dict, files: dict, pipes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from recipes.__main__ import main

    (tmp_path / "sd1").symlink_to(folders["sd"])  # the configs of a family that is as small as the file
    (tmp_path / "merges.xz").symlink_to(single_file.BUNDLED / "merges.xz")
    monkeypatch.setattr(single_file, "BUNDLED", tmp_path)
    monkeypatch.setattr(single_file, "FAMILIES", {pipes["sd"].unet.config.cross_attention_dim: "sd1"})
    tuned = UNet2DConditionModel.from_pretrained(folders["sd"], subfolder="unet")
    with torch.no_grad():
        tuned.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight += 0.01
    tuned.save_pretrained(tmp_path / "tuned")
    made: dict[str, list[bytes]] = {"lora": [], "unet": []}
    for name, base in (("folder", folders["sd"]), ("file", files["sd"])):
        lora, out = tmp_path / f"{name}.safetensors", tmp_path / name
        assert main(["extract", str(base), str(tmp_path / "tuned"), "--out", str(lora), "--rank", "1"]) == 0
        assert main(["merge", f"{lora}=0.5", "--base", str(base), "--out", str(out)]) == 0
        made["lora"].append(lora.read_bytes())
        made["unet"].append((out / "diffusion_pytorch_model.safetensors").read_bytes())
    assert len({*made["lora"]}) == len({*made["unet"]}) == 1
    assert '"modules": 1' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["merge", str(lora), "--base", str(lora), "--out", str(tmp_path / "none")])
    said = capsys.readouterr().err
    assert f"error: base {lora} is an adapter" in said
    assert adapters_command(["merge", str(lora), "--base", str(files["sd"]), "--out", str(tmp_path / "none")]) == 2
    assert "`scfg-toolkit` reads other bases" in capsys.readouterr().err


@pytest.mark.parametrize("single", [True, False])
def test_the_card_s_code_reads_the_base_as_it_was(single: bool, folders: dict, files: dict, tmp_path: Path) -> None:
    from recipes import ship
    from recipes.common.base import sampling_pipeline

    path, more = (files["sd"], {"config": str(folders["sd"])}) if single else (folders["sd"], {})
    base = config.BaseSettings(path=str(path), prediction="v_prediction", **more)
    pipe = sampling_pipeline(base, SamplingSettings())
    settings = ship.Settings(base=base, adapter="x", out=str(tmp_path))
    card = ship._card(settings, MeasureSettings(prompts=["a dog"]), 1.0, pipe)
    assert card.base_model == ("sd.safetensors" if single else str(path))
    text = adapters.card.render_card(
        card, kinds=["lora"], gains=None, has=["pytorch_lora_weights.safetensors"], notes=[]
    )
    code = text.split("```python")[1].split("```")[0]
    if single:  # the configs of the tiny model do not ship
        assert "pipe = StableDiffusionPipeline.from_single_file('sd.safetensors')" in code
        code = code.replace("'sd.safetensors'", f"{str(path)!r}, config={str(folders['sd'])!r}, safety_checker=None")
    scope: dict[str, Any] = {}
    exec(code.partition("pipe.load_lora_weights")[0], scope)
    assert scope["pipe"].scheduler.config.prediction_type == "v_prediction"


# ---------------------------------------------------------------------------------------------- what it predicts


@pytest.mark.parametrize(
    ("tensors", "metadata", "settings", "prediction", "zero"),
    [
        ({}, None, {}, "epsilon", None),
        ({"v_pred": ONE}, None, {}, "v_prediction", None),
        ({"v_pred": ONE, "ztsnr": ONE}, None, {}, "v_prediction", True),
        ({"v_pred": ONE, "ztsnr": ONE}, None, {"zero_snr": False, "prediction": "epsilon"}, "epsilon", None),
        ({}, {"modelspec.prediction_type": "v"}, {}, "v_prediction", None),
        ({}, {"modelspec.prediction_type": "epsilon"}, {}, "epsilon", None),
        ({}, None, {"prediction": "v_prediction", "zero_snr": True}, "v_prediction", True),
    ],
)
def test_prediction_and_schedule_are_told_by_the_file_or_the_settings(
    tensors: dict,
    metadata: dict,
    settings: dict,
    prediction: str,
    zero: bool | None,
    folders: dict,
    pipes: dict,
    tmp_path,
) -> None:
    file = original_layout.write(pipes["sd"], tmp_path / "x.safetensors", metadata=metadata, **tensors)
    found = single_file.inspect_file(file, config=str(folders["sd"]), **settings)
    assert found.scheduler["prediction_type"] == prediction
    assert found.scheduler.get("rescale_betas_zero_snr") in ((True,) if zero else (None, False))
    scheduler = single_file.single_file_pipeline(found, None).scheduler
    scheduler.set_timesteps(4)
    assert (scheduler.timesteps[0] == 999) == bool(zero)  # else no step would see that there is no signal
    assert (scheduler.alphas_cumprod[-1] < 1e-7) == bool(zero)


def test_a_folder_s_prediction_may_be_overruled(folders: dict) -> None:
    assert models.load_parts(folders["sd"], prediction="v_prediction").scheduler["prediction_type"] == "v_prediction"
    assert models.load_parts(folders["sd"]).scheduler["prediction_type"] == "epsilon"


@pytest.mark.parametrize(("spread", "prediction"), [(0.05, "epsilon"), (0.2, "v_prediction")])
def test_sd2_is_told_by_a_norm(spread: float, prediction: str, tmp_path: Path) -> None:
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0"
    torch.manual_seed(0)
    tensors = {
        f"{key}.norm1.bias": torch.randn(320) * spread,
        f"{key}.attn2.to_k.weight": torch.zeros(320, 1024),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "cond_stage_model.model.x": ONE,
        "first_stage_model.x": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "two.safetensors")
    found = single_file.inspect_file(tmp_path / "two.safetensors")
    assert found.configs.name == "sd2"
    assert found.scheduler["prediction_type"] == prediction
    assert found.unet == ({"sample_size": 96, "upcast_attention": True} if prediction == "v_prediction" else {})


# ---------------------------------------------------------------------------------------------- what is bundled


@pytest.mark.parametrize("family", SIZES)
def test_the_bundled_configs_are_those_of_the_published_models(family: str) -> None:
    folder = single_file.BUNDLED / family
    text = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with init_empty_weights():
        made = {
            kind: own.from_config(own.load_config(folder / kind))
            for kind, own in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
        }
        made |= {
            name: kind(CLIPTextConfig.from_pretrained(folder / name))
            for name, kind in text.items()
            if (folder / name).is_dir()
        }
    assert {name: sum(one.numel() for one in module.parameters()) for name, module in made.items()} == SIZES[family]
    unet = made["unet"]
    original = {f"model.diffusion_model.{key}": value for key, value in original_layout.unet_tensors(unet)}
    back = convert_ldm_unet_checkpoint(original, unet.config)
    assert {key: value.shape for key, value in back.items()} == {k: v.shape for k, v in unet.state_dict().items()}


def test_the_bundled_tokenizer_is_clip_s() -> None:
    first, second = single_file._tokenizers("sdxl").values()
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]  # as published
    assert len(first) == 49408
    padded = [one("dog", padding="max_length").input_ids for one in (first, second)]
    assert [len(ids) for ids in padded] == [77, 77]
    assert [ids[:3] for ids in padded] == [[49406, 1929, 49407]] * 2
    assert [ids[-1] for ids in padded] == [49407, 0]


# ---------------------------------------------------------------------------------------------- what is refused

CASES = {
    "lora": (
        {"lora_unet_mid_block.lora_down.weight": ONE},
        "is an adapter, which goes on a base: give it as --adapter",
    ),
    "sd3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": ONE}, "is a checkpoint of SD-3"),
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": ONE}, "is a checkpoint of Flux or its kin"),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": ONE}, "is one network in diffusers' names"),
    "vae": ({"encoder.down.0.block.0.conv1.weight": ONE}, "is a VAE alone"),
    "other": ({"weights": ONE}, "has none of the keys of a U-net"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_no_base_is_one_line(case: str, tmp_path: Path) -> None:
    tensors, said = CASES[case]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(TrainingError, match=said) as caught:
        models.load_parts(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)
    assert "SD-1.x, SD-2.x or SDXL" in str(caught.value)


def test_damaged_and_unfitting_files_are_one_line(folders: dict, files: dict, pipes: dict, tmp_path: Path) -> None:
    def refused(name: str, said: str, **more: Any) -> None:
        with pytest.raises(TrainingError, match=said) as caught:
            models.load_parts(tmp_path / name, **more)
        assert "\n" not in str(caught.value)

    whole = files["sd"].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("cut.safetensors", "cut.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    refused("empty.safetensors", "too short for a safetensors file")
    (tmp_path / "pickled.safetensors").write_bytes(b"\x80\x04" + bytes(100))
    refused("pickled.safetensors", "a pickled checkpoint")
    refused("old.ckpt", "single pickled file, which is never loaded here")
    refused("nowhere.safetensors", "no such file")
    tensors = load_file(files["sd"])
    for left_out, said in (("cond_stage", "has no text encoder"), ("first_stage", "has no VAE")):
        save_file({k: v for k, v in tensors.items() if not k.startswith(left_out)}, tmp_path / "part.safetensors")
        refused("part.safetensors", said)
    save_file(tensors, tmp_path / "whole.safetensors")
    refused("whole.safetensors", "reads text of width 16, which no known family does")
    refused("whole.safetensors", "does not fit the configs of sdxl", config=str(folders["sdxl"]))
    refused("whole.safetensors", "base.config .* has no model_index.json", config=str(tmp_path))
    del tensors["model.diffusion_model.out.2.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    refused("less.safetensors", "lacks weights of its U-net or VAE", config=str(folders["sd"]))
    tensors = load_file(files["sd"])
    del tensors["cond_stage_model.transformer.text_model.final_layer_norm.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    refused("less.safetensors", "lacks 1 weights of its text_encoder, such as", config=str(folders["sd"]))


def test_zero_snr_takes_a_scheduler_that_knows_it() -> None:
    published = json.loads((single_file.BUNDLED / "sd1" / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    assert published["_class_name"] == "PNDMScheduler"
    changed = single_file.scheduled(published, "v_prediction", True)
    assert changed["_class_name"] == "DDIMScheduler"
    assert DDIMScheduler.from_config(changed).config.rescale_betas_zero_snr


def test_the_estimate_of_memory_reads_a_file(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(640, 2048),
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "conditioner.embedders.0.x": torch.zeros(1),
        "first_stage_model.x": torch.zeros(1),
    }
    save_file(tensors, tmp_path / "xl.safetensors")
    found = memory.architecture_of(str(tmp_path / "xl.safetensors"))
    assert (found.resolution, len(found.text_encoders)) == (1024, 2)

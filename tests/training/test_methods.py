"""LoRA's relatives, new tokens, SDXL, prior preservation, and bases that cannot be trained."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters.edges import Canny
from adapters.placement import is_moved
from training import class_images, config, controlnet, dreambooth, loop, lora, models, prepare
from training.data import crops, images
from training.errors import TrainingError
from training.estimate import Estimate
from training.memory import Peak
from training.method import Method


def train(method: Method, pictures: Path, out: Path, **changes: object) -> loop.Result:
    data = crops.Views(
        images.folder(pictures, conditioning=pictures, minimum=8), resolution=32, multiple=method.parts.multiple
    )
    plain = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "trackers": [], "log_every": 1}
    settings = config.TrainSettings(**{**plain, **changes})  # type: ignore[arg-type]
    result = loop.train(method, data, settings, out=out, say=lambda line: None, record={"lora": {"rank": 2}})
    assert result is not None
    return result


def predict(unet, width: int = 16, **more: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 12, width, generator=generator)
    with torch.no_grad():
        return unet.eval()(latents, 500, text, **more).sample


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 5.0},
        {"rslora": True, "alpha": 3.0},
        {"dora": True},
        {"targets": "attention+ff"},
        {"targets": "all-linear"},
        {"targets": "conv"},
        {"targets": ["to_q", "conv1"]},
    ],
    ids=str,
)
def test_every_lora_loads_into_a_pipeline_as_it_was_trained(
    changes: dict, base: Path, pictures: Path, tmp_path: Path
) -> None:
    parts = models.load_parts(base)
    result = train(lora.prepare(parts, config.LoraSettings(rank=2, **changes)), pictures, tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    before = predict(pipe.unet)
    pipe.load_lora_weights(result.folder)
    torch.testing.assert_close(predict(pipe.unet), predict(parts.unet), rtol=1e-4, atol=1e-6)
    assert float((predict(pipe.unet) - before).abs().max()) > 1e-4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_result_is_saved_in_the_precision_asked_for(
    precision: str, base: Path, pictures: Path, tmp_path: Path
) -> None:
    found = {}
    for name in ("fp32", precision):
        method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2))
        result = train(method, pictures, tmp_path / name, save_precision=name)
        found[name] = load_file(result.folder / lora.WEIGHTS_NAME)
        (kept,) = (tmp_path / name / "checkpoints").glob("step-*/weights.safetensors")
        assert {value.dtype for value in load_file(kept).values()} == {torch.float32}
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert all(torch.equal(value.to(dtype), found[precision][key]) for key, value in found["fp32"].items())
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_lora_weights(result.folder)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_loha_and_lokr_come_back_through_peft(kind: str, base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    result = train(lora.prepare(parts, config.LoraSettings(rank=2, kind=kind)), pictures, tmp_path)  # type: ignore[arg-type]
    fresh = PeftModel.from_pretrained(models.load_parts(base).unet, result.folder / "unet")
    torch.testing.assert_close(predict(fresh), predict(parts.unet), rtol=1e-4, atol=1e-6)


def test_the_file_tells_alpha_and_settings(base: Path, pictures: Path, tmp_path: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(rank=2, alpha=5.0))
    with safe_open(train(method, pictures, tmp_path).folder / lora.WEIGHTS_NAME, framework="pt") as file:
        header = file.metadata()
        assert not [key for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118 # diffusers refuses them
    described = json.loads(header["lora_adapter_metadata"])
    assert described["unet.lora_alpha"] == 5.0
    assert described["unet.r"] == 2
    assert json.loads(header["settings"]) == {"lora": {"rank": 2}}


def test_an_unknown_target_is_named(base: Path) -> None:
    with pytest.raises(TrainingError, match=r"lora.targets: to_x names no layer.*attention.*to_q"):
        lora.prepare(models.load_parts(base), config.LoraSettings(targets=["to_q", "to_x"]))


def test_a_second_adapter_on_the_same_base_is_refused(base: Path) -> None:
    parts = models.load_parts(base)
    lora.prepare(parts)
    with pytest.raises(TrainingError, match="already has an adapter"):
        lora.prepare(parts)


def test_a_new_token_trains_alone_and_loads_as_textual_inversion(base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    table = parts.text_encoders[0].get_input_embeddings().weight.detach().clone()
    word = parts.tokenizers[0]("d", add_special_tokens=False).input_ids
    (pictures / "0.txt").write_text("a <rex>")
    method = lora.prepare(parts, config.LoraSettings(rank=2, tokens={"<rex>": "d"}))
    result = train(method, pictures, tmp_path, steps=4)
    assert torch.equal(parts.text_encoders[0].get_input_embeddings().table.weight, table)
    learned = load_file(result.folder / "learned_embeds.safetensors")["<rex>"]
    assert float((learned - table[word[0]]).abs().max()) > 1e-4
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipe.load_textual_inversion(result.folder / "learned_embeds.safetensors")
    pipe.load_lora_weights(result.folder)
    ours = models.encode_text(parts, models.tokenize_captions(parts, ["a <rex> d"]))["embeds"]
    ids = pipe.tokenizer("a <rex> d", padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(pipe.text_encoder(ids)[0], ours, rtol=1e-4, atol=1e-5)


def test_a_token_that_no_caption_has_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    method = lora.prepare(models.load_parts(base), config.LoraSettings(tokens={"<rex>": "d"}))
    with pytest.raises(TrainingError, match=r"lora.tokens: <rex> is in no caption"):
        train(method, pictures, tmp_path)


def test_a_token_that_is_a_word_already_is_refused(base: Path) -> None:
    with pytest.raises(TrainingError, match=r"lora.tokens: a</w> is in the vocabulary"):
        lora.prepare(models.load_parts(base), config.LoraSettings(tokens={"a</w>": "d"}))


@pytest.mark.parametrize("text_encoder", [False, True])
def test_sdxl_trains_both_text_encoders_and_loads(
    text_encoder: bool, sdxl_base: Path, pictures: Path, tmp_path: Path
) -> None:
    parts = models.load_parts(sdxl_base)
    assert parts.family == "sdxl"
    result = train(
        lora.prepare(parts, config.LoraSettings(rank=2, text_encoder=text_encoder)), pictures, tmp_path, steps=3
    )
    keys = load_file(result.folder / lora.WEIGHTS_NAME).keys()
    found = {key.split(".")[0] for key in keys}
    assert found == ({"unet", "text_encoder", "text_encoder_2"} if text_encoder else {"unet"})
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_base)
    pipe.load_lora_weights(result.folder)
    added = {"text_embeds": torch.ones(1, 8), "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])}
    ours, theirs = (predict(unet, 32, added_cond_kwargs=added) for unet in (parts.unet, pipe.unet))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


def test_sdxl_text_and_sizes_are_those_of_its_pipeline(sdxl_base: Path) -> None:
    parts = models.load_parts(sdxl_base)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_base)
    with torch.no_grad():
        ours = models.encode_text(parts, models.tokenize_captions(parts, ["a dog"]))
        embeds, _, pooled, _ = pipe.encode_prompt("a dog", device="cpu", do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["embeds"], embeds)
    torch.testing.assert_close(ours["pooled"], pooled)


def test_sdxl_full_and_controlnet_train(sdxl_base: Path, pictures: Path, tmp_path: Path) -> None:
    full = train(dreambooth.prepare(models.load_parts(sdxl_base)), pictures, tmp_path / "full")
    StableDiffusionXLPipeline.from_pretrained(full.folder)
    train(controlnet.prepare(models.load_parts(sdxl_base)), pictures, tmp_path / "controlnet")


def test_a_controlnet_goes_on_from_a_given_one(base: Path, sdxl_base: Path, pictures: Path, tmp_path: Path) -> None:
    edges = Canny(low=30, high=90, grey=True)
    first = train(controlnet.prepare(models.load_parts(base), edges=edges), pictures, tmp_path / "one")
    assert Canny.of(ControlNetModel.load_config(first.folder)) == edges
    again = controlnet.prepare(models.load_parts(base), config.ControlNetSettings(start=str(first.folder)))
    saved = load_file(first.folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in again.controlnet.state_dict().items())
    assert Canny.of(again.controlnet.config) == edges  # diffusers carries it along
    with pytest.raises(TrainingError, match="cross_attention_dim = 16, the base's U-net has 32"):
        controlnet.prepare(models.load_parts(sdxl_base), config.ControlNetSettings(start=str(first.folder)))
    with pytest.raises(TrainingError, match=r"controlnet.channels must hold 3 widths for a VAE factor of 4"):
        controlnet.prepare(models.load_parts(base), config.ControlNetSettings(channels=(16, 32)))


def prior(base: Path, folder: Path, **changes: object) -> dreambooth.Prior:
    plain = {"preserve": "pictures", "class_prompt": "dog", "class_images": 3, "steps": 1}
    chosen = config.DreamBoothSettings(**{**plain, **changes})  # type: ignore[arg-type]
    parts = models.load_parts(base)
    data = crops.Views([images.Sample(image=Image.new("RGB", (32, 32)), caption="x dog")], resolution=32)
    made = dreambooth.prior(parts, chosen, data, folder=folder)
    assert made is not None
    return made


def test_class_images_are_made_once_and_only_reused_for_the_same_purpose(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior(base, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert len(before) == 3
    (folder / "00001.png").unlink()
    assert len(prior(base, folder, class_images=4).views) == 4
    after = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert before.items() <= after.items()  # the missing one came back as it was, by its own seed
    whole = before["00001.png"]
    for damaged in (whole[: len(whole) // 2], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:], b"", b"[]"):
        (folder / "00001.png").write_bytes(damaged)
        prior(base, folder, class_images=4)
        assert (folder / "00001.png").read_bytes() == whole
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("")):
        damage(folder / "00001.txt")
        prior(base, folder, class_images=4)
        assert (folder / "00001.txt").read_text("utf-8") == "dog\n"
    with pytest.raises(TrainingError, match=r"class images in .* settings \(prompts: \['dog'\] -> \['cat'\]\)"):
        prior(base, folder, class_prompt="cat")
    (folder / "manifest.json").write_text("")
    with pytest.raises(TrainingError, match=r"manifest.json: not valid JSON.*delete .*class, they are made again"):
        prior(base, folder)
    (folder / "manifest.json").unlink()
    for put, undo in ((os.mkfifo, os.unlink), (os.mkdir, os.rmdir)):
        put(folder / "manifest.json")
        with pytest.raises(
            TrainingError, match=r"manifest.json: not a regular file.*delete .*class, they are made again"
        ):
            prior(base, folder)
        undo(folder / "manifest.json")
    with pytest.raises(TrainingError, match=r"has images but no manifest.json"):
        prior(base, folder)
    for path in folder.iterdir():
        path.unlink()
    (folder / "manifest.json").write_text("")  # as a full disk once left it: it says nothing about no images
    assert len(prior(base, folder).views) == 3
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before


def test_class_images_are_drawn_in_the_precision_asked_for_and_the_base_is_as_it_was(
    base: Path, tmp_path: Path
) -> None:
    parts = models.load_parts(base)
    networks = [parts.unet, parts.vae, *parts.text_encoders]
    before = {one: (one.data_ptr(), one.detach().clone()) for network in networks for one in network.parameters()}
    seen: set[torch.dtype] = set()
    handle = parts.unet.register_forward_pre_hook(lambda net, _: seen.add(net.dtype))
    plain = {"resolution": 32, "steps": 1, "batch_size": 2}
    class_images.class_images(parts, ["dog"], 2, tmp_path / "fp32", **plain)
    assert seen == {torch.float32}
    seen.clear()
    known = [one for network in networks for one in (*network.parameters(), *network.buffers())]
    with Peak(known) as count:
        class_images.class_images(parts, ["dog"], 2, tmp_path / "bf16", **plain, precision="bf16")
        gc.collect()
    handle.remove()
    assert seen == {torch.bfloat16}
    rounded = sum(2 * one.numel() for one in before)
    assert count.most > rounded
    assert count.live < rounded / 10  # the rounded weights are gone
    assert all(one.data_ptr() == place and torch.equal(one, value) for one, (place, value) in before.items())
    pictures = [np.asarray(Image.open(tmp_path / name / "00000.png"), float) for name in ("fp32", "bf16")]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 20
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("fp32", "bf16")]
    assert manifests[1] == {**manifests[0], "precision": "bf16"}
    assert "precision" not in manifests[0]  # as before there was a choice


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_class_images_are_the_same_where_the_parts_of_the_base_take_turns(
    precision: str, base: Path, tmp_path: Path
) -> None:
    parts = models.load_parts(base)
    networks = [parts.unet, parts.vae, *parts.text_encoders]
    plain = {"resolution": 32, "steps": 1, "batch_size": 2, "precision": precision}
    class_images.class_images(parts, ["dog"], 2, tmp_path / "whole", **plain)
    with class_images.base_drawing(parts, precision, offload=True):
        assert all(map(is_moved, networks))
    class_images.class_images(parts, ["dog"], 2, tmp_path / "turns", **plain, offload=True)
    whole, turns = ({file.name: file.read_bytes() for file in (tmp_path / way).iterdir()} for way in ("whole", "turns"))
    assert whole == turns
    assert not any(map(is_moved, networks))
    assert not any("forward" in vars(network) for network in networks)


def test_batch_and_precision_matter_only_to_class_images_that_are_still_to_be_drawn(base: Path, tmp_path: Path) -> None:
    parts, folder = models.load_parts(base), tmp_path / "class"
    plain = {"resolution": 32, "steps": 1}
    class_images.class_images(parts, ["dog"], 3, folder, **plain, batch_size=2)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    class_images.class_images(parts, ["dog"], 3, folder, **plain, batch_size=1, precision="bf16")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(TrainingError, match=r"settings \(precision: fp32 -> bf16; batch_size: 2 -> 1\); delete"):
        class_images.class_images(parts, ["dog"], 4, folder, **plain, batch_size=1, precision="bf16")
    (folder / "manifest.json").write_text(json.dumps(json.loads(before["manifest.json"]) | {"precision": "fp7"}))
    with pytest.raises(TrainingError, match=r"settings \(precision: fp7 -> fp32\); delete"):
        class_images.class_images(parts, ["dog"], 3, folder, **plain, batch_size=2)


def test_fewer_class_images_than_there_are_are_used(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    prior(base, folder)
    Image.new("RGB", (32, 32)).save(folder / "mine.jpg")
    assert len(prior(base, folder, class_images=2).views) == 2
    assert len(prior(base, folder, class_images=3).views) == 3
    (folder / "manifest.json").write_text("{", "utf-8")
    with pytest.raises(TrainingError, match=r"manifest.json: not valid JSON"):
        prior(base, folder)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_own_class_pictures_are_taken_as_they_are(
    suffix: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (40 + number, 32)).save(folder / f"{number}.{suffix}")
    (folder / "1.txt").write_text("a wet dog", "utf-8")
    before = sorted(folder.iterdir())
    made = prior(base, tmp_path / "unused", class_folder=str(folder), class_images=3)
    assert [made.views.caption(number) for number in range(len(made.views))] == ["dog", "a wet dog", "dog"]
    assert f"{folder}: 3 of your own 4 class pictures are used, none are generated" in capsys.readouterr().out
    assert len(prior(base, tmp_path / "unused", class_folder=str(folder), class_images=100).views) == 4
    assert sorted(folder.iterdir()) == before


def test_class_images_of_a_prompt_file_are_captioned_with_what_they_were_drawn_of(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("{} far\n\na cat\n")
    made = prior(base, tmp_path / "class", class_prompt="a dog", class_prompt_file=str(file))
    assert [made.views.caption(number) for number in range(3)] == ["a dog far", "a cat", "a dog far"]
    alone = prior(base, tmp_path / "alone", class_prompt="a dog far")
    same = [bool((made.views[number].pixels == alone.views[number].pixels).all()) for number in range(3)]
    assert same == [True, False, True]
    file.write_text("a cat\n")
    with pytest.raises(TrainingError, match=r"with other settings \(prompts: "):
        prior(base, tmp_path / "class", class_prompt="a dog", class_prompt_file=str(file))
    file.write_text("\n")
    with pytest.raises(TrainingError, match=r"class_prompt_file .* is empty; give it a caption a line"):
        prior(base, tmp_path / "other", class_prompt="a dog", class_prompt_file=str(file))
    with pytest.raises(TrainingError, match=r"class_prompt_file .*gone.txt cannot be read"):
        prior(base, tmp_path / "other", class_prompt="a dog", class_prompt_file=str(tmp_path / "gone.txt"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(TrainingError, match=r"its \{\} needs dreambooth\.class_prompt"):
        config.DreamBoothSettings(class_prompt_file=str(file))


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_the_loss_is_instance_mean_plus_weighted_class_mean(
    ratio: float, base: Path, pictures: Path, tmp_path: Path
) -> None:
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = method.step

    def step(networks, batch, dtype):
        losses = inner(networks, batch, dtype)
        seen.append((losses.detach(), batch["weight"]))
        return losses

    method.step = step
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    settings = config.TrainSettings(steps=1, batch_size=6, trackers=[])
    made = prior(base, tmp_path / "class", prior_ratio=ratio, prior_weight=0.25)
    result = loop.train(method, data, settings, out=tmp_path / "out", prior=made, say=lambda line: None)
    assert result is not None
    losses, weights = seen[-1]
    of_class = weights == weights.min()
    assert int(of_class.sum()) == round(6 * ratio / (1 + ratio))
    expected = losses[~of_class].mean() + 0.25 * losses[of_class].mean()
    assert result.losses[0] == pytest.approx(float(expected), rel=1e-5)


def test_bases_that_cannot_be_trained_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="is not a folder; give a diffusers pipeline folder"):
        models.load_parts(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match=r"model_index.json is missing"):
        models.load_parts(tmp_path)
    (tmp_path / "alone.safetensors").write_bytes(b"")
    with pytest.raises(TrainingError, match=r"alone.safetensors: 0 bytes is too short for a safetensors file"):
        models.load_parts(tmp_path / "alone.safetensors")
    with pytest.raises(TrainingError, match=r"models/alone.safetensors: no such file"):  # not a hub id
        models.load_parts("models/alone.safetensors")
    with pytest.raises(TrainingError, match=r"old.ckpt is a single pickled file, which is never loaded"):
        models.load_parts("models/old.ckpt")
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").rename(broken / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(TrainingError, match="broken"):
        models.load_parts(broken)
    index = json.loads((base / "model_index.json").read_text())
    index["transformer"] = index.pop("unet")
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TrainingError, match=r"has no U-net \(it holds .*transformer"):
        models.load_parts(broken)


def not_finite(file: Path) -> None:
    tensors = load_file(file)
    tensors[max(tensors)][..., 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})


DAMAGED_BASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty U-net folder": (
        lambda base: [path.unlink() for path in (base / "unet").iterdir()],
        r"unet/config.json is missing",
    ),
    "a config that is a list": (
        lambda base: (base / "unet/config.json").write_text("[]"),
        r"unet/config.json: expected",
    ),
    "an empty config": (lambda base: (base / "vae/config.json").write_text(""), r"vae/config.json: not valid JSON"),
    "an index that is a list": (
        lambda base: (base / "model_index.json").write_text("[1]"),
        "model_index.json: expected",
    ),
    "a scheduler that is a list": (
        lambda base: (base / "scheduler/scheduler_config.json").write_text("[1]"),
        "scheduler_config.json: expected a JSON object",
    ),
    "a scheduler without a class": (
        lambda base: (base / "scheduler/scheduler_config.json").write_text("{}"),
        "scheduler_config.json: no scheduler is named",
    ),
    "no tokenizer": (lambda base: shutil.rmtree(base / "tokenizer"), "tokenizer holds no tokenizer"),
    "cut weights": (lambda base: os.truncate(base / "unet/diffusion_pytorch_model.safetensors", 3000), "unet"),
    "NaN in the U-net": (
        lambda base: not_finite(base / "unet/diffusion_pytorch_model.safetensors"),
        r"unet\.\S+ holds NaN or infinite values; get the base again",
    ),
    "NaN in the VAE": (
        lambda base: not_finite(base / "vae/diffusion_pytorch_model.safetensors"),
        r"vae\.\S+ holds NaN or infinite values",
    ),
    "NaN in the text encoder": (
        lambda base: not_finite(base / "text_encoder/model.safetensors"),
        r"text_encoder\.\S+ holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", DAMAGED_BASES)
def test_a_damaged_base_is_named(name: str, base: Path, tmp_path: Path) -> None:
    damage, said = DAMAGED_BASES[name]
    shutil.copytree(base, tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(TrainingError, match=said):
        models.load_parts(tmp_path / "base")


def test_a_dry_run_of_a_heavy_base_tries_smaller_pictures_and_scales(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config.TrainSettings(steps=100, batch_size=2, dry_run=True, trackers=[])

    def tried(resolution: int) -> tuple[Estimate, str]:
        parts = models.load_parts(base)
        data = crops.Views(
            images.folder(pictures, minimum=8),
            resolution=resolution,
            multiple=parts.multiple,
            further=[resolution // 2],
        )
        found: list[Estimate] = []
        said: list[str] = []
        method = lora.prepare(parts, config.LoraSettings(rank=2))
        loop.train(method, data, settings, out=tmp_path / "run", say=said.append, estimated=found.append)
        return found[0], "\n".join(said)

    whole, said = tried(192)
    assert "this trial takes" not in said
    monkeypatch.setattr(prepare, "HEAVY", 1e-9)
    monkeypatch.setattr(prepare, "SHORTER", (2, 4))
    scaled, said = tried(192)
    assert "a step of 192 pixels is slow without a GPU: this trial takes one of 48" in said
    assert scaled.weights == whole.weights
    assert scaled.activations == pytest.approx(whole.activations, rel=0.15)
    # The process had only those of the smaller pictures, a sixteenth.
    assert (whole.untried, scaled.untried) == (0, pytest.approx(15 / 16 * scaled.activations, rel=1e-6))


@pytest.mark.parametrize(("cache", "wanted"), [("memory", "pictures, pictures, pictures, texts, U-net"), ("off", None)])
def test_a_dry_run_encodes_before_the_unet_comes_where_the_run_caches(
    cache: str, wanted: str | None, base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a GPU that has room for the training would have none for its trial. The first picture is timed."""
    parts, order = models.load_parts(base), []
    parts.vae.encoder.register_forward_hook(lambda *_: order.append("pictures"))
    parts.text_encoders[0].register_forward_hook(lambda *_: order.append("texts"))
    ready = prepare.lay_ready
    monkeypatch.setattr(prepare, "lay_ready", lambda *given: (order.append("U-net"), ready(*given)))
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    settings = config.TrainSettings(steps=2, batch_size=2, dry_run=True, trackers=[])
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    loop.train(method, data, settings, out=tmp_path / "run", cache=cache, say=lambda line: None)
    # What is asked in every step of the run is asked beside the U-net.
    assert ", ".join(order) == (wanted or "U-net, pictures, texts")


def test_a_dry_run_tells_and_trains_nothing(base: Path, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    for name in ("0.txt", "1.txt"):
        (pictures / name).write_text("picture of words " * 100, "utf-8")
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    said: list[str] = []
    settings = config.TrainSettings(steps=100, dry_run=True, trackers=[])
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    assert loop.train(method, data, settings, out=tmp_path / "out", say=said.append) is None
    text = "\n".join(said)
    trained = sum(parameter.numel() for parameter in method.trainable().values())
    assert f"{trained:,} of" in text
    assert "tensors of a training step: " in text
    assert "of it caching" in text
    assert [line.split(":")[0] for line in said if "longer than" in line] == [
        f"1 of 4 captions are longer than the {parts.tokenizers[0].model_max_length} tokens that the text encoder reads"
    ]
    assert not (tmp_path / "out").exists()

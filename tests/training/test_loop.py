"""The loop on tiny random bases: identities first."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from safetensors.torch import load_file

from training import config, controlnet, dreambooth, images, loop, lora, models, views
from training.errors import TrainingError
from training.method import Method

RATE = 1e-2


def settings(**changes: object) -> config.TrainSettings:
    plain = {"steps": 3, "batch_size": 2, "learning_rate": RATE, "trackers": [], "log_every": 1}
    return config.TrainSettings(**{**plain, **changes})  # type: ignore[arg-type]


def quiet(line: str) -> None:
    pass


def train(base: Path, pictures: Path, out: Path, make, chosen: config.TrainSettings, **more: object) -> loop.Result:
    parts = models.load(base)
    source = images.folder(pictures, conditioning=pictures, minimum=8)
    data = views.Views(source, resolution=32, multiple=parts.multiple)
    result = loop.train(make(parts), data, chosen, out=out, say=quiet, **more)  # type: ignore[arg-type]
    assert result is not None
    return result


def small_lora(parts: models.Parts) -> Method:
    return lora.prepare(parts, config.LoraSettings(rank=2))


def weights(result: loop.Result) -> dict[str, torch.Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint / "weights.safetensors")


def test_the_same_settings_give_the_same_bits(base: Path, pictures: Path, tmp_path: Path) -> None:
    one, two = (train(base, pictures, tmp_path / name, small_lora, settings()) for name in "ab")
    other = train(base, pictures, tmp_path / "c", small_lora, settings(seed=1))
    assert all(bool((weights(two)[key] == value).all()) for key, value in weights(one).items())
    assert one.losses == two.losses != other.losses


@pytest.mark.parametrize("make", [small_lora, dreambooth.prepare, controlnet.prepare])
def test_validation_leaves_training_bit_identical(make, base: Path, pictures: Path, tmp_path: Path) -> None:
    plain = train(base, pictures, tmp_path / "plain", make, settings(ema=0.9))
    watched = config.ValidationSettings(
        prompts=["picture a"], conditioning=[str(pictures / "0.png")], every=2, steps=2, loss_samples=2
    )
    seen = train(base, pictures, tmp_path / "seen", make, settings(ema=0.9, validation=watched))
    assert all(bool((weights(seen)[key] == value).all()) for key, value in weights(plain).items())
    assert seen.losses == plain.losses
    there = {path.relative_to(tmp_path / "seen" / "samples").as_posix() for path in tmp_path.rglob("samples/*/*.png")}
    assert there == {"step-000000/00.png", "step-000002/00.png", "step-000003/00.png"}


@pytest.mark.parametrize("split", [(1, 4), (2, 2)])
def test_a_batch_may_be_split_into_micro_steps(
    split: tuple[int, int], base: Path, pictures: Path, tmp_path: Path
) -> None:
    steps = 20
    whole = train(base, pictures, tmp_path / "whole", small_lora, settings(steps=steps, batch_size=4))
    size, accumulation = split
    chosen = settings(steps=steps, batch_size=size, accumulation=accumulation)
    parted = train(base, pictures, tmp_path / "parted", small_lora, chosen)
    torch.testing.assert_close(whole.losses, parted.losses, rtol=0, atol=1e-5)
    ours, theirs = weights(whole), weights(parted)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 0.02 * RATE * steps


def test_the_saved_lora_changes_a_plain_pipeline_as_the_trained_unet(
    base: Path, pictures: Path, tmp_path: Path
) -> None:
    parts = models.load(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2, alpha=3, text_encoder=True))
    data = views.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    result = loop.train(method, data, settings(), out=tmp_path, say=quiet)
    assert result is not None
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    latents, ids = torch.randn(1, 4, 8, 8), torch.arange(12)[None]
    with torch.no_grad():
        before = pipe.unet(latents, 500, pipe.text_encoder(ids)[0]).sample
        pipe.load_lora_weights(result.folder)
        after = pipe.unet(latents, 500, pipe.text_encoder(ids)[0]).sample
        trained = parts.unet.eval()(latents, 500, parts.text_encoders[0].eval()(ids)[0]).sample
    torch.testing.assert_close(after, trained, rtol=1e-4, atol=1e-6)
    assert float((after - before).abs().max()) > 1e-3


def test_full_training_saves_a_whole_pipeline(base: Path, pictures: Path, tmp_path: Path) -> None:
    def both(parts: models.Parts) -> Method:
        return dreambooth.prepare(parts, config.DreamBoothSettings(text_encoder=True))

    result = train(base, pictures, tmp_path, both, settings())
    pipe = StableDiffusionPipeline.from_pretrained(result.folder, safety_checker=None)
    saved = weights(result)
    for name, module in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for key, value in module.state_dict().items():
            assert bool((saved[f"{name}.{key}"] == value).all()), key


def test_a_new_controlnet_changes_nothing_and_the_saved_one_loads(base: Path, pictures: Path, tmp_path: Path) -> None:
    network = controlnet.prepare(models.load(base)).controlnet
    with torch.no_grad():
        down, mid = network(
            torch.randn(1, 4, 8, 8), 5, torch.randn(1, 12, 16), torch.rand(1, 3, 32, 32), return_dict=False
        )
    assert all(not bool(part.any()) for part in (*down, mid))
    result = train(base, pictures, tmp_path, controlnet.prepare, settings())
    loaded = ControlNetModel.from_pretrained(result.folder)
    saved = weights(result)
    assert all(bool((saved[f"controlnet.{key}"] == value).all()) for key, value in loaded.state_dict().items())
    assert float(loaded.controlnet_mid_block.weight.detach().abs().max()) > 0


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(base: Path, pictures: Path, tmp_path: Path) -> None:
    def spoilt(parts: models.Parts) -> Method:
        method, calls = small_lora(parts), []

        def step(networks, batch, dtype):
            calls.append(1)
            return method_step(networks, batch, dtype) * (float("nan") if len(calls) == 3 else 1)

        method_step = method.step
        return dataclasses.replace(method, step=step)

    with pytest.raises(TrainingError, match=r"loss became nan between steps 3 and 3.*step-000002"):
        train(base, pictures, tmp_path, spoilt, settings(steps=5, save_every=2))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002"]


def test_a_model_that_gets_no_gradient_is_an_error(base: Path, pictures: Path, tmp_path: Path) -> None:
    def deaf(parts: models.Parts) -> Method:
        method = lora.prepare(parts, config.LoraSettings(rank=2, text_encoder=True))
        method_step = method.step

        def step(networks, batch, dtype):
            with torch.no_grad():
                text = networks["text_encoder"](batch["ids_0"])[0]
            return method_step(networks, {**batch, "embeds": text}, dtype)

        return dataclasses.replace(method, step=step)

    with pytest.raises(TrainingError, match="no gradient reaches text_encoder"):
        train(base, pictures, tmp_path, deaf, settings())


def test_clipping_clips(base: Path, pictures: Path, tmp_path: Path) -> None:
    """With plain gradient descent the first step is as long as the clipped gradient: learning rate times `clip`."""
    chosen = settings(steps=1, optimizer="torch.optim:SGD", learning_rate=1.0, clip=1e-3)
    start = {key: value.detach().clone() for key, value in small_lora(models.load(base)).trainable().items()}
    end = weights(train(base, pictures, tmp_path, small_lora, chosen))
    length = sum(float((end[key] - start[key]).square().sum()) for key in start) ** 0.5
    assert length == pytest.approx(1e-3, rel=1e-2)

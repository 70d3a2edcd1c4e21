"""The loop on tiny random bases: identities first."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from safetensors.torch import load_file

from training import config, controlnet, dreambooth, loop, lora, models, networks
from training.data import crops, images
from training.errors import TrainingError
from training.kernels import prepack
from training.method import Method

RATE = 1e-2


def settings(**changes: object) -> config.TrainSettings:
    plain = {"steps": 3, "batch_size": 2, "learning_rate": RATE, "trackers": [], "log_every": 1}
    return config.TrainSettings(**{**plain, **changes})  # type: ignore[arg-type]


def quiet(line: str) -> None:
    pass


def train(base: Path, pictures: Path, out: Path, make, chosen: config.TrainSettings, **more: object) -> loop.Result:
    parts = models.load_parts(base)
    source = images.folder(pictures, conditioning=pictures, minimum=8)
    data = crops.Views(source, resolution=32, multiple=parts.multiple)
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
    parts = models.load_parts(base)
    method = lora.prepare(parts, config.LoraSettings(rank=2, alpha=3, text_encoder=True))
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
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
    network = controlnet.prepare(models.load_parts(base)).controlnet
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
            if not torch.is_grad_enabled():
                calls.clear()  # the estimate's trial ends so
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
    start = {key: value.detach().clone() for key, value in small_lora(models.load_parts(base)).trainable().items()}
    end = weights(train(base, pictures, tmp_path, small_lora, chosen))
    length = sum(float((end[key] - start[key]).square().sum()) for key in start) ** 0.5
    assert length == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("make", [small_lora, dreambooth.prepare, controlnet.prepare])
def test_bf16_computes_low_and_trains_in_float32(make, base: Path, pictures: Path, tmp_path: Path) -> None:
    full = train(base, pictures, tmp_path / "fp32", make, settings())
    low = train(base, pictures, tmp_path / "bf16", make, settings(precision="bf16"))
    assert {value.dtype for value in weights(low).values()} == {torch.float32}
    torch.testing.assert_close(low.losses, full.losses, rtol=5e-2, atol=5e-2)
    assert low.losses != full.losses


def test_frozen_weights_get_the_compute_precision(base: Path) -> None:
    method = small_lora(models.load_parts(base))
    networks.cast(method, torch.device("cpu"), torch.bfloat16)
    frozen = {parameter.dtype for parameter in method.parts.unet.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}
    assert {parameter.dtype for parameter in method.trainable().values()} == {torch.float32}


def test_gradient_checkpointing_changes_no_result(base: Path, pictures: Path, tmp_path: Path) -> None:
    plain = train(base, pictures, tmp_path / "plain", small_lora, settings())
    again = train(base, pictures, tmp_path / "again", small_lora, settings(gradient_checkpointing=True))
    torch.testing.assert_close(again.losses, plain.losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["fuse", "prepack"])
def test_faster_kernels_change_no_result(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    monkeypatch.setattr(prepack, "SMALLEST", 0)
    off = {"fuse": False, "prepack": False}
    plain, fast = (
        train(base, pictures, tmp_path / str(how), small_lora, settings(**{**off, kernel: how}))
        for how in (False, True)
    )
    torch.testing.assert_close(fast.losses, plain.losses, rtol=1e-5, atol=1e-6)
    ours, theirs = weights(plain), weights(fast)
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 0.02 * RATE * 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("bits", [None, "int8"])
def test_compiling_changes_no_result(bits: str | None, base: Path, pictures: Path, tmp_path: Path) -> None:
    plain, compiled = (
        train(base, pictures, tmp_path / str(how), small_lora, settings(compile=how, quantize=bits))
        for how in (False, True)
    )
    torch.testing.assert_close(compiled.losses, plain.losses, rtol=1e-4, atol=1e-5)
    ours, theirs = weights(plain), weights(compiled)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in ours) <= 0.02 * RATE * 3


def test_no_step_waits_for_the_device_between_log_lines(
    base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`.item()`, `float()` and `bool()` of a tensor wait for its device; a step may call none of them."""
    reads: list[str] = []
    watched = {"loop.py", "setup.py", "method.py", "objective.py", "optim.py", "models.py", "clip_grad.py"}
    for name in ("item", "__float__", "__bool__", "tolist"):
        original = getattr(torch.Tensor, name)

        def counted(self, *, name=name, original=original):
            caller = sys._getframe(1).f_code
            if Path(caller.co_filename).name in watched:
                reads.append(f"{name} in {caller.co_name}")
            return original(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for steps in (10, 30):
        reads.clear()
        chosen = settings(steps=steps, log_every=10, workers=0, save_every=1000)
        train(base, pictures, tmp_path / str(steps), small_lora, chosen)
        counts.append(len(reads))
    assert counts[0] >= 1  # the log line itself, so the counting works
    assert counts[1] - counts[0] <= 2, reads  # two more log lines


def test_tensorboard_gets_the_loss_and_a_missing_tracker_is_named(base: Path, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    parts = models.load_parts(base)
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    chosen = settings(steps=1, trackers=["tensorboard", "no_such_tracker"])
    loop.train(small_lora(parts), data, chosen, out=tmp_path, say=said.append)
    assert list((tmp_path / "tracking").glob("events.out*"))
    assert any("no_such_tracker is not installed" in line for line in said)

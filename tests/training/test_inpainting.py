"""Inpainting U-nets: their nine channels in training are those of diffusers' pipelines, and holes follow a seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import original_layout
import pytest
import tiny_bases
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from training import config, controlnet, dreambooth, holes, loop, lora, models, single_file
from training.data import crops, images
from training.data.batches import Draws, Feed, Stream
from training.data.cache import Live
from training.errors import TrainingError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inpainting")
    return {
        "sd": tiny_bases.inpainting(root / "sd", tiny_bases.sd(root / "sd0")),
        "sdxl": tiny_bases.inpainting(root / "sdxl", tiny_bases.sdxl(root / "sdxl0", second=24)),
    }


def views(parts: models.Parts, pictures: Path) -> crops.Views:
    return crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)


def train(method: Any, data: crops.Views, out: Path, **more: Any) -> dict[str, torch.Tensor]:
    plain = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "trackers": []}
    extra = {name: more.pop(name) for name in ("prior", "cache", "say") if name in more}
    settings = config.TrainSettings(**{**plain, **more})
    assert loop.train(method, data, settings, out=out, **({"say": lambda line: None} | extra)) is not None
    return {name: value.detach().clone() for name, value in method.trainable().items()}


def test_holes_follow_their_seed_and_are_never_empty() -> None:
    drawn = [holes.hole(seed, (48, 64)) for seed in range(400)]
    assert all(torch.equal(one, holes.hole(seed, (48, 64))) for seed, one in enumerate(drawn[:20]))
    assert all(one.shape == (1, 48, 64) and set(one.unique().tolist()) <= {0.0, 1.0} for one in drawn)
    shares = torch.tensor([float(one.mean()) for one in drawn])
    assert shares.min() > 0
    assert 0.18 < float((shares == 1).float().mean()) < 0.32
    assert len({float(share) for share in shares}) > 200


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_stands_beside_the_latents_is_what_the_pipeline_gives(bases: dict, family: str, pictures: Path) -> None:
    parts = models.load_parts(bases[family])
    assert parts.inpainting
    pipe = models.live_pipeline(parts)
    data = views(parts, pictures)
    pixels = data[0].pixels[None]
    hole = next(one for seed in range(9) if (one := holes.hole(seed, (32, 32))[None]).mean() < 1)
    assert 0 < hole.mean() < 1
    ours = holes.beside(parts, pixels, hole)
    seen: list[torch.Tensor] = []
    hook = parts.unet.register_forward_pre_hook(lambda unet, args: seen.append(args[0]))
    picture = Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())
    mask = Image.fromarray((hole[0, 0] * 255).byte().numpy())
    with torch.no_grad():
        pipe("a", image=picture, mask_image=mask, height=32, width=32, strength=1.0, num_inference_steps=1)
    hook.remove()
    theirs = seen[0][1:, 4:]
    assert torch.equal(ours[:, 0], theirs[:, 0])
    spread = parts.vae.encode(pixels * (1 - hole)).latent_dist.std * parts.vae.config.scaling_factor
    # The pipeline draws its latents, training takes their mean.
    assert ((ours[:, 1:] - theirs[:, 1:]).abs() < 6 * spread + 0.05).all()


def test_a_batch_holds_holes_by_position(bases: dict, pictures: Path) -> None:
    parts = models.load_parts(bases["sd"])
    entries = Live(views(parts, pictures), parts.vae_scale_factor)
    draws = Draws(latent_shape=(parts.channels, parts.vae_scale_factor), holes=True)
    one = Feed([Stream(entries=entries)], draws, seed=5, batch_size=4)
    two = Feed([Stream(entries=entries)], draws, seed=5, batch_size=2, accumulation=2)
    whole = one.batch(3, 0)
    assert whole["hole"].shape == (4, 1, 32, 32)
    assert whole["noise"].shape[1] == 4
    assert torch.equal(whole["hole"], torch.cat([two.batch(3, 0)["hole"], two.batch(3, 1)["hole"]]))
    plain = Feed(
        [Stream(entries=entries)], Draws(latent_shape=(4, parts.vae_scale_factor)), seed=5, batch_size=4
    ).batch(3, 0)
    assert torch.equal(plain["noise"], whole["noise"])  # holes have a seed of their own
    assert "hole" not in plain


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("cached", ["memory", "off"])
def test_a_lora_trains_resumes_to_the_bit_and_loads(
    bases: dict, family: str, cached: str, pictures: Path, tmp_path: Path
) -> None:
    validation = config.ValidationSettings(prompts=["a"], steps=1, loss_samples=2)

    def method() -> Any:
        return lora.prepare(models.load_parts(bases[family]), config.LoraSettings(rank=2))

    def run(own: Any, out: Path, steps: int) -> dict[str, torch.Tensor]:
        return train(own, views(own.parts, pictures), out, steps=steps, cache=cached, validation=validation)

    whole = run(method(), tmp_path / "whole", 4)
    run(method(), tmp_path / "cut", 2)
    again = run(method(), tmp_path / "cut", 4)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert list((tmp_path / "whole" / "samples").rglob("*.png"))
    pipe = DiffusionPipeline.from_pretrained(bases[family])
    assert "Inpaint" in type(pipe).__name__
    pipe.load_lora_weights(tmp_path / "whole" / "lora")


def test_the_base_is_kept_at_the_same_holes(bases: dict, pictures: Path, tmp_path: Path) -> None:
    parts = models.load_parts(bases["sd"])
    settings = config.DreamBoothSettings(class_prompt="a d", class_images=2, steps=1)
    data = views(parts, pictures)
    prior = dreambooth.prior(parts, settings, data, folder=tmp_path / "class", batch_size=2)
    assert len(list((tmp_path / "class").glob("*.png"))) == 2
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    train(method, data, tmp_path / "run", prior=prior)
    method = dreambooth.prepare(models.load_parts(bases["sd"]))
    train(method, views(method.parts, pictures), tmp_path / "full")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "full" / "dreambooth")
    assert pipe.unet.config.in_channels == 9


def test_what_inpainting_models_cannot_do_is_one_line(bases: dict, pictures: Path, tmp_path: Path) -> None:
    def refused(said: str, method: Any, **more: Any) -> None:
        data = views(method.parts, pictures)
        settings = config.TrainSettings(steps=1, dry_run=True, trackers=[])
        with pytest.raises(TrainingError, match=said) as caught:
            loop.train(method, data, settings, out=tmp_path / "out", say=lambda line: None, **more)
        assert "\n" not in str(caught.value)

    refused("a ControlNet of an inpainting model cannot be trained", controlnet.prepare(models.load_parts(bases["sd"])))
    refused("region: words are not looked for", lora.prepare(models.load_parts(bases["sd"])), region=lambda *args: None)
    company = config.DreamBoothSettings(
        class_prompt="a d", class_prompt_file=str(pictures / "0.txt"), identifier="sks", company=0.5
    )
    parts = models.load_parts(bases["sd"])
    with pytest.raises(TrainingError, match="class images of inpainting models are not looked into"):
        dreambooth.prior(parts, company, views(parts, pictures), folder=tmp_path / "class")


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_single_file_is_the_same_inpainting_base(bases: dict, family: str, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(bases[family])
    file = original_layout.write(pipe, tmp_path / "x.safetensors")
    found = single_file.inspect_file(file, config=str(bases[family]))
    assert "Inpaint" in found.index["_class_name"]
    assert models.load_parts(file, config=str(bases[family])).identity == models.load_parts(bases[family]).identity


def test_other_numbers_of_channels_are_refused(bases: dict, tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(bases["sd"])
    pipe.unet = type(pipe.unet).from_config(dict(pipe.unet.config) | {"in_channels": 5})
    pipe.save_pretrained(tmp_path / "depth")
    with pytest.raises(TrainingError, match="takes 5 channels and its VAE gives 4; depth, editing and upscaling"):
        models.load_parts(tmp_path / "depth")
    file = original_layout.write(pipe, tmp_path / "depth.safetensors")
    with pytest.raises(TrainingError, match="its U-net takes 5 channels; depth, editing and upscaling"):
        models.load_parts(file, config=str(bases["sd"]))

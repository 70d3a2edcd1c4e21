"""Every kind of adapter on every preset of layers, through the whole recipe and out of it into other programs."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch

import adapters
from adapters.__main__ import main as inspect
from adapters.measuring.verify import verify
from recipes.common.base import sampling_pipeline
from recipes.common.settings import SamplingSettings
from training.config import BaseSettings

RECIPES = ("dreambooth_lora", "text_to_image_lora")
KINDS = {
    "lora": ["--lora.kind=lora"],
    "rslora": ["--lora.rslora=true"],
    "dora": ["--lora.dora=true"],
    "loha": ["--lora.kind=loha"],
    "lokr": ["--lora.kind=lokr"],
}
PRESETS = ("attention", "attention+ff", "all-linear", "conv")
ARMS = json.dumps({"CFG": {"method": "cfg", "guidance_scale": 3.0}, "S-CFG": {"guidance_scale": 3.0}})
COMPARED = [
    f"--measure.arms={ARMS}",
    "--measure.seeds=[1]",
    "--measure.base_arm=false",
    "--measure.overlays=0",
    "--measure.metrics=[saturation, contrast]",
]
TRAINED = [
    "--data.resolution=32",
    "--data.cache=memory",
    "--train.steps=2",
    "--train.learning_rate=0.1",
    "--train.trackers=[]",
    "--train.snapshot_every=1",
    "--train.prepack=false",
]
TUNED = ["--tune.seeds=[101]", "--tune.guidance_scales=[3.0]", "--sampling.steps=2"]
PROMPTED = ["--tune.prompts=['a c', 'a d']", "--measure.prompts=['a a', 'a b']"]
SMALL = [*TRAINED, *TUNED, *COMPARED, *PROMPTED, "--ship.title=Rex"]
# Every kind in both recipes, every preset in some; the rest of the product is slow.
QUICK = [
    ("dreambooth_lora", "lora", "conv"),
    ("dreambooth_lora", "rslora", "attention+ff"),
    ("dreambooth_lora", "dora", "all-linear"),
    ("dreambooth_lora", "loha", "conv"),
    ("dreambooth_lora", "lokr", "attention"),
    ("text_to_image_lora", "lora", "all-linear"),
    ("text_to_image_lora", "rslora", "attention"),
    ("text_to_image_lora", "dora", "conv"),
    ("text_to_image_lora", "loha", "attention+ff"),
    ("text_to_image_lora", "lokr", "conv"),
]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in product(RECIPES, KINDS, PRESETS) if case not in QUICK]


def trained(done, models: Path, photos: Path, out: Path, recipe: str, *more: str, base: str = "sd15") -> Path:
    """Runs the recipe; returns the folder of the release."""
    data = photos / ("coco" if recipe == "text_to_image_lora" else "dreambooth/rex")
    place = [f"--base.path={models / base}", f"--data.source={data}", f"--out={out}"]
    own = ["--dreambooth.identifier=sks"] if recipe.startswith("dreambooth") else []
    done(recipe, *place, *SMALL, *own, *more)
    return out / "release"


def computed(pipe: object) -> list[torch.Tensor]:
    """What U-net and text encoders make of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    parts = adapters.base.modules_of(pipe)
    width, rows = parts["unet"].config.cross_attention_dim, 6
    added = {"text_embeds": torch.randn(1, 8, generator=generator), "time_ids": torch.ones(1, 6)}
    inputs = [torch.randn(1, 4, 8, 8, generator=generator), 10, torch.randn(1, rows, width, generator=generator)]
    with torch.no_grad():
        made = [parts["unet"](*inputs, added_cond_kwargs=added)[0]]
        return made + [encoder(torch.arange(rows)[None])[0] for name, encoder in parts.items() if name != "unet"]


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


def elsewhere(kind: str, folder: Path, pipe: object, *, nested: bool) -> list[torch.Tensor]:
    """The folder through plain diffusers, or for LoHa and LoKr through plain peft."""
    from peft import PeftModel

    parts = adapters.base.modules_of(pipe)
    if kind not in ("loha", "lokr"):
        pipe.load_lora_weights(folder)  # type: ignore[attr-defined]
        return computed(pipe)
    for component, model in parts.items():
        place = folder / component if nested or component != "unet" else folder
        setattr(pipe, component, PeftModel.from_pretrained(model, place).eval())
    return computed(pipe)


@pytest.mark.parametrize(("recipe", "kind", "preset"), [*QUICK, *SLOW])
def test_a_recipe_ends_in_what_other_programs_load(recipe, kind, preset, models, photos, done, tmp_path) -> None:
    options = [*KINDS[kind], "--lora.rank=2", "--lora.alpha=3", f"--lora.targets={preset}", "--lora.text_encoder=true"]
    release = trained(done, models, photos, tmp_path, recipe, *options)
    assert verify(release)["numbers"] > 10
    base = BaseSettings(path=str(models / "sd15"))

    def fresh() -> object:
        return sampling_pipeline(base, SamplingSettings())

    pipe = fresh()
    plain = computed(pipe)
    chosen = Path(json.loads((tmp_path / "tuned" / "tuned.json").read_text())["adapter"])
    results = []
    for folder in (release, chosen):
        with adapters.load(pipe, folder, guidance=lambda _: torch.no_grad()):
            results.append(computed(pipe))
    assert not close(results[0], plain), "the adapter changes nothing"
    assert close(results[0], results[1])
    assert close(results[0], elsewhere(kind, release, fresh(), nested=False))
    assert close(results[0], elsewhere(kind, chosen, fresh(), nested=True))
    (file,) = (name for name in release.glob("*.kohya.safetensors") if ".dora." not in name.name)
    with adapters.load(pipe, file):
        near = computed(pipe)
    assert close(results[0], near) or kind == "dora"
    assert float((near[0] - results[0][0]).norm()) < 0.5 * float((plain[0] - results[0][0]).norm())
    assert inspect(["inspect", str(chosen)]) == 0


def test_sdxl_with_new_tokens_goes_the_whole_way(models, photos, done, tmp_path) -> None:
    options = [
        "--lora.kind=loha",
        "--lora.rank=2",
        "--lora.alpha=3",
        "--lora.targets=attention",
        "--lora.text_encoder=true",
    ]
    words = ['--lora.tokens={"sks": "d", "dog": "c"}']  # of the captions, which this tokenizer reads as letters
    release = trained(done, models, photos, tmp_path, "dreambooth_lora", *options, *words, base="sdxl")
    pipe = sampling_pipeline(BaseSettings(path=str(models / "sdxl")), SamplingSettings())
    found = adapters.source.read_adapter(adapters.source.open_source(release))
    assert found.components == ["unet", "text_encoder", "text_encoder_2"]
    with adapters.load(pipe, release, guidance=lambda _: torch.no_grad()):
        for number, encoder in ((0, pipe.text_encoder), (1, pipe.text_encoder_2)):
            tokenizer = (pipe.tokenizer, pipe.tokenizer_2)[number]
            for token in ("sks", "dog"):
                row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(token)]
                own = found.tokens[token][("text_encoder", "text_encoder_2")[number]]
                assert torch.equal(row, own[0])


def test_a_full_fine_tune_ends_in_a_unet_of_diffusers(models, photos, done, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    release = trained(done, models, photos, tmp_path, "dreambooth")
    assert verify(release)["kind"] == "unet"
    base = models / "sd15"
    plain, ours = (sampling_pipeline(BaseSettings(path=str(base)), SamplingSettings()) for _ in range(2))
    before = computed(plain)
    with adapters.load(ours, release, guidance=lambda _: torch.no_grad()):
        made = computed(ours)
    assert not close(made, before), "the training changes nothing"
    unet = UNet2DConditionModel.from_pretrained(release)
    theirs = StableDiffusionPipeline.from_pretrained(base, unet=unet, safety_checker=None)
    assert all(torch.equal(a, b) for a, b in zip(made, computed(theirs), strict=True))
    chosen = json.loads((tmp_path / "tuned" / "tuned.json").read_text())["adapter"]
    with adapters.load(ours, chosen):
        assert all(torch.equal(a, b) for a, b in zip(made, computed(ours), strict=True))


def test_a_controlnet_ends_in_one_of_diffusers(models, photos, done, tmp_path) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    base, out = f"--base.path={models / 'sd15'}", f"--out={tmp_path}"
    done("controlnet", base, out, f"--data.source={photos / 'coco'}", "--data.annotator=canny", *TRAINED)
    trained_to = tmp_path / "controlnet"
    pictures = [f"--measure.targets={photos / 'coco'}", "--measure.control=canny", "--measure.limit=2"]
    given = [base, out, f"--controlnet={trained_to}", *pictures, *COMPARED]
    others = tmp_path / "others"
    others.mkdir()
    for picture in photos.glob("ade20k/*.png"):
        shutil.copy(picture, others)
        (others / f"{picture.stem}.txt").write_text(f"other {picture.stem}")
    done("tune", *given, *TUNED, f"--tune.targets={others}")
    done("measure", *given, "--sampling.steps=2", f"--tuned={tmp_path / 'tuned'}")
    done("ship", base, out, f"--adapter={trained_to}", f"--measured={tmp_path / 'measured'}", "--ship.title=Edges")
    release = tmp_path / "release"
    assert verify(release)["kind"] == "controlnet"
    own, shipped = ControlNetModel.from_pretrained(trained_to), ControlNetModel.from_pretrained(release)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in shipped.state_dict().items())
    assert any(bool(value.any()) for name, value in shipped.state_dict().items() if "controlnet_mid_block" in name)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(models / "sd15", controlnet=shipped, safety_checker=None)
    fixed = {"num_inference_steps": 2, "output_type": "pt", "height": 32, "width": 32}
    edges = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drawn = [
        pipe(
            "a a", image=edges, controlnet_conditioning_scale=scale, generator=torch.Generator().manual_seed(1), **fixed
        ).images
        for scale in (0.0, 1.0)
    ]
    assert not torch.equal(*drawn), "the ControlNet changes nothing"

"""Training reads captions as the pipeline reads prompts, whatever the rule; the cache and the class images know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_bases
import torch

from adapters import text
from adapters.text import TextRule
from recipes.common.base import load_base, sampling_pipeline
from recipes.common.settings import SamplingSettings
from training import class_images, config, loop, lora, models
from training.config import BaseSettings
from training.data import cache, crops, images
from training.errors import TrainingError

LONG = "abcdefghij klmnopq"
RULES = [{"clip_skip": 2}, {"prompt_chunks": 2}, {"clip_skip": 2, "prompt_chunks": 3}]


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layered")
    return {"sd": tiny_bases.sd(root / "sd"), "sdxl": tiny_bases.sdxl(root / "sdxl", layers=3)}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_training_and_sampling_read_alike(layered: dict, family: str, rule: dict) -> None:
    if family == "sdxl" and "clip_skip" in rule:
        rule = rule | {"clip_skip": 3}
    base = BaseSettings(path=str(layered[family]), **rule)
    parts, pipe = load_base(base), sampling_pipeline(base, SamplingSettings())
    usual = models.load_parts(layered[family])
    with torch.no_grad():
        ours = models.encode_text(parts, models.tokenize_captions(parts, [LONG, "a"]))
        plain = models.encode_text(usual, models.tokenize_captions(usual, [LONG, "a"]))
        asked = {"prompt": [LONG, "a"], "device": "cpu", "num_images_per_prompt": 1}
        theirs = pipe.encode_prompt(**asked, do_classifier_free_guidance=False)
        live = models.live_pipeline(parts).encode_prompt(**asked, do_classifier_free_guidance=False)
    torch.testing.assert_close(ours["embeds"], theirs[0])
    torch.testing.assert_close(ours["embeds"], live[0])
    if family == "sdxl":
        torch.testing.assert_close(ours["pooled"], theirs[2])
    assert plain["embeds"].shape != ours["embeds"].shape or not torch.allclose(plain["embeds"], ours["embeds"])


def test_the_familys_own_layer_is_no_rule(layered: dict) -> None:
    for family, own in (("sd", 1), ("sdxl", 2)):
        assert load_base(BaseSettings(path=str(layered[family]), clip_skip=own)).text.neutral


def test_the_cache_keeps_every_rules_embeddings_apart(layered: dict) -> None:
    store = cache.Store()

    def entry(**rule: int) -> tuple[str, torch.Tensor]:
        parts = load_base(BaseSettings(path=str(layered["sd"]), **rule))
        name = cache.encode_captions([LONG], parts, store, device=torch.device("cpu"))[LONG]
        return name, store[name]["embeds"]

    found = [entry(), entry(clip_skip=2), entry(prompt_chunks=2), entry(clip_skip=1)]
    assert len({name for name, _ in found}) == store.encoded == 3
    assert found[3][0] == found[0][0]
    assert [len(embeds) for _, embeds in found] == [12, 12, 24, 12]


@pytest.mark.parametrize("cached", ["memory", "off"])
def test_a_run_reads_the_ends_of_long_captions(layered: dict, pictures: Path, tmp_path: Path, cached: Any) -> None:
    """Two runs whose captions differ after the first chunk only: the rule tells them apart."""

    def trained(ending: str, **rule: int) -> dict[str, torch.Tensor]:
        place = tmp_path / f"{ending}-{rule}"
        parts = load_base(BaseSettings(path=str(layered["sd"]), **rule))
        source = images.folder(pictures, prompt=f"abcdefghij {ending}", minimum=8)
        data = crops.Views(source, resolution=32, multiple=parts.multiple)
        method = lora.prepare(parts, config.LoraSettings(rank=2))
        validation = config.ValidationSettings(prompts=[f"abcdefghij {ending}"], steps=1)
        settings = config.TrainSettings(steps=2, learning_rate=1e-2, trackers=[], validation=validation)
        said: list[str] = []
        result = loop.train(method, data, settings, out=place, cache=cached, say=said.append)
        assert result is not None
        assert any("base.prompt_chunks 2 reads them whole" in line for line in said) == (not rule)
        assert text.rule_in(result.folder) == TextRule(chunks=rule.get("prompt_chunks", 1))
        return {name: value.detach().clone() for name, value in method.trainable().items()}

    def alike(one: dict, other: dict) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert alike(trained("klm"), trained("nop"))
    assert not alike(trained("klm", prompt_chunks=2), trained("nop", prompt_chunks=2))


def test_a_text_encoder_trains_through_its_chunks(layered: dict, pictures: Path, tmp_path: Path) -> None:
    parts = load_base(BaseSettings(path=str(layered["sdxl"]), clip_skip=3, prompt_chunks=2))
    method = lora.prepare(parts, config.LoraSettings(rank=2, text_encoder=True))
    data = crops.Views(images.folder(pictures, minimum=8), resolution=32, multiple=parts.multiple)
    settings = config.TrainSettings(steps=2, learning_rate=1e-2, trackers=[])
    assert loop.train(method, data, settings, out=tmp_path, say=lambda line: None) is not None
    ups = {name: value for name, value in method.trainable().items() if "lora_B" in name}
    for part in ("unet.", "text_encoder.", "text_encoder_2."):
        assert any(value.any() for name, value in ups.items() if name.startswith(part))


def test_class_images_of_another_rule_are_refused(layered: dict, tmp_path: Path) -> None:
    def drawn(**rule: int) -> None:
        parts = load_base(BaseSettings(path=str(layered["sd"]), **rule))
        class_images.class_images(parts, ["a dog"], 2, tmp_path, resolution=32, steps=1, batch_size=2)

    drawn(clip_skip=2)
    drawn(clip_skip=2)
    with pytest.raises(TrainingError, match=r"made with other settings \(text: .*'clip_skip': 2"):
        drawn()


@pytest.mark.parametrize(
    ("family", "rule", "said"),
    [
        ("sd", {"clip_skip": 3}, "base.clip_skip 3: this base takes 1 to 2"),
        ("sdxl", {"clip_skip": 1}, "base.clip_skip 1: this base takes 2 to 3; SDXL is trained with 2"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(layered: dict, family: str, rule: dict, said: str) -> None:
    base = BaseSettings(path=str(layered[family]), **rule)
    for opened in (load_base, lambda one: sampling_pipeline(one, SamplingSettings())):
        with pytest.raises(TrainingError, match=said):
            opened(base)


@pytest.mark.parametrize("name", ["clip_skip", "prompt_chunks"])
def test_impossible_numbers_are_settings_errors(name: str) -> None:
    with pytest.raises(TrainingError, match=f"base.{name} must be from 1 to 16 or null, got 0"):
        BaseSettings(path="x", **{name: 0})

"""Clip-skip and long prompts: neutral is nothing, the rest is what the pipelines' own encoders make of the pieces."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases
import torch
from diffusers import IFPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextModel

import adapters
from adapters import files, text
from adapters.errors import AdapterError, FileError
from adapters.text import TextRule
from adapters.writing import write_adapter

WORDS = ["abcdefghij", "klmnopqrst", "uvwxyzabcd"]  # ten letters each: the body of a chunk of twelve tokens
LONG = " ".join(WORDS)
FAMILIES = ("sd", "sdxl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("text")
    return {"sd": tiny_bases.sd(root / "sd"), "sdxl": tiny_bases.sdxl(root / "sdxl", layers=4)}


@pytest.fixture
def open_pipe(folders: dict[str, Path]) -> Callable[[str], Any]:
    kinds = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
    return lambda family: kinds[family].from_pretrained(folders[family])


def encoded(pipe: Any, prompt: Any, *, negative: Any = None, images: int = 1, **more: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(
            pipe.encode_prompt(
                prompt=prompt,
                device="cpu",
                num_images_per_prompt=images,
                do_classifier_free_guidance=True,
                negative_prompt=negative,
                **more,
            )
        )


@pytest.mark.parametrize(("family", "own"), [("sd", 1), ("sdxl", 2)])
def test_a_neutral_rule_leaves_the_pipeline_alone(open_pipe: Callable, family: str, own: int) -> None:
    pipe = open_pipe(family)
    before = set(vars(pipe))
    for rule in (TextRule(), TextRule(clip_skip=own)):
        text.follow(pipe, rule)
        assert set(vars(pipe)) == before
        assert text.rule_of(pipe) == TextRule()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", ["a dog", WORDS[0]])
def test_the_first_chunk_is_what_the_pipeline_makes(open_pipe: Callable, family: str, prompt: str) -> None:
    pipe = open_pipe(family)
    own = encoded(pipe, prompt, negative="bad")
    text.follow(pipe, TextRule(chunks=2))
    ours = encoded(pipe, prompt, negative="bad")
    empty = encoded(open_pipe(family), "")[0]
    assert ours[0].shape[1] == ours[1].shape[1] == 24
    for half in (0, 1):
        torch.testing.assert_close(ours[half][:, :12], own[half])
        torch.testing.assert_close(ours[half][:, 12:], empty)
    for mine, theirs in zip(ours[2:], own[2:], strict=True):  # SDXL's pooled ones
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_prompt_is_its_chunks_side_by_side(open_pipe: Callable, family: str) -> None:
    pipe = open_pipe(family)
    each = [encoded(pipe, word) for word in WORDS]
    text.follow(pipe, TextRule(chunks=3))
    ours = encoded(pipe, [LONG, "a"], negative=["bad", LONG], images=2)
    assert ours[0].shape == (4, 36, each[0][0].shape[-1])
    expected = torch.cat([one[0] for one in each], dim=1)
    for row in (ours[0][0], ours[0][1], ours[1][2], ours[1][3]):
        torch.testing.assert_close(row, expected[0])
    if family == "sdxl":
        torch.testing.assert_close(ours[2][0], each[0][2][0])
        torch.testing.assert_close(ours[3][2], each[0][2][0])
    longer = encoded(pipe, [LONG + " zzz", "a"])
    torch.testing.assert_close(longer[0][0], encoded(pipe, [LONG, "a"])[0][0])  # what exceeds the chunks is cut


def test_sdxl_keeps_its_zeros_for_no_negative_prompt(open_pipe: Callable) -> None:
    pipe = open_pipe("sdxl")
    text.follow(pipe, TextRule(chunks=2, clip_skip=3))
    made = encoded(pipe, "a dog")
    assert made[1].shape == made[0].shape
    assert not made[1].any()
    assert not made[3].any()


@pytest.mark.parametrize(("family", "skip", "theirs"), [("sd", 2, 1), ("sdxl", 3, 1), ("sdxl", 4, 2)])
def test_clip_skip_is_diffusers_own_one_or_two_less(
    open_pipe: Callable, family: str, skip: int, theirs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers looks for the norm under the name that transformers 4 had.
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    plain, pipe = open_pipe(family), open_pipe(family)
    text.follow(pipe, TextRule(clip_skip=skip))
    own = encoded(plain, "a dog", negative="bad", clip_skip=theirs)
    ours = encoded(pipe, "a dog", negative="bad")
    torch.testing.assert_close(ours[0], own[0])
    assert not torch.allclose(ours[0], encoded(plain, "a dog")[0])
    # diffusers leaves the negative prompt at the usual layer; the rule holds for both halves, as in A1111.
    torch.testing.assert_close(ours[1], encoded(plain, "bad", clip_skip=theirs)[0])
    assert not torch.allclose(own[1], ours[1])
    # A call may ask for another layer in diffusers' count, and gets both halves of it.
    asked = encoded(pipe, "a dog", negative="bad", clip_skip=0)
    torch.testing.assert_close(asked[:2], encoded(plain, "a dog", negative="bad")[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_that_are_given_stay(open_pipe: Callable, family: str) -> None:
    pipe = open_pipe(family)
    text.follow(pipe, TextRule(chunks=2))
    made = encoded(pipe, LONG, negative="b")
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    again = encoded(pipe, None, **dict(zip(names, made, strict=False)))
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))


def test_a_picture_follows_and_leaving_restores(open_pipe: Callable) -> None:
    pipe = open_pipe("sd")
    pipe.set_progress_bar_config(disable=True)

    def drawn(prompt: str) -> torch.Tensor:
        noise = torch.Generator().manual_seed(1)
        return torch.tensor(pipe(prompt, num_inference_steps=2, generator=noise, output_type="np").images)

    short, cut = drawn(WORDS[0]), drawn(LONG)
    before = set(vars(pipe))
    assert torch.equal(short, cut)
    with text.ruled(pipe, TextRule(chunks=3)):
        whole = drawn(LONG)
        with text.ruled(pipe, TextRule(clip_skip=2)):
            assert text.rule_of(pipe) == TextRule(clip_skip=2)
            assert not torch.equal(drawn("a dog"), short)
        assert torch.equal(drawn(LONG), whole)
    assert not torch.equal(whole, cut)
    assert set(vars(pipe)) == before
    assert torch.equal(drawn(LONG), cut)


@pytest.mark.parametrize(
    ("family", "rule", "said"),
    [
        ("sd", {"clip_skip": 3}, "clip_skip 3: this base takes 1 to 2"),
        ("sdxl", {"clip_skip": 1}, "clip_skip 1: this base takes 2 to 4; SDXL is trained with 2"),
        ("sd", {"clip_skip": 0}, "clip_skip 0: 1 is the last layer"),
        ("sd", {"chunks": 17}, "prompt_chunks 17: give 1 to 16"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_one_line(open_pipe: Callable, family: str, rule: dict, said: str) -> None:
    with pytest.raises(AdapterError, match=said) as caught:
        text.follow(open_pipe(family), TextRule(**rule))
    assert "\n" not in str(caught.value)


def test_other_encoders_than_clips_are_refused(tmp_path: Path) -> None:
    pipe = IFPipeline.from_pretrained(tiny_bases.deepfloyd(tmp_path / "if"))
    text.follow(pipe, TextRule())
    with pytest.raises(AdapterError, match="are for CLIP's text encoders, this base has T5EncoderModel"):
        text.follow(pipe, TextRule(chunks=2))


# ---------------------------------------------------------------------------------------------- in a folder


@pytest.fixture
def shipped(make_adapter: Callable, tmp_path: Path) -> Callable[[Any], Path]:
    def make(told: Any) -> Path:
        folder = tmp_path / "lora"
        folder.mkdir()
        write_adapter(folder, make_adapter("lora"))
        files.write_manifest(folder, {"format": 1, "kind": "lora", **({} if told is None else {"text": told})})
        return folder

    return make


def test_load_reads_prompts_as_the_adapter_was_trained(pipe: Any, shipped: Callable) -> None:
    folder, before = shipped({"clip_skip": 2, "chunks": 2}), set(vars(pipe))
    (folder / "unet").mkdir()  # as in a trained pipeline, of which the U-net alone is measured
    assert text.rule_in(folder) == text.rule_in(folder / "unet") == TextRule(clip_skip=2, chunks=2)
    with adapters.load(pipe, folder):
        assert text.rule_of(pipe) == TextRule(clip_skip=2, chunks=2)
        assert encoded(pipe, "a dog")[0].shape[1] == 32
    assert set(vars(pipe)) == before
    with text.ruled(pipe, TextRule(clip_skip=2, chunks=2)), warnings.catch_warnings():
        warnings.simplefilter("error")
        with adapters.load(pipe, folder):
            assert text.rule_of(pipe).chunks == 2
    warned = pytest.warns(UserWarning, match="was trained with clip-skip 2")
    with text.ruled(pipe, TextRule(chunks=3)), warned, adapters.load(pipe, folder):
        assert text.rule_of(pipe) == TextRule(chunks=3)  # the caller's own rule counts


def test_a_folder_without_a_rule_changes_none(pipe: Any, shipped: Callable) -> None:
    folder, before = shipped(None), set(vars(pipe))
    with adapters.load(pipe, folder):
        assert "encode_prompt" not in vars(pipe)
    assert set(vars(pipe)) == before


@pytest.mark.parametrize("told", [3, "x", {"clip_skip": "2"}, {"layers": 2}, {"chunks": 0}, {"chunks": None}, [1]])
def test_a_rule_that_is_none_is_refused(pipe: Any, shipped: Callable, told: Any) -> None:
    with pytest.raises(FileError, match=r"manifest.json: text: .* is not understood"):
        adapters.load(pipe, shipped(told))


def test_the_card_says_how_to_read_prompts_elsewhere(pipe: Any, make_adapter: Callable, tmp_path: Path) -> None:
    rule = TextRule(clip_skip=2, chunks=3)
    card = adapters.Card(title="A mug", base_model="a-base")
    folder = adapters.ship.ship(
        tmp_path / "out", weights=make_adapter("lora"), base=adapters.describe(pipe), card=card, rule=rule
    )
    readme = (folder / "README.md").read_text("utf-8")
    assert "clip-skip 2, prompts of up to 225 tokens" in readme
    assert "CLIP Set Last Layer of -2 in ComfyUI" in readme
    assert "`clip_skip=1`" in readme
    assert text.rule_in(folder) == rule

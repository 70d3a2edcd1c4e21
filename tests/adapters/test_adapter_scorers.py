"""Scorers of this field on tiny random models of their classes, and the rules around them against known answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_bases
import torch
from PIL import Image

from adapters.errors import FileError, GainsError
from adapters.measuring.metrics import FaceSimilarity, score
from adapters.measuring.metrics.alignment import PickScore, Siglip
from adapters.measuring.metrics.detection import Box, Detector, ObjectAccuracy, lies, read_objects
from adapters.measuring.metrics.located import Depth, DepthRmse, Located, Sam
from adapters.measuring.metrics.networks import Clip, TextAlignment, Vit
from adapters.measuring.metrics.phrases import Thing, said_in
from adapters.measuring.metrics.questions import Question, QuestionAccuracy, Reader, VqaScore, questions_of
from adapters.measuring.sample import Shot

KINDS = ("clip", "siglip", "dinov2", "dinov3", "owl", "grounding", "sam", "depth", "reader")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        getattr(tiny_bases, kind)(folder / kind)
    return folder


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def shots(*prompts: str) -> list[Shot]:
    return [Shot(prompt=prompt, seed=i, latents="n", image=noise(i)) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (Clip, "clip", "siglip"),
        (Siglip, "siglip", "clip"),
        (Vit, "dinov2", "clip"),
        (Vit, "dinov3", "owl"),
        (Detector, "owl", "clip"),
        (Detector, "grounding", "sam"),
        (Sam, "sam", "depth"),
        (Depth, "depth", "clip"),
        (Reader, "reader", "dinov2"),
    ],
)
def test_a_model_of_another_class_is_refused_and_none_is_loaded_before_it_is_asked(
    make, right: str, wrong: str, models: Path, tmp_path: Path
) -> None:
    named = make(name=models / right)
    assert "_model" not in vars(named), "the weights were read"
    with pytest.raises(FileError, match=r"is a model of type .*; this needs"):
        make(name=models / wrong)
    with pytest.raises(FileError, match="no such model here or on the Hub"):
        make(name=tmp_path / "gone")
    config = json.loads((models / right / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(FileError, match=r"no \*.safetensors"):
        make(name=tmp_path)


def test_siglip_and_pickscore_agree_with_transformers(models: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel, SiglipModel

    given = shots("a red car", "a dog")
    ours = score(TextAlignment(name="a", clip=Siglip(name=models / "siglip", batch_size=2)), given)
    model = SiglipModel.from_pretrained(models / "siglip").eval()
    words = AutoTokenizer.from_pretrained(models / "siglip")
    tokens = words([shot.prompt for shot in given], padding="max_length", max_length=24, return_tensors="pt")
    small = [
        np.asarray(shot.image.resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1 for shot in given
    ]
    values = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, pixel_values=values).logits_per_image
    theirs = ((logits - model.logit_bias) / model.logit_scale.exp()).diag()
    assert ours == pytest.approx(theirs.detach().numpy(), abs=1e-5)
    clip = Clip(name=models / "clip")
    picked = score(PickScore(clip=clip), given)
    scale = float(CLIPModel.from_pretrained(models / "clip").logit_scale.exp())
    assert picked == pytest.approx(scale * score(TextAlignment(name="a", clip=clip), given), rel=1e-6)


def test_a_reader_answers_alike_alone_and_in_a_batch(models: Path) -> None:
    reader = Reader(name=models / "reader", batch_size=2)
    given = shots("a red car", "a dog above a cat", "two dogs")
    scored = score(VqaScore(reader=reader), given)
    assert ((scored > 0) & (scored < 1)).all()
    alone = np.array(
        [score(VqaScore(reader=Reader(name=models / "reader", batch_size=1)), [shot])[0] for shot in given]
    )
    assert scored == pytest.approx(alone, abs=1e-4)
    hard = QuestionAccuracy(reader=reader, questions={})
    soft = QuestionAccuracy(reader=reader, questions={}, soft=True, name="question probability")
    assert set(score(hard, given)) <= {0, 0.5, 1 / 3, 2 / 3, 1}
    chances = score(soft, given)
    swapped = {shot.prompt: [Question(text=q.text, answer="no") for q in questions_of(shot.prompt)] for shot in given}
    denied = QuestionAccuracy(reader=reader, questions=swapped, soft=True)
    assert score(denied, given) == pytest.approx(1 - chances, abs=1e-6)
    same = {"a dog": [Question(text="what?", answer="red car", choices=("red car", "red dog"))]}
    with pytest.raises(GainsError, match="do not begin with different words"):
        QuestionAccuracy(reader=reader, questions=same)(shots("a dog"))
    with pytest.raises(GainsError, match="none of"):
        Question(text="what?", answer="blue", choices=("red", "green"))


@pytest.mark.parametrize("kind", ["owl", "grounding"])
def test_boxes_lie_in_the_picture_and_do_not_repeat(kind: str, models: Path) -> None:
    found = Detector(name=models / kind, least=0.0, side=32)(noise(0), "red car")
    assert found
    assert all(0 <= box.left <= box.right <= 30 and 0 <= box.top <= box.bottom <= 40 for box in found)
    assert [box.score for box in found] == sorted((box.score for box in found), reverse=True)
    assert all(one.overlap(other) < 0.5 for i, one in enumerate(found) for other in found[:i])
    assert Detector(name=models / kind, least=1.1, side=32)(noise(0), "red car") == []


def test_masks_and_depth(models: Path) -> None:
    detector, sam = Detector(name=models / "owl", least=0.0), Sam(name=models / "sam")
    images = [noise(0), noise(1)]
    boxes, cut = Located(detector=detector, noun="dog")(images), Located(detector=detector, noun="dog", sam=sam)(images)
    assert [mask.shape for mask in (*boxes, *cut)] == [(40, 30)] * 4
    assert all(mask.dtype == bool and mask.any() for mask in boxes)
    never = Detector(name=models / "owl", least=1.1)
    assert not Located(detector=never, noun="dog", sam=sam)(images)[0].any()
    metric = DepthRmse(depth=Depth(name=models / "depth"), target=lambda shot: noise(0))
    same, other = score(metric, shots("a", "b"))
    assert same == 0
    assert 0 < other < 1


def test_what_a_prompt_says() -> None:
    said = said_in("a photo of two red cars left of a dog")
    assert said.things == (Thing(noun="car", count=2, color="red"), Thing(noun="dog"))
    assert said.relations == ((0, "left of", 1),)
    assert [thing.noun for thing in said_in("a cat and three buses in the snow").things] == ["cat", "bus", "snow"]
    assert [question.text for question in questions_of("a green cat above two dogs")] == [
        "Is there a green cat in the picture?",
        "Are there exactly 2 dogs in the picture?",
        "Is the cat above the dog?",
    ]


def test_where_things_lie_by_hand() -> None:
    box = lambda x, y: Box(score=1, left=x, top=y, right=x + 10, bottom=y + 10)  # noqa: E731
    assert lies(box(0, 0), box(40, 0)) == {"left of"}
    assert lies(box(40, 0), box(0, 0)) == {"right of"}
    assert lies(box(0, 0), box(0, 40)) == {"above"}
    assert lies(box(0, 40), box(0, 0)) == {"below"}
    assert lies(box(0, 0), box(30, 30)) == {"left of", "above"}
    assert lies(box(0, 0), box(1, 1)) == set()


def blobs(image: Image.Image, noun: str) -> list[Box]:
    """Finds what it knows by its color: cars are blue, dogs are red."""
    import cv2

    channel = {"car": 2, "dog": 0}[noun]
    mask = (np.asarray(image).argmax(-1) == channel) & (np.asarray(image).max(-1) > 100)
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    return [
        Box(score=1.0, left=x, top=y, right=x + w, bottom=y + h)
        for x, y, w, h, _ in stats[1:count].astype(float).tolist()
    ]


def scene(*squares: tuple[tuple[int, int, int], int, int]) -> Image.Image:
    image = Image.new("RGB", (64, 64))
    for color, x, y in squares:
        image.paste(color, (x, y, x + 10, y + 10))
    return image


def test_the_protocol_of_objects_counts_and_places(tmp_path: Path) -> None:
    car, dog = (0, 0, 255), (255, 0, 0)
    right = scene((car, 0, 20), (dog, 40, 20))
    images = {
        "a car left of a dog": [(right, 1), (scene((dog, 0, 20), (car, 40, 20)), 0), (scene((car, 0, 20)), 0)],
        "two cars": [(scene((car, 0, 0), (car, 40, 40)), 1), (scene((car, 0, 0)), 0)],
        "a car": [(right, 1), (scene((dog, 0, 0)), 0)],
    }
    metric = ObjectAccuracy(detector=blobs, objects={})  # type: ignore[arg-type]
    for prompt, cases in images.items():
        given = [Shot(prompt=prompt, seed=i, latents="n", image=image) for i, (image, _) in enumerate(cases)]
        assert score(metric, given).tolist() == [value for _, value in cases], prompt
    rows = [{"prompt": "it", "include": [{"class": "car"}, {"class": "dog", "position": ["right of", 0]}]}]
    file = tmp_path / "objects.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    told = ObjectAccuracy(detector=blobs, objects=read_objects(file))  # type: ignore[arg-type]
    assert score(told, [Shot(prompt="it", seed=0, latents="n", image=right)]) == [1]
    file.write_text('{"prompt": "it", "include": [{"class": "car", "position": ["above", 3]}]}', "utf-8")
    with pytest.raises(FileError, match="a line of JSON a prompt"):
        read_objects(file)


def test_faces_by_any_callable() -> None:
    embed = lambda image: None if not np.asarray(image).any() else np.asarray(image, float).mean((0, 1))  # noqa: E731
    red, black = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8))
    given = [Shot(prompt="p", seed=i, latents="n", image=image) for i, image in enumerate((red, black))]
    assert score(FaceSimilarity(embed=embed, references=[red, black]), given).tolist() == [1, 0]
    with pytest.raises(GainsError, match="no face is found"):
        FaceSimilarity(embed=embed, references=[black])(given)

"""The subjects that ship: enough of them, true to their captions and masks, and made anew by the code that ships."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapters.measuring.metrics import score
from adapters.measuring.sample import Shot
from training.pocket import PocketError, metrics, scenes, subjects
from training.pocket.captions import parse_caption
from training.pocket.making import rendered
from training.pocket.making.rendered import TOYS
from training.pocket.subjects import SUBJECTS
from training.pocket.world import CLASSES, SIZE

SHIPPED = Path(__file__).parents[2] / "recipes" / "subjects"
OLD = ("dog", "bird", "teapot", "robot")
DRAWN = [name for name in SUBJECTS if name not in TOYS]
COUNT = 8


def facts(name: str) -> dict:
    return json.loads((SHIPPED / name / "subject.json").read_text())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@lru_cache
def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def without_identifier(text: str) -> str:
    assert f" {subjects.IDENTIFIER} " in text
    return text.replace(f"{subjects.IDENTIFIER} ", "", 1)


def test_there_are_twelve_or_more_and_the_first_four_stay_first() -> None:
    assert SUBJECTS[:4] == OLD
    assert len(SUBJECTS) == len(set(SUBJECTS)) >= 12
    assert len(TOYS) >= 4
    assert set(TOYS) < set(SUBJECTS)
    assert sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) == sorted(SUBJECTS)
    assert len({facts(name)["class"] for name in SUBJECTS}) == len(SUBJECTS), "one subject a class"


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_subject_is_whole(name: str) -> None:
    pictures = [f"{i}.webp" for i in range(COUNT)]
    masks = [f"masks/{i}.png" for i in range(COUNT)]
    texts = [f"{i}.txt" for i in range(COUNT)]
    assert files(SHIPPED / name) == sorted([*pictures, *texts, *masks, "subject.json"])
    for picture, hole in zip(pictures, masks, strict=True):
        image, mask = pixels(SHIPPED / name / picture), pixels(SHIPPED / name / hole)
        assert image.shape == (SIZE, SIZE, 3)
        assert mask.shape == (SIZE, SIZE)
        assert set(np.unique(mask)) == {0, 255}
        assert 0.05 < (mask > 0).mean() < 0.7
    assert sum((SHIPPED / name / file).stat().st_size for file in files(SHIPPED / name)) < 12_000 * COUNT
    said = facts(name)
    assert set(said) == {"class", "identifier", "origin", "prompts"}
    assert said["class"] in CLASSES
    assert said["class"] == (TOYS[name].name if name in TOYS else name)
    assert said["origin"].startswith("rendered" if name in TOYS else "Fluent Emoji")


@pytest.mark.parametrize("name", SUBJECTS)
def test_prompts_are_read_and_share_no_background_with_the_pictures(name: str) -> None:
    said = facts(name)
    captions = [parse_caption(without_identifier((SHIPPED / name / f"{i}.txt").read_text())) for i in range(COUNT)]
    prompts = [parse_caption(without_identifier(prompt)) for prompt in said["prompts"]]
    assert len(set(said["prompts"])) == 12
    alone = [caption for caption in captions if len(caption.nouns) == 1]
    beside = [caption.nouns[1].name for caption in captions if len(caption.nouns) == 2]
    assert {caption.nouns[0].name for caption in captions} == {said["class"]}
    assert (len(alone), len(beside)) == (3, 5)
    assert not {*beside} & {noun.name for prompt in prompts for noun in prompt.nouns}
    for prompt in prompts:
        names = [noun.name for noun in prompt.nouns]
        assert names[0] == said["class"]
        assert len(set(names)) == len(names), f"{names} asks for one class twice"
    shown, held_out = ({one.background for one in some} for some in (captions, prompts))
    assert None not in shown | held_out
    assert not shown & held_out


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_pictures_differ_from_each_other(name: str) -> None:
    masks = [pixels(SHIPPED / name / "masks" / f"{i}.png").tobytes() for i in range(COUNT)]
    assert len(set(masks)) == COUNT


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_subject_is_made_anew(name: str, tmp_path: Path) -> None:
    made = subjects.write_subject(tmp_path, name)
    assert files(made) == files(SHIPPED / name)
    for file in files(made):
        if file.endswith((".png", ".webp")):
            assert np.abs(pixels(made / file) - pixels(SHIPPED / name / file)).max() <= 1, file
        else:
            assert (made / file).read_bytes() == (SHIPPED / name / file).read_bytes(), file


@pytest.mark.parametrize("name", TOYS)
def test_a_rendered_subject_is_made_anew(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pybullet")
    made = subjects.write_subject(tmp_path, name)
    assert files(made) == files(SHIPPED / name)
    for file in files(made):
        if file.endswith((".png", ".webp")):
            # Another processor may put a sample on the other side of an edge.
            apart = np.abs(pixels(made / file) - pixels(SHIPPED / name / file))
            assert (apart > 8).mean() < 0.005, file
        else:
            assert (made / file).read_bytes() == (SHIPPED / name / file).read_bytes(), file


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_is_closed_colored_and_seen_five_times(name: str) -> None:
    toy = TOYS[name]
    assert len(set(toy.views)) == 5
    for part in toy.build():
        assert np.isfinite(part.vertices).all()
        assert part.faces.min() >= 0
        assert part.faces.max() < len(part.vertices)
        assert part.colors.shape == part.faces.shape
        assert part.colors.min() >= 0
        assert part.colors.max() <= 1


def test_surfaces_face_outwards() -> None:
    shapes = {
        "ball": rendered._ball((1.0, 0.7, 0.5), (1, 1, 1)),
        "box": rendered._box((1.0, 0.7, 0.5), (1, 1, 1), 0.2),
        "tube": rendered._tube(np.array([(0, 0, z) for z in np.linspace(-1, 1, 9)]), 0.3, (1, 1, 1)),
        "cushion": rendered._cushion(lambda angle: 1 + 0 * angle, 0.4, (1, 1, 1)),
    }
    for name, shape in shapes.items():
        outwards = (shape.normals() * shape.vertices).sum(1)
        assert outwards.min() > 0, name


def test_without_pybullet_the_message_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pybullet", None)
    with pytest.raises(PocketError, match="pip install pybullet"):
        subjects.write_subject(tmp_path, next(iter(TOYS)))
    assert not list(tmp_path.iterdir())


def test_an_unknown_subject_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PocketError, match="zebra"):
        subjects.write_subject(tmp_path, "zebra")
    with pytest.raises(PocketError, match="zebra"):
        rendered.rendering("zebra", 0)


def test_the_names_come_without_torch_and_pybullet() -> None:
    script = (
        "import sys; from training.pocket.subjects import SUBJECTS; "
        "print(len(SUBJECTS), 'torch' in sys.modules, 'pybullet' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(SUBJECTS)), "False", "False"]


def classes(noun: str, count: int = 12) -> list[Shot]:
    """Drawn scenes in the base's own look that show the class in its own colors, as prompts of a subject ask for it."""
    found = (scenes.sample(scenes.HELD_OUT_SEED, index) for index in range(4000))
    shown = (scene for scene in found if (noun, None) in {(item.name, item.color) for item in scene.description.nouns})
    return [
        Shot(prompt=scene.caption, seed=number, latents="", image=Image.fromarray(scene.image))
        for number, scene in zip(range(count), shown, strict=False)
    ]


@pytest.mark.parametrize("name", ["dog", "toy_car"])
def test_identity_tells_the_subject_from_its_class(name: str) -> None:
    noun, own = facts(name)["class"], [SHIPPED / name / f"{number}.webp" for number in range(COUNT)]
    pictures = [Image.open(path).convert("RGB") for path in own]
    masks = [np.asarray(Image.open(SHIPPED / name / "masks" / f"{path.stem}.png").convert("L")) > 127 for path in own]
    base, others = classes(noun)[:6], classes(noun)[6:]
    captions = [path.with_suffix(".txt").read_text().strip() for path in own]
    shots = [Shot(prompt=text, seed=0, latents="", image=image) for text, image in zip(captions, pictures, strict=True)]
    made = {
        margin: metrics.identity(pictures[:4], masks[:4], noun, "sks", lambda: base, margin=margin)
        for margin in (False, True)
    }
    assert score(made[False], shots[4:]).mean() == 1  # pictures of it that the metric was not given
    assert score(made[False], others).mean() < 0.2
    margins = score(made[True], [*shots[4:], *others])
    assert margins[: COUNT - 4].mean() > 0.3
    assert margins[COUNT - 4 :].mean() < -0.2
    grass = Shot(prompt=f"a sks {noun} on the grass", seed=0, latents="", image=Image.new("RGB", (64, 64), "green"))
    assert score(made[True], [grass]) <= -0.5


def test_where_the_judge_does_not_see_the_class_the_largest_other_region_counts() -> None:
    scene = next(
        scene
        for scene in (scenes.sample(scenes.HELD_OUT_SEED, index) for index in range(400))
        if len(scene.description.nouns) == 2 and scene.masks.mean((1, 2)).min() > 0.08
    )
    first, second = (noun.name for noun in scene.description.nouns)
    missing = next(noun for noun in CLASSES if noun not in (first, second))
    images = torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 127.5 - 1
    regions, named = metrics.subject_regions(images, [f"a {missing} and a {first} at night"], missing)
    truth = torch.from_numpy(scene.masks)[:, ::2, ::2]
    overlaps = [float((regions[0] & one).sum() / (regions[0] | one).sum()) for one in truth]
    assert not named[0]
    assert overlaps[1] > 0.5 > overlaps[0]  # what the prompt names is somebody else
    regions, named = metrics.subject_regions(images, ["not of the grammar"], first)
    assert named[0]
    assert float((regions[0] & truth[0]).sum() / (regions[0] | truth[0]).sum()) > 0.5

"""Scenes, captions and tokens: reproducible, true to their own description, refused by name."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from training.pocket import PocketError, scenes
from training.pocket.backgrounds import draw_background
from training.pocket.captions import Description, Noun, parse_caption, vocabulary
from training.pocket.control import EDGES
from training.pocket.world import BACKGROUNDS, CLASSES, COLORS, RELATIONS, SIZE, TINTABLE


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    first, again, other = scenes.sample(1, 7), scenes.sample(1, 7), scenes.sample(2, 7)
    assert first.caption == again.caption
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.masks, again.masks)
    assert not np.array_equal(first.image, other.image)


def test_a_caption_reads_back_as_its_description() -> None:
    for index in range(200):
        scene = scenes.sample(1, index)
        read = parse_caption(scene.caption)
        assert read.nouns == scene.description.nouns, scene.caption
        assert read.relation == scene.description.relation, scene.caption
        assert read.background in (None, scene.description.background), scene.caption


@pytest.mark.parametrize("free", [False, True])
def test_objects_stand_as_said(free: bool) -> None:
    related = [s for s in (scenes.sample(1, i, free=free) for i in range(200)) if s.description.relation]
    assert len(related) > 30
    for scene in related:
        (x1, y1), (x2, y2) = (placed.centre for placed in scene.objects)
        dx, dy = RELATIONS[scene.description.relation]
        assert dx * (x1 - x2) + dy * (y1 - y2) > 0, scene.caption


@pytest.mark.parametrize("free", [False, True])
def test_masks_are_disjoint_and_every_object_shows(free: bool) -> None:
    for index in range(200):
        scene = scenes.sample(1, index, free=free)
        assert scene.masks.sum(0).max() == 1
        assert (scene.masks.mean((1, 2)) > 0.02).all(), scene.caption
        assert set(np.unique(scene.classes)) - {0} == {
            list(CLASSES).index(placed.noun.name) + 1 for placed in scene.objects
        }


def test_a_drawing_always_has_the_same_latents_unless_the_scene_is_free() -> None:
    """One side a number of objects, corners on cells of the U-net's coarsest level, never mirrored."""
    for index in range(100):
        scene = scenes.sample(1, index)
        sides = {placed.side for placed in scene.objects}
        assert sides == {round(scenes.SIDE[len(scene.objects)] * SIZE)}
        assert not any(placed.flip or placed.x % 16 or placed.y % 16 for placed in scene.objects)
    free = [placed for i in range(100) for placed in scenes.sample(1, i, free=True).objects]
    assert len({placed.side for placed in free}) > 10
    assert 0.3 < np.mean([placed.flip for placed in free]) < 0.7


def test_pixels_outside_the_masks_do_not_depend_on_the_objects() -> None:
    rng = np.random.default_rng(0)
    background = draw_background("grass", SIZE, rng)
    scene = scenes.sample(1, 3)
    image, _ = scenes.render_objects(background, scene.objects)
    bare, none = scenes.render_objects(background, ())
    alpha = np.abs(image.astype(int) - bare).max(-1) > 0
    box = np.zeros_like(alpha)
    for placed in scene.objects:
        box[placed.y : placed.y + placed.side, placed.x : placed.x + placed.side] = True
    assert none.shape == (0, SIZE, SIZE)
    assert not (alpha & ~box).any()
    assert alpha.any()


def test_a_prompt_becomes_its_own_scene() -> None:
    prompt = "a red car to the left of a blue dog on the grass"
    scene = scenes.from_prompt(prompt, seed=4)
    assert scene.caption == prompt
    assert [placed.noun for placed in scene.objects] == [
        Noun(name="car", color="red"),
        Noun(name="dog", color="blue"),
    ]
    assert scene.objects[0].centre[0] < scene.objects[1].centre[0]
    assert scene.description.background == "grass"


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a zebra on the grass", "zebra"),
        ("a mauve dog on the grass", "mauve"),
        ("a dog on the moon", "a dog on the moon"),
        ("a red penguin in the snow", "penguin"),
        ("a dog, a cat, a car and a bus", "4"),
    ],
)
def test_what_is_outside_the_grammar_is_refused_by_name(prompt: str, named: str) -> None:
    with pytest.raises(PocketError, match=named):
        scenes.from_prompt(prompt, seed=0)


def test_a_relation_needs_two_objects() -> None:
    with pytest.raises(PocketError, match="two objects"):
        Description(nouns=(Noun(name="dog"),), relation="above")


@pytest.mark.parametrize("color", COLORS)
def test_a_tint_has_the_hue_it_is_called(color: str) -> None:
    import cv2

    for name in sorted(TINTABLE):
        premultiplied, alpha = scenes.sprite(name, color, 64)
        hsv = cv2.cvtColor(premultiplied, cv2.COLOR_RGB2HSV)
        body = (alpha[..., 0] > 0.9) & (hsv[..., 1] > 0.3)
        apart = np.abs((np.median(hsv[..., 0][body]) - COLORS[color][0] + 180) % 360 - 180)
        assert apart < 25, f"{color} {name}: {apart:.0f} degrees off"


def test_conditions_come_from_the_scene() -> None:
    scene = scenes.sample(1, 0)
    edges = np.asarray(EDGES.condition(Image.fromarray(scene.image)))
    assert edges.shape == (SIZE, SIZE, 3)
    assert set(np.unique(edges)) == {0, 255}
    assert len(np.unique(scenes.palette(), axis=0)) == len(CLASSES) + 1


def test_a_scene_keeps_to_its_own_condition_by_the_detector_that_made_it() -> None:
    from adapters.measuring.metrics import CannyF1
    from adapters.measuring.sample import Shot
    from training.pocket.control import Scenes

    drawn = Scenes(control="canny", count=4, seed=scenes.HELD_OUT_SEED)
    shots = [Shot(prompt=str(i), seed=1, latents="0", image=drawn[i].image) for i in range(4)]
    wanted = {str(i): drawn[i].conditioning for i in range(4)}
    assert CannyF1(condition=lambda shot: wanted[shot.prompt], edges=EDGES)(shots) == [1.0] * 4


def test_backgrounds_are_told_apart_by_their_mean_color() -> None:
    means = {
        name: np.mean([draw_background(name, 32, np.random.default_rng(i)).mean((0, 1)) for i in range(8)], 0)
        for name in BACKGROUNDS
    }
    names = list(means)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert np.abs(means[a] - means[b]).max() > 0.04, (a, b)


def test_every_word_is_one_token_and_other_words_still_work() -> None:
    from training.pocket import tokenizer

    tokens = tokenizer.build_tokenizer()
    for word in vocabulary():
        assert len(tokens(word).input_ids) == 3, word
    ids = tokens("a zebra on the grass").input_ids
    assert tokens.unk_token_id not in ids[1:-1]
    longest = max(len(tokens(scenes.sample(1, i).caption).input_ids) for i in range(200))
    assert longest <= tokenizer.MAX_LENGTH


def test_a_saved_tokenizer_reads_the_same(tmp_path) -> None:
    from transformers import CLIPTokenizer

    from training.pocket import tokenizer

    built = tokenizer.build_tokenizer()
    built.save_pretrained(tmp_path)
    read = CLIPTokenizer.from_pretrained(tmp_path)
    prompt = "a red dog, a zebra and a blue car in the night sky"
    assert read(prompt, padding="max_length").input_ids == built(prompt, padding="max_length").input_ids


def test_importing_the_package_is_cheap() -> None:
    script = (
        "import sys, time; begin = time.perf_counter(); import training.pocket; "
        "print(time.perf_counter() - begin, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    seconds = min(float(run.stdout.split()[0]) for run in runs)
    assert all(run.stdout.split()[1:] == ["False", "False"] for run in runs)
    assert seconds < 0.3

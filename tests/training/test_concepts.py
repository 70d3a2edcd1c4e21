"""Several subjects in one run: shares, captions, priors, and resuming."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_data import picture

from recipes.common.training import subjects
from recipes.dreambooth_lora import Settings
from training import config, dreambooth, loop, lora, models, prepare
from training.data import crops, images
from training.data.cache import Live
from training.dreambooth import Concept, Prior
from training.errors import TrainingError


def pictures_of(folder: Path, noun: str, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        picture(number + len(noun)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a sks {noun} {'abcdefgh'[number]}")
    return folder


def views(folder: Path) -> crops.Views:
    return crops.Views(images.folder(folder, minimum=8), resolution=32)


def preserved(data: crops.Views, ratio: float = 1.0, own_share: float = 0.0) -> Prior:
    rename = lambda caption: dreambooth.class_caption(caption, identifier="sks", words={})  # noqa: E731
    own = data.renamed(rename)
    return Prior(views=own, to_base=True, own=own if own_share else None, own_share=own_share, ratio=ratio, weight=0.5)


def test_samples_are_shared_as_asked_and_each_subject_s_loss_is_a_mean_of_its_own(tmp_path: Path) -> None:
    dogs, owls = (views(pictures_of(tmp_path / noun, noun, count)) for noun, count in (("dog", 6), ("owl", 3)))
    concepts = [
        Concept(name="dog", views=dogs, prior=preserved(dogs, ratio=0.5)),
        Concept(name="owl", views=owls, prior=preserved(owls, ratio=2.0, own_share=0.5), share=3.0),
        Concept(name="bare", views=owls, share=2.0),
    ]
    entries = lambda data: Live(data, 4)  # noqa: E731
    samples = [prepare._streams(concept, entries, alone=False) for concept in concepts]
    shares = [sum(stream.share for stream in some) for some in samples]
    assert [share / shares[0] for share in shares] == pytest.approx([1, 3, 2])
    for concept, (own, *kept), share in zip(concepts, samples, shares, strict=True):
        assert own.share * own.weight == pytest.approx(share)  # a subject's own samples count as its share
        if concept.prior is not None:  # and its class as the prior's weight of that
            assert sum(stream.share * stream.weight for stream in kept) == pytest.approx(0.5 * share)
    alone = prepare._streams(concepts[0], entries, alone=True)
    assert [stream.share for stream in alone] == [1.0, 0.5]  # as before there were several


def settings(tmp_path: Path, base: Path, **changes: object) -> Settings:
    dogs, owls = tmp_path / "dogs", tmp_path / "owls"
    for folder, noun, count in ((dogs, "dog", 4), (owls, "owl", 2)):
        if not folder.exists():
            pictures_of(folder, noun, count)
    concepts: dict = {"owl": {"source": str(owls), **changes.pop("owl", {})}}  # type: ignore[dict-item]
    if concepts["owl"]["source"] == "dogs":
        concepts["owl"]["source"] = str(dogs)
    return Settings(
        base=config.BaseSettings(path=str(base)),
        data=config.DataSettings(source=str(dogs), resolution=32, minimum=8, tags=config.TagSettings(shuffle=True)),
        dreambooth=config.DreamBoothSettings(
            **{"identifier": "sks", "class_images": 2, "steps": 1, **changes.pop("dreambooth", {})}  # type: ignore[dict-item]
        ),
        concepts={name: config.ConceptSettings(**one) for name, one in concepts.items()},
        out=str(tmp_path / "out"),
        **changes,  # type: ignore[arg-type]
    )


def test_a_recipe_s_concepts_have_their_own_pictures_words_and_class_images(base: Path, tmp_path: Path) -> None:
    parts = models.load_parts(base)
    one = {"prefix": "x y", "identifier": "y", "class_prompt": "an owl", "share": None}
    chosen = settings(tmp_path, base, owl=one, dreambooth={"class_prompt": "a dog"})
    data, prior, (owl,) = subjects(parts, chosen)
    assert data.caption(0) == "a sks dog a"
    assert owl.views.caption(1) == "x y, a sks owl b"
    assert owl.share == 0.5  # two pictures for each four
    assert prior is not None
    assert owl.prior is not None
    assert [prior.views.caption(0), owl.prior.views.caption(0)] == ["a dog", "an owl"]
    # What the base is asked has none of the words that mark subjects, whosever they are.
    assert owl.prior.own is not None
    assert owl.prior.own.caption(0) == "x, an owl a"
    places = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert places == ["class_images", "class_images-an-owl"]
    same = settings(tmp_path, base, owl={"class_prompt": "a dog"}, dreambooth={"class_prompt": "a dog"})
    subjects(parts, same)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == places  # one prompt, one folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"owl": {"share": 0}}, r"concepts: share must be > 0 or null, got 0"),
        ({"owl": {"source": "./nowhere"}}, r"concepts.owl: .*nowhere"),
        ({"owl": {"identifier": "zzz"}, "dreambooth": {"identifier": "dog"}}, r"concepts.owl: .*zzz.* is not in"),
        ({"owl": {"source": "dogs"}}, r"concepts.owl: its captions are those of data, such as 'a sks dog"),
        ({"region": "sks dog"}, r"region 'sks dog' is of one subject"),
    ],
)
def test_what_is_wrong_with_a_concept_is_named(changes: dict, message: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=message):
        subjects(models.load_parts(base), settings(tmp_path, base, **changes))


class Crash(Exception):
    """An interruption."""


def test_a_run_with_two_subjects_resumes_to_the_bit(base: Path, tmp_path: Path) -> None:
    chosen = settings(tmp_path, base)

    def run(out: Path, crash: int = 0) -> tuple[dict[str, torch.Tensor], list[str]]:
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if line.startswith(f"step {crash}/"):
                raise Crash

        parts = models.load_parts(base)
        data, prior, others = subjects(parts, chosen)
        method = lora.prepare(parts, config.LoraSettings(rank=2))
        train = config.TrainSettings(steps=6, batch_size=4, learning_rate=1e-2, trackers=[], log_every=1, save_every=2)
        loop.train(method, data, train, out=out, prior=prior, further=others, say=say)
        return load_file(out / "checkpoints/step-000006/weights.safetensors"), said

    whole, said = run(tmp_path / "whole")
    shown = [" ".join(line.split()) for line in said]
    assert "data 4 views, 50% of the samples" in shown
    assert "owl 2 views, 50% of the samples" in shown
    with pytest.raises(Crash):
        run(tmp_path / "cut", crash=5)
    cut, _ = run(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_positions_are_spread_over_the_subjects(tmp_path: Path) -> None:
    from training.data.batches import Draws, Feed

    dogs, owls = (views(pictures_of(tmp_path / noun, noun, count)) for noun, count in (("dog", 5), ("owl", 2)))
    streams = [
        stream
        for concept in (Concept(name="a", views=dogs), Concept(name="b", views=owls, share=3))
        for stream in prepare._streams(concept, lambda data: Live(data, 4), alone=False)
    ]
    feed = Feed(streams, Draws(latent_shape=(4, 4)), seed=0, batch_size=8)
    for step in range(4):
        counts = Counter(caption.split()[2] for caption in feed.batch(step, 0)["captions"])
        assert counts == {"dog": 2, "owl": 6}

"""Order and noise are functions of (seed, position), however a step is split."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from training.data.batches import Draws, Feed, Stream, interleave, pick
from training.errors import TrainingError


class Entries:
    """Named entries whose content shows which one it is."""

    def __init__(self, count: int, sizes: list[tuple[int, int]] | None = None, extra: str | None = None):
        self.names = [str(number) for number in range(count)]
        self.captions = [f"caption {number}" for number in range(count)]
        self.sizes = sizes or [(16, 16)] * count
        self.extra = extra

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        entry = {"mean": torch.tensor(float(index))}
        return entry | ({self.extra: torch.zeros(1, 4, 4)} if self.extra else {})


DRAWS = Draws(latent_shape=(4, 4))


def make(streams: list[Stream] | None = None, **changes: object) -> Feed:
    options = {"seed": 0, "batch_size": 4, **changes}
    return Feed(streams or [Stream(entries=Entries(5))], DRAWS, **options)  # type: ignore[arg-type]


def test_every_split_of_a_step_has_the_same_samples_and_noise() -> None:
    whole = make(batch_size=4)
    splits = [
        [make(batch_size=1, accumulation=4).batch(3, micro) for micro in range(4)],
        [make(batch_size=2, processes=2, rank=rank).batch(3, 0) for rank in range(2)],
        [make(batch_size=1, processes=2, accumulation=2, rank=r).batch(3, m) for m in range(2) for r in range(2)],
    ]
    expected = whole.batch(3, 0)
    for parts in splits:
        for key in ("mean", "noise", "posterior", "timesteps", "weight"):
            assert torch.equal(torch.cat([part[key] for part in parts]), expected[key]), key
        assert [caption for part in parts for caption in part["captions"]] == expected["captions"]


def test_captions_stay_with_their_images_under_shuffling() -> None:
    feed = make(batch_size=7)
    for step in range(6):
        batch = feed.batch(step, 0)
        assert batch["captions"] == [f"caption {int(number)}" for number in batch["mean"]]


def test_an_epoch_visits_every_sample_once_in_a_new_order() -> None:
    epochs = [[pick(0, 0, 6, 6 * epoch + place) for place in range(6)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_posterior_is_drawn_anew_at_every_visit() -> None:
    feed = make([Stream(entries=Entries(1))], batch_size=2)
    first, second = feed.batch(0, 0), feed.batch(1, 0)
    seen = [*first["posterior"], *second["posterior"], *first["noise"], *second["noise"]]
    assert all(not torch.equal(seen[i], seen[j]) for i in range(8) for j in range(i))


def test_threads_ahead_give_the_same_batches() -> None:
    plain = list(make().ahead(2, 6, 0))
    ahead = list(make().ahead(2, 6, 3))
    assert len(plain) == len(ahead) == 4
    for one, two in zip(plain, ahead, strict=True):
        assert torch.equal(one[0]["noise"], two[0]["noise"])


@pytest.mark.parametrize("ratio", [1.0, 0.5, 3.0])
def test_class_samples_take_their_share_evenly(ratio: float) -> None:
    share = ratio / (1 + ratio)
    chosen = [interleave(position, share) for position in range(120)]
    counts = Counter(stream for stream, _ in chosen)
    assert counts[1] == pytest.approx(120 * share, abs=1)
    for stream in (0, 1):
        assert [turn for number, turn in chosen if number == stream] == list(range(counts[stream]))


def test_masks_and_conditioning_are_there_when_asked_for() -> None:
    streams = [Stream(entries=Entries(3, extra="mask")), Stream(entries=Entries(3))]
    assert "mask" not in make(streams).batch(0, 0)
    masked = Feed(streams, Draws(latent_shape=(4, 4), masks=True), seed=0, batch_size=4)
    assert sorted(masked.batch(0, 0)["mask"].mean((1, 2, 3)).tolist()) == [0, 0, 1, 1]  # class images have none: ones


def test_dropout_shares() -> None:
    draws = Draws(latent_shape=(4, 4), caption_dropout=0.3, noise_offset=1.0)
    feed = Feed([Stream(entries=Entries(5))], draws, seed=0, batch_size=400)
    batch = feed.batch(0, 0)
    assert sum(caption == "" for caption in batch["captions"]) / 400 == pytest.approx(0.3, abs=0.07)
    assert float(batch["noise"].mean((2, 3)).std()) == pytest.approx((1 + 1 / 16) ** 0.5, abs=0.06)


def test_a_step_stays_within_one_bucket_and_all_are_visited() -> None:
    sizes = [(16, 16)] * 3 + [(8, 32)] * 2
    feed = make([Stream(entries=Entries(5, sizes=sizes))], batch_size=2)
    batches = [feed.batch(step, 0) for step in range(40)]
    assert all(
        len(set(map(int, batch["mean"])) & {3, 4}) in (0, len(set(map(int, batch["mean"])))) for batch in batches
    )
    visits = Counter(int(number) for batch in batches for number in batch["mean"])
    assert set(visits) == set(range(5))
    assert make([Stream(entries=Entries(5, sizes=sizes))], batch_size=2).batch(1500, 0)["noise"].ndim == 4


TALL = [(16, 16)] * 3 + [(8, 32)]
BOTH = [(16, 16), (8, 32)] * 2


def test_class_samples_come_in_every_size_beside_the_subject_s() -> None:
    """In each step one size; over all steps each size, stream and entry as often as its share says."""
    spread = {(16, 16): 0.75, (8, 32): 0.25}
    streams = [
        Stream(entries=Entries(4, sizes=TALL)),
        Stream(entries=Entries(4, sizes=BOTH, extra="mask"), share=0.5, spread=spread),
    ]
    feed = make(streams, batch_size=6)
    chosen = [[feed._choose(step, step * 6 + place) for place in range(6)] for step in range(400)]
    for step in chosen:
        sizes = {(TALL if stream == 0 else BOTH)[entry] for stream, entry in step}
        assert len(sizes) == 1
        assert Counter(stream for stream, _ in step) == {0: 4, 1: 2}  # at every size
    visits = Counter(pair for step in chosen for pair in step)
    expected = {**dict.fromkeys([(0, n) for n in range(4)], 400), (1, 0): 300, (1, 1): 100, (1, 2): 300, (1, 3): 100}
    assert set(visits) == set(expected)
    for pair, count in expected.items():  # the sizes of 400 steps are drawn: a standard deviation is 9 of 300
        assert visits[pair] == pytest.approx(count, rel=0.35), pair
    assert max(visits[0, n] for n in range(3)) - min(visits[0, n] for n in range(3)) <= 1  # epochs within a size


def test_with_several_sizes_too_a_batch_may_be_split() -> None:
    streams = [Stream(entries=Entries(4, sizes=TALL)), Stream(entries=Entries(4, sizes=BOTH), share=0.5)]
    for step in range(6):
        whole = make(streams, batch_size=6).batch(step, 0)
        parts = [make(streams, batch_size=3, processes=2, rank=rank).batch(step, 0) for rank in range(2)]
        for key in ("mean", "noise", "weight"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key]), key


def test_subjects_of_other_shapes_share_a_run_by_their_shares() -> None:
    streams = [
        Stream(entries=Entries(3)),
        Stream(entries=Entries(2, sizes=[(8, 32), (8, 32)]), share=2.0),
    ]
    feed = make(streams, batch_size=2)
    counts = Counter(feed._choose(step, 2 * step)[0] for step in range(600))
    assert counts[1] / 600 == pytest.approx(2 / 3, abs=0.06)
    assert feed.sizes[feed._size(feed.largest())[0]] in ((16, 16), (8, 32))


def test_the_largest_size_is_the_one_that_is_estimated() -> None:
    feed = make([Stream(entries=Entries(6, sizes=[(16, 16)] * 5 + [(32, 32)]))], batch_size=1)
    assert tuple(feed.batch(feed.largest(), 0)["noise"].shape) == (1, 4, 8, 8)
    assert feed.largest() > 0


def test_class_images_without_a_size_are_refused() -> None:
    streams = [Stream(entries=Entries(4, sizes=TALL)), Stream(entries=Entries(2), spread={(16, 16): 0.5, (8, 32): 0.5})]
    with pytest.raises(TrainingError, match=r"class images lack the size 32x8 of the subject's pictures; .*data.used"):
        make(streams)


def test_one_of_several_captions_is_drawn_by_position_alone() -> None:
    several = {0: ("a", "b", "c"), 3: ("d", "e")}

    def draw(index: int, seed: int) -> str:
        some = several.get(index, (f"caption {index}",))
        return some[seed % len(some)]

    plain, feed = make(), make([Stream(entries=Entries(5), draw=draw)])
    drawn = [feed.batch(step, 0)["captions"] for step in range(60)]
    counts = Counter(caption for captions in drawn for caption in captions)
    assert counts.keys() == {"a", "b", "c", "d", "e", "caption 1", "caption 2", "caption 4"}
    assert min(counts[caption] for caption in "abc") >= 8  # of 48
    again = make([Stream(entries=Entries(5), draw=draw)], batch_size=1, accumulation=4)
    assert [again.batch(7, micro)["captions"][0] for micro in range(4)] == drawn[7]
    for key in ("mean", "noise", "timesteps"):  # the other draws are those of a single caption
        assert torch.equal(feed.batch(3, 0)[key], plain.batch(3, 0)[key])
    said = {caption for captions in drawn for caption in captions}
    assert feed.captions(60, 100) == said
    assert len(feed.captions(60, 3)) == 4  # one more than may be, and no further
    both = make([Stream(entries=Entries(5), draw=draw, asked=str.upper)])
    assert both.captions(60, 100) == said | {caption.upper() for caption in said}

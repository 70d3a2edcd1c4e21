"""Which samples a step trains on and with which noise: pure functions of (seed, position), so resuming is a number.

Positions count samples over the whole run. Step s of batches of B per process, accumulated A times on W processes owns
the positions s·A·W·B up to (s+1)·A·W·B, and what happens at a position does not depend on how they are split.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ..batch import CaptionTensors, DrawnBatch, DrawnSample, EntryTensors, tensors
from ..errors import TrainingError
from ..holes import hole

__all__ = ["Draws", "Feed", "Stream", "seed_of"]

RING = 2


def seed_of(*numbers: int | str) -> int:
    """A 63-bit seed from any numbers and words; near inputs give unrelated seeds."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Entries(Protocol):
    """Sized entries: a `cache.Encoded`, or views turned into tensors as they are asked for."""

    @property
    def names(self) -> list[str]: ...

    @property
    def sizes(self) -> list[tuple[int, int]]: ...

    @property
    def captions(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> EntryTensors: ...


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Entries with their share of the samples and the weight of their loss."""

    entries: Entries
    share: float = 1.0
    weight: float = 1.0
    preserved: bool = False
    """Whether its samples are trained towards the base's own prediction."""
    asked: Callable[[str], str] | None = None
    """From a caption, what the base is asked outside the masks of samples that are not preserved; None: nothing."""
    draw: Callable[[int, int], str] | None = None
    """From entry and seed to its caption at a position; None: always the one of the entry."""
    spread: Mapping[tuple[int, int], float] | None = None
    """Share of its samples at each image size; None: by its number of entries."""
    several: Callable[[int], tuple[str, ...]] | None = None
    """All captions of an entry that may be drawn, but for what becomes of their tags; None: the one of the entry."""


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn at random per position."""

    latent_shape: tuple[int, int]
    """(channels, pixels per latent)."""
    timesteps: int = 1000
    noise_offset: float = 0.0
    caption_dropout: float = 0.0
    conditioning_dropout: float = 0.0
    conditioning: bool = False
    """Whether the method reads conditioning images; otherwise they are left out of the batches."""
    holes: bool = False
    """Whether the network paints holes (inpainting), which are drawn by a seed of their own."""
    masks: bool = False
    """Whether the loss uses masks; samples without one get a mask of ones."""


class Feed:
    """Batches by step; building one touches no state, so threads may do it ahead.

    Args:
        streams: entries, each with its share. One step has one image size; the streams that have entries of it share
            the step.
        draws: what is drawn at random for a sample.
        seed: of order, noise and dropout.
        batch_size: samples of one micro-step in one process.
        accumulation: micro-steps of an optimizer step.
        processes: how many share a step.
        rank: of this process, from 0.
        text: captions to embeddings or token ids; None: batches hold the captions.

    """

    def __init__(
        self,
        streams: list[Stream],
        draws: Draws,
        *,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        rank: int = 0,
        text: Callable[[list[str]], CaptionTensors] | None = None,
    ):
        self.streams, self.draws, self.seed, self.text = streams, draws, seed, text
        self.batch_size, self.accumulation, self.processes, self.rank = batch_size, accumulation, processes, rank
        self.per_step = batch_size * accumulation * processes
        self.preserves = any(stream.preserved or stream.asked is not None for stream in streams)
        self.sizes = sorted({size for stream in streams for size in stream.entries.sizes})
        self._members = [_by_size(stream.entries.sizes, self.sizes) for stream in streams]
        for stream, members in zip(streams, self._members, strict=True):
            for size, there in zip(self.sizes, members, strict=True):
                if not there and _part(stream, size):
                    raise TrainingError(
                        f"class images lack the size {size[1]}x{size[0]} of the subject's pictures; give them every "
                        "size with `Views.at(data.used())`"
                    )
        # Share of all samples, by size and stream.
        self._shares = tuple(tuple(stream.share * _part(stream, size) for stream in streams) for size in self.sizes)

    @property
    def asked(self) -> float:
        """Share of samples for which the base is asked too."""
        total = sum(stream.share for stream in self.streams)
        of_captions = sum(stream.share for stream in self.streams if stream.preserved or stream.asked) / total
        return of_captions + (1 - of_captions) * self.draws.caption_dropout if self.preserves else 0.0

    def batch(self, step: int, micro: int) -> DrawnBatch:
        """This process's batch of one micro-step."""
        return self.finish([self.item(step, position) for position in self._own(step, micro)])

    def _own(self, step: int, micro: int) -> list[int]:
        """The positions of this process in one micro-step.

        Where the base is asked for some samples, they are dealt out evenly: it takes a pass of its own, for which the
        other processes would wait.
        """
        together = self.processes * self.batch_size
        first = step * self.per_step + micro * together
        positions = range(first, first + together)
        if self.processes == 1 or not self.preserves:
            return list(positions[self.rank * self.batch_size :][: self.batch_size])
        return sorted(positions, key=lambda position: not self._asks(step, position))[self.rank :: self.processes]

    def _asks(self, step: int, position: int) -> bool:
        """Whether the base is asked about the sample at a position, without making it."""
        stream = self.streams[self._choose(step, position)[0]]
        return stream.preserved or stream.asked is not None or self._drawn(position)[2]

    def _drawn(self, position: int) -> tuple[torch.Generator, Tensor, bool, bool]:
        """A position's generator, its timestep (), and whether caption and conditioning are dropped."""
        random = torch.Generator().manual_seed(seed_of(self.seed, "draw", position))
        timestep = torch.randint(self.draws.timesteps, (), generator=random)
        caption, conditioning = torch.rand(2, generator=random).tolist()
        return random, timestep, caption < self.draws.caption_dropout, conditioning < self.draws.conditioning_dropout

    def whole(self, steps: int) -> Iterator[DrawnBatch]:
        """The batches of all processes in the first steps, in the order of their positions: the same in each of them.

        Args:
            steps: how many; a run has no captions beyond its own.
        """
        for position in range(0, steps * self.per_step, self.batch_size):
            step, numbers = position // self.per_step, range(position, position + self.batch_size)
            yield self.finish([self.item(step, number) for number in numbers])

    def finish(self, items: list[DrawnSample]) -> DrawnBatch:
        """Stacks samples; `text` turns their captions into tensors, cached embeddings or token ids."""
        captions = [item["caption"] for item in items]
        asked = [item.get("asked") for item in items]
        inside = [item["inside"] for item in items if "inside" in item]
        stacked = [key for key in items[0] if key not in ("caption", "asked", "inside")]
        batch = cast(DrawnBatch, {key: torch.stack([tensors(item)[key] for item in items]) for key in stacked})
        rows = [number for number, caption in enumerate(asked) if caption is not None]
        if self.preserves:  # row numbers and no mask: their count is known without a look at the GPU
            batch["preserved"] = torch.tensor(rows, dtype=torch.int64)
        if not self.text:
            return {**batch, "captions": captions}
        if rows:
            batch["inside"] = torch.stack(inside)
            said = self.text([asked[row] or "" for row in rows])
            tensors(batch).update({f"base_{key}": value for key, value in tensors(said).items()})
        return {**batch, **self.text(captions)}

    def item(self, step: int, position: int) -> DrawnSample:
        """One sample with its draws."""
        number, index = self._choose(step, position)
        stream = self.streams[number]
        entry = stream.entries[index]
        draws = self.draws
        random, timestep, no_caption, no_conditioning = self._drawn(position)
        height, width = stream.entries.sizes[index]
        channels, factor = draws.latent_shape
        shape = (channels, height // factor, width // factor)
        noise = torch.randn(shape, generator=random)
        item: DrawnSample = {
            **entry,
            "timesteps": timestep,
            "noise": noise,
            "posterior": torch.randn(shape, generator=random),
            "weight": torch.tensor(stream.weight),
            "caption": "" if no_caption else self._caption(stream, index, position),
        }
        if self.preserves:
            # The empty prompt is half of every guided prediction: where the base is kept, it is kept there too.
            whole = stream.preserved or not item["caption"]
            if whole:
                item |= {"asked": item["caption"], "inside": torch.zeros(1, *shape[1:])}
            elif stream.asked is not None:
                if "mask" not in entry:
                    raise TrainingError("dreambooth.surroundings: base looks outside the subject: set data.masks")
                item |= {"asked": stream.asked(item["caption"]), "inside": _widened(entry["mask"])}
        if draws.holes:
            item["hole"] = hole(seed_of(self.seed, "hole", position), (height, width))
        if draws.noise_offset:
            item["noise"] = noise + draws.noise_offset * torch.randn((channels, 1, 1), generator=random)
        if not draws.masks:
            item.pop("mask", None)
        elif "mask" not in item or "asked" in item:  # where the base is asked, the sample counts whole
            item["mask"] = torch.ones(1, *shape[1:])
        if not draws.conditioning:
            item.pop("conditioning", None)
        elif no_conditioning:
            item["conditioning"] = torch.zeros_like(item["conditioning"])
        return item

    def _caption(self, stream: Stream, index: int, position: int) -> str:
        """The entry's caption, drawn by a seed of its own: other draws are as with one caption."""
        if stream.draw is None:
            return stream.entries.captions[index]
        return stream.draw(index, seed_of(self.seed, "caption", position))

    def captions(self, steps: int, limit: int) -> set[str]:
        """What the samples of the first `steps` say and what the base is asked of them; ends beyond `limit` texts."""
        found: set[str] = set()
        for position in range(steps * self.per_step):
            number, index = self._choose(position // self.per_step, position)
            stream = self.streams[number]
            caption = self._caption(stream, index, position)
            found |= {caption, stream.asked(caption)} if stream.asked else {caption}
            if len(found) > limit:
                break
        return found

    def _choose(self, step: int, position: int) -> tuple[int, int]:
        """Stream and entry at a position."""
        size, turns = self._size(step)
        # Positions among the steps of this size, in which the streams take turns as over all steps where sizes are one.
        place = turns * self.per_step + position % self.per_step if len(self.sizes) > 1 else position
        number, turn = interleaved(place, self._shares[size])
        members = self._members[number][size]
        return number, members[pick(self.seed, number * len(self.sizes) + size, len(members), turn)]

    def _size(self, step: int) -> tuple[int, int]:
        """The number of the image size of a whole step, drawn by share, and how often it was drawn before."""
        if len(self.sizes) == 1:
            return 0, step
        drawn = _drawn_sizes(self.seed, tuple(map(sum, self._shares)), 1 << max(10, step.bit_length()))
        return int(drawn[step]), int((drawn[:step] == drawn[step]).sum())

    def largest(self) -> int:
        """The first step with the largest image size, whose batch needs the most memory."""
        wanted = max(range(len(self.sizes)), key=lambda number: self.sizes[number][0] * self.sizes[number][1])
        return next(step for step in itertools.count() if self._size(step)[0] == wanted)

    def ahead(self, first: int, last: int, workers: int) -> Generator[list[DrawnBatch], None, None]:
        """Lists of a step's micro-batches for steps `first` up to `last`, prepared `workers` steps ahead in threads.

        Args:
            first: step to begin with.
            last: step to end before.
            workers: threads, and steps prepared ahead; 0: prepared when asked for.
        """

        def build(step: int) -> list[DrawnBatch]:
            return [self.batch(step, micro) for micro in range(self.accumulation)]

        if not workers:
            yield from map(build, range(first, last))
            return
        with ThreadPoolExecutor(workers, thread_name_prefix="feed") as pool:
            waiting: list[Future[list[DrawnBatch]]] = [
                pool.submit(build, step) for step in range(first, min(last, first + workers))
            ]
            try:
                for step in range(first, last):
                    ready = waiting.pop(0).result()
                    if step + workers < last:
                        waiting.append(pool.submit(build, step + workers))
                    yield ready
            finally:
                for future in waiting:
                    future.cancel()


def _widened(mask: Tensor) -> Tensor:
    """1 in the mask and `RING` latents around it, (1, h, w): beside the subject the base would go on with its class."""
    side = 2 * RING + 1
    return torch.nn.functional.max_pool2d((mask > 0).float()[None], side, stride=1, padding=RING)[0]


def interleave(position: int, share: float) -> tuple[int, int]:
    """Stream (0 or 1) at a position when stream 1 gets `share` of all, spread evenly, and the turn within it."""
    before, after = int(position * share + 1e-9), int((position + 1) * share + 1e-9)
    return (1, before) if after > before else (0, position - before)


def interleaved(position: int, shares: tuple[float, ...]) -> tuple[int, int]:
    """The same for any number of streams, their shares not normalized."""
    if len(shares) == 1:
        return 0, position
    last, turn = interleave(position, shares[-1] / sum(shares))
    return (len(shares) - 1, turn) if last else interleaved(turn, shares[:-1])


def pick(seed: int, stream: int, size: int, turn: int) -> int:
    """The entry at a turn: every epoch goes through all entries once, in its own order.

    Args:
        seed: of the order.
        stream: its number, so that streams have orders of their own.
        size: entries of the stream.
        turn: samples drawn from the stream before.
    """
    epoch, place = divmod(turn, size)
    return int(_order(seed, stream, size, epoch)[place])


@lru_cache(maxsize=16)
def _order(seed: int, stream: int, size: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(seed_of(seed, "order", stream, epoch)).permutation(size)


def _by_size(found: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """The entries of each size."""
    return [[index for index, size in enumerate(found) if size == wanted] for wanted in sizes]


def _part(stream: Stream, size: tuple[int, int]) -> float:
    """Share of a stream's samples that have this size."""
    there = stream.entries.sizes
    return there.count(size) / len(there) if stream.spread is None else stream.spread.get(size, 0.0)


@lru_cache(maxsize=4)
def _drawn_sizes(seed: int, parts: tuple[float, ...], steps: int) -> np.ndarray:
    shares = np.cumsum(parts) / sum(parts)
    # Drawing more steps leaves the first ones as they were: one uniform number each, in order.
    return np.searchsorted(shares, np.random.default_rng(seed_of(seed, "buckets")).random(steps), side="right")

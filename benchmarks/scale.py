"""What many pictures cost: the disk cache and the order of a training, and the per-image table of a comparison.

    python benchmarks/scale.py                 # 100 to 100,000 entries; minutes, and about 1 GB in the temporary folder
    python benchmarks/scale.py --smoke         # seconds; checks that everything here runs

Entries are synthetic: one latent of 4 channels, written by the cache's own writer. Times are CPU seconds of the
process; what a busy machine or a slow disk adds is not in them. `start` checks every entry, as the start of a training
does, and makes the feed. Memory is what the process holds more at most. Prints Markdown.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# Run as a script: modules are looked for in the root instead of its folder, which holds a `training` of its own.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from adapters.measuring.table import Row, read_csv, write_csv
from training.data.batches import Draws, Feed, Stream
from training.data.cache import Encoded, Store, _mine

SIZES = (100, 1_000, 10_000, 100_000)
BATCHES, BATCH = 200, 4
FACTOR = 8


def peak() -> float:
    """MiB, the most that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def names_of(count: int) -> list[str]:
    return [f"{number * 2654435761 % 2**32:08x}{number:032x}" for number in range(count)]


def write(folder: Path, count: int) -> None:
    """The entries that the folder lacks."""
    store, frame = Store(folder), torch.zeros(6)
    for number, name in enumerate(names_of(count)):
        if name not in store:
            mean = torch.full((4, 1, 1), float(number % 7))
            store.put(name, {"mean": mean, "std": torch.ones_like(mean), "frame": frame})


def cache(folder: Path, count: int) -> list[str]:
    """Cells of a row: start, a batch, memory."""
    before, began = peak(), time.process_time()
    store, names = Store(folder), names_of(count)
    lacking = sum(1 for _ in _mine(((name, name) for name in names), store))
    assert not lacking
    entries = Encoded(store, names, [(FACTOR, FACTOR)] * count, [f"picture {number}" for number in range(count)])
    feed = Feed([Stream(entries=entries)], Draws(latent_shape=(4, FACTOR)), seed=0, batch_size=BATCH)
    start = time.process_time() - began
    began = time.process_time()
    for step in range(BATCHES):
        feed.batch(step, 0)
    each = (time.process_time() - began) / BATCHES
    return [f"{start:.2f}", f"{1000 * each:.2f}", f"{1 / each:.0f}", f"{peak() - before:.0f}"]


def table(folder: Path, count: int) -> list[str]:
    """Cells of a row: writing and reading the per-image table, its size, memory."""
    before, began = peak(), time.process_time()
    rows = [
        Row(arm=f"arm {number % 4}", prompt=f"a dog on the grass {number // 4}", seed=1, latents="0123456789abcdef",
            image="01234567", seconds=1.0, numbers={"prompt accuracy": number % 5 / 4, "identity": number % 2})
        for number in range(count)
    ]  # fmt: skip
    file = folder / "per_image.csv"
    file.write_text(write_csv(rows), "utf-8")
    wrote = time.process_time() - began
    began = time.process_time()
    assert len(read_csv(file)) == count
    read = time.process_time() - began
    return [f"{wrote:.2f}", f"{read:.2f}", f"{file.stat().st_size / 2**20:.1f}", f"{peak() - before:.0f}"]


def alone(kind: Callable[[Path, int], object], folder: Path, count: int) -> object:
    """The result of a function in a process of its own, whose memory nothing else has grown."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(kind, (folder, count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    sizes = SIZES[:1] if args.smoke else SIZES
    print(f"CPU seconds, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n")
    lines = ["| entries | start, s | batch of 4, ms | batches/s | memory, MiB |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        for count in sizes:
            alone(write, Path(name), count)
            cells = alone(cache, Path(name), count)
            lines.append(f"| {count:,} | {' | '.join(cells)} |")  # type: ignore[arg-type]
            print(lines[-1], file=sys.stderr, flush=True)
        lines += ["", "| rows of the table | write, s | read, s | MiB | memory, MiB |", "|---|---|---|---|---|"]
        for count in sizes:
            cells = alone(table, Path(name), count)
            lines.append(f"| {count:,} | {' | '.join(cells)} |")  # type: ignore[arg-type]
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Compare two arms by eye, blind: numbered pairs of pictures in an order and on sides that give nothing away.

python -m benchmarks.study.blind runs/study/text-ddim/pictures/cfg runs/study/text-ddim/pictures/s-cfg --out runs/blind
python -m benchmarks.study.blind --out runs/blind --score answers.txt

The first draws pages of pairs with their prompts, and the key. Write a line a pair, "17 left", "17 right" or "17 same",
before opening the key; the second form counts. The unit is the prompt: several pairs of one prompt are averaged.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.common.cli import explained
from training.errors import TrainingError, exit_on_error

__all__ = ["main", "pages", "score"]

SIDE, COLUMNS, ROWS, LINE = 144, 3, 6, 46
VALUE = {"left": 1.0, "right": -1.0, "same": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", type=Path, help="two folders of pictures of the same prompts and seeds")
    parser.add_argument("--count", type=int, default=100, help="pairs shown")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of pairs, their order and sides")
    parser.add_argument("--score", type=Path, help="file of answers, a line a pair")
    parser.add_argument("--out", type=Path, required=True, help="folder of page-*.png and key.json")
    options = parser.parse_args()
    if options.score is not None:
        print(json.dumps(score(options.out / "key.json", options.score), indent=1))
        return
    if len(options.arms) != 2:
        raise TrainingError(f"{len(options.arms)} folders given; two arms are compared")
    made = pages(options.arms[0], options.arms[1], options.out, count=options.count, seed=options.seed)
    print(f"{len(made)} pages in {options.out}; write your answers before you open key.json")


def pages(first: Path, second: Path, out: Path, *, count: int, seed: int) -> list[Path]:
    """Draw the pages and the key; at most `count` pairs, no prompt twice before every prompt came once."""
    import numpy as np
    from PIL import Image, ImageDraw

    import adapters

    arms = [{shot.key: shot for shot in adapters.measuring.sample.shots_in(folder)} for folder in (first, second)]
    shared = sorted(set(arms[0]) & set(arms[1]))
    if not shared:
        raise TrainingError(f"{first} and {second} share no picture of equal prompt, seed and initial noise")
    rng = np.random.default_rng(seed)
    queues = defaultdict(list)
    for index in rng.permutation(len(shared)):  # a unit is a subject, a prompt, a seed and an initial noise
        queues[shared[index][1]].append(shared[index])
    turn = sorted((place, rng.random(), key) for own in queues.values() for place, key in enumerate(own))
    chosen = [key for _, _, key in turn[:count]]
    swapped = rng.random(len(chosen)) < 0.5
    pairs = {
        str(number): {"prompt": unit[1], "seed": unit[2], "left": "second" if swap else "first"}
        for number, (unit, swap) in enumerate(zip(chosen, swapped.tolist(), strict=True), 1)
    }
    key = {"first": str(first), "second": str(second), "pairs": pairs}
    width, height, per_page = 2 * SIDE + 16, SIDE + LINE, COLUMNS * ROWS
    made = []
    with adapters.files.write_folder(out) as stage:
        for begin in range(0, len(chosen), per_page):
            page = Image.new("RGB", (COLUMNS * width, ROWS * height), "white")
            pen = ImageDraw.Draw(page)
            for place, unit in enumerate(chosen[begin : begin + per_page]):
                x, y = place % COLUMNS * width, place // COLUMNS * height
                pen.text((x + 4, y + 2), f"{begin + place + 1}", fill="black")
                pen.text((x + 4, y + 14), textwrap.fill(unit[1], 44), fill="black", spacing=1)
                for side, arm in enumerate(arms[::-1] if swapped[begin + place] else arms):
                    picture = arm[unit].image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
                    page.paste(picture, (x + 4 + side * (SIDE + 4), y + LINE - 4))
            made.append(out / f"page-{begin // per_page + 1}.png")
            page.save(stage / made[-1].name)
        (stage / "key.json").write_text(json.dumps(key, separators=(",", ":")) + "\n", "utf-8")
    return made


def score(key: Path, answers: Path) -> dict[str, Any]:
    """Wins and ties, and the mean preference for the second folder over the first, with its interval over prompts.

    Preference of a pair: 1 where the second's picture is better, -1 where the first's, 0 for the same.
    """
    import numpy as np

    import adapters

    read = adapters.files.read_json(key)
    preferences = defaultdict(list)
    for number, said in _answers(answers, read["pairs"]).items():
        pair = read["pairs"][number]
        preferences[pair["prompt"]].append(VALUE[said] * (1 if pair["left"] == "second" else -1))
    every = [value for values in preferences.values() for value in values]
    means = np.array([np.mean(values) for values in preferences.values()])
    found = adapters.measuring.stats.mean_interval(means)
    return {
        "pairs": len(every),
        "prompts": len(means),
        f"better: {read['first']}": every.count(-1.0),
        f"better: {read['second']}": every.count(1.0),
        "the same": every.count(0.0),
        "preference for the second": round(found.mean, 3),
        "95 % interval": [round(found.low, 3), round(found.high, 3)],
        "p (signed rank)": round(adapters.measuring.stats.wilcoxon(means), 4),
    }


def _answers(path: Path, pairs: Mapping[str, Any]) -> dict[str, str]:
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise TrainingError(f"--score {path} cannot be read: {error.strerror}") from error
    found: dict[str, str] = {}
    for words in lines:
        if len(words) != 2 or words[0] not in pairs or words[1] not in VALUE or words[0] in found:
            raise TrainingError(
                f"--score {path}: {' '.join(words)!r} is no answer, or a second one; say 'NUMBER left', right or same"
            )
        found[words[0]] = words[1]
    if len({pairs[number]["prompt"] for number in found}) < 2:
        raise TrainingError(f"--score {path}: answers for fewer than two prompts give no interval")
    return found


if __name__ == "__main__":
    with exit_on_error(explained):
        main()

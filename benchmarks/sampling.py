"""Sampling on the pocket base: float32 against bfloat16, plain CFG against S-CFG, adapters, and what scopes cost.

    python benchmarks/sampling.py                 # minutes on one CPU core; the adapter is that of the zoo
    python benchmarks/sampling.py --judge 64      # also what the judge sees in so many pictures of each arm
    python benchmarks/sampling.py --scopes        # an adapter's scopes instead, against plain CFG
    python benchmarks/sampling.py --smoke         # seconds; checks that everything here runs

Arms take turns. Times are the process's own CPU time, so that a busy machine changes little; with `--threads 1` (the
default) that is what the step computes. Each draws four pictures in 25 steps. Prints Markdown.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

# Run as a script its folder may not be where modules are looked for: it holds a `training` of its own.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]

import numpy as np
import torch

import adapters
from recipes.common.base import adapted, sampling_pipeline
from recipes.common.guidance import guided
from recipes.common.precision import drawing_in
from recipes.common.settings import GuidanceSettings, SamplingSettings, ScopeSettings
from training.config import BaseSettings
from training.pocket import judge
from training.pocket.scenes import sample

ADAPTER = Path(__file__).resolve().parents[1] / "recipes" / "zoo" / "teapot"
PROMPTS = ["a dog on the grass", "a red car and a cat", "a fish in the sea", "a house in the snow"]
SCALE = 4.0
TRIGGER, NOUN = "sks", "teapot"
SUBJECT_PROMPTS = [f"a {TRIGGER} {NOUN} {rest}" for rest in ("on the grass", "and a cat", "in the sea", "in the snow")]
# None: merged into the weights, as an adapter without a scope is drawn. The others leave it beside them.
SCOPES: dict[str, dict[str, Any] | None] = {
    "no scope, merged": None,
    "no scope, beside the weights": {},
    "base's unconditional prediction": {"uncond_weight": 0.0},
    "half the weight in the unconditional half": {"uncond_weight": 0.5},
    "off in the first fifth": {"start": 0.2},
    "in the subject's place for three tenths": {"where": "subject", "where_stop": 0.3},
    "in the subject's place throughout": {"where": "subject"},
}


def draw(pipe: Any, arm: tuple[str, str, str], prompts: list[str], args: argparse.Namespace, seed: int) -> Any:
    """Pictures of the prompts by an arm: (precision, guidance, adapter)."""
    chosen, method, adapter = arm
    around = guided(pipe, GuidanceSettings(method=method, guidance_scale=SCALE))  # type: ignore[arg-type]
    with adapted(pipe, ADAPTER) if adapter else nullcontext(), drawing_in(pipe, chosen, around)():
        began = time.process_time()
        images = pipe(
            prompt=prompts,
            num_inference_steps=args.steps,
            guidance_scale=SCALE,
            generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
        ).images
        return images, time.process_time() - began


def draw_scoped(pipe: Any, name: str, method: str, args: argparse.Namespace) -> float:
    """CPU seconds of four pictures with the zoo's adapter in a scope."""
    fields = SCOPES[name]
    if fields == {}:  # no scope, and yet not merged
        everywhere = adapters.Scope()
        around: Any = adapters.load(pipe, ADAPTER, guidance=lambda _: nullcontext(), merged=False, scope=everywhere)
    else:
        scope = None if fields is None else ScopeSettings(**fields)
        around = adapted(pipe, ADAPTER, scope=scope, identifier=TRIGGER, noun=NOUN)
    guidance = GuidanceSettings(method=method, guidance_scale=SCALE)  # type: ignore[arg-type]
    with around, guided(pipe, guidance)():
        began = time.process_time()
        pipe(
            prompt=SUBJECT_PROMPTS,
            num_inference_steps=args.steps,
            guidance_scale=SCALE,
            generator=[torch.Generator().manual_seed(number) for number in range(len(SUBJECT_PROMPTS))],
        )
        return time.process_time() - began


def scope_times(pipe: Any, args: argparse.Namespace) -> list[str]:
    """What each scope costs, with plain CFG and with S-CFG."""
    arms = [(name, method) for method in ("cfg", "semantic") for name in SCOPES]
    seconds: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    for number in range(args.rounds + 1):
        for arm in arms:
            took = draw_scoped(pipe, *arm, args)
            if number:  # the first round warms up
                seconds[arm].append(took)
    lines = [
        "| scope | guidance | CPU seconds | against merged | against beside the weights |",
        "|---|---|---|---|---|",
    ]
    for (name, method), took in seconds.items():
        others = [seconds[reference, method] for reference in list(SCOPES)[:2]]
        ratios = [interval([mine / theirs for mine, theirs in zip(took, other, strict=True)]) for other in others]
        shown = {"cfg": "CFG", "semantic": "S-CFG"}[method]
        lines.append(f"| {name} | {shown} | {statistics.median(took):.2f} | {' | '.join(ratios)} |")
    return lines


def interval(values: list[float]) -> str:
    """Median with its 95 % bootstrap interval."""
    drawn = np.median(np.random.default_rng(0).choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{statistics.median(values):.3f} [{low:.3f}, {high:.3f}]"


def times(pipe: Any, arms: list[tuple[str, str, str]], args: argparse.Namespace) -> list[str]:
    seconds: dict[tuple[str, str, str], list[float]] = {arm: [] for arm in arms}
    for number in range(args.rounds + 1):
        for arm in arms:
            took = draw(pipe, arm, PROMPTS, args, 0)[1]
            if number:  # the first round warms up
                seconds[arm].append(took)
    lines = ["| arm | CPU seconds | against the first |", "|---|---|---|"]
    for arm, took in seconds.items():
        ratios = [mine / first for mine, first in zip(took, seconds[arms[0]], strict=True)]
        name = ", ".join(filter(None, arm)).replace("semantic", "S-CFG").replace("cfg", "CFG")
        lines.append(f"| {name} | {statistics.median(took):.2f} | {interval(ratios)} |")
    return lines


def judged(pipe: Any, args: argparse.Namespace) -> list[str]:
    """Prompt accuracy of each arm's pictures of held-out scenes, and the paired difference of the precisions."""
    prompts = [sample(977, index).caption for index in range(args.judge)]
    found: dict[tuple[str, str], np.ndarray] = {}
    for method in ("cfg", "semantic"):
        for chosen in ("fp32", "bf16"):
            values: list[float] = []
            for first in range(0, len(prompts), 4):
                some = prompts[first : first + 4]
                images, _ = draw(pipe, (chosen, method, ""), some, args, 1000 + first)
                values += [score.mean for score in judge().scores(images, some)]
            found[method, chosen] = np.array(values)
    lines = ["| guidance | float32 | bfloat16 | difference, 95 % interval |", "|---|---|---|---|"]
    for method, name in (("cfg", "CFG"), ("semantic", "S-CFG")):
        full, half = found[method, "fp32"], found[method, "bf16"]
        drawn = np.random.default_rng(0).choice(half - full, (2000, len(full))).mean(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        difference = f"{(half - full).mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append(f"| {name} | {full.mean():.3f} | {half.mean():.3f} | {difference} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds; one more warms up")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--judge", type=int, default=0, help="pictures of each arm that the judge looks at")
    parser.add_argument("--scopes", action="store_true", help="time an adapter's scopes, and nothing else")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="one round of two steps, four judged pictures")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.steps, args.judge = 1, 2, 4
    torch.set_num_threads(args.threads)
    pipe = sampling_pipeline(BaseSettings(path="pocket"), SamplingSettings())
    print(f"# Sampling speed\n\nCPU, {args.threads} thread(s), torch {torch.__version__}, {platform.platform()}\n")
    if args.scopes:
        print("\n".join(scope_times(pipe, args)), flush=True)
        return
    arms = [
        (chosen, method, adapter)
        for method, adapter in (("cfg", ""), ("semantic", ""), ("cfg", "adapter"))
        for chosen in ("fp32", "bf16")
    ]
    print("\n".join(times(pipe, arms, args)), flush=True)
    if args.judge:
        print("\n".join(["", *judged(pipe, args)]))


if __name__ == "__main__":
    main()

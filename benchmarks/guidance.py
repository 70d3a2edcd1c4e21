"""What S-CFG costs beside plain CFG: time and peak memory per step, on full architectures with random weights.

    python benchmarks/guidance.py sd15                      # 512x512, seven rounds, about six minutes on two cores
    python benchmarks/guidance.py sdxl --size wide --device cuda
    python benchmarks/guidance.py sd15 --tiny               # a smoke test of this file, seconds

Arithmetic: operations in matrix products, attention and convolutions of one step, counted: no machine's noise in it.
Time: all arms in one process, one step per arm and round, order rotated; each arm's ratio to `cfg` within a round,
median over rounds with its order-statistics interval; `--rounds 0` only counts. Own time (CPU only): what this guider's
hooks take over the rest of the same step, which a slow or fast minute of the machine stretches alike. Memory: every arm
alone in a fresh process (CPU: that process's largest resident size, weights included; GPU: the allocator's peak).
Prints Markdown for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

import scfg
from scfg import segment
from scfg.attention import AttentionRecorder, find_blocks, select_blocks
from scfg.regions import RegionAverage, complete
from scfg.run import Run
from scfg.scale import rewrite
from training.architectures import FAMILIES

GUIDANCE_SCALE = 7.5
TOKENS = 77
# U-net settings and native image size of the published models.
ARCHITECTURES = {name: (found.unet, found.resolution) for name, found in FAMILIES.items()}
TINY = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}
TINY_XL = {"block_out_channels": (32, 32, 64), "norm_num_groups": 8, "attention_head_dim": (2, 2, 4)}


def build(arguments: argparse.Namespace) -> Any:
    """The pipeline: a full-size random U-net, a VAE only for its scale factor, no text encoder."""
    settings = dict(ARCHITECTURES[arguments.architecture][0])
    xl = arguments.architecture == "sdxl"
    if arguments.tiny:
        settings |= TINY_XL if xl else TINY
    if arguments.xl_depth is not None and xl:
        settings["transformer_layers_per_block"] = (1, min(2, arguments.xl_depth), arguments.xl_depth)
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=4, out_channels=4, layers_per_block=2, **settings)
    unet = unet.to(arguments.dtype).to_empty(device=arguments.device).eval()
    fill(unet)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    if xl:
        pipe = StableDiffusionXLPipeline(vae, None, None, None, None, unet, scheduler, add_watermarker=False)
    else:
        pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def fill(unet: torch.nn.Module) -> None:
    """Small random weights, one block of numbers over and over: a billion fresh ones would take longer than a step."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            repeats = math.ceil(parameter.numel() / len(block))
            parameter.copy_(block.repeat(repeats)[: parameter.numel()].view_as(parameter))


def one_step(pipe: Any, arguments: argparse.Namespace, steps: int = 1) -> None:
    """One denoising step, or more, with guidance on `batch` images."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(arguments.device, arguments.dtype)

    width = pipe.unet.config.cross_attention_dim
    texts = {name: random(arguments.batch, TOKENS, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    if arguments.architecture == "sdxl":
        texts |= {f"{half}pooled_prompt_embeds": random(arguments.batch, 1280) for half in ("", "negative_")}
    if arguments.no_negative:
        texts |= {name: torch.zeros_like(text) for name, text in texts.items() if name.startswith("negative_")}
    height, width = arguments.image
    pipe(
        **texts,
        height=height,
        width=width,
        latents=random(arguments.batch, 4, height // 8, width // 8),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE_SCALE,
        output_type="latent",
    )


class KeepMaps:
    """An attention processor with an explicit softmax that keeps its head-averaged map, as the published code does."""

    def __init__(self) -> None:
        self.map: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(part) for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        weights = attn.get_attention_scores(query, key, attention_mask)  # (B * heads, N, M)
        self.map = weights.unflatten(0, (-1, attn.heads)).mean(dim=1)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(weights, value))))


@contextlib.contextmanager
def explicit(pipe: Any, arguments: argparse.Namespace) -> Iterator[None]:
    """The same guidance from explicit maps of every layer, kept until the U-net is through."""
    unet, settings = pipe.unet, scfg.SemanticCFG()
    before = unet.attn_processors
    unet.set_attn_processor({name: KeepMaps() for name in before})
    height, width = arguments.image[0] // 8, arguments.image[1] // 8
    blocks = select_blocks(find_blocks(unet), height, width, settings.latent_ratio)
    target = min(blocks, key=lambda block: block.ratio).grid(height, width)

    def guide(module: Any, args: tuple, output: tuple) -> tuple:
        images = output[0].shape[0] // 2
        average = RegionAverage(target, settings.smoothing_sigma)
        for block in blocks:
            own = block.self_attention.processor.map.float()
            cross = block.cross_attention.processor.map.float()
            maps = complete(own.matmul, cross, completion=settings.completion, steps=settings.completion_steps)
            average.add_tokens(maps[images:], block.grid(height, width))
            pair = torch.stack([maps[:images, :, 0], maps[:images, :, 1:].sum(-1)], dim=-1)
            average.add_pair(pair, block.grid(height, width))
        uncond, cond = output[0].chunk(2)
        given = scfg.GuidanceInputs(uncond=uncond, cond=cond, guidance_scale=GUIDANCE_SCALE, regions=average.regions())
        scaled = settings(given)
        return (torch.cat([uncond, rewrite(uncond, cond, scaled.gamma, GUIDANCE_SCALE, keep_cond=False)]),)

    handle = unet.register_forward_hook(guide)
    try:
        yield
    finally:
        handle.remove()
        unet.set_attn_processor(before)


@contextlib.contextmanager
def fused(pipe: Any, arguments: argparse.Namespace) -> Iterator[None]:
    """This guider with its fused products everywhere, also where one (N, N) matrix would be allowed."""
    limit, segment.EXPLICIT_LIMIT = segment.EXPLICIT_LIMIT, 0
    try:
        with scfg.attach(pipe, scfg.SemanticCFG()):
            yield
    finally:
        segment.EXPLICIT_LIMIT = limit


ARMS: dict[str, Callable[[Any, argparse.Namespace], contextlib.AbstractContextManager]] = {
    "cfg": lambda pipe, arguments: contextlib.nullcontext(),
    "scfg": lambda pipe, arguments: scfg.attach(pipe, scfg.SemanticCFG()),
    "explicit": explicit,
    "scfg-fused": fused,
}


# Everything this guider does in a step happens in these hooks; the U-net's and the pipeline's own code is untouched.
HOOKS = ((Run, "_before"), (AttentionRecorder, "_take"), (Run, "_after"))


@contextlib.contextmanager
def own_time() -> Iterator[list[float]]:
    """Collects the seconds spent in each call of this guider's hooks, while the context is open."""
    spent: list[float] = []

    def timed(hook: Callable) -> Callable:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - begin)

        return wrapper

    with contextlib.ExitStack() as stack:
        for owner, name in HOOKS:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield spent


def seconds(pipe: Any, arm: str, arguments: argparse.Namespace) -> tuple[float, float]:
    """Wall time per step of an arm, and the part of it that was spent in this guider's hooks."""
    steps = arguments.steps
    with own_time() as spent, ARMS[arm](pipe, arguments):
        synchronize(arguments)
        begin = time.perf_counter()
        one_step(pipe, arguments, steps)
        synchronize(arguments)
        return (time.perf_counter() - begin) / steps, sum(spent) / steps


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _fused_attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """torch counts the GPU's fused attention and leaves the CPU's out."""
    return sdpa_flop_count(query, key, value)


def arithmetic(pipe: Any, arm: str, arguments: argparse.Namespace) -> int:
    """Operations (two a multiply-add) of one step of an arm."""
    with ARMS[arm](pipe, arguments), FlopCounterMode(display=False) as counter:
        one_step(pipe, arguments)
    return counter.get_total_flops()


def synchronize(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def time_arms(
    arguments: argparse.Namespace, pipe: Any = None
) -> tuple[dict[str, int], dict[str, list[tuple[float, float]]]]:
    """Arithmetic per arm; `seconds` per arm and round, stopping early, after whole rounds, when the time is up."""
    pipe = pipe or build(arguments)
    counts = {arm: arithmetic(pipe, arm, arguments) for arm in arguments.arms}  # the warm-up, too
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arguments.arms}
    begin = time.perf_counter()
    for round_ in range(arguments.rounds):
        shift = round_ % len(arguments.arms)
        for arm in arguments.arms[shift:] + arguments.arms[:shift]:
            times[arm].append(seconds(pipe, arm, arguments))
        spent = time.perf_counter() - begin
        if round_ and spent * (round_ + 2) / (round_ + 1) > 60 * arguments.minutes:
            break
    return counts, times


def peak_here(arm: str, arguments: argparse.Namespace, pipe: Any = None) -> int:
    """Bytes; run in a process of its own, on a GPU in one that holds nothing else there."""
    pipe = pipe or build(arguments)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with ARMS[arm](pipe, arguments):
        one_step(pipe, arguments)
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(arm: str) -> int:
    """Bytes, from a fresh process with this command's own arguments."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", arm]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with the narrowest order-statistics interval of at least 95 % (all values where there are too few)."""
    ordered, n = sorted(values), len(values)
    depth = 0
    while 2 * depth + 2 < n and 1 - 2 * sum(math.comb(n, k) for k in range(depth + 2)) / 2**n >= 0.95:
        depth += 1
    return statistics.median(ordered), ordered[depth], ordered[-1 - depth]


def ratios(values: list[float]) -> str:
    median, low, high = interval(values)
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def report(
    counts: dict[str, int],
    times: dict[str, list[tuple[float, float]]],
    peaks: dict[str, int],
    arguments: argparse.Namespace,
) -> str:
    """A Markdown section: what was run, and one row per arm."""
    height, width = arguments.image
    rounds = len(times["cfg"])
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    reduced = "" if arguments.xl_depth is None else f", transformer depth at most {arguments.xl_depth}"
    reduced += ", negative embeddings of zeros" if arguments.no_negative else ""
    lines = [
        f"### {arguments.architecture}{' (tiny)' if arguments.tiny else ''}, {height}x{width}{reduced}",
        "",
        f"latent {height // 8}x{width // 8}, batch {arguments.batch} (U-net rows {2 * arguments.batch}), "
        f"{str(arguments.dtype).removeprefix('torch.')}, steps per measurement: {arguments.steps}, {rounds} "
        f"interleaved rounds, {where}, torch {torch.__version__}",
        "",
        "| arm | arithmetic / CFG | s per step, median | time / CFG, median [interval] "
        "| 1 + own time / rest of its step | peak memory | peak / CFG |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, measured in times.items():
        told = "not timed | | "
        if measured:
            told = f"{statistics.median(total for total, _ in measured):.3f} | "
            told += ratios([total / base for (total, _), (base, _) in zip(measured, times["cfg"], strict=True)]) + " | "
            # A hook returns before the GPU has done its work, and `explicit` has hooks of its own.
            if arguments.device == "cpu" and arm.startswith("scfg"):
                told += ratios([total / (total - own) for total, own in measured])
        lines.append(
            f"| {arm} | {counts[arm] / counts['cfg']:.4f} | {told} "
            f"| {peaks[arm] / 2**30:.2f} GiB | {peaks[arm] / peaks['cfg']:.3f} |"
        )
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=sorted(ARCHITECTURES))
    parser.add_argument("--size", default="native", help="native, big (1.5x), wide (1x by 1.5x), or HEIGHTxWIDTH")
    parser.add_argument("--arms", nargs="+", default=["cfg", "scfg", "explicit"], choices=list(ARMS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="sampling steps in a measurement; CPU: 1, GPU: 5")
    parser.add_argument("--minutes", type=float, default=6.0, help="no further round begins that would end after this")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default=None, choices=["float32", "float16", "bfloat16"], help="GPU: float16")
    parser.add_argument("--xl-depth", type=int, default=None, help="SDXL: cut every transformer to so many blocks")
    parser.add_argument(
        "--no-negative",
        action="store_true",
        help="zeros for the negative embeddings, as SDXL has them without a negative prompt: one half tells all",
    )
    parser.add_argument("--tiny", action="store_true", help="narrow channels and a small image: tests this file")
    parser.add_argument("--peak-of", default=None, choices=list(ARMS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.steps = arguments.steps or (5 if arguments.device == "cuda" else 1)
    native = 128 if arguments.tiny else ARCHITECTURES[arguments.architecture][1]
    named = {"native": (native, native), "big": (native * 3 // 2,) * 2, "wide": (native, native * 3 // 2)}
    if arguments.size in named:
        arguments.image = named[arguments.size]
    else:
        arguments.image = tuple(int(side) for side in arguments.size.split("x"))
    arguments.dtype = getattr(torch, arguments.dtype or ("float16" if arguments.device == "cuda" else "float32"))
    if arguments.arms[0] != "cfg":
        parser.error("--arms must begin with cfg: everything is measured against it")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.peak_of is not None:
        print(json.dumps({"peak": peak_here(arguments.peak_of, arguments)}))
        return
    peaks = {arm: peak(arm) for arm in arguments.arms}  # before this process holds a model of its own
    print(report(*time_arms(arguments), peaks, arguments))


if __name__ == "__main__":
    main()

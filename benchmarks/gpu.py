"""Everything that this project says about one GPU, in one command of less than ten minutes.

    python benchmarks/gpu.py                             # on the GPU; docs/benchmarks/<card>.json
    python benchmarks/gpu.py --out results --only masks  # one kind of part, into another folder
    python benchmarks/gpu.py --device cpu --smoke        # every part with tiny networks: tests this file

Parts: the cost of S-CFG in a sampling step (SD-1.5 and SDXL, fp16 and bf16, with and without a negative prompt);
region masks on the GPU against the CPU's in float32; whether an interrupted and resumed training ends with the same
bits; speed and peak memory of LoRA training against the bare U-net and a plain loop; frozen weights in 8 and 4 bits;
torch.compile (which does not compile with --smoke).

The full architectures have random weights. Masks and resuming use the embedded pocket base. Nothing is downloaded.
Every part runs in a process of its own with a time limit. One that fails or takes too long is one line in the results,
and the others go on. Results are written after each part. Prints Markdown at the end.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

QUIET = {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
for name, value in {"HF_HUB_OFFLINE": "1", **QUIET}.items():
    os.environ.setdefault(name, value)
ROOT = Path(__file__).resolve().parents[1]
# Run as a script: modules are looked for in the root instead of this folder, which holds a `training` of its own.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT / "benchmarks"]
sys.path.insert(0, str(ROOT))

import torch

GIB = 2**30
MINUTES = 9.5
FAMILIES = {"sd15": ("sd15", "tiny"), "sdxl": ("sdxl", "tiny-xl")}  # full size, tiny
PRECISIONS = {"fp16": "float16", "bf16": "bfloat16"}
# Steps of a round and rounds, after one that warms up: a few seconds each on a card of 2022.
PLANS = {("sd15", 1): (5, 5), ("sd15", 8): (5, 5), ("sdxl", 1): (3, 5), ("sdxl", 8): (2, 3)}
RESUME_STEPS, CUT_AT = 6, 3


# --- parts: each a function that returns what goes into the results ---------------------------------------------------


def card() -> dict[str, Any]:
    """What is measured on."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.platform()}
    if not torch.cuda.is_available():
        return {"card": "cpu", "threads": torch.get_num_threads(), **facts}
    found = torch.cuda.get_device_properties(0)
    return {
        "card": found.name,
        "gib": found.total_memory / GIB,
        "capability": f"{found.major}.{found.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **facts,
    }


def sampling(family: str, precision: str, smoke: bool) -> dict[str, Any]:
    """A sampling step with S-CFG against one with plain CFG, with and without a negative prompt."""
    from benchmarks import guidance

    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = [family, "--device", device, "--dtype", PRECISIONS[precision], "--arms", "cfg", "scfg"]
    words += (
        ["--tiny", "--size", "64x64", "--xl-depth", "1", "--rounds", "1"]
        if smoke
        else ["--rounds", "9", "--minutes", "0.3"]
    )
    found: dict[str, Any] = {}
    pipe = guidance.build(guidance.parse(words))
    for negative in (True, False):
        args = guidance.parse(words + ([] if negative else ["--no-negative"]))
        counts, times = guidance.time_arms(args, pipe)
        peaks = {arm: guidance.peak_here(arm, args, pipe) for arm in args.arms}
        ratios = [mine[0] / base[0] for mine, base in zip(times["scfg"], times["cfg"], strict=True)]
        found["negative prompt" if negative else "no negative prompt"] = {
            "image": args.image,
            "rounds": len(ratios),
            "cfg_s": statistics.median(took for took, _ in times["cfg"]),
            "scfg_s": statistics.median(took for took, _ in times["scfg"]),
            "time": guidance.interval(ratios),
            "operations": counts["scfg"] / counts["cfg"],
            "cfg_gib": peaks["cfg"] / GIB,
            "memory": peaks["scfg"] / peaks["cfg"],
        }
    return found


def masks(smoke: bool) -> dict[str, Any]:
    """Share of positions where regions and foreground are those of the CPU in float32, on the pocket base."""
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    scenes = 2 if smoke else 16
    wanted = _regions("cpu", torch.float32, scenes)
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        same = [
            float((mine == theirs).float().mean())
            for mine, theirs in zip(_regions(gpu, dtype, scenes), wanted, strict=True)
        ]
        found[str(dtype).removeprefix("torch.")] = {"regions": same[0], "foreground": same[1], "scenes": scenes}
    return found


@torch.no_grad()
def _regions(device: str, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Regions and foreground (B, h, w), on the CPU, of one guided step on noised held-out scenes."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

    from scfg import SemanticCFG, attach
    from training.pocket import base_path
    from training.pocket.making.fitting import image_batch
    from training.pocket.scenes import HELD_OUT_SEED, sample

    pipe = StableDiffusionPipeline.from_pretrained(base_path(), dtype=dtype).to(device)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)  # takes `timesteps`
    pipe.set_progress_bar_config(disable=True)
    scenes = [sample(HELD_OUT_SEED, index) for index in range(count)]
    vae = AutoencoderKL.from_pretrained(base_path() / "vae")  # the same latents in every precision
    clean = vae.encode(image_batch(scene.image for scene in scenes)).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = pipe.scheduler.add_noise(clean, noise, torch.tensor([500]))
    with attach(pipe, SemanticCFG(tokens="prompt"), record=["regions"]) as run:
        pipe(
            [scene.caption for scene in scenes],
            latents=noisy.to(device, dtype),
            timesteps=[500],
            guidance_scale=4.0,
            output_type="latent",
        )
    step = run.trace[0]
    assert step.regions is not None
    assert step.foreground is not None
    return step.regions.cpu(), step.foreground.cpu()


class Cut(Exception):
    """An interruption that leaves training no time to do anything."""


def resume(precision: str) -> dict[str, Any]:
    """Whether a LoRA training of the pocket base ends with the same bits when repeated, and when cut and resumed."""
    from benchmarks import training as speed
    from training import loop, lora
    from training.config import TrainSettings
    from training.data import crops, images

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed.pictures(folder / "pictures", 64)

        def train(out: str, say: Callable[[str], None] = lambda line: None) -> None:
            data = crops.Views(images.folder(folder / "pictures", minimum=1), resolution=64)
            settings = TrainSettings(
                steps=RESUME_STEPS, batch_size=2, save_every=2, log_every=1, trackers=[], precision=precision  # type: ignore[arg-type]
            )  # fmt: skip
            loop.train(lora.prepare(speed.base("pocket"), speed.LORA), data, settings, out=folder / out, say=say)

        def cut(line: str) -> None:
            if line.startswith(f"step {CUT_AT}/"):
                raise Cut

        train("first")
        train("second")
        try:
            train("cut", cut)
        except Cut:
            train("cut")
        else:
            raise RuntimeError("the training was not cut")
        last = f"checkpoints/step-{RESUME_STEPS:06d}"
        return {
            "repeated": _same_bits(folder / "first" / last, folder / "second" / last),
            "resumed": _same_bits(folder / "first" / last, folder / "cut" / last),
        }


def _same_bits(one: Path, other: Path) -> float:
    """Share of the tensors of weights and optimizer that have the same bits."""
    from safetensors.torch import load_file

    same = []
    for name in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(one / name), load_file(other / name)
        assert ours.keys() == theirs.keys()
        same += [torch.equal(ours[key], theirs[key]) for key in ours]
    return sum(same) / len(same)


def training(
    family: str, arm: str, batch: int, checkpointing: bool, compiled: bool, precision: str, smoke: bool
) -> dict[str, Any]:
    """Speed and peak memory of one arm, which has the process to itself."""
    from benchmarks import training as speed

    steps, rounds = (1, 1) if smoke else PLANS[family, batch]
    words = ["--model", FAMILIES[family][smoke], "--batch", str(batch), "--precision", precision]
    words += ["--steps", str(steps), "--rounds", str(rounds)]
    words += ["--checkpointing"] * checkpointing + ["--compile"] * compiled
    args = speed.arguments(words)
    if smoke and compiled:
        torch.compiler.set_stance("force_eager")  # a CPU compiles even a tiny network for minutes
    seconds = speed.alone(args, arm, batch)
    middle, low, high = speed.interval(seconds[1:])
    return {
        "resolution": args.resolution,
        "s_per_step": [middle, low, high],
        "images_per_s": batch / middle,
        "first_round_s": seconds[0] * steps,
        **_memory(),
    }


def _memory() -> dict[str, float]:
    """GiB of this process: the allocator's peaks, and what the card holds beside its blocks."""
    if not torch.cuda.is_available():
        return {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    free, whole = torch.cuda.mem_get_info()
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "context_gib": (whole - free - torch.cuda.memory_reserved()) / GIB,
    }


def quantized(family: str, kind: str | None, smoke: bool) -> dict[str, Any]:
    """Memory by kind and time of a training step with gradient checkpointing, frozen layers in `kind`."""
    from benchmarks import memory
    from benchmarks import training as speed
    from recipes.common.memory_plan import Choice, training_bytes
    from training import quantize
    from training.architectures import FAMILIES as FULL
    from training.memory import needs

    quantize.check_quantization(kind)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = (speed.TINY_XL if family == "sdxl" else memory.TINY) if smoke else FULL[family]
    chosen = Choice(batch=1, rank=memory.RANK, checkpointing=True, quantize=kind)
    unet, optimizer, step = memory.training_step(base, chosen, base.resolution, device)
    kinds = memory.measured(unet, optimizer, step, device)
    computed = training_bytes(needs(base, base.resolution, memory.TARGETS), chosen)
    return {
        "resolution": base.resolution,
        "s_per_step": speed.timed(step, 1 if smoke else 10, device),
        **{f"{name}_mib": size / 2**20 for name, size in kinds.items()},
        "computed_mib": computed / 2**20,
        "off": computed / sum(kinds.values()) - 1,
    }


# --- running them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Part:
    """A function of this file with its arguments, and the seconds that it may take."""

    name: str
    kind: Callable[..., dict[str, Any]]
    options: dict[str, Any]
    limit: float


def plan(smoke: bool) -> list[Part]:
    """All parts; the most asked for come first, should the time run out."""
    parts = [
        Part(name=f"sampling {family} {precision}", kind=sampling, limit=90,
             options={"family": family, "precision": precision, "smoke": smoke})
        for family in FAMILIES for precision in PRECISIONS
    ]  # fmt: skip
    parts.append(Part(name="masks", kind=masks, limit=60, options={"smoke": smoke}))
    # Half precision in a CPU's kernels tests nothing of a GPU.
    precision = "fp32" if smoke else "bf16"
    parts += [
        Part(name=f"resume {chosen}", kind=resume, limit=60, options={"precision": chosen})
        for chosen in dict.fromkeys(("fp32", precision))
    ]

    def trained(family: str, arm: str, batch: int, compiled: bool = False) -> Part:
        checkpointing = (family, batch) == ("sdxl", 8)  # without it 80 GB are too few
        name = f"{'compile' if compiled else 'training'} {family} batch {batch} {arm}"
        options = {"family": family, "arm": arm, "batch": batch, "checkpointing": checkpointing, "compiled": compiled}
        limit = 150 if compiled else 75
        return Part(name=name, kind=training, limit=limit, options={**options, "precision": precision, "smoke": smoke})

    arms = ("floor", "trainer", "plain")
    parts += [trained(family, arm, batch) for family in FAMILIES for batch in (1, 8) for arm in arms]
    parts += [
        Part(name=f"quantized {family} {kind or 'bf16'}", kind=quantized, limit=60,
             options={"family": family, "kind": kind, "smoke": smoke})
        for family in FAMILIES for kind in (None, "int8", "nf4")
    ]  # fmt: skip
    return [*parts, trained("sd15", "trainer", 1, compiled=True)]


def child(channel: Any, kind: Callable[..., dict[str, Any]], options: dict[str, Any]) -> None:
    """Runs a part and sends back its result, or why there is none, in one line."""
    try:
        channel.send({"result": kind(**options)})
    except BaseException as error:
        lines = str(error).strip().splitlines() or ["no message"]
        channel.send({"error": f"{type(error).__name__}: {lines[0][:300]}"})


def run(part: Part, context: Any, left: float) -> dict[str, Any]:
    """A part's row of the results."""
    limit = min(part.limit, left)
    row: dict[str, Any] = {"part": part.name}
    if limit <= 0:
        return {**row, "seconds": 0.0, "error": "not run: the time is up, see --minutes"}
    began = time.perf_counter()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, part.kind, part.options))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            row |= ours.recv()
            process.join(10)
        else:
            row["error"] = f"not finished within {limit:.0f} s"
    except EOFError:  # killed from outside, or a crash below Python
        process.join()
        row["error"] = f"its process ended with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def started() -> Any:
    """How processes begin: from one that has imported everything and has not touched the GPU."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    os.environ["PYTHONSAFEPATH"] = "1"  # it looks for modules in the root, not in the current folder
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["diffusers", "benchmarks.guidance", "benchmarks.training", "benchmarks.memory"])
    return context


# --- results ----------------------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tables(results: dict[str, Any]) -> str:
    """Markdown: what was measured on, a table for each kind of part, and a line for each part without a result."""
    facts = results["facts"]
    lines = [f"# {facts['card']}", "", ", ".join(f"{key} {value}" for key, value in facts.items() if key != "card")]
    rows = {row["part"]: row["result"] for row in results["parts"] if "result" in row}
    for kind, (title, heads, cells) in TABLES.items():
        own = [(name.removeprefix(kind).strip(), found) for name, found in rows.items() if name.split()[0] == kind]
        if own:
            lines += ["", f"## {title}", "", f"| {heads} |", "|---" * (heads.count("|") + 1) + "|"]
            lines += [f"| {' | '.join(cell)} |" for name, found in own for cell in cells(name, found, rows)]
    failed = [f"- {row['part']}: {row['error']}" for row in results["parts"] if "error" in row]
    return "\n".join(lines + (["", "## Without a result", "", *failed] if failed else []))


def _sampling(name: str, found: Any, rows: dict[str, Any]) -> list[list[str]]:
    made = []
    for prompt, one in found.items():
        time_ratio = "{:.3f} [{:.3f}, {:.3f}]".format(*one["time"])
        sizes = [f"{one['operations']:.4f}", f"{one['cfg_gib']:.2f}", f"{one['memory']:.3f}"]
        made.append([name, prompt, f"{one['cfg_s']:.4f}", time_ratio, *sizes])
    return made


def _masks(name: str, found: Any, rows: dict[str, Any]) -> list[list[str]]:
    return [[dtype, f"{one['regions']:.4f}", f"{one['foreground']:.4f}"] for dtype, one in found.items()]


def _resume(name: str, found: Any, rows: dict[str, Any]) -> list[list[str]]:
    return [[name, f"{found['repeated']:.4f}", f"{found['resumed']:.4f}"]]


def _training(name: str, found: Any, rows: dict[str, Any]) -> list[list[str]]:
    floor = rows.get(f"training {name.rpartition(' ')[0]} floor")
    cells = [name, "{:.4f} ({:.4f} to {:.4f})".format(*found["s_per_step"]), f"{found['images_per_s']:.2f}"]
    cells += [
        f"{found['s_per_step'][0] / floor['s_per_step'][0]:.3f}" if floor else "",
        f"{found['first_round_s']:.1f}",
    ]
    return [
        cells + [f"{found[key]:.2f}" if key in found else "" for key in ("peak_gib", "reserved_gib", "context_gib")]
    ]


def _quantized(name: str, found: Any, rows: dict[str, Any]) -> list[list[str]]:
    kinds = [f"{found[f'{size}_mib']:,.0f}" for size in SIZES]
    return [[name, f"{found['s_per_step']:.4f}", *kinds, f"{found['off']:+.1%}"]]


SIZES = ("weights", "gradients", "optimizer", "activations", "computed")
ARM = (
    "arm | s/step (95 % interval) | images/s | time against the floor | first round, s "
    "| peak GiB | reserved GiB | beside it GiB"
)
Cells = Callable[[str, Any, dict[str, Any]], list[list[str]]]
# First word of a part's name -> title, heads and rows of its table.
TABLES: dict[str, tuple[str, str, Cells]] = {
    "sampling": (
        "S-CFG in a sampling step",
        "base | prompt | s per step, CFG | time / CFG [interval] | operations / CFG | peak GiB, CFG | peak / CFG",
        _sampling,
    ),
    "masks": ("Region masks against the CPU's in float32", "weights | same regions | same foreground", _masks),
    "resume": ("Share of tensors with the same bits", "precision | repeated | cut and resumed", _resume),
    "training": ("LoRA training", ARM, _training),
    "compile": ("torch.compile", ARM, _training),
    "quantized": (
        "Frozen weights in fewer bits, batch 1, gradient checkpointing, MiB",
        f"base | s/step | {' | '.join(SIZES)} | off",
        _quantized,
    ),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny networks, a step or two each")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="parts whose names begin with a word")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no part runs longer than until then")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the results")
    args = parser.parse_args()
    if args.device == "cpu" and not args.smoke:
        parser.error("--device cpu: full sizes would take hours on a CPU; add --smoke")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the parts look for a GPU themselves
    elif not torch.cuda.is_available():
        sys.exit(
            "error: torch finds no CUDA GPU here; use a machine with one, or --device cpu --smoke to test the parts"
        )
    return args


def main() -> None:
    with contextlib.ExitStack() as stack:
        measure(arguments(), stack)


def measure(args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    """Runs the parts one after another and writes what they find."""
    deadline = time.perf_counter() + 60 * args.minutes
    parts = [one for one in plan(args.smoke) if not args.only or one.name.startswith(tuple(args.only))]
    home = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    os.environ["TMPDIR"] = home  # a part that is killed leaves its files here
    context = started()
    told = run(Part(name="card", kind=card, options={}, limit=120), context, 120)
    if "error" in told:
        sys.exit(f"error: the card does not answer: {told['error']}")
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "smoke": args.smoke,
        "facts": told["result"],
        "parts": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{slug(results['facts']['card'])}.json"
    for part in parts:
        row = run(part, context, deadline - time.perf_counter())
        results["parts"].append(row)
        print(f"{row['part']}: {row.get('error', 'done')} ({row['seconds']:.0f} s)", file=sys.stderr, flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(tables(results))
    print(f"\nwritten to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""Memory of a LoRA's training step: what the allocator counts against what is computed from the configs alone.

    python benchmarks/memory.py --base sd15 --resolution 256     # minutes on one CPU core, 5 GiB
    python benchmarks/memory.py --base sdxl --resolution 256     # 9 GiB
    python benchmarks/memory.py --base sd15 --resolution 128 --drawing   # class images; minutes, 5 GiB
    python benchmarks/memory.py --smoke                          # seconds; checks that everything here runs

The networks have random weights and run in bfloat16, on a GPU where there is one. Weights, gradients and the
optimizer's state are counted tensor by tensor. The peak is that of torch's allocator over a whole step: on a CPU the
sum of what its profiler saw handed out and taken back, on a GPU `max_memory_allocated`. What is neither weight nor
gradient nor state at the peak is called activations. The arms of nf4 need bitsandbytes. Prints Markdown.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Run as a script: modules are looked for in the root instead of its folder, which holds a `training` of its own.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.guidance import fill
from recipes.common.memory_plan import Choice, training_bytes
from training import lora, memory, networks, quantize
from training.architectures import FAMILIES, Architecture
from training.config import LoraSettings, TrainSettings
from training.models import Parts

TARGETS = "attention+ff"
RANK = 16
HALF = torch.bfloat16
MIB = 2**20
ARMS = {
    "bf16": Choice(batch=1, rank=RANK),
    "bf16, checkpointing": Choice(batch=1, rank=RANK, checkpointing=True),
    "int8": Choice(batch=1, rank=RANK, quantize="int8"),
    "int8, checkpointing": Choice(batch=1, rank=RANK, quantize="int8", checkpointing=True),
    "blocks in main memory": Choice(batch=1, rank=RANK, offload=True),
    "nf4": Choice(batch=1, rank=RANK, quantize="nf4"),
    "nf4, checkpointing": Choice(batch=1, rank=RANK, quantize="nf4", checkpointing=True),
}
TINY = Architecture(
    title="tiny",
    base="tiny",
    resolution=64,
    unet={
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "layers_per_block": 1,
    },
    text_encoders=(),
    vae=FAMILIES["sd15"].vae,
)


def unet_of(base: Architecture) -> Any:
    """The base's U-net with random weights, in bfloat16 from the start: in float32 SDXL's would take 10 GB."""
    with torch.device("meta"):
        unet, _, _ = memory._networks(base)
    unet = unet.to(HALF).to_empty(device="cpu").requires_grad_(False)
    fill(unet)
    return unet


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum({one.data_ptr(): one.numel() * one.element_size() for one in tensors}.values())


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that the allocator holds at most during a run, more than before it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None
    results: Any = seen.profiler.kineto_results
    live = most = 0
    for event in sorted((one for one in results.events() if one.name() == "[memory]"), key=lambda one: one.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def training_step(
    base: Architecture, chosen: Choice, resolution: int, device: torch.device
) -> tuple[Any, torch.optim.Optimizer, Callable[[], None]]:
    """U-net, optimizer, and a training step as `training.loop` takes it."""
    unet = unet_of(base)
    nothing: Any = None
    parts = Parts(
        folder=Path(), family="", unet=unet, vae=nothing, text_encoders=[], tokenizers=[], scheduler={}, index={},
        vae_scale_factor=2 ** (len(base.vae["block_out_channels"]) - 1), identity="random weights",
    )  # fmt: skip
    lora.inject(unet, LoraSettings(rank=RANK, targets=TARGETS))
    settings = TrainSettings(
        precision="bf16",
        attention="sdpa",
        gradient_checkpointing=chosen.checkpointing,
        offload=chosen.offload,
    )
    if chosen.quantize is not None:
        quantize.quantize_networks([unet], chosen.quantize, HALF, device)
    only: Any = _Networks(unet)
    networks.cast(only, device, HALF, move=not chosen.offload)
    side = resolution // parts.vae_scale_factor
    networks.configure_networks(only, settings, device, tokens=side**2)
    trained = [one for one in unet.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        with torch.device(device):
            memory._predict(unet, batch=chosen.batch, side=side).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return unet, optimizer, step


def measured(
    unet: Any, optimizer: torch.optim.Optimizer, step: Callable[[], None], device: torch.device
) -> dict[str, int]:
    """Bytes by kind in the second training step."""
    step()  # makes the optimizer's state
    trained = [one for one in unet.parameters() if one.requires_grad]
    weights = bytes_of(unet.parameters()) + quantize.scale_bytes([unet])
    state = bytes_of(one for kept in optimizer.state.values() for one in kept.values() if one.ndim)
    gradients = bytes_of(trained)
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": state,
        "activations": peak_of(step, device) - gradients,
    }


class _Networks:
    """What `prepare` asks of a method."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    def networks(self) -> list[nn.Module]:
        return [self.unet]


def table(base: Architecture, resolution: int, device: torch.device, arms: list[str]) -> str:
    """Markdown: a row for every arm that is asked for."""
    found = memory.needs(replace(base, resolution=resolution), resolution, TARGETS)
    rows = [
        f"| {base.title}, {resolution} pixels | weights | gradients | optimizer | activations | sum | computed | off |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in arms:
        chosen = ARMS[name]
        if chosen.quantize == "nf4" and importlib.util.find_spec(quantize.PACKAGE) is None:
            continue
        kinds = measured(*training_step(base, chosen, resolution, device), device)
        gc.collect()  # two of SDXL's networks are too many for most machines
        total, wanted = sum(kinds.values()), training_bytes(found, chosen)
        cells = [f"{size / MIB:,.0f}" for size in (*kinds.values(), total, wanted)]
        rows.append(f"| {name} | {' | '.join(cells)} | {wanted / total - 1:+.1%} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows)


def drawn(base: Architecture, resolution: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Bytes of the weights of a pipeline that draws class images, and what it takes besides in two steps."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.device("meta"):
        networks = memory._networks(base)
    unet, vae, *encoders = (
        one.to(dtype).to_empty(device=device).requires_grad_(False) for one in (*networks[:2], *networks[2])
    )
    for network in (unet, vae):
        for parameter in network.parameters():
            parameter.data.fill_(0.01)
    pieces: Any = {"vae": vae, "unet": unet, "scheduler": DDIMScheduler(), "text_encoder": None, "tokenizer": None}
    nothing: Any = None
    pipe = StableDiffusionPipeline(**pieces, safety_checker=nothing, feature_extractor=nothing)
    pipe.set_progress_bar_config(disable=True)
    words = torch.zeros(batch, memory.TOKENS, unet.config.cross_attention_dim, dtype=dtype, device=device)

    def draw() -> None:
        pipe(
            prompt_embeds=words,
            negative_prompt_embeds=words,
            num_inference_steps=2,
            height=resolution,
            width=resolution,
            output_type="pt",
        )

    weights = bytes_of(one for network in (unet, vae, *encoders) for one in network.parameters())
    return weights, peak_of(draw, device)


def drawing_table(base: Architecture, resolution: int, device: torch.device, dtypes: list[torch.dtype]) -> str:
    """Markdown: class images in float32 and bfloat16, one and several at once."""
    rows = [
        f"| {base.title}, {resolution} pixels | weights | besides | sum | computed | off |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, batch in itertools.product(dtypes, (1, 4)):
        weights, besides = drawn(base, resolution, batch, dtype, device)
        gc.collect()
        total, wanted = weights + besides, sum(memory.drawing_bytes(base, resolution, batch=batch, dtype=dtype))
        cells = " | ".join(f"{size / MIB:,.0f}" for size in (weights, besides, total, wanted))
        rows.append(f"| {str(dtype).removeprefix('torch.')}, {batch} at once | {cells} | {wanted / total - 1:+.1%} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=tuple(FAMILIES), default="sd15")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--drawing", action="store_true", help="class images instead of a training step")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base, resolution = (TINY, 64) if args.smoke else (FAMILIES[args.base], args.resolution)
    if args.drawing or args.smoke:
        if len(base.text_encoders) > 1:
            parser.error("--drawing: SDXL's pipeline takes more than this asks; take sd15 or sd21")
        print(f"Sizes in MiB; torch {torch.__version__}, {device.type}, class images.\n")
        print(drawing_table(base, resolution, device, [torch.float32] if args.smoke else [torch.float32, HALF]))
    if args.drawing:
        return
    print(f"Sizes in MiB; torch {torch.__version__}, {device.type}, LoRA of {TARGETS}, rank {RANK}, batch 1.\n")
    print(table(base, resolution, device, args.arms))


if __name__ == "__main__":
    main()

"""Training speed on this machine: the bare network, this project's loop, and a plain loop like the common scripts'.

    python benchmarks/training.py --model pocket --batch 1 4        # minutes on two CPU cores
    python benchmarks/training.py --model sd15 --resolution 256     # SD-1.5's architecture with random weights
    python benchmarks/training.py --model sdxl --resolution 256     # SDXL's; about 50 GB of memory, 14 GB with --only
    python benchmarks/training.py --smoke                           # seconds; checks that everything here runs

All arms train the same LoRA on the same images at the same precision, in turns of some steps (rounds), so that what
else the machine does meets all alike. `trainer` is `training.loop.train` itself: its turns are what passes between two
of its log lines. The plain loop encodes image and caption in every step, decodes in the main process, autocasts, uses
foreach AdamW with zeroed gradients and reads the loss in every step. With `--peer-script` a user's own script is timed
too, by the difference of two runs. Prints Markdown.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Run as a script this file would itself be `training`: modules are looked for in the root instead of its folder.
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from torch import Tensor

from benchmarks.guidance import fill
from training import loop, lora, memory, models, networks, quantize, validate
from training.architectures import FAMILIES, Architecture
from training.config import LoraSettings, TrainSettings
from training.data import crops, images
from training.kernels import fused, prepack
from training.method import conditions_of
from training.models import Parts

ARMS = ("floor", "trainer", "plain")
RATE = 1e-4
IMAGES = 8
LORA = LoraSettings(rank=8)
TINY_XL = Architecture(
    title="tiny SDXL",
    base="tiny-xl",
    resolution=32,
    unet={
        "sample_size": 32,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 4,
        "layers_per_block": 1,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    text_encoders=(
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "projection_dim": 32},
    ),
    vae={
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
    },
)  # fmt: skip


# --- bases ------------------------------------------------------------------------------------------------------------


def base(name: str) -> Parts:
    """The pocket base (with random weights where it is not there), SD-1.5's or SDXL's architecture, or a tiny one."""
    if name in ("sdxl", "tiny-xl"):
        return xl_base(TINY_XL if name == "tiny-xl" else FAMILIES[name])
    from transformers import CLIPTextConfig, CLIPTextModel

    from training.pocket import PocketError, base_path, tokenizer
    from training.pocket.making import model

    if name == "pocket":
        try:
            return models.load_parts(base_path())
        except PocketError:
            print("the pocket base is not here: random weights of its architecture", file=sys.stderr)
    torch.manual_seed(0)
    words = tokenizer.build_tokenizer()
    if name == "sd15":
        words.model_max_length = 77
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, vocab_size=49408
        )
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # diffusers' defaults are SD-1's
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=1.0,  # fits random weights
        )
        encoder, scheduler = CLIPTextModel(config), DDIMScheduler(beta_schedule="scaled_linear")
    elif name == "pocket":
        unet, vae, encoder, scheduler = model.unet(), model.vae(), model.text_encoder(words), model.scheduler()
        vae.register_to_config(scaling_factor=1.0)
    else:
        unet = UNet2DConditionModel(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=128,
            in_channels=8,
            out_channels=8,
        )
        vae, encoder, scheduler = model.vae(), model.text_encoder(words), model.scheduler()
        vae.register_to_config(scaling_factor=1.0)
    for module in (unet, vae, encoder):
        module.requires_grad_(False).eval()
    kind = type(scheduler).__name__
    return Parts(
        folder=Path(),
        identity="random weights",
        family="sd",
        unet=unet,
        vae=vae,
        text_encoders=[encoder],
        tokenizers=[words],
        scheduler=dict(scheduler.config),
        index={"scheduler": ["diffusers", kind]},
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
    )


def xl_base(described: Architecture) -> Parts:
    """SDXL's architecture, whose random weights are one block of numbers over and over: fresh ones take a minute."""
    import transformers

    from training.pocket import tokenizer

    words = tokenizer.build_tokenizer()
    words.model_max_length = 77
    with torch.device("meta"):
        unet, vae, _ = memory._networks(described)
        encoders = []
        for settings in described.text_encoders:
            kind = "CLIPTextModelWithProjection" if "projection_dim" in settings else "CLIPTextModel"
            config = transformers.CLIPTextConfig(**settings, eos_token_id=words.eos_token_id)
            encoders.append(getattr(transformers, kind)(config))
    vae.register_to_config(scaling_factor=1.0)  # fits random weights
    for module in (unet, vae, *encoders):
        module.to_empty(device="cpu").requires_grad_(False).eval()
        fill(module)
        for key, buffer in module.named_buffers():
            assert key.endswith("position_ids"), key
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return Parts(
        folder=Path(),
        identity="random weights",
        family="sdxl",
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=[words, words],
        scheduler=dict(DDIMScheduler(beta_schedule="scaled_linear").config),
        index={"scheduler": ["diffusers", "DDIMScheduler"]},
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
    )


def pictures(folder: Path, resolution: int) -> list[Path]:
    """JPEGs larger than what is trained on, as photographs are."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = []
    for number in range(IMAGES):
        small = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        paths.append(folder / f"{number}.jpg")
        small.resize((2 * resolution, 2 * resolution), Image.Resampling.BICUBIC).save(paths[-1], quality=95)
        paths[-1].with_suffix(".txt").write_text("a photo of a dog", "utf-8")
    return paths


# --- arms: each a function that trains one step -----------------------------------------------------------------------


def floor(parts: Parts, args: argparse.Namespace, batch: int, *, attention: str = "auto") -> Callable[[], None]:
    """Forward, backward and optimizer step of the U-net with LoRA on tensors that are ready."""
    method = lora.prepare(parts, LORA)
    device = args.device
    dtype = networks.DTYPES[args.precision]
    settings = TrainSettings(
        precision=args.precision,
        attention=attention,  # type: ignore[arg-type]
        compile=args.compile,
        gradient_checkpointing=args.checkpointing,
    )
    if args.quantize:
        quantize.quantize_networks(method.networks(), args.quantize, dtype, device)
    networks.cast(method, device, dtype)
    networks.configure_networks(method, settings, device, tokens=(args.resolution // parts.vae_scale_factor) ** 2)
    trainable = list(method.trainable().values())
    optimizer = torch.optim.AdamW(trainable, lr=RATE, fused=True)
    size = args.resolution // parts.vae_scale_factor
    tokens, width = parts.tokenizers[0].model_max_length, parts.unet.config.cross_attention_dim
    noisy = torch.randn(batch, parts.unet.config.in_channels, size, size, device=device, dtype=dtype)
    wanted = torch.randn_like(noisy, dtype=torch.float32)
    text = {"embeds": torch.randn(batch, tokens, width, device=device, dtype=dtype)}
    if parts.family == "sdxl":
        pooled = parts.text_encoders[-1].config.projection_dim
        text["pooled"] = torch.randn(batch, pooled, device=device, dtype=dtype)
    conditions = conditions_of(text, frames(args, batch), dtype)  # type: ignore[arg-type]
    timesteps = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        predicted = parts.unet(noisy, timesteps, **conditions, return_dict=False)[0]
        torch.nn.functional.mse_loss(predicted.float(), wanted).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def frames(args: argparse.Namespace, batch: int) -> Tensor:
    """SDXL's conditioning on sizes (B, 6): nothing is cropped."""
    size = args.resolution
    return torch.tensor([size, size, 0, 0, size, size], device=args.device, dtype=torch.float32).repeat(batch, 1)


def plain(parts: Parts, args: argparse.Namespace, batch: int, paths: list[Path]) -> Callable[[], None]:
    """A loop of the kind that example scripts have."""
    method = lora.prepare(parts, LORA)
    device, dtype = args.device, networks.DTYPES[args.precision]
    parts.unet.set_attn_processor(AttnProcessor2_0())
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        module.to(device)  # not before: the device might not have the room for float32
    parts.unet.train()
    if args.checkpointing:
        parts.unet.enable_gradient_checkpointing()
    trainable = list(method.trainable().values())
    optimizer = torch.optim.AdamW(trainable, lr=RATE, foreach=True)
    noising = DDPMScheduler.from_config(parts.scheduler)
    random = np.random.default_rng(0)

    def read(path: Path) -> tuple[Tensor, Tensor]:
        image = Image.open(path).convert("RGB")
        image = image.resize((args.resolution, args.resolution), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        caption = path.with_suffix(".txt").read_text("utf-8")
        ids = parts.tokenizers[0](
            caption,
            padding="max_length",
            truncation=True,
            max_length=parts.tokenizers[0].model_max_length,
            return_tensors="pt",
        ).input_ids[0]
        return pixels, ids

    def step() -> None:
        chosen = [read(paths[index]) for index in random.integers(0, len(paths), batch)]
        pixels = torch.stack([item[0] for item in chosen]).to(device, dtype)
        ids = torch.stack([item[1] for item in chosen]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            latents = parts.vae.encode(pixels).latent_dist.sample() * parts.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noising.config.num_train_timesteps, (batch,), device=device)
            noisy = noising.add_noise(latents, noise, timesteps)
            text = models.encode_text(parts, [ids] * len(parts.text_encoders))
            conditions = conditions_of(text, frames(args, batch), dtype)
            predicted = parts.unet(noisy, timesteps, **conditions, return_dict=False)[0]
            velocity = noising.config.prediction_type == "v_prediction"
            wanted = noising.get_velocity(latents, noise, timesteps) if velocity else noise
            loss = torch.nn.functional.mse_loss(predicted.float(), wanted.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        loss.item()

    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds per step."""
    wait(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - began) / steps


# --- rounds -----------------------------------------------------------------------------------------------------------


def rounds(args: argparse.Namespace, batch: int, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per step of every arm and round, and each trained arm's fixed-noise loss after equal steps."""
    paths = pictures(folder / "pictures", args.resolution)
    start = base(args.model)
    arms = {name: copy.deepcopy(start) for name in ARMS}
    del start
    others = {
        "floor": floor(arms["floor"], args, batch),
        "plain": plain(arms["plain"], args, batch, paths),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    method = lora.prepare(arms["trainer"], LORA)
    source = images.folder(folder / "pictures", minimum=1)
    data = crops.Views(source, resolution=args.resolution, multiple=arms["trainer"].multiple)
    clock = [time.perf_counter()]
    deadline = time.perf_counter() + 60 * args.minutes

    def between(line: str) -> None:
        """Called at every log line of the trainer: notes its turn, then lets the others have theirs."""
        if not line.startswith("step "):
            clock[0] = time.perf_counter()
            return
        wait(args.device)
        took = (time.perf_counter() - clock[0]) / args.steps
        turn = {name: timed(step, args.steps, args.device) for name, step in others.items()}
        first = line.startswith(f"step {args.steps}/")  # warms everything up
        if not first and time.perf_counter() < deadline:
            for name, value in (("trainer", took), *turn.items()):
                seconds[name].append(value)
        clock[0] = time.perf_counter()

    result = loop.train(method, data, trainer_settings(args, batch), out=folder / "out", say=between)
    assert result is not None
    return seconds, fixed_losses(args, arms, data)


def trainer_settings(args: argparse.Namespace, batch: int) -> TrainSettings:
    """Of the trainer: one log line a round."""
    return TrainSettings(
        steps=args.steps * (args.rounds + 1),
        batch_size=batch,
        learning_rate=RATE,
        precision=args.precision,
        compile=args.compile,
        gradient_checkpointing=args.checkpointing,
        quantize=args.quantize,
        trackers=[],
        log_every=args.steps,
        save_every=10**9,
    )


def fixed_losses(args: argparse.Namespace, arms: dict[str, Parts], data: crops.Views) -> dict[str, float]:
    """The loss at fixed timesteps and noise of what both loops trained, over the same batches."""
    from training import method, objective
    from training.data import batches
    from training.data.cache import Live

    encoders = arms["plain"]
    bound = objective.build_objective(encoders.scheduler)
    stream = batches.Stream(entries=Live(data, encoders.vae_scale_factor))
    shape = (encoders.unet.config.in_channels, encoders.vae_scale_factor)

    def ids(captions: list[str]) -> dict[str, Tensor]:
        return {f"ids_{number}": found for number, found in enumerate(models.tokenize_captions(encoders, captions))}

    batches = validate.fixed_loss_batches(stream, batches.Draws(latent_shape=shape), 16, seed=5, text=ids)
    found = {}
    for name in ("trainer", "plain"):
        unet = arms[name].unet

        def step(batch: dict[str, Any], unet: Any = unet) -> Tensor:
            moved = {key: value.to(args.device) for key, value in batch.items()}
            mean, std = models.encode_images(encoders.vae, moved.pop("pixels"))
            moved["latents"] = mean.float() + std.float() * moved["posterior"]
            words = [moved.pop(f"ids_{number}") for number in range(len(encoders.text_encoders))]
            moved |= models.encode_text(encoders, words)
            dtype = networks.DTYPES[args.precision]
            return method.denoise_step({"unet": unet}, moved, dtype, parts=encoders, objective=bound)

        found[name] = validate.fixed_loss(step, batches, [unet])
    return found


def peak(args: argparse.Namespace, arm: str, batch: int) -> float:
    """GiB of a process that runs only this arm: resident set on a CPU, allocated memory on a GPU."""
    command = [sys.executable, __file__, "--only", arm, "--model", args.model, "--batch", str(batch)]
    command += ["--resolution", str(args.resolution), "--precision", args.precision, "--threads", str(args.threads)]
    command += ["--steps", "3"] + (["--compile"] if args.compile else [])
    command += (["--checkpointing"] if args.checkpointing else []) + (
        ["--quantize", args.quantize] * bool(args.quantize)
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["gib"])


def alone(args: argparse.Namespace, arm: str, batch: int) -> list[float]:
    """Seconds per step of every round of an arm that has the process to itself; the first round warms up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = pictures(folder / "pictures", args.resolution)
        parts = base(args.model)
        if arm != "trainer":
            step = floor(parts, args, batch) if arm == "floor" else plain(parts, args, batch, paths)
            return [timed(step, args.steps, args.device) for _ in range(args.rounds + 1)]
        times = []

        def note(line: str) -> None:
            wait(args.device)
            times.append((time.perf_counter(), line.startswith("step ")))

        data = crops.Views(images.folder(folder / "pictures", minimum=1), resolution=args.resolution)
        loop.train(lora.prepare(parts, LORA), data, trainer_settings(args, batch), out=folder / "out", say=note)
        return [(end - times[number][0]) / args.steps for number, (end, steps) in enumerate(times[1:]) if steps]


def only(args: argparse.Namespace) -> None:
    """Runs one arm alone and prints its peak memory."""
    args.rounds = 0
    alone(args, args.only, args.batch[0])
    cuda = args.device.type == "cuda"
    used = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"gib": used / 2**30}))


# --- lower floors, profile, peer --------------------------------------------------------------------------------------


def lower_floors(args: argparse.Namespace, batch: int) -> list[str]:
    """What precision, attention kernel, our kernels, threads and compilation do to the floor, each in turns with it."""
    lines = ["| floor | s/step | times as fast as the first |", "|---|---|---|"]
    plans: list[tuple[str, dict[str, Any]]] = [
        ("float32, plain attention", {"attention": "plain"}),
        ("bfloat16, sdpa attention", {"precision": "bf16"}),
        ("float32, sdpa attention, LoRA layers fused", {"fuse": True}),
        ("float32, sdpa attention, frozen convolutions prepacked", {"prepack": True}),
        ("float32, sdpa attention, compiled", {"compile": True}),
        ("float32, sdpa attention, one thread", {"threads": 1}),
    ]

    def made(plan: dict[str, Any]) -> Callable[[], float]:
        """Seconds per step of this floor, warmed up."""
        changed = argparse.Namespace(**{**vars(args), "precision": "fp32", "compile": False, **plan})
        parts = base(args.model)
        step = floor(parts, changed, batch, attention=plan.get("attention", "sdpa"))

        def seconds(steps: int = max(1, args.steps // 2)) -> float:
            torch.set_num_threads(changed.threads)
            try:
                with (
                    fused.fused([parts.unet] if "fuse" in plan else []),
                    prepack.prepacked([parts.unet] if "prepack" in plan else []),
                ):
                    return timed(step, steps, args.device)
            finally:
                torch.set_num_threads(args.threads)

        seconds(2)
        return seconds

    first = made({})
    alone = [first() for _ in range(args.rounds)]
    lines.append(f"| float32, sdpa attention | {statistics.median(alone):.4f} | 1.00x |")
    for name, plan in plans:
        try:
            other = made(plan)
        except RuntimeError as error:  # a compiler that is not there, a type the device does not do
            lines.append(f"| {name} | not possible: {str(error).splitlines()[0][:80]} | |")
            continue
        pairs = [(first(), other()) for _ in range(args.rounds)]
        taken, ratio = statistics.median(pair[1] for pair in pairs), statistics.median(a / b for a, b in pairs)
        lines.append(f"| {name} | {taken:.4f} | {ratio:.2f}x |")
    return lines


def profile(args: argparse.Namespace, batch: int) -> list[str]:
    """Where the floor's time goes, by operator."""
    step = floor(base(args.model), args, batch)
    timed(step, 2, args.device)
    with torch.profiler.profile() as seen:
        timed(step, 3, args.device)
    cuda = args.device.type == "cuda"
    weight = lambda item: item.self_device_time_total if cuda else item.self_cpu_time_total  # noqa: E731
    events = sorted(seen.key_averages(), key=weight, reverse=True)
    total = sum(map(weight, events))
    lines = ["| operator | share of the floor |", "|---|---|"]
    return lines + [f"| {event.key} | {100 * weight(event) / total:.1f} % |" for event in events[:8]]


def peer(args: argparse.Namespace, batch: int, folder: Path) -> float:
    """Seconds per step of a user's DreamBooth-LoRA script with the usual flags, from two runs of different length."""
    from training.pocket import base_path

    pictures(folder / "peer", args.resolution)
    for path in (folder / "peer").glob("*.txt"):
        path.unlink()

    def run(steps: int) -> float:
        command = [sys.executable, args.peer_script, "--pretrained_model_name_or_path", str(base_path())]
        command += ["--instance_data_dir", str(folder / "peer"), "--instance_prompt", "a photo of a dog"]
        command += ["--output_dir", str(folder / f"peer-{steps}"), "--resolution", str(args.resolution)]
        command += ["--train_batch_size", str(batch), "--max_train_steps", str(steps), "--rank", str(LORA.rank)]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began

    short, long = 4 * args.steps, 16 * args.steps
    return (run(long) - run(short)) / (long - short)


# --- report -----------------------------------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval."""
    random = np.random.default_rng(0)
    drawn = np.median(random.choice(values, (2000, len(values))), axis=1)
    return statistics.median(values), float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


def report(args: argparse.Namespace, batch: int, folder: Path) -> list[str]:
    seconds, losses = rounds(args, batch, folder)
    if not seconds["trainer"]:
        return [f"batch {batch}: not one round fitted into --minutes {args.minutes}"]
    count = len(seconds["trainer"])
    lines = [
        f"\n## {args.model}, {args.resolution} px, batch {batch}, {args.precision}: "
        f"{count} rounds of {args.steps} steps",
        "",
        "| arm | s/step (95 % interval) | images/s | time against the floor | peak GiB | fixed-noise loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in ARMS:
        middle, low, high = interval(seconds[name])
        over, low_over, high_over = interval(
            [mine / bare for mine, bare in zip(seconds[name], seconds["floor"], strict=True)]
        )
        memory = f"{peak(args, name, batch):.2f}" if args.memory else "not measured"
        loss = f"{losses[name]:.4f}" if name in losses else ""
        lines.append(
            f"| {name} | {middle:.4f} ({low:.4f} to {high:.4f}) | {batch / middle:.1f} | "
            f"{over:.3f} ({low_over:.3f} to {high_over:.3f}) | {memory} | {loss} |"
        )
    faster, low, high = interval([p / t for p, t in zip(seconds["plain"], seconds["trainer"], strict=True)])
    lines.append(f"\nThe trainer is {faster:.2f}x ({low:.2f} to {high:.2f}) as fast as the plain loop.")
    if args.peer_script:
        took = peer(args, batch, folder)
        trainer = statistics.median(seconds["trainer"])
        lines.append(f"The peer script takes {took:.4f} s/step: the trainer is {took / trainer:.2f}x as fast.")
    if args.floors:
        lines += ["", *lower_floors(args, batch), "", *profile(args, batch)]
    return lines


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("pocket", "sd15", "sdxl", "tiny", "tiny-xl"), default="pocket")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--resolution", type=int, help="default: 64 for pocket, that of the model for others")
    parser.add_argument("--rounds", type=int, default=9, help="counted rounds; one more warms up")
    parser.add_argument("--steps", type=int, help="steps per round; default: 20 for pocket, 1 for sd15 and sdxl")
    parser.add_argument("--minutes", type=float, default=10, help="per batch size; later rounds are not counted")
    parser.add_argument("--precision", choices=tuple(networks.DTYPES), default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile the floor's and the trainer's U-net")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all arms")
    parser.add_argument("--quantize", choices=("int8", "nf4"), help="floor and trainer: frozen layers in fewer bits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory, per process"
    )
    parser.add_argument("--floors", action="store_true", help="also lower floors and a profile")
    parser.add_argument("--peer-script", help="a DreamBooth-LoRA training script to time on the pocket base")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, two rounds, seconds")
    parser.add_argument("--only", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.smoke:
        args.model = args.model if args.model.startswith("tiny") else "tiny"
        args.batch, args.rounds, args.steps, args.memory = [2], 2, 2, False
    full = FAMILIES.get(args.model)
    args.resolution = args.resolution or (full.resolution if full else 64)
    args.steps = args.steps or (1 if full else 20)
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads)
    return args


def main() -> None:
    args = arguments()
    if args.only:
        only(args)
        return
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else f"CPU, {args.threads} thread(s)"
    print(f"# Training speed\n\n{name}, torch {torch.__version__}, {platform.platform()}")
    for batch in args.batch:
        with tempfile.TemporaryDirectory() as folder:
            print("\n".join(report(args, batch, Path(folder))), flush=True)


if __name__ == "__main__":
    main()

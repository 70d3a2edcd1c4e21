"""Settings that fit into a GPU's memory, chosen from a base's configs alone, and the table "which GPU for what".

`python -m recipes.common.memory_plan` prints the table of docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from recipes.common.base import POCKET
from training.config import require
from training.errors import TrainingError

if TYPE_CHECKING:
    from training.memory import Needs

__all__ = ["MEMORIES", "Choice", "Plan", "Uses", "choose", "gpu_table", "plan_for", "training_bytes"]

GIB = 2**30
MEMORIES = (6, 8, 12, 16, 24)
"""Memory of common GPUs, GiB."""
# None of them is counted by `training.memory`; all are assumptions, on the safe side, until someone measures them.
CONTEXT = 0.8 * GIB  # CUDA's context and the libraries' workspaces
WASTE = 1.1  # of the allocator, which hands out whole blocks
ROOM = 0.95  # of a GPU's memory: a desktop takes some
METRICS = 4 * 173_000_000  # CLIP ViT-B/32 and DINO ViT-S/16 in float32, which measure what is drawn
STATE = {"adamw": 8, "adamw8bit": 2}  # bytes of optimizer state for each number that trains
SAMPLES = 2  # a step: on average one of the subject and one of its class, as in DreamBooth's prior preservation
RANK = 16
MEASURING, CLASSES = "measuring", "class images"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What memory depends on. `batch` pictures at once, as often as a step needs."""

    batch: int = SAMPLES
    checkpointing: bool = False
    optimizer: str = "adamw"
    quantize: str | None = None
    offload: bool = False
    """Whether the U-net's blocks wait in main memory, see `train.offload`; they are recomputed either way."""
    rank: int = RANK


# What costs little time, in the order in which it is given up; then bits of the base's weights; then much time, as the
# weights travel twice a step; then the rank. 4 bits take more memory than weights that travel, and cost exactness.
TIME = (
    Choice(),
    Choice(batch=1),
    Choice(checkpointing=True),
    Choice(batch=1, checkpointing=True),
    Choice(batch=1, checkpointing=True, optimizer="adamw8bit"),
)
LADDER = (
    *(replace(chosen, quantize=kind) for kind in (None, "int8") for chosen in TIME),
    *(replace(chosen, offload=True) for chosen in TIME[2:]),
    *(replace(TIME[-1], offload=True, rank=rank) for rank in (8, 4)),
)
BATCHES = (4, 2, 1)  # of sampling


@dataclass(frozen=True, kw_only=True)
class Uses:
    """What a run does besides, each with a peak of its own."""

    classes: bool = False
    """Draws class images before it trains (`dreambooth.class_prompt`)."""
    validates: bool = False
    """Draws samples while it trains (`train.validation.prompts`)."""
    region: bool = False
    """Asks the U-net for a region while it caches (`region`)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A choice that fits, and the peak of each stage, bytes."""

    choice: Choice
    drawn: int
    """Pictures that are sampled at once."""
    stages: Mapping[str, float]
    """Without measuring where that does not fit, while training does."""
    needs: Needs
    uses: Uses = Uses()
    offload: bool = False
    """Whether the parts of the base take turns on the GPU while it draws, and metrics are computed on the CPU."""

    @property
    def peak(self) -> float:
        """Bytes of the largest stage."""
        return max(self.stages.values())

    @property
    def measured(self) -> bool:
        """Whether the GPU has room to measure what it trained."""
        return MEASURING in self.stages

    def settings(self) -> dict[str, dict[str, Any]]:
        """As tables of a training config."""
        chosen = self.choice
        train = {
            "precision": "bf16",
            "gradient_checkpointing": chosen.checkpointing,
            "batch_size": chosen.batch,
            "accumulation": SAMPLES // chosen.batch,
            "optimizer": chosen.optimizer,
            **({} if chosen.quantize is None else {"quantize": chosen.quantize}),
            **({"offload": True} if chosen.offload else {}),
        }
        return {
            "lora": {"rank": chosen.rank},
            "train": train,
            "sampling": {"precision": "bf16", "batch_size": self.drawn, **({"offload": True} if self.offload else {})},
            **({"measure": {"device": "cpu"}} if self.offload and self.measured else {}),
        }

    def lines(self) -> list[str]:
        """What was chosen, and what each choice saves and costs."""
        chosen, found = self.choice, self.needs
        stages = ", ".join(f"{name} {_gib(size)}" for name, size in self.stages.items())
        lines = [
            f"memory at most, computed from the configs and not tried on a GPU: {stages}",
            f"  precision bf16: saves {_gib(found.unet)} of frozen weights; what trains stays in float32; a GPU older "
            "than Ampere needs fp16, which takes as much",
        ]
        saved = chosen.batch * (found.kept - found.recomputed)
        if chosen.checkpointing:
            lines.append(f"  gradient checkpointing: saves {_gib(saved)}; a step runs the forward pass twice")
        else:
            lines.append(f"  no gradient checkpointing: takes {_gib(saved)} more, and a step is faster")
        if chosen.batch < SAMPLES:
            lines.append(f"  batch {chosen.batch}, accumulated {SAMPLES} times: the same step, one picture at a time")
        else:
            lines.append(f"  batch {chosen.batch}: on average one picture of the subject and one of its class")
        if chosen.optimizer == "adamw8bit":
            lines.append("  optimizer adamw8bit: rounds its state to 8 bits; needs pip install bitsandbytes")
        else:
            lines.append("  optimizer adamw: nothing is given up")
        if chosen.quantize is not None:
            saved = found.unet - found.frozen(chosen.quantize)
            lines.append(
                f"  quantize {chosen.quantize}: saves {_gib(saved)} of frozen weights; linear layers are rounded to "
                "8 bits, and a step is slower"
            )
        if chosen.offload:
            saved = found.unet - found.frozen(None, offload=True)
            lines.append(
                f"  train.offload: saves {_gib(saved)} of frozen weights, which wait in main memory; "
                f"{_gib(found.unet - found.outside)} travel to the GPU twice a batch"
            )
        if CLASSES in self.stages:
            turns = "; its parts take turns there while it draws" if self.offload else ""
            lines.append(
                f"  class images: {self.drawn} at once, in bf16; the base leaves the GPU before it trains{turns}"
            )
        less = "" if chosen.rank == RANK else f"; less than {RANK}, so the subject may be less like itself"
        lines.append(f"  rank {chosen.rank}: {found.trained * chosen.rank / 1e6:.1f} million numbers train{less}")
        if self.measured:
            lines.append(f"  sampling: {self.drawn} picture(s) at once")
        if self.offload and self.measured:
            whole = _peaks(found, chosen, self.drawn, self.uses)[MEASURING]
            lines.append(
                f"  offload, measure.device cpu: save {_gib(whole - self.stages[MEASURING])} while measuring; text "
                "encoders, U-net and VAE take turns on the GPU, each moved there and back for every batch of pictures, "
                "and metrics are computed on the CPU"
            )
        if not self.measured:
            size = _peaks(found, chosen, self.drawn, self.uses, offload=True)[MEASURING]
            lines.append(
                f"  measuring, tuning and shipping are left out: they need {_gib(size)}, even with the parts of the "
                "base taking turns on the GPU; run them on a larger GPU or on a CPU"
            )
        return lines


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def training_bytes(found: Needs, chosen: Choice) -> int:
    """What the tensors of a training step take at most, without what a GPU takes besides."""
    numbers = found.trained * chosen.rank
    activations = found.recomputed if chosen.checkpointing or chosen.offload else found.kept
    state = 4 + 4 + STATE[chosen.optimizer]  # the adapter, its gradients, the optimizer's
    frozen = found.frozen(chosen.quantize, offload=chosen.offload)
    return frozen + state * numbers + chosen.batch * activations


def _peaks(found: Needs, chosen: Choice, drawn: int, uses: Uses, *, offload: bool = False) -> dict[str, float]:
    """Peak of each stage, as this toolkit runs them: encoders are freed before the U-net comes, all after training.

    Args:
        found: what the base needs.
        chosen: what training depends on.
        drawn: pictures at once.
        uses: what the run does besides.
        offload: the parts of the base take turns while it draws, and metrics are computed on the CPU.
    """
    numbers = found.trained * chosen.rank
    adapter = 4 * numbers
    frozen = found.frozen(chosen.quantize, offload=chosen.offload)
    pipeline = found.unet + (found.encoders + found.vae) / 2
    caching = found.vae + max(found.encoding, found.encoders) + (frozen + adapter if uses.region else 0)
    # The VAE stays for samples. While they are drawn there are no gradients; the optimizer's state is there.
    training = training_bytes(found, chosen) + (found.vae if uses.validates else 0)
    validating = frozen + (4 + STATE[chosen.optimizer]) * numbers + found.vae + found.previewing
    # Twice: a scope with `where` asks the U-net for four rows a picture instead of two. Even so the decoder takes more
    # in all published bases: SD-1.5 0.38 against 0.25 GiB, SD-2.1 0.84 against 0.57, SDXL 1.5 against 0.62.
    predicting, decoding = drawn * 2 * found.predicting, drawn * found.decoding
    drawing = pipeline + adapter + METRICS + max(predicting, decoding)
    classes = pipeline + drawn * max(found.guided, found.decoded)
    if offload:
        steps = max(found.unet + drawn * found.guided, found.encoders / 2)
        classes = found.vae / 2 + max(steps, drawn * found.decoded)  # the VAE stays beside the encoders
        drawing = max(found.unet + adapter + predicting, found.vae / 2 + decoding, found.encoders / 2)
    sizes = {
        # `dreambooth.company` then looks at them one by one with the same weights, which takes less.
        **({CLASSES: classes} if uses.classes else {}),
        "caching": caching,
        "training": training,
        **({"validating": validating} if uses.validates else {}),
        MEASURING: drawing,
    }
    return {name: WASTE * size + CONTEXT for name, size in sizes.items()}


def choose(found: Needs, memory: float, uses: Uses | None = None) -> Plan | None:
    """The first choice of the ladder that fits into a GPU of `memory` bytes; None: none does.

    Where no choice leaves room to draw with the whole base on the GPU, its parts take turns there; and where that does
    not leave room to measure either, it is the first that trains.
    """
    uses = uses or Uses()
    for measured, offload in ((True, False), (True, True), (False, False), (False, True)):
        for chosen in LADDER:
            for drawn in BATCHES if measured or uses.classes else BATCHES[-1:]:
                stages = _peaks(found, chosen, drawn, uses, offload=offload)
                kept = {name: size for name, size in stages.items() if measured or name != MEASURING}
                plan = Plan(choice=chosen, drawn=drawn, stages=kept, needs=found, uses=uses, offload=offload)
                if plan.peak <= ROOM * memory:
                    return plan
    return None


def plan_for(base: str, memory: int, resolution: int, targets: str, uses: Uses | None = None) -> Plan:
    """The plan for a base of Stable Diffusion, from its configs.

    Args:
        base: folder or hub id.
        memory: of the GPU, GiB.
        resolution: pixels of a side of the training pictures.
        targets: preset of `lora.targets`.
        uses: what the run does besides; None: nothing.

    Raises:
        TrainingError: what cannot fit, with the stage that is too large and the nearest that fits.
    """
    from training.memory import architecture_of, needs

    require(memory >= 1, f"--memory must be the GPU's memory in GB, such as 12, got {memory}")
    require(base != POCKET, f"--memory {memory}: the pocket base trains on a CPU; leave --memory out, or name a --base")
    found = needs(architecture_of(base), resolution, targets)
    uses = uses or Uses()
    plan = choose(found, memory * GIB, uses)
    if plan is not None:
        return plan
    least = _peaks(found, LADDER[-1], BATCHES[-1], uses, offload=True)
    del least[MEASURING]
    stage, size = max(least.items(), key=lambda item: item[1])
    larger = next((size for size in MEMORIES if size > memory and choose(found, size * GIB, uses)), None)
    other = _smaller(base, memory, uses)
    without = choose(found, memory * GIB, replace(uses, classes=False)) if uses.classes else None
    nearest = (
        (["no dreambooth.class_prompt"] if without else [])
        + ([f"--memory {larger}"] if larger else [])
        + ([f"--base {other}"] if other else [])
    )
    raise TrainingError(
        f"--memory {memory}: {base} at {resolution} pixels needs {_gib(size)} for {stage} at least; the nearest that "
        f"fits: {' or '.join(nearest) or 'a GPU with more memory'}"
    )


def _smaller(base: str, memory: int, uses: Uses) -> str | None:
    """The largest published base that fits."""
    from training.architectures import FAMILIES
    from training.memory import needs

    for known in reversed(FAMILIES.values()):
        if known.base != base and choose(needs(known, known.resolution, "attention+ff"), memory * GIB, uses):
            return known.base
    return None


def gpu_table() -> str:
    """Markdown: the choice for every published base and every memory."""
    from training.architectures import FAMILIES
    from training.memory import needs

    rows = [
        "| base | pixels | " + " | ".join(f"{size} GB" for size in MEMORIES) + " |",
        "|---|---|" + "---|" * len(MEMORIES),
    ]
    for known in FAMILIES.values():
        found = needs(known, known.resolution, "attention+ff")
        cells = [_cell(choose(found, size * GIB)) for size in MEMORIES]
        rows.append(f"| {known.title} | {known.resolution} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _cell(plan: Plan | None) -> str:
    if plan is None:
        return "does not fit"
    chosen = plan.choice
    words = [f"batch {chosen.batch}" + (f" x {SAMPLES // chosen.batch}" if chosen.batch < SAMPLES else "")]
    words += ["checkpointing"] if chosen.checkpointing else []
    words += ["adamw8bit"] if chosen.optimizer != "adamw" else []
    words += [chosen.quantize] if chosen.quantize is not None else []
    words += ["blocks in main memory"] if chosen.offload else []
    words += [f"rank {chosen.rank}"] if chosen.rank < RANK else []
    words += ["measured with offload"] if plan.offload and plan.measured else []
    words += [] if plan.measured else ["training alone"]
    return f"{', '.join(words)}: {_gib(plan.peak)}"


if __name__ == "__main__":
    print(gpu_table())

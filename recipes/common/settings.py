"""Settings that several recipes share: sampling, guidance, what is measured and tuned, what ships.

Importing this loads no torch, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from training.config import require

__all__ = [
    "GuidanceSettings",
    "MeasureSettings",
    "SamplingSettings",
    "ShipSettings",
    "TuneSettings",
]


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """One way to guide."""

    method: str = "semantic"
    """semantic (S-CFG), cfg, dose, placebo, pointwise or interval."""
    scale: float = 7.5
    """Guidance scale that the pipeline is called with."""
    preset: Literal["default", "published", "paper", "published_if_stage1", "published_if_stage2"] = "default"
    """Fields to start from: the toolkit's own, the authors' code, or the paper's text."""
    options: dict[str, Any] = field(default_factory=dict)
    """Fields changed, such as {"latent_ratio": 4, "stop": 0.8}; see docs/guidance.md."""
    weight: float | None = None
    """Weight of the adapter; null: the recipe's."""
    rescale: float | None = None
    """`guidance_rescale` of the pipeline's call (Lin et al. 2023), from 0 to 1; null: the pipeline's own, none."""

    def __post_init__(self) -> None:
        require(self.scale >= 1, f"guidance scale must be at least 1, got {self.scale}")
        require(self.rescale is None or 0 <= self.rescale <= 1, f"rescale must be from 0 to 1, got {self.rescale}")


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How pictures are sampled; the same for every arm."""

    steps: int = 25
    """Sampling steps."""
    scheduler: Literal["base", "ddim", "ddpm", "dpm++", "euler", "euler_a", "pndm", "unipc"] = "base"
    """base: the one that the base model comes with."""
    batch_size: int = 4
    """Pictures at once and process."""
    height: int | None = None
    """Pixels; null: the base's own size."""
    width: int | None = None
    """Pixels; null: the base's own size."""
    negative_prompt: str | None = None
    """What the unconditional half is given instead of nothing."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and computation while sampling."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, f"sampling.{name} must be at least 1, got {getattr(self, name)}")


def _arms() -> dict[str, GuidanceSettings]:
    names = {"CFG": "cfg", "S-CFG": "semantic", "dose": "dose", "placebo": "placebo", "pointwise": "pointwise"}
    return {name: GuidanceSettings(method=method) for name, method in names.items()}


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """A paired comparison: units, arms, metrics, and what decides. Declared before the run."""

    subjects: list[str] = field(default_factory=list)
    """Folders of subjects (pictures, `masks/`, `subject.json`); patterns such as data/dreambooth/* are allowed."""
    prompts: list[str] = field(default_factory=list)
    """Held-out prompts; {} stands for "identifier class". Default: those of each subject's subject.json."""
    prompt_file: str | None = None
    """Text file with a prompt a line, beside or instead of `prompts`."""
    targets: str | None = None
    """Captioned pictures whose conditions the ControlNet is given; `pocket`: held-out scenes of the pocket world."""
    control: Literal["canny", "segmentation", "given"] | None = None
    """How a condition is made from a target; given: `targets` has them in its folder `conditioning`."""
    limit: int | None = None
    """Only so many prompts, or targets."""
    skip: int | None = None
    """So many targets are left out first."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds of every prompt; none of them may have been tuned on."""
    arms: dict[str, GuidanceSettings] = field(default_factory=_arms)
    """Name -> guidance. `dose`, `placebo` and `pointwise` tell a spatial gain from stronger guidance."""
    scale: float | None = None
    """Guidance scale of every arm; null: each its own."""
    base_arm: bool = True
    """Also samples the base without the adapter, with plain CFG."""
    arm: str = "S-CFG"
    """The arm that the verdict is about."""
    baseline: str = "CFG"
    """The arm it is compared with."""
    sweep: list[float] = field(default_factory=list)
    """Further guidance scales for arm and baseline: the curves, and the comparison at equal effective scale."""
    metrics: list[str] = field(default_factory=list)
    """Metrics by name, see docs/gains.md; default: by task and base."""
    spaces: dict[str, str] = field(default_factory=dict)
    """Feature space -> folder or hub id of its network: clip, dino. `judge`, `lite0` and `colour` need none."""
    primary: str | None = None
    """The metric that decides; default: the first."""
    referee: str | None = None
    """A metric in another feature space that must agree in sign."""
    minimum_effect: float = 0.02
    """Least difference worth calling a gain, in the primary metric's unit."""
    frechet: str | None = None
    """Feature space of a Fréchet distance to `reference`, per arm; believe it from 1,000 pictures on."""
    reference: str | None = None
    """Folder of real pictures for Fréchet and kernel distances; `pocket`: held-out scenes."""
    drift_prompts: list[str] = field(default_factory=list)
    """Unrelated prompts: how far the adapter moves the base's pictures of them."""
    overlays: int = 4
    """Pairs of the report that show regions and gamma over the steps."""

    def __post_init__(self) -> None:
        require(bool(self.seeds), "measure.seeds is empty; give at least one seed")
        require(self.minimum_effect > 0, f"measure.minimum_effect must be > 0, got {self.minimum_effect}")
        for name in (self.arm, self.baseline):
            require(name in self.arms, f"measure: {name!r} is none of the arms {', '.join(self.arms)}")
        require(
            (self.targets is None) == (self.control is None),
            "measure.targets and measure.control belong together: the pictures, and how they become conditions",
        )


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """A search over guidance and checkpoints on prompts and seeds that the report never sees."""

    prompts: list[str] = field(default_factory=list)
    """Prompts to tune on; {} stands for "identifier class". None may be held out by `measure`."""
    prompt_file: str | None = None
    """Text file with a prompt a line, beside or instead of `prompts`."""
    targets: str | None = None
    """What conditions are made from instead, see `measure.targets`; `pocket`: other scenes than the report has."""
    limit: int | None = None
    """Only so many targets."""
    seeds: list[int] = field(default_factory=lambda: [101, 102, 103])
    """Seeds to tune on; successive halving gives the better candidates more of them."""
    scales: list[float] = field(default_factory=lambda: [3.0, 5.0, 7.5])
    """Guidance scales tried for every method."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Further fields of the guidance and the values tried, such as {"stop": [0.6, 1.0]}; only for `measure.arm`."""
    weights: list[float] = field(default_factory=lambda: [1.0])
    """Weights of the adapter tried."""
    snapshots: str | None = None
    """Folder of `train.snapshot_every`: also finds the best checkpoint. Default: the one beside the adapter."""
    metric: str | None = None
    """What is maximised; default: `measure.primary`."""

    def __post_init__(self) -> None:
        for name in ("seeds", "scales", "weights"):
            require(bool(getattr(self, name)), f"tune.{name} is empty; give at least one value")


@dataclass(frozen=True, kw_only=True)
class ShipSettings:
    """What only the maker of an adapter knows."""

    title: str | None = None
    """Of the model card; default: from the subject and the base."""
    licence: str = "other"
    """An identifier of the Hub's list, such as apache-2.0."""
    description: str = ""
    """A sentence or two for the card."""
    trigger_words: list[str] = field(default_factory=list)
    """Default: "identifier class" of the subject."""
    limits: list[str] = field(default_factory=list)
    """What it does badly, a sentence each."""
    compact: bool = False
    """Weights in one spelling, few samples and no page: small enough to be kept under version control."""
    push: str | None = None
    """Hub id (owner/name) to upload to."""
    private: bool = True
    """Whether a new repository on the Hub is private."""

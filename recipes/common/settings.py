"""Settings that several recipes share: sampling, guidance, what is measured and tuned, what ships.

Importing this loads no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from training.config import require

__all__ = [
    "GuidanceSettings",
    "MeasureSettings",
    "SamplingSettings",
    "ScopeSettings",
    "ShipSettings",
    "TuneSettings",
]


@dataclass(frozen=True, kw_only=True)
class ScopeSettings:
    """Where, when and how strongly an adapter acts while sampling; see `adapters.Scope`."""

    uncond_weight: float | None = None
    """Weight of the adapter in the unconditional half; 0: the base's own prediction, null: as in the other half."""
    start: float = 0.0
    """Fraction of the sampling steps at which the adapter is switched on."""
    stop: float = 1.0
    """Fraction of the sampling steps at which it is switched off again."""
    where: Literal["subject"] | None = None
    """subject: only where the attention to the subject's words is, the base elsewhere; twice the U-net's work."""

    def __post_init__(self) -> None:
        require(
            0 <= self.start < self.stop <= 1,
            f"scope.start {self.start} and scope.stop {self.stop} must be fractions of the steps, start below stop",
        )
        require(
            self.uncond_weight is None or 0 <= self.uncond_weight <= 100,
            f"scope.uncond_weight must be from 0 to the adapter's weight, got {self.uncond_weight}",
        )


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
    scope: ScopeSettings | None = None
    """Where, when and how strongly the adapter acts; null: everywhere, in every step, in both halves."""
    rescale: float | None = None
    """`guidance_rescale` of the pipeline's call (Lin et al. 2023), from 0 to 1; null: the pipeline's own, none."""

    def __post_init__(self) -> None:
        require(1 <= self.scale < inf, f"guidance scale must be at least 1, got {self.scale}")
        require(self.weight is None or abs(self.weight) <= 100, f"weight must be from -100 to 100, got {self.weight}")
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


def _seeds(flag: str, seeds: Sequence[int]) -> None:
    """Seeds that a generator takes, each once."""
    require(bool(seeds), f"{flag} is empty; give at least one seed")
    for seed in seeds:
        require(0 <= seed < 2**63, f"{flag}: a seed must be from 0 to 2^63 - 1, got {seed}")
        require(seeds.count(seed) == 1, f"{flag}: {seed} is there twice; a picture would count twice")


def _numbers(flag: str, values: Sequence[float], least: float, most: float = inf) -> None:
    """Numbers in a range, each once."""
    for value in values:
        said = f"at least {least:g}" if most == inf else f"from {least:g} to {most:g}"
        require(least <= value <= most and value < inf, f"{flag} must be {said}, got {value}")
        require(values.count(value) == 1, f"{flag}: {value:g} is there twice")


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
    weights: list[float] | None = None
    """Further weights of the adapter for the baseline, at each of its scales: with the sweep they make the front of
    plain guidance in the plane of identity and accuracy."""
    metrics: list[str] = field(default_factory=list)
    """Metrics by name, see docs/gains.md; default: by task and base."""
    spaces: dict[str, str] = field(default_factory=dict)
    """Feature space -> folder or hub id of its network: clip, dino. `judge`, `lite0` and `colour` need none."""
    primary: str | None = None
    """The metric that decides; default: the first."""
    referee: str | None = None
    """A metric in another feature space that must agree in sign."""
    minimum_effect: float = 0.02
    """Least difference worth calling a gain, in the primary metric's unit (for an adapter, in that of `identity`)."""
    identity: str | None = None
    """The metric that says whether it is this subject; default: identity, or else a similarity, where one is measured.
    With `accuracy` it says what the adapter does to its base."""
    accuracy: str | None = None
    """The metric that says how far the prompt is kept; default: prompt accuracy or alignment (clip)."""
    tolerance: float | None = None
    """Loss of `accuracy` that a gain of identity may cost; default: `minimum_effect`."""
    frechet: str | None = None
    """Feature space of a Fréchet distance to `reference`, per arm; believe it from 1,000 pictures on."""
    reference: str | None = None
    """Folder of real pictures for Fréchet and kernel distances; `pocket`: held-out scenes."""
    drift_prompts: list[str] = field(default_factory=list)
    """Unrelated prompts: how far the adapter moves the base's pictures of them."""
    overlays: int = 4
    """Pairs of the report that show regions and gamma over the steps."""

    def __post_init__(self) -> None:
        _seeds("measure.seeds", self.seeds)
        _numbers("measure.sweep", self.sweep, 1)
        _numbers("measure.weights", self.weights or [], -100, 100)
        _numbers("measure.scale", [] if self.scale is None else [self.scale], 1)
        for flag, least in (("limit", 1), ("skip", 0), ("overlays", 0)):
            value = getattr(self, flag)
            require(value is None or value >= least, f"measure.{flag} must be at least {least}, got {value}")
        require(0 < self.minimum_effect < inf, f"measure.minimum_effect must be > 0, got {self.minimum_effect}")
        require(
            self.tolerance is None or 0 < self.tolerance < inf, f"measure.tolerance must be > 0, got {self.tolerance}"
        )
        require(self.arm != self.baseline, f"measure.arm and measure.baseline are both {self.arm!r}")
        for prompt in self.drift_prompts:
            require("{}" not in prompt, f"measure.drift_prompts: {prompt!r} names the subject; give unrelated prompts")
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
    weights: list[float] | None = None
    """Weights of the adapter tried; default: .6, .8 and 1 where `metric` is joint and there is an adapter, else 1."""
    snapshots: str | None = None
    """Folder of `train.snapshot_every`: also finds the best checkpoint. Default: the one beside the adapter."""
    metric: str | None = None
    """What is maximised: a metric, or joint, the harmonic mean of `measure.identity` and `measure.accuracy`, each over
    its reference. Default: joint for subjects, else `measure.primary`."""
    references: dict[str, float] | None = None
    """Metric -> what its mean is divided by in the joint one; default: 1, which fits shares, and for CLIP and DINO the
    published marks of real photos."""

    def __post_init__(self) -> None:
        _seeds("tune.seeds", self.seeds)
        for name, least, most in (("scales", 1, inf), ("weights", -100, 100)):
            values = getattr(self, name)
            require(values is None or bool(values), f"tune.{name} is empty; give at least one value")
            _numbers(f"tune.{name}", values or [], least, most)
        for name, tried in self.grid.items():
            require(bool(tried), f"tune.grid: {name} has no values to try")
        require(self.limit is None or self.limit >= 1, f"tune.limit must be at least 1, got {self.limit}")
        for name, value in (self.references or {}).items():
            require(0 < value < inf, f"tune.references: {name} must be > 0, got {value}")


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

    def __post_init__(self) -> None:
        for name in ("title", "licence"):
            value = getattr(self, name)
            require(value is None or bool(value.strip()), f"ship.{name} is empty; write one, or leave it out")
        for name in ("trigger_words", "limits"):
            require(all(word.strip() for word in getattr(self, name)), f"ship.{name}: one of them is empty")
        require(
            self.push is None or re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", self.push) is not None,
            f"ship.push must be owner/name, got {self.push!r}",
        )

"""Settings that several recipes share: sampling, guidance, measuring, tuning and shipping.

Importing this loads no torch, so that `--help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from training import naming
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
    """Weight of the adapter in the prediction without the prompt. 0: the base alone; null: as with the prompt."""
    early_weight: float | None = None
    """Weight of the adapter in the first steps, which decide the layout. 0: off; null: as in the others. Not together
    with uncond_weight."""
    early_stop: float = 0.2
    """Fraction of the sampling steps until which early_weight counts."""
    start: float = 0.0
    """Fraction of the sampling steps at which the adapter is switched on."""
    stop: float = 1.0
    """Fraction of the sampling steps at which it is switched off again."""
    where: Literal["subject", "uniform", "elsewhere"] | None = None
    """Where the adapter acts. subject: only where the base, asked for the class instead of the subject, attends to the
    class, which doubles the U-net's work. Two controls: uniform acts everywhere but weaker, by the class's share of the
    picture; elsewhere acts in a wrong place of the same shape. null: everywhere."""
    where_stop: float = 1.0
    """Fraction of the sampling steps at which `where` ends; from then on the adapter acts everywhere."""

    def __post_init__(self) -> None:
        require(
            0 <= self.start < self.stop <= 1,
            f"scope.start {self.start} and scope.stop {self.stop} must be fractions of the steps, start below stop",
        )
        require(
            0 < self.where_stop <= 1,
            f"scope.where_stop must be a fraction of the steps, above 0 and at most 1, got {self.where_stop}",
        )
        require(
            self.where is not None or self.where_stop == 1,
            f"scope.where_stop {self.where_stop} ends scope.where, which is not set; set where: subject",
        )
        for name, value in (("uncond_weight", self.uncond_weight), ("early_weight", self.early_weight)):
            require(
                value is None or 0 <= value <= 100, f"scope.{name} must be from 0 to the adapter's weight, got {value}"
            )
        require(
            self.uncond_weight is None or self.early_weight is None,
            f"scope.uncond_weight {self.uncond_weight} and scope.early_weight {self.early_weight} do not combine; set "
            "one of them to null",
        )
        require(
            0 < self.early_stop <= 1,
            f"scope.early_stop must be a fraction of the steps, above 0 and at most 1, got {self.early_stop}",
        )

    def steps(self) -> dict[str, Any]:
        """The fields of `adapters.Scope` that do not look for a place."""
        return {name: getattr(self, name) for name in ("uncond_weight", "early_weight", "early_stop", "start", "stop")}


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """How pictures are guided."""

    method: str = "semantic"
    """Guidance method: semantic (S-CFG), cfg (plain), dose, placebo, pointwise or interval; see docs/guidance.md."""
    guidance_scale: float = field(default=7.5, metadata={"was": "scale"})
    """Guidance scale of the pipeline."""
    preset: Literal["default", "published", "paper", "published_if_stage1", "published_if_stage2"] = "default"
    """Set of options to start from: this toolkit's defaults, the authors' code, or the paper's text."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options that differ from the preset, such as {"latent_ratio": 4, "stop": 0.8}; see docs/guidance.md."""
    weight: float | None = None
    """Weight of the adapter. null: the recipe's weight."""
    scope: ScopeSettings | None = None
    """Where, when and how strongly the adapter acts. null: everywhere, in every step, with and without the prompt."""
    rescale: float | None = None
    """`guidance_rescale` of the pipeline (Lin et al. 2023), from 0 to 1. null: not set."""

    def __post_init__(self) -> None:
        require(1 <= self.guidance_scale < inf, f"guidance_scale must be at least 1, got {self.guidance_scale}")
        require(self.weight is None or abs(self.weight) <= 100, f"weight must be from -100 to 100, got {self.weight}")
        require(self.rescale is None or 0 <= self.rescale <= 1, f"rescale must be from 0 to 1, got {self.rescale}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GuidanceSettings:
        """What `dataclasses.asdict` made of one, also under names of before, and before there were scopes."""
        renamed, scope = naming.was(cls), values.get("scope")
        named = {renamed.get(name, name): value for name, value in values.items()}
        return cls(**{**named, "scope": None if scope is None else ScopeSettings(**scope)})


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How pictures are sampled. The same for every arm of a comparison."""

    steps: int = 25
    """Sampling steps."""
    scheduler: Literal["base", "ddim", "ddpm", "dpm++", "euler", "euler_a", "pndm", "unipc"] = "base"
    """Scheduler. base: the base model's own."""
    batch_size: int = 4
    """Pictures in one batch, for each process."""
    height: int | None = None
    """Pixels. null: the base's own size."""
    width: int | None = None
    """Pixels. null: the base's own size."""
    negative_prompt: str | None = None
    """Negative prompt, used in place of the empty prompt."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Precision of weights and computation while sampling. auto: bf16 if a short trial, made once, shows that it is
    faster on this machine, otherwise fp32."""
    offload: bool = False
    """Keeps text encoders, U-net and VAE in main memory, and each on the GPU only while it computes. For bases that do
    not fit whole. Class images are drawn this way too."""
    image: str | None = None
    """For inpainting bases: the picture that every prompt is painted into. null: whole pictures are painted."""
    mask: str | None = None
    """For inpainting bases: a mask that is white where `image` is painted over."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            require(getattr(self, name) >= 1, f"sampling.{name} must be at least 1, got {getattr(self, name)}")
        require(
            (self.image is None) == (self.mask is None),
            f"sampling.image {self.image!r} and sampling.mask {self.mask!r} belong together: the picture, and where it "
            "is painted over",
        )


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


def _as_today(settings: object, *flags: str) -> None:
    """Metrics and spaces under today's names; those of before are accepted for one version, with a note."""

    def today(name: str) -> str:
        new = re.sub(r"\bcolour\b", "color", name)
        if new != name:
            naming.note(name, new)
        return new

    for flag in flags:
        if value := getattr(settings, flag):
            new = today(value) if isinstance(value, str) else [today(name) for name in value]
            object.__setattr__(settings, flag, new)  # frozen, and still being made


def _arms() -> dict[str, GuidanceSettings]:
    names = {"CFG": "cfg", "S-CFG": "semantic", "dose": "dose", "placebo": "placebo", "pointwise": "pointwise"}
    return {name: GuidanceSettings(method=method) for name, method in names.items()}


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """A paired comparison: its prompts, arms and metrics, and the metric that decides. Declared before the run."""

    subjects: list[str] = field(default_factory=list)
    """Subject folders (pictures, `masks/`, `subject.json`). Patterns such as data/dreambooth/* are allowed. In a
    training, the default is `data.source`, if it has a subject.json."""
    prompts: list[str] = field(default_factory=list)
    """Held-out prompts. {} is replaced by "identifier class". Default: the prompts in each subject.json."""
    prompt_file: str | None = None
    """Text file with one prompt per line, in addition to `prompts` or instead of them."""
    targets: str | None = None
    """Captioned pictures from which the ControlNet's conditions are made. `pocket`: held-out drawn scenes."""
    control: Literal["canny", "segmentation", "given"] | None = None
    """How a condition is made from a target. given: read from the folder `conditioning` in `targets`."""
    limit: int | None = None
    """Maximum number of prompts or targets. null: all."""
    skip: int | None = None
    """Number of targets to skip at the beginning."""
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """Seeds for every prompt. They must differ from the seeds used for tuning."""
    arms: dict[str, GuidanceSettings] = field(default_factory=_arms)
    """Name -> guidance. `dose`, `placebo` and `pointwise` show whether a gain comes only from stronger guidance."""
    guidance_scale: float | None = field(default=None, metadata={"was": "scale"})
    """Guidance scale for all arms. null: each arm's own."""
    base_arm: bool = True
    """Also samples the base without the adapter, with plain CFG and prompts without the subject's identifier."""
    arm: str = "S-CFG"
    """The arm that the verdict on the guidance is about."""
    baseline: str = "CFG"
    """The arm that it is compared with."""
    sweep: list[float] = field(default_factory=list)
    """Further guidance scales for arm and baseline, for curves and for the comparison at equal effective scale."""
    weights: list[float] | None = None
    """Further adapter weights for the baseline, at each of its scales. With `sweep` they form the front of plain
    guidance in the plane of identity and accuracy."""
    metrics: list[str] = field(default_factory=list)
    """Metrics by name, see docs/gains.md. Default: depends on the task and the base."""
    spaces: dict[str, str] = field(default_factory=dict)
    """Feature space (clip, siglip2, dino, dinov2, dinov3) -> folder or hub id of its network. `judge`, `lite0` and
    `color` need none."""
    models: dict[str, str] = field(default_factory=dict)
    """Model of a scorer (pickscore, vqa, detector, segmenter, depth) -> its folder or hub id; see docs/gains.md."""
    questions: str | None = None
    """JSON file: prompt -> questions with answers, for question accuracy. Default: questions made from the prompt."""
    objects: str | None = None
    """File in GenEval's format with the objects of each prompt, for detected objects. Default: read from the prompt."""
    device: str | None = None
    """Device of the metrics' networks, such as cpu or cuda:1. null: the device that draws the pictures."""
    batch_size: int = 16
    """Pictures in one batch of a metric's network."""
    primary: str | None = None
    """The metric that decides. Default: the first one."""
    referee: str | None = None
    """A second metric, in another feature space. A gain needs a difference of the same sign there."""
    minimum_effect: float = 0.02
    """Smallest difference worth calling a gain, in units of the primary metric (for an adapter: of `identity`)."""
    identity: str | None = None
    """The metric for how well the subject is recognized. Default: identity, or else a similarity, if one is measured.
    Together with `accuracy` it decides the verdict on the adapter."""
    accuracy: str | None = None
    """The metric for how well the prompt is followed. Default: prompt accuracy or alignment (clip)."""
    tolerance: float | None = None
    """Largest loss of `accuracy` that a gain in identity may cost. Default: `minimum_effect`."""
    frechet: str | None = None
    """Feature space in which to compute each arm's Fréchet distance to `reference`. Needs 1,000 pictures or more."""
    reference: str | None = None
    """Folder of real pictures for Fréchet and kernel distances. `pocket`: held-out drawn scenes."""
    drift_prompts: list[str] = field(default_factory=list)
    """Prompts without the subject, to measure how far the adapter changes the base's pictures of them."""
    overlays: int = 4
    """Number of pairs in the report that show regions and gamma over the steps."""

    def __post_init__(self) -> None:
        _as_today(self, "metrics", "primary", "referee", "identity", "accuracy", "frechet")
        _seeds("measure.seeds", self.seeds)
        _numbers("measure.sweep", self.sweep, 1)
        _numbers("measure.weights", self.weights or [], -100, 100)
        _numbers("measure.guidance_scale", [] if self.guidance_scale is None else [self.guidance_scale], 1)
        for flag, least in (("limit", 1), ("skip", 0), ("overlays", 0), ("batch_size", 1)):
            value = getattr(self, flag)
            require(value is None or value >= least, f"measure.{flag} must be at least {least}, got {value}")
        require(0 < self.minimum_effect < inf, f"measure.minimum_effect must be > 0, got {self.minimum_effect}")
        require(
            self.tolerance is None or 0 < self.tolerance < inf, f"measure.tolerance must be > 0, got {self.tolerance}"
        )
        require(self.arm != self.baseline, f"measure.arm and measure.baseline are both {self.arm!r}")
        for prompt in self.drift_prompts:
            require("{}" not in prompt, f"measure.drift_prompts: {prompt!r} names the subject; give unrelated prompts")
        for flag, name in (("arm", self.arm), ("baseline", self.baseline)):
            known = ", ".join(self.arms)
            require(name in self.arms, f"measure.{flag} {name!r} is none of measure.arms; set it to one of {known}")
        require(
            (self.targets is None) == (self.control is None),
            "measure.targets and measure.control belong together: the pictures, and how they become conditions",
        )


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """A search over guidance and checkpoints, on prompts and seeds that the report does not use."""

    prompts: list[str] = field(default_factory=list)
    """Prompts to tune on. {} is replaced by "identifier class". They must differ from the prompts of `measure`."""
    prompt_file: str | None = None
    """Text file with one prompt per line, in addition to `prompts` or instead of them."""
    targets: str | None = None
    """Pictures from which conditions are made, see `measure.targets`. `pocket`: scenes that the report does not use."""
    limit: int | None = None
    """Maximum number of targets. null: all."""
    seeds: list[int] = field(default_factory=lambda: [101, 102, 103])
    """Seeds to tune with. Successive halving gives better candidates more of them."""
    guidance_scales: list[float] = field(default_factory=lambda: [3.0, 5.0, 7.5], metadata={"was": "scales"})
    """Guidance scales to try for every method. An arm's own scale, if it is one of them, is kept unless another one
    measures better."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Further options of the guidance and the values to try, such as {"stop": [0.6, 1.0]}. For `measure.arm` only."""
    weights: list[float] | None = None
    """Adapter weights to try. Default: .6, .8 and 1 if `metric` is joint and there is an adapter, otherwise 1."""
    scopes: list[ScopeSettings | None] | None = None
    """Scopes of the adapter to try for `measure.arm`, such as [null, {"where": "subject", "where_stop": 0.3}]; null in
    the list: the adapter acts everywhere. Empty: the arm's own scope. Default: this example for a LoRA of a subject if
    the arm is S-CFG without a scope and there are two guidance scales or more, otherwise empty."""
    snapshots: str | None = None
    """Folder of snapshots (`train.snapshot_every`) to choose the best from. Default: the one beside the adapter."""
    metric: str | None = None
    """What to maximise: a metric, or `joint`, the harmonic mean of `measure.identity` and `measure.accuracy`, each
    divided by its reference. Default: joint for subjects, otherwise `measure.primary`."""
    references: dict[str, float] | None = None
    """Metric -> the value by which its mean is divided in `joint`. Default: 1, which fits shares; for CLIP and DINO the
    published values of real photos."""

    def __post_init__(self) -> None:
        _as_today(self, "metric")
        _seeds("tune.seeds", self.seeds)
        for name, least, most in (("guidance_scales", 1, inf), ("weights", -100, 100)):
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
    """Facts for the model card that only the maker of an adapter knows."""

    title: str | None = None
    """Title of the model card. Default: made from the subject and the base."""
    license: str = field(default="other", metadata={"was": "licence"})
    """License identifier from the Hub's list, such as apache-2.0."""
    description: str = ""
    """One or two sentences for the model card."""
    trigger_words: list[str] = field(default_factory=list)
    """Words that trigger the adapter. Default: "identifier class" of the subject."""
    limits: list[str] = field(default_factory=list)
    """Known limitations, one sentence each."""
    compact: bool = False
    """Writes the weights in one format only, few samples and no report page, to fit into version control."""
    sign: str | None = None
    """Private key of OpenSSH to sign the release with, such as ~/.ssh/id_ed25519. null: unsigned."""
    push: str | None = None
    """Hub id (owner/name) to upload to. null: no upload."""
    private: bool = True
    """Whether a new repository on the Hub is private."""

    def __post_init__(self) -> None:
        for name in ("title", "license"):
            value = getattr(self, name)
            require(value is None or bool(value.strip()), f"ship.{name} is empty; write one, or leave it out")
        for name in ("trigger_words", "limits"):
            require(all(word.strip() for word in getattr(self, name)), f"ship.{name}: one of them is empty")
        require(
            self.push is None or re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", self.push) is not None,
            f"ship.push must be owner/name, got {self.push!r}",
        )

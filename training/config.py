"""Settings as frozen dataclasses, of which a recipe composes its own; `command_line.parse` reads them.

The string under a field is its help line. Importing this module loads no torch, so `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import TrainingError

__all__ = [
    "BaseSettings",
    "ConceptSettings",
    "ControlNetSettings",
    "DataSettings",
    "DreamBoothSettings",
    "LoraSettings",
    "ObjectiveSettings",
    "TagSettings",
    "TrainSettings",
    "ValidationSettings",
    "require",
    "resolved",
    "write_settings",
]


def require(holds: bool, message: str) -> None:
    """Raises `TrainingError` with the message if the condition is false."""
    if not holds:
        raise TrainingError(message)


def _patterns(setting: str, patterns: Mapping[str, float]) -> None:
    """Keys that are regular expressions, values that are not negative."""
    for pattern, value in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise TrainingError(f"{setting}: {pattern!r} is no regular expression ({error})") from error
        require(value >= 0, f"{setting}: {pattern!r} must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """The pretrained pipeline that training or sampling starts from."""

    path: str
    """Folder or hub id of a diffusers pipeline with a U-net, or a single-file checkpoint (.safetensors) of SD-1.x,
    SD-2.x or SDXL; the family is read from its configs or keys."""
    revision: str | None = None
    """Hub revision (commit, tag or branch); ignored for a folder."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    config: str | None = None
    """Folder in diffusers' layout with the configs and tokenizers for a single file. null: those of its family."""
    prediction: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the U-net predicts, for training and sampling. auto: read from the scheduler's config or the file's keys."""
    zero_snr: bool | None = None
    """Whether the noise schedule ends without signal (zero terminal SNR). null: read from the config or keys."""
    clip_skip: int | None = None
    """Layer of CLIP whose output is used, counted from the last one as in A1111 and kohya: 1 is the last, 2 the one
    before it. null: the default of the model family, which is 1 for SD and 2 for SDXL."""
    prompt_chunks: int | None = None
    """Number of chunks of 75 tokens for prompts and captions. Shorter texts are padded, longer ones are cut. 3: up to
    225 tokens. null: 1."""

    def __post_init__(self) -> None:
        require(
            self.config is None or Path(self.path).suffix.lower() == ".safetensors",
            f"base.config {self.config} is for a single file, and base.path {self.path} is none; leave it out",
        )
        for name in ("clip_skip", "prompt_chunks"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 16, f"base.{name} must be from 1 to 16 or null, got {value}")


@dataclass(frozen=True, kw_only=True)
class TagSettings:
    """How captions that are lists of tags vary from step to step. By default they do not."""

    shuffle: bool = False
    """Shuffles the tags, except the first `keep`."""
    keep: int = 0
    """Number of tags at the beginning that are neither moved nor dropped."""
    drop: float = 0.0
    """Probability that each other tag is dropped."""
    drop_all: float = 0.0
    """Probability that all other tags are dropped together. `objective.caption_dropout` empties the whole caption."""
    prefix: str | None = None
    """Put before every caption that does not begin with it, such as a trigger. It is never moved or dropped."""
    separator: str = ","
    """Text that separates tags."""
    cached: int = 1000
    """Maximum number of captions whose embeddings are cached. If the run draws more different ones, none are cached:
    the text encoders stay in memory and encode in every step."""

    def __post_init__(self) -> None:
        for name in ("keep", "cached"):
            require(getattr(self, name) >= 0, f"data.tags.{name} must not be negative, got {getattr(self, name)}")
        for name in ("drop", "drop_all"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.tags.{name} must be from 0 to 1, got {value}")
        require(bool(self.separator.strip()), f"data.tags.separator must not be blank, got {self.separator!r}")
        require(
            self.prefix is None or bool(self.prefix.strip()), f"data.tags.prefix must not be blank, got {self.prefix!r}"
        )

    @property
    def varies(self) -> bool:
        """Whether a caption is not said alike at every position."""
        return self.shuffle or self.drop > 0 or self.drop_all > 0


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Images, captions, masks and conditioning images, and how they are cropped and cached."""

    source: str
    """Folder of images (with its subfolders), or a `datasets` dataset (folder, parquet file or hub id), or `pocket` for
    drawn scenes."""
    kind: Literal["auto", "folder", "dataset"] = "auto"
    """How to read `source`. auto: as a folder if it contains images, otherwise as a dataset."""
    prompt: str | None = None
    """One caption for all images. Default: captions from .txt files, metadata.jsonl or the caption column."""
    tags: TagSettings = field(default_factory=TagSettings)
    """For captions that are lists of tags: shuffling, dropping, and a prefix."""
    masks: str | None = None
    """Folder of masks with the names and sizes of the images. White, or opaque, marks the subject."""
    conditioning: str | None = None
    """Folder of conditioning images with the names and sizes of the images (ControlNet)."""
    annotator: Literal["canny", "lineart", "depth", "segmentation"] | None = None
    """Computes the conditioning image from each image instead of reading it."""
    canny: tuple[float, float] | None = None
    """Lower and upper threshold of the annotator canny; the ControlNet keeps them. Default: those of
    `controlnet.start`, otherwise 100 and 200, which published ControlNets use; for pocket scenes 80 and 160."""
    annotator_model: str | None = None
    """Folder or hub id of the network for depth or segmentation. Not needed for pocket scenes."""
    split: str = "train"
    """Split of the dataset to train on."""
    image_column: str = "image"
    """Dataset column with the image."""
    caption_column: str = "text"
    """Dataset column, or key in a folder's metadata.jsonl, with the caption or a list of captions."""
    mask_column: str | None = None
    """Dataset column with the mask."""
    conditioning_column: str | None = None
    """Dataset column with the conditioning image."""
    resolution: int = 512
    """Side of the square crop in pixels. With buckets: the square root of each bucket's area."""
    resolutions: list[int] = field(default_factory=list)
    """Further resolutions, at which every picture is trained too. One step uses one size."""
    minimum: int = 64
    """Shortest allowed side in pixels. Smaller images are refused; those smaller than `resolution` are enlarged."""
    count: int | None = None
    """Number of scenes if `source` is `pocket`. Default: 6,000."""
    buckets: int = 1
    """Number of aspect ratios. 1: square crops only."""
    flip: bool = False
    """Also trains on mirrored images. Not for text or subjects that are not symmetric."""
    crops: int = 1
    """Fixed crops per image, so that they can be cached. 1: the center; more: spread along the longer side."""
    cache: Literal["memory", "disk", "off"] = "memory"
    """Where image and text encodings are cached. With several processes, memory becomes disk."""
    cache_folder: str | None = None
    """Folder of the disk cache. Default: `cache` beside the output folder."""

    def __post_init__(self) -> None:
        require(
            self.prompt is None or bool(self.prompt.strip()),
            "data.prompt is empty; write a caption, or leave it out if the captions lie beside the images",
        )
        require(self.resolution >= 8, f"data.resolution must be at least 8 pixels, got {self.resolution}")
        for further in self.resolutions:
            require(further >= 8, f"data.resolutions must be at least 8 pixels each, got {further}")
        require(self.buckets >= 1, f"data.buckets must be at least 1, got {self.buckets}")
        require(self.crops >= 1, f"data.crops must be at least 1, got {self.crops}")
        require(
            not (self.annotator and (self.conditioning or self.conditioning_column)),
            "data.annotator makes the conditioning and data.conditioning reads it: give one of the two",
        )
        if self.canny is not None:
            low, high = self.canny
            require(0 < low < high < math.inf, f"data.canny must be 0 < lower < upper, got {low:g} and {high:g}")
            require(self.annotator == "canny", "data.canny needs data.annotator canny")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """What the network predicts, and how its error is weighted."""

    prediction: Literal["auto", "epsilon", "v_prediction", "sample"] = "auto"
    """Type of prediction. auto: as in the base model's scheduler config."""
    loss: Literal["mse", "huber"] = "mse"
    """huber: the pseudo-Huber loss 2c(sqrt(e^2 + c^2) - c)."""
    huber_c: float = 0.1
    """c of the pseudo-Huber loss."""
    snr_gamma: float | None = None
    """Gamma of min-SNR weighting (Hang et al. 2023); the paper uses 5. null: off."""
    debiased: bool = False
    """Weights the loss by 1/sqrt(SNR), debiased estimation (Yu et al. 2023)."""
    noise_offset: float = 0.0
    """Standard deviation of an extra noise value per sample and channel; usually 0.05 to 0.1. 0: off."""
    zero_terminal_snr: bool = False
    """Rescales the schedule to zero terminal SNR (Lin et al. 2023); not with epsilon prediction."""
    caption_dropout: float = 0.0
    """Share of samples trained with an empty caption, so that classifier-free guidance keeps working."""
    background: float = 1.0
    """Loss weight outside the mask or region, from 0 to 1. 1: masks are ignored."""

    def __post_init__(self) -> None:
        require(self.snr_gamma is None or self.snr_gamma > 0, f"objective.snr_gamma must be > 0, got {self.snr_gamma}")
        require(not (self.snr_gamma and self.debiased), "objective.snr_gamma and objective.debiased exclude each other")
        require(self.huber_c > 0, f"objective.huber_c must be > 0, got {self.huber_c}")
        require(self.noise_offset >= 0, f"objective.noise_offset must be >= 0, got {self.noise_offset}")
        for name in ("caption_dropout", "background"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name} must be from 0 to 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A low-rank adapter on the U-net, optionally also on the text encoders."""

    kind: Literal["lora", "loha", "lokr"] = "lora"
    """Type of adapter. lora loads in every diffusers pipeline; loha and lokr are saved in peft's layout."""
    rank: int = 8
    """Rank of the weight update. Higher: more capacity, larger files."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from `rank`, by pattern, such as {"mid_block": 16, "attn1": 0}. A pattern is a regular
    expression for a part of a layer's name; the first one that matches counts. 0: not adapted."""
    alpha: float | None = None
    """The update is scaled by alpha/rank (alpha/sqrt(rank) with rslora). Default: equal to the layer's rank."""
    alphas: dict[str, float] = field(default_factory=dict)
    """Alphas that differ from `alpha`, by pattern, as in `ranks`."""
    plus_ratio: float = 1.0
    """LoRA+ (Hayou et al. 2024): factor on the learning rate of the up projections. The paper uses 16. 1: off."""
    start: Literal["default", "gaussian", "orthogonal", "eva", "pissa", "olora"] = "default"
    """How the matrices are initialised, as in peft. default, gaussian, orthogonal: without effect at the start. eva:
    without effect too, but the down matrices are the principal components of the layers' inputs in the first batches.
    pissa, olora: with a part of the layer's weight; the result is saved as a plain LoRA of twice the rank."""
    dropout: float = 0.0
    """Dropout probability before the down projection (lora.kind: lora)."""
    rank_dropout: float = 0.0
    """Probability that a rank of a layer's update is left out for a sample (loha, lokr: a row of the update)."""
    module_dropout: float = 0.0
    """Probability that a layer's whole update is left out in a forward pass."""
    max_norm: float | None = None
    """Largest norm of a layer's update: larger ones are scaled down after every step, as kohya's scale_weight_norms
    does. 1 is usual. null: off."""
    rslora: bool = False
    """Scales by alpha/sqrt(rank), rank-stabilised LoRA (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024); takes about 1.3 times as long."""
    targets: Literal["attention", "attention+ff", "all-linear", "conv"] | list[str] = "attention"
    """Adapted layers of the U-net: a preset, or a list of module names as in peft."""
    text_encoder: bool = False
    """Also adapts the text encoders' attention."""
    tokens: dict[str, str] = field(default_factory=dict)
    """New tokens to train, each with the word whose embedding it starts from, such as {"<rex>": "dog"}."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank must be at least 1, got {self.rank}")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha must be > 0, got {self.alpha}")
        _patterns("lora.ranks", self.ranks)
        _patterns("lora.alphas", self.alphas)
        for pattern, alpha in self.alphas.items():
            require(alpha > 0, f"lora.alphas: {pattern!r} must be > 0, got {alpha}")
        require(self.plus_ratio > 0, f"lora.plus_ratio must be > 0, got {self.plus_ratio}")
        require(
            self.kind == "lora" or self.plus_ratio == 1,
            f"lora.plus_ratio belongs to lora.kind: lora, whose up projections it is about, not {self.kind}",
        )
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"lora.{name} must be in [0, 1), got {value}")
        require(
            self.kind == "lora" or not self.dropout,
            f"lora.dropout belongs to lora.kind: lora; {self.kind} has rank_dropout and module_dropout",
        )
        require(
            not self.dora or not (self.rank_dropout or self.module_dropout),
            "lora.rank_dropout and lora.module_dropout do not go with lora.dora, whose norms need all of an update",
        )
        require(self.max_norm is None or self.max_norm > 0, f"lora.max_norm must be > 0 or null, got {self.max_norm}")
        require(
            self.max_norm is None or (self.kind == "lora" and not self.dora and self.start not in ("pissa", "olora")),
            "lora.max_norm is for plain LoRAs: lora.kind lora without lora.dora, and a lora.start other than pissa and "
            "olora, whose updates begin as a part of the weight",
        )
        require(
            self.start == "default" or self.kind == "lora",
            f"lora.start: {self.start} belongs to lora.kind: lora, not {self.kind}",
        )
        require(
            self.start not in ("pissa", "olora") or not (self.dropout or self.rank_dropout or self.module_dropout),
            f"lora.start: {self.start} trains a part of the base's weight, which dropout would leave out too: set none",
        )
        require(
            self.start not in ("pissa", "olora") or not self.dora,
            f"lora.start: {self.start} does not go with lora.dora, whose result is no plain LoRA",
        )
        require(
            self.kind == "lora" or not (self.rslora or self.dora),
            f"lora.rslora and lora.dora belong to lora.kind: lora, not {self.kind}",
        )


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings:
    """How the subject's class is preserved, and what full fine-tuning trains."""

    text_encoder: bool = False
    """Full fine-tuning only: also trains the text encoders. For LoRA, see lora.text_encoder."""
    preserve: Literal["base", "pictures", "off"] = "base"
    """Training target for samples of the class. base: the base's own prediction; pictures: the class images."""
    surroundings: Literal["picture", "base"] = "picture"
    """Training target outside the masks of the subject's pictures. picture: the picture; base: the base's own
    prediction for the caption without the identifier."""
    company: float = 0.0
    """Share of the subject's samples in which its cut-out is pasted into a class image, where the base drew the class.
    Uses the lines of class_prompt_file with {}."""
    class_prompt: str | None = None
    """Prompt of the class images, such as "a photo of a dog"."""
    identifier: str | None = None
    """Rare word that marks the subject in captions, such as sks. With it, preserve: base also uses the subject's own
    pictures, with this word removed from their captions; only these if class_prompt is null."""
    own_share: float = 0.5
    """Share of the subject's own pictures among the class samples, if there are class images as well. With company,
    these are the pictures with its cut-out."""
    class_prompt_file: str | None = None
    """File with one prompt per line for the class images, instead of one prompt for all. {} is replaced by
    class_prompt, and image i uses line i."""
    class_folder: str | None = None
    """Folder of class images: your own pictures, or generated ones with their manifest. Default: `class_images` in the
    output folder."""
    class_images: int = 100
    """Number of class images. Missing ones are generated, but never added to pictures of your own."""
    prior_weight: float = 1.0
    """Weight of the mean class loss, relative to the mean loss of the subject's samples."""
    prior_ratio: float = 1.0
    """Class samples for each sample of the subject. 1: half and half, as usual."""
    steps: int = 25
    """Sampling steps for a class image."""
    guidance_scale: float = 7.5
    """Guidance scale for class images."""

    def __post_init__(self) -> None:
        require(
            self.class_prompt_file is None or self.class_prompt is not None,
            f"dreambooth.class_prompt_file {self.class_prompt_file}: its {{}} needs dreambooth.class_prompt",
        )
        asks = self.surroundings == "base" or self.company > 0
        require(0 <= self.own_share < 1, f"dreambooth.own_share must be in [0, 1), got {self.own_share}")
        require(0 <= self.company < 1, f"dreambooth.company must be in [0, 1), got {self.company}")
        require(
            not asks or self.preserve == "base",
            f"dreambooth.surroundings: base and company need dreambooth.preserve: base, not {self.preserve}",
        )
        require(
            not self.company or (self.class_prompt_file is not None and self.identifier is not None),
            f"dreambooth.company {self.company} places the subject in class images: set dreambooth.identifier, "
            "class_prompt and class_prompt_file",
        )
        require(self.class_images >= 1, f"dreambooth.class_images must be at least 1, got {self.class_images}")
        require(self.prior_ratio > 0, f"dreambooth.prior_ratio must be > 0, got {self.prior_ratio}")
        require(self.prior_weight >= 0, f"dreambooth.prior_weight must be >= 0, got {self.prior_weight}")


@dataclass(frozen=True, kw_only=True)
class ConceptSettings:
    """A further subject in the same run. All other settings are those of the first one, in `data` and `dreambooth`."""

    source: str
    """Folder or dataset of this subject's pictures."""
    masks: str | None = None
    """Folder of the masks of these pictures."""
    prompt: str | None = None
    """One caption for all pictures of this subject. Default: captions as in `data`."""
    prefix: str | None = None
    """Text before every caption of this subject, such as a trigger that they lack. Default: `data.tags.prefix`."""
    identifier: str | None = None
    """Word that marks this subject in captions. Default: `dreambooth.identifier`."""
    class_prompt: str | None = None
    """Prompt of class images for this subject. Default: none; its own pictures then preserve the class."""
    class_folder: str | None = None
    """Folder of these class images. Default: one for each class prompt, in the output folder."""
    share: float | None = 1.0
    """Number of samples of this subject, class samples included, for each sample of the first subject. 1: balanced;
    null: by number of pictures, where kohya's repeats count."""

    def __post_init__(self) -> None:
        require(self.share is None or self.share > 0, f"concepts: share must be > 0 or null, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class ControlNetSettings:
    """A ControlNet beside the frozen U-net."""

    start: str | None = None
    """Folder or hub id of a ControlNet to continue from. Default: a copy of the U-net's encoder with zero outputs."""
    channels: tuple[int, ...] | None = None
    """Channels of the conditioning embedding. Default: (16, 32, 96, 256), shortened to fit the VAE's factor."""
    dropout: float = 0.0
    """Share of samples trained with an empty conditioning image."""

    def __post_init__(self) -> None:
        require(0 <= self.dropout < 1, f"controlnet.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class ValidationSettings:
    """Sample pictures and a fixed-noise loss during training. They do not change the training by a single bit."""

    prompts: list[str] = field(default_factory=list)
    """Prompts sampled at step 0, every `every` steps and at the end, with the same seeds each time."""
    conditioning: list[str] = field(default_factory=list)
    """ControlNet: one conditioning image per prompt."""
    every: int = 250
    """Steps between validations."""
    seed: int = 0
    """Seed for the first prompt; each further prompt uses the next number."""
    steps: int = 25
    """Sampling steps."""
    guidance_scale: float = 7.5
    """Guidance scale for the samples."""
    loss_samples: int = 0
    """Number of training images, of each concept, whose loss at fixed timesteps and noise is logged. 0: none."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"train.validation.every must be at least 1, got {self.every}")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training loop."""

    steps: int = 500
    """Optimizer steps."""
    batch_size: int = 1
    """Samples per process and micro-step."""
    accumulation: int = 1
    """Micro-steps per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate. Default: the optimizer's, 1e-4 for adamw."""
    text_learning_rate: float | None = None
    """Learning rate of text encoders and new tokens. Default: `learning_rate`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Factors on these rates by pattern, such as {"mid_block": 0.5}. A pattern is a regular expression for a part of a
    parameter's name; the first one that matches counts. 0: not trained."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after warm-up."""
    warmup: int = 0
    """Steps of linear warm-up of the learning rate."""
    optimizer: str = "adamw"
    """adamw (fused), adafactor, lion, came, prodigy, schedulefree, adamw8bit, lion8bit, or any class as
    `module:Class`."""
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, such as {"betas": [0.9, 0.99], "weight_decay": 0.01}."""
    clip: float | None = 1.0
    """Maximum gradient norm. null: no clipping."""
    ema: float | None = None
    """Decay of an exponential moving average, which is then saved and sampled instead of the last weights."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    """Compute precision. Trained weights stay in float32. auto: bf16 if a short trial shows that it is faster on this
    machine, otherwise fp32; a resumed run keeps the choice."""
    quantize: Literal["int8", "nf4"] | None = None
    """Keeps the frozen linear layers in 8 (int8) or 4 (nf4) bits, beside which a LoRA trains. Saves memory, costs time
    and some exactness; convolutions stay in the compute precision. nf4 needs bitsandbytes. null: not rounded."""
    offload: bool = False
    """Keeps the frozen weights of the U-net's blocks in main memory and brings each block to the GPU as it computes.
    Includes gradient checkpointing. Saves most of the memory of the weights, costs time."""
    attention: Literal["auto", "sdpa", "plain"] = "auto"
    """Attention kernel. auto: plain on a CPU up to 1024 latents, where it is faster; otherwise sdpa."""
    gradient_checkpointing: bool = False
    """Recomputes activations in the backward pass. Saves memory, costs time."""
    compile: bool = False
    """Uses torch.compile: takes minutes before the first step, and pays off after thousands of steps."""
    fuse: bool = True
    """Computes each plain LoRA layer in fewer operations, if the compute precision is that of the LoRA."""
    prepack: bool = True
    """On a CPU in float32: reorders the weights of large frozen convolutions. Faster, but keeps two more copies."""
    tf32: bool = True
    """Uses TensorFloat-32 for matrix products on NVIDIA GPUs."""
    seed: int = 0
    """Seed. Together with the step it determines order, crops, noise and timesteps."""
    workers: int = 1
    """Threads that prepare batches in advance. 0: batches are prepared in the loop."""
    save_every: int = 250
    """Steps between checkpoints. The last step always saves one."""
    keep: int = 2
    """Number of checkpoints to keep."""
    snapshot_every: int | None = None
    """Steps between loadable results in `snapshots/`, from which tuning can choose the best. null: none."""
    save_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the saved result and snapshots. Checkpoints are always float32."""
    resume: str | None = "latest"
    """Checkpoint to continue from: `latest` (if there is one), a checkpoint folder, or null to start again."""
    if_damaged: Literal["earlier", "stop"] = "earlier"
    """What to do if the latest checkpoint is damaged. earlier: say so and use the one before it; stop: an error."""
    log_every: int = 10
    """Steps between log lines. The loss is read from the device only then."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers, by accelerate's names. One that is not installed is skipped with a message."""
    project: str = "tracking"
    """Name of the trackers' project. For tensorboard, the folder of its files in the output folder."""
    dry_run: bool = False
    """Checks everything, prints what would be trained and the memory and time, and stops."""
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    """Sample pictures during training."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "log_every", "keep"):
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.snapshot_every is None or self.snapshot_every >= 1,
            f"train.snapshot_every must be at least 1 or null, got {self.snapshot_every}",
        )
        for name in ("warmup", "workers"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "text_learning_rate"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name} must be > 0, got {value}")
        _patterns("train.rates", self.rates)
        require(self.clip is None or self.clip > 0, f"train.clip must be > 0 or null, got {self.clip}")
        require(
            bool(self.project.strip()) and "/" not in self.project,
            f"train.project must be a name without slashes, got {self.project!r}",
        )
        require(self.ema is None or 0 < self.ema < 1, f"train.ema must be between 0 and 1 or null, got {self.ema}")


def resolved(settings: Any) -> dict[str, Any]:
    """Every value of a settings dataclass as plain dictionaries, lists and numbers (for YAML and JSON)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    values: dict[str, Any] = plain(dataclasses.asdict(settings))
    return values


def write_settings(values: dict[str, Any], path: str | Path) -> None:
    """Writes resolved settings as a YAML file that `--config` reads again."""
    Path(path).write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")

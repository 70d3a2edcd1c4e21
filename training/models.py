"""A base pipeline's parts, loaded from safetensors, and the two encoders training needs.

The family is read from the configs: two text encoders and `addition_embed_type: text_time` are SDXL; everything else
with a U-net of the VAE's latent channels is SD (1.x, 2.x and the pocket base differ only in numbers).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from adapters import text
from adapters.errors import AdapterError, FileError
from adapters.files import read_object

from . import single_file
from .batch import CaptionTensors
from .errors import TrainingError
from .hub import offline_if_unreachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Parts",
    "check_finite",
    "encode_images",
    "encode_text",
    "everywhere",
    "live_pipeline",
    "load_parts",
    "tokenize_captions",
    "too_long",
    "weights_digest",
]


FOLDERS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# Neither pickles nor the single-file copies that many hub repositories have beside the folders.
HUB_FILES = ("model_index.json", *(f"{folder}/*.{end}" for folder in FOLDERS for end in ("json", "txt", "safetensors")))


@dataclass(kw_only=True)
class Parts:
    """What a base holds; encoders may be dropped once everything is cached."""

    folder: Path
    """Of the base; for a single file the one with its configs."""
    file: single_file.SingleFile | None = None
    """The base, where it is a single file."""
    family: str
    """`sd` or `sdxl`."""
    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    scheduler: dict[str, Any]
    """Config of the base's scheduler."""
    index: dict[str, Any]
    """The base's model_index.json."""
    vae_scale_factor: int
    """Pixels per latent."""
    identity: str
    """`weights_digest` of all weights as loaded; a run resumes on the base it began on."""
    text: text.TextRule = field(default_factory=text.TextRule)
    """How its text encoders are read, in every prompt of this base."""

    def release(self, *, vae: bool) -> None:
        """Drops the text encoders, and with `vae` the VAE, once what they give is cached; frees their memory."""
        self.text_encoders = []
        if vae:
            self.vae = None

    @property
    def inpainting(self) -> bool:
        """Whether its U-net is also given a hole and the picture around it, see `holes`."""
        return bool(self.unet.config.in_channels > self.channels)

    @property
    def channels(self) -> int:
        """Of the latents that the U-net predicts."""
        return int(self.unet.config.out_channels)

    @property
    def multiple(self) -> int:
        """Pixels an image side should be a multiple of, so that every U-net level has whole latents."""
        return int(self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))


def load_parts(
    base: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    prediction: str = "auto",
    zero_snr: bool | None = None,
    rule: text.TextRule | None = None,
) -> Parts:
    """Loads a diffusers pipeline folder, a hub id or a single-file checkpoint, float32, on the CPU, never a pickle.

    Args:
        base: folder, file or hub id.
        revision: branch, tag or commit on the hub.
        variant: of the files' names, such as "fp16".
        config: folder of the configs for a single file; None: those of its family.
        prediction: what the U-net predicts; auto: as the base says.
        zero_snr: whether the noise schedule ends without signal; None: as the base says.
        rule: how its text encoders are read; None: as usual.

    Raises:
        TrainingError: nothing there, no U-net, a U-net that is no text-to-latent U-net, weights only as pickles, or a
            rule that these encoders cannot follow.
    """
    file = None
    if single_file.is_file(base):
        file = single_file.inspect_file(base, config=config, prediction=prediction, zero_snr=zero_snr)
        folder, index, scheduler = file.configs, file.index, file.scheduler
        pipe = single_file.single_file_pipeline(file, torch.float32)
        unet, vae = pipe.unet, pipe.vae
        encoders = [getattr(pipe, name) for name in _encoders(index)]
        tokenizers = [getattr(pipe, name) for name in _tokenizers(index)]
    else:
        folder = _folder(base, revision)
        index = _json(folder / "model_index.json")
        unet, vae, encoders, tokenizers = _networks(base, folder, index, variant)
        config_file = folder / "scheduler" / "scheduler_config.json"
        scheduler = single_file.scheduled(_json(config_file), prediction, zero_snr)
        if not isinstance(scheduler.get("_class_name"), str):
            raise TrainingError(f"{config_file}: no scheduler is named in it (_class_name); get the base again")
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    channels = vae.config.latent_channels
    if unet.config.in_channels not in (channels, 2 * channels + 1):
        raise TrainingError(
            f"base {base}: its U-net takes {unet.config.in_channels} channels and its VAE gives "
            f"{channels}; depth, editing and upscaling bases cannot be trained here"
        )
    try:
        rule = text.checked(rule or text.TextRule(), encoders, tokenizers)
    except AdapterError as error:
        raise TrainingError(f"base.{error}") from error
    check_finite(base, {"unet": unet, "vae": vae, **dict(zip(_encoders(index), encoders, strict=True))})
    for module in (unet, vae, *encoders):
        module.requires_grad_(False).eval()
        module.float()
    return Parts(
        folder=folder,
        file=file,
        family="sdxl" if unet.config.addition_embed_type == "text_time" else "sd",
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        scheduler=scheduler,
        index=index,
        vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1),
        identity=weights_digest(unet, vae, *encoders),
        text=rule,
    )


def _networks(
    base: str | Path, folder: Path, index: dict[str, Any], variant: str | None
) -> tuple[Any, Any, list[Any], list[Any]]:
    """U-net, VAE, text encoders and tokenizers of a pipeline folder."""
    if "unet" not in index:
        others = sorted(name for name in index if not name.startswith("_"))
        raise TrainingError(
            f"base {base} has no U-net (it holds {', '.join(others)}); use an SD-1.x, SD-2.x or SDXL base"
        )
    for name in ("unet", "vae", *_encoders(index)):  # diffusers and transformers do not say which part lacks it
        _json(folder / name / "config.json")
    for name in _tokenizers(index):
        if not any((folder / name / file).is_file() for file in ("tokenizer.json", "vocab.json")):
            raise TrainingError(f"base {base}: {folder / name} holds no tokenizer; get the base again")
    try:
        return (
            UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True, variant=variant),
            AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, variant=variant),
            [
                _transformers_part(folder, index, name, use_safetensors=True, variant=variant)
                for name in _encoders(index)
            ],
            [_transformers_part(folder, index, name) for name in _tokenizers(index)],
        )
    except (OSError, ValueError) as problem:
        raise TrainingError(f"base {base}: {problem}") from problem


def _folder(base: str | Path, revision: str | None) -> Path:
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(base).startswith(".") or str(base).count("/") != 1:
        raise TrainingError(
            f"base {base} is not a folder; give a diffusers pipeline folder or a hub id like owner/name"
        )
    from huggingface_hub import snapshot_download

    offline_if_unreachable(base)
    try:
        return Path(snapshot_download(str(base), revision=revision, allow_patterns=list(HUB_FILES)))
    except Exception as problem:  # the hub client raises many unrelated kinds
        raise TrainingError(f"base {base} is neither a folder nor a reachable hub id: {problem}") from problem


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise TrainingError(f"{path} is missing; the base must be a diffusers pipeline folder")
    try:
        return read_object(path)
    except FileError as error:
        raise TrainingError(f"{error}; get the base again") from error


def _encoders(index: dict[str, Any]) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if index.get(name, [None])[0]]


def _tokenizers(index: dict[str, Any]) -> list[str]:
    return [name for name in ("tokenizer", "tokenizer_2") if index.get(name, [None])[0]]


def _transformers_part(folder: Path, index: dict[str, Any], name: str, **options: Any) -> Any:
    import transformers

    library, kind = index[name]
    if library != "transformers" or not kind.startswith("CLIP"):
        raise TrainingError(f"base {folder}: {name} is {library}.{kind}; only CLIP text encoders are known")
    return getattr(transformers, kind).from_pretrained(folder, subfolder=name, **options)


def tokenize_captions(parts: Parts, captions: list[str]) -> list[Tensor]:
    """Token ids per text encoder, each (B, T) int64, padded to the length of all chunks of the base's rule."""
    return text.tokenize(parts.tokenizers, captions, parts.text)


def too_long(parts: Parts, captions: list[str]) -> str | None:
    """A line on captions that are longer than the text encoders read; None where there are none."""
    body = min(tokenizer.model_max_length for tokenizer in parts.tokenizers) - text.MARKS
    limit = parts.text.chunks * body + text.MARKS
    lengths = [
        max(map(len, found))
        for found in zip(*(_all_ids(tokenizer, captions) for tokenizer in parts.tokenizers), strict=True)
    ]
    if not lengths or max(lengths) <= limit:
        return None
    worst = captions[lengths.index(max(lengths))]
    return (
        f"{sum(length > limit for length in lengths)} of {len(captions)} captions are longer than the {limit} tokens "
        f"that the text encoder reads: their ends are not seen; the longest has {max(lengths)}: {worst[:60]!r}... "
        f"base.prompt_chunks {-(-(max(lengths) - text.MARKS) // body)} reads them whole"
    )


def _all_ids(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> list[list[int]]:
    return tokenizer(captions, truncation=False, verbose=False).input_ids if captions else []


def encode_text(parts: Parts, ids: list[Tensor], encoders: list[Any] | None = None) -> CaptionTensors:
    """`embeds` (B, T, D), and for SDXL `pooled` (B, P), as the base's rule has them.

    Args:
        parts: the base.
        ids: tokens (B, T) for each encoder.
        encoders: in the place of the base's own, where they train.
    """
    return cast(CaptionTensors, text.encode(encoders or parts.text_encoders, ids, parts.text))


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents, each (B, C, h, w), for pixels (B, 3, H, W) in [-1, 1].

    Scaling *and shift* are those of the VAE's config, so that mean + std * noise is what the U-net is trained on.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    return (posterior.mean - shift) * scale, posterior.std * scale


def check_finite(base: str | Path, networks: Mapping[str, torch.nn.Module]) -> None:
    """Refuses damaged weights, which would draw black pictures, or be blamed on the learning rate.

    Args:
        base: whose they are, for the message.
        networks: by their names in the pipeline.

    Raises:
        TrainingError: names the first tensor that is not finite.
    """
    for part, network in networks.items():
        for name, value in network.named_parameters():
            # A sum costs no memory; it may overflow in half precision, so it is no proof.
            if not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
                raise TrainingError(f"base {base}: {part}.{name} holds NaN or infinite values; get the base again")


def weights_digest(*modules: Any) -> str:
    """Hash of configs and weights, which content keys and manifests use; the same weights give the same hash."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        digest.update(type(module).__name__.encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        if hasattr(module, "decoder"):  # a VAE: scaling and shift change the latents but are no weights
            config: Any = module.config
            digest.update(f"{config.scaling_factor} {getattr(config, 'shift_factor', None)}".encode())
    return digest.hexdigest()


def everywhere(parts: Parts, size: tuple[int, int]) -> dict[str, Any]:
    """What an inpainting pipeline is given so that it paints a whole picture; nothing for other bases.

    Args:
        parts: the base.
        size: (height, width) in pixels.
    """
    if not parts.inpainting:
        return {}
    height, width = size
    return {
        "image": Image.new("RGB", (width, height), "gray"),
        "mask_image": Image.new("L", (width, height), 255),
        "strength": 1.0,
    }


def live_pipeline(parts: Parts, *, controlnet: ControlNetModel | None = None) -> Any:
    """An ordinary diffusers pipeline around the live parts: nothing is copied, no file but configs is read."""
    import diffusers

    kind = parts.index["scheduler"][1]
    scheduler = getattr(diffusers, kind).from_config(parts.scheduler)
    encoders: list[Any] = [*parts.text_encoders, None, None]
    pieces: dict[str, Any] = {
        "vae": parts.vae,
        "unet": parts.unet,
        "scheduler": scheduler,
        "text_encoder": encoders[0],
        "tokenizer": parts.tokenizers[0],
    }
    if controlnet is not None:
        pieces["controlnet"] = controlnet
    if parts.family == "sdxl":
        pieces |= {"text_encoder_2": encoders[1], "tokenizer_2": parts.tokenizers[1]}
        pieces["force_zeros_for_empty_prompt"] = parts.index.get("force_zeros_for_empty_prompt", True)
        classes: tuple[Any, ...] = (
            StableDiffusionXLPipeline,
            StableDiffusionXLControlNetPipeline,
            StableDiffusionXLInpaintPipeline,
        )
    else:
        pieces |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        classes = (StableDiffusionPipeline, StableDiffusionControlNetPipeline, StableDiffusionInpaintPipeline)
    pipe = classes[2 if parts.inpainting else controlnet is not None](**pieces)
    pipe.set_progress_bar_config(disable=True)
    if parts.text_encoders:  # otherwise it is given embeddings
        text.follow(pipe, parts.text)
    return pipe

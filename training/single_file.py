"""A single-file checkpoint in the original (ldm, sgm) layout as a base, read by diffusers without the network.

The family is read from the file's keys; the configs and the tokenizer that the file does not hold are in `bases/`.
What the network predicts is told as other programs tell it: the keys `v_pred` and `ztsnr`, the metadata of the
modelspec standard, and for SD-2.x ComfyUI's rule on one of the weights.
"""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from adapters.errors import FileError
from adapters.files import read_header, read_object

from .config import require
from .errors import TrainingError

__all__ = ["SingleFile", "inspect_file", "is_file", "scheduled", "single_file_pipeline"]

BUNDLED = Path(__file__).parent / "bases"
FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Width of the text that cross-attention reads -> folder of configs."""
PADS = {"sd1": ["<|endoftext|>"], "sd2": ["!"], "sdxl": ["<|endoftext|>", "!"]}
"""Family -> what fills a short text, for each text encoder: OpenCLIP's are filled with zeros."""
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
UNET = "model.diffusion_model."
INPAINTING = 9
"""Channels of a U-net that is given noisy latents, a hole and the latents of the picture around it."""
PARTS = {
    "U-net": (f"{UNET}input_blocks.0.0.weight",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
    "VAE": ("first_stage_model.", "vae."),
}
WANTED = "a base is a whole checkpoint of SD-1.x, SD-2.x or SDXL"
OTHERS = {
    r"lora_|\.lora|hada_w|lokr_w": "an adapter, which goes on a base: give it as --adapter",
    r"(^|\.)(double|single)_blocks\.": "a checkpoint of Flux or its kin",
    r"(^|\.)joint_blocks\.": "a checkpoint of SD-3",
    r"^(control_model|controlnet_cond_embedding)\.": "a ControlNet, which goes on a base",
    r"^edm_mean$|^edm_vpred\.": "a checkpoint with EDM's noise schedule, which is not known here",
    r"^(down_blocks|up_blocks|conv_in|add_embedding)\.": "one network in diffusers' names; give the pipeline's folder",
    r"^(encoder|decoder)\.": "a VAE alone",
}
"""Pattern of keys -> what such a file is; the first that is found is said."""


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A checkpoint whose keys have been looked at; its weights are still on the disk."""

    path: Path
    configs: Path
    """Folder in diffusers' layout, of which only configs, and tokenizers where it has them, are read."""
    scheduler: dict[str, Any]
    unet: dict[str, Any] = field(default_factory=dict)
    """What differs from the config of its family."""

    @property
    def index(self) -> dict[str, Any]:
        """`model_index.json`, with the scheduler that the file needs."""
        index = _json(self.configs / "model_index.json") | {"scheduler": ["diffusers", self.scheduler["_class_name"]]}
        if "in_channels" in self.unet:  # inpainting
            index["_class_name"] = re.sub(r"(Inpaint)?Pipeline$", "InpaintPipeline", str(index["_class_name"]))
        return index


def is_file(base: str | Path) -> bool:
    """Whether a base is a single file of weights, there or not: no hub id ends like one."""
    path = Path(base).expanduser()
    return path.suffix.lower() in (".safetensors", ".gguf", *PICKLES) or path.is_file()


def inspect_file(
    base: str | Path, *, config: str | None = None, prediction: str = "auto", zero_snr: bool | None = None
) -> SingleFile:
    """Reads a checkpoint's keys.

    Args:
        base: the file.
        config: folder whose configs and tokenizers are used; null: those of the file's family.
        prediction: as in `BaseSettings`.
        zero_snr: as in `BaseSettings`.

    Raises:
        TrainingError: no such file, a damaged or pickled one, or one that is no checkpoint of a known family.
    """
    path = Path(base).expanduser()
    if path.suffix.lower() in PICKLES:
        raise TrainingError(
            f"base {base} is a single pickled file, which is never loaded here; take its .safetensors, or a "
            "diffusers folder"
        )
    try:
        header = read_header(path)
    except FileError as error:
        raise TrainingError(f"base {error}") from error
    metadata = header.pop("__metadata__", {})
    _refuse(path, header)
    family = None if config else FAMILIES.get(_text_width(header))
    require(
        bool(config or family),
        f"base {base}: its U-net reads text of width {_text_width(header)}, which no known family does; {WANTED}, or "
        "give base.config the folder of its configs",
    )
    configs = Path(config).expanduser() if config else BUNDLED / str(family)
    require((configs / "model_index.json").is_file(), f"base.config {config} has no model_index.json")
    own = _json(configs / "scheduler" / "scheduler_config.json")
    told = _prediction(path, header, metadata, family) if prediction == "auto" else prediction
    unet: dict[str, Any] = {}
    if family == "sd2" and told == "v_prediction":  # the 768-pixel models
        unet = {"sample_size": 96, "upcast_attention": True}
    if header[PARTS["U-net"][0]]["shape"][1] == INPAINTING:
        unet["in_channels"] = INPAINTING
    zero = "ztsnr" in header if zero_snr is None else zero_snr
    return SingleFile(path=path, configs=configs, scheduler=scheduled(own, told, zero or None), unet=unet)


def single_file_pipeline(file: SingleFile, dtype: torch.dtype | None) -> Any:
    """The diffusers pipeline of a checkpoint, on the CPU.

    Args:
        file: what `inspect_file` found.
        dtype: of its weights; None: as they are in the file.

    Raises:
        TrainingError: weights that are missing, or do not fit the configs.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from diffusers.utils import logging

    kind = getattr(diffusers, str(file.index["_class_name"]), None)
    require(
        hasattr(kind, "from_single_file"), f"base.config {file.configs}: {file.index['_class_name']} reads no such file"
    )
    assert kind is not None
    options = {"config": str(file.configs), "local_files_only": True}
    own: dict[str, Any] = _tokenizers(file.configs.name) if file.configs.parent == BUNDLED else {}
    if "safety_checker" in file.index:
        own |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    spoken = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of buffers that old files have, and of each change of precision
    try:
        own["unet"] = diffusers.UNet2DConditionModel.from_single_file(
            str(file.path), subfolder="unet", **options, **file.unet
        )
        pipe = kind.from_single_file(str(file.path), **options, **own)
        for name, module in pipe.components.items():
            if not isinstance(module, torch.nn.Module):
                continue
            lacking = [key for key, value in module.named_parameters() if value.is_meta]
            require(
                not lacking,
                f"base {file.path} lacks {len(lacking)} weights of its {name}, such as {lacking[:1]}; get it again",
            )
            if dtype is not None:
                module.to(dtype)
    except TrainingError:
        raise
    except NotImplementedError as error:  # of torch, where a weight is still without data
        raise TrainingError(f"base {file.path} lacks weights of its U-net or VAE; get the file again") from error
    except (OSError, ValueError, RuntimeError, KeyError, SingleFileComponentError) as error:
        raise TrainingError(
            f"base {file.path} does not fit the configs of {file.configs.name}: {' '.join(str(error).split())[:200]}"
        ) from error
    finally:
        logging.set_verbosity(spoken)
    pipe.scheduler = getattr(diffusers, file.scheduler["_class_name"]).from_config(file.scheduler)
    return pipe


def scheduled(config: Mapping[str, Any], prediction: str | None, zero_snr: bool | None) -> dict[str, Any]:
    """A scheduler's config with what the base's settings say of it; None and auto: as it is."""
    changed = dict(config)
    if prediction not in (None, "auto"):
        changed["prediction_type"] = prediction
    if zero_snr is not None:
        changed["rescale_betas_zero_snr"] = zero_snr
    if zero_snr:
        changed["timestep_spacing"] = "trailing"  # or no picture would begin at the step without signal
        if changed.get("_class_name") == "PNDMScheduler":  # which knows no such betas
            changed["_class_name"] = "DDIMScheduler"
    return changed


def _refuse(path: Path, header: Mapping[str, Any]) -> None:
    """Raises `TrainingError` where a file is something else than a whole checkpoint with a U-net."""
    lacking = [
        name for name, starts in PARTS.items() if not any(key.startswith(start) for key in header for start in starts)
    ]
    for pattern, what in OTHERS.items():
        if ("U-net" in lacking or pattern.startswith("^edm")) and any(re.search(pattern, key) for key in header):
            raise TrainingError(f"base {path} is {what}; {WANTED}")
    if "U-net" in lacking:
        some = ", ".join(sorted(header)[:2])
        raise TrainingError(f"base {path} has none of the keys of a U-net (it has {some}); {WANTED}")
    require(not lacking, f"base {path} has no {' and no '.join(lacking)}; {WANTED}")
    channels = header[PARTS["U-net"][0]]["shape"][1]
    require(
        channels in (4, INPAINTING),
        f"base {path}: its U-net takes {channels} channels; depth, editing and upscaling bases are not known here; "
        f"{WANTED}",
    )


def _text_width(header: Mapping[str, Any]) -> int:
    """Width of the text that the U-net reads; 0 where it reads none."""
    keys = (key for key in header if key.startswith(UNET) and key.endswith("attn2.to_k.weight"))
    return next((header[key]["shape"][-1] for key in keys), 0)


def _prediction(path: Path, header: Mapping[str, Any], metadata: Mapping[str, str], family: str | None) -> str | None:
    """What the U-net predicts, as far as the file says; None: as the configs say."""
    from safetensors import safe_open

    named = metadata.get("modelspec.prediction_type", metadata.get("modelspec.predict_key", ""))
    if "v_pred" in header or named in ("v", "v_prediction"):
        return "v_prediction"
    if named == "epsilon" or family != "sd2":
        return named or None
    # SD-2.x comes both ways and its keys are the same; ComfyUI's rule on how far training moved this norm.
    key = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if key not in header:
        return None
    with safe_open(path, "pt") as file:
        return "v_prediction" if file.get_tensor(key).float().std(correction=0) > 0.09 else "epsilon"


def _tokenizers(family: str) -> dict[str, Any]:
    """CLIP's tokenizer as each encoder of a family pads it."""
    return {name: _clip(pad) for name, pad in zip(("tokenizer", "tokenizer_2"), PADS[family], strict=False)}


def _clip(pad: str) -> Any:
    """CLIP's tokenizer; its vocabulary is the bytes, then what each merge makes, then the two marks."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    # For each merge the numbers of its two words: low and high bytes of the first ones, then of the second ones.
    planes = (
        np.frombuffer(lzma.decompress((BUNDLED / "merges.xz").read_bytes()), np.uint8).reshape(2, 2, -1).astype(int)
    )
    letters = list(bytes_to_unicode().values())
    words, merges = [*letters, *(f"{letter}</w>" for letter in letters)], ""
    for left, right in (planes[:, 0] + 256 * planes[:, 1]).T.tolist():
        merges += f"{words[left]} {words[right]}\n"
        words.append(words[left] + words[right])
    numbers = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(numbers), "utf-8")
        Path(folder, "merges.txt").write_text(f"#version: 0.2\n{merges}", "utf-8")
        return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def _json(path: Path) -> dict[str, Any]:
    return read_object(path)

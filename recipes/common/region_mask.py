"""Where the base's attention sees a word in a training picture: the mask of the region-aware loss, without masks.

The picture is noised to a few middle timesteps, where cross-attention is clear; the words of its caption compete for
every position, as they do in S-CFG, and the region is what the wanted words win in most of them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

import scfg
from training.batch import CaptionTensors, EntryTensors, tensors
from training.errors import TrainingError
from training.method import conditions_of
from training.models import Parts, encode_text, tokenize_captions
from training.objective import add_noise, alpha_sigma, alphas_cumprod

__all__ = ["region_of"]

FRACTIONS = (0.2, 0.35, 0.5)  # of the schedule, from clean to noise


def region_of(phrase: str) -> Any:
    """The region of the words of ``phrase`` as `training.loop.train` takes it; its name is part of the cache's key."""

    @torch.no_grad()
    def region(parts: Parts, entry: EntryTensors, caption: str) -> Tensor:
        limit = parts.text.chunks * parts.tokenizers[0].model_max_length
        words = scfg.prompt_words(parts.tokenizers[0], caption, limit)
        if not {word.text for word in words} & set(phrase.split()):
            raise TrainingError(f"region {phrase!r}: none of its words is in the caption {caption!r}")
        unet: Any = parts.unet
        text = tensors(encode_text(parts, tokenize_captions(parts, [caption])))
        there = cast(CaptionTensors, {name: value.to(unet.device) for name, value in text.items()})
        conditions = conditions_of(there, entry["frame"][None].to(unet.device), unet.dtype)
        maps = scfg.WordMaps(unet)
        mean = entry["mean"][None].to(unet.device)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        products = alphas_cumprod(parts.scheduler).to(mean)
        votes = torch.zeros(mean.shape[-2:])
        for fraction in FRACTIONS:
            timestep = torch.tensor([int(fraction * len(products))], device=mean.device)
            noisy = add_noise(mean, noise, *alpha_sigma(products, timestep))
            context, size = conditions["encoder_hidden_states"], (mean.shape[-2], mean.shape[-1])
            with maps.watch(size, context, [words], phrase, rows=slice(0, 1)) as found:
                unet(noisy.to(unet.dtype), timestep, **conditions)
                votes += found()[0, 0].cpu()
        return (votes > len(FRACTIONS) / 2).float()[None]

    region.__name__ = f"attention-{phrase}"
    return region

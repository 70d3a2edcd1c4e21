"""Where attention to words is: in training pictures, as the region-aware loss's mask, and while sampling.

The picture is noised to a few middle timesteps, where cross-attention is clear; the words of its caption compete for
every position, as they do in S-CFG, and the region is what the wanted words win in most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import scfg
from scfg.segment import Segmenter, background_positions, grouping
from training.errors import TrainingError
from training.method import conditions_of
from training.models import Parts, encode_text, tokenize
from training.objective import add_noise, alpha_sigma, alphas_cumprod

__all__ = ["place_of", "region_of"]

FRACTIONS = (0.2, 0.35, 0.5)  # of the schedule, from clean to noise


def region_of(phrase: str) -> Any:
    """The region of the words of ``phrase`` as `training.loop.train` takes it; its name is part of the cache's key."""
    asked = set(phrase.split())

    @torch.no_grad()
    def region(parts: Parts, entry: dict[str, Tensor], caption: str) -> Tensor:
        words = scfg.prompt_words(parts.tokenizers[0], caption, parts.tokenizers[0].model_max_length)
        wanted = [index for index, item in enumerate(words) if item.text in asked]
        if not wanted:
            raise TrainingError(f"region {phrase!r}: none of its words is in the caption {caption!r}")
        unet: Any = parts.unet
        text = encode_text(parts.text_encoders, tokenize(parts, [caption]), family=parts.family)
        conditions = conditions_of(
            {name: value.to(unet.device) for name, value in text.items()},
            entry["frame"][None].to(unet.device),
            unet.dtype,
        )
        length = text["embeds"].shape[1]
        segmenter = Segmenter(unet, scfg.SemanticCFG(tokens="prompt", reference="mean"))
        mean = entry["mean"][None].to(unet.device)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
        products = alphas_cumprod(parts.scheduler).to(mean)
        votes = torch.zeros(mean.shape[-2:])
        for fraction in FRACTIONS:
            timestep = torch.tensor([int(fraction * len(products))], device=mean.device)
            segmenter.start(
                (mean.shape[-2], mean.shape[-1]),
                tokens=slice(0, 1),
                foreground=None,
                background=background_positions(length, length),
                groups=grouping([[item.positions for item in words]], length, mean.device),
            )
            unet(add_noise(mean, noise, *alpha_sigma(products, timestep)), timestep, **conditions)
            average = segmenter.finish()
            if average is None:
                raise TrainingError("region: this base's attention gives no maps; use masks instead")
            index = average.regions().index[0].cpu()
            owned = torch.isin(index, torch.tensor(wanted)).float()[None, None]
            votes += torch.nn.functional.interpolate(owned, votes.shape, mode="nearest")[0, 0]
        return (votes > len(FRACTIONS) / 2).float()[None]

    region.__name__ = f"attention-{phrase}"
    return region


def place_of(pipe: Any, phrase: str) -> Any:
    """Where the attention to the words of ``phrase`` is while a picture is sampled, as `adapters.Scope.where` takes it.

    The words of each prompt compete for every position, in the adapted network's attention of this very step; the map
    is 1 where a word of the phrase wins.

    Raises:
        TrainingError: while sampling: a prompt has none of the words, or the pipeline was given embeddings.
    """
    asked = set(phrase.split())
    limit = pipe.tokenizer.model_max_length
    segmenters: dict[int, Segmenter] = {}

    @contextmanager
    def where(call: Any) -> Iterator[Callable[[], Tensor]]:
        if call.prompts is None:
            raise TrainingError("scope.where: call the pipeline with texts; of embeddings the words are not known")
        words = [scfg.prompt_words(pipe.tokenizer, prompt, limit) for prompt in call.prompts]
        wanted = [[i for i, word in enumerate(said) if word.text in asked] for said in words]
        for prompt, found in zip(call.prompts, wanted, strict=True):
            if not found:
                raise TrainingError(f"scope.where {phrase!r}: none of its words is in the prompt {prompt!r}")
        segmenter = segmenters.setdefault(
            id(call.unet), Segmenter(call.unet, scfg.SemanticCFG(tokens="prompt", reference="mean"))
        )
        length, size = call.context.shape[1], call.sample.shape[-2:]
        segmenter.start(
            tuple(size),
            tokens=slice(call.images, 2 * call.images),
            foreground=None,
            background=background_positions(length, limit),
            groups=grouping([[word.positions for word in said] for said in words], length, call.context.device),
        )
        try:
            yield lambda: _owned(segmenter.finish(), wanted, size)
        finally:
            segmenter.stop()

    return where


def _owned(average: Any, wanted: Sequence[Sequence[int]], size: Sequence[int]) -> Tensor:
    """(B, 1, h, w): 1 where a wanted word wins."""
    if average is None:
        raise TrainingError("scope.where: this U-net's attention gives no maps (token merging or block caching?)")
    index = average.regions().index
    own = [torch.isin(one, torch.tensor(ids, device=one.device)) for one, ids in zip(index, wanted, strict=True)]
    return torch.nn.functional.interpolate(torch.stack(own)[:, None].float(), tuple(size), mode="nearest")

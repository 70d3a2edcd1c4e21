"""Where a U-net's attention to chosen words is: a map per image, for an adapter's scope or the mask of a loss.

The words of each prompt compete for every position, as they do in S-CFG with `tokens="prompt"`. What is watched is the
next forward of the U-net as it is then: adapted, or with its adapter off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .errors import ScfgError
from .pipelines import unwrapped
from .segment import Segmenter, grouping
from .semantic import SemanticCFG
from .words import Word, prompt_words

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from diffusers import DiffusionPipeline

__all__ = ["UNetCall", "WordMaps", "place_of"]

Found = Callable[[], Tensor]
# Of the map's shorter side, to each side: attention sees what tells an object apart, such as a car's wheels, and an
# adapted subject is not of the class's outline. See benchmarks/study.
MARGIN = 1 / 16


class WordMaps:
    """Maps of words in the attention of one U-net.

    Args:
        unet: the U-net, compiled or not.
        soft: give the chosen words' share of the attention to all words, in [0, 1]; else 1 where one of them wins.
    """

    def __init__(self, unet: nn.Module, *, soft: bool = False) -> None:
        self.soft = soft
        self._segmenter = Segmenter(unwrapped(unet), SemanticCFG(tokens="prompt", reference="mean"))

    @contextmanager
    def watch(
        self,
        size: tuple[int, int],
        context: Float[Tensor, "N T C"],
        words: Sequence[Sequence[Word]],
        phrase: str,
        *,
        rows: slice,
    ) -> Iterator[Found]:
        """Watch the next forward; afterwards what this yields returns the maps, (B, 1, H, W).

        Args:
            size: (H, W) of the latents, and of the maps.
            context: the text that the U-net is called with.
            words: of each image's prompt, as `prompt_words` gives them.
            phrase: the words whose place is wanted, with spaces between.
            rows: the images' rows in the batch, one for each of `words`.

        Raises:
            ScfgError: a prompt has none of the words; or, when the maps are asked for, the forward gave none.
        """
        asked = set(phrase.lower().split())
        chosen = [[i for i, word in enumerate(own) if word.text.lower() in asked] for own in words]
        for own, found in zip(words, chosen, strict=True):
            if not found:
                said = " ".join(word.text for word in own)
                raise ScfgError(f"none of the words {phrase!r} is in the prompt {said!r}; its place cannot be found")
        positions = [[word.positions for word in own] for own in words]
        groups = grouping(positions, context.shape[1], context.device)
        self._segmenter.start(size, tokens=rows, foreground=None, background=[0], groups=groups)
        try:
            yield lambda: self._found(chosen, size)
        finally:
            self._segmenter.stop()

    def _found(self, chosen: list[list[int]], size: tuple[int, int]) -> Float[Tensor, "B 1 H W"]:
        average = self._segmenter.finish()
        if average is None:
            raise ScfgError("this U-net's attention gave no maps (token merging or block caching?); turn that off")
        if self.soft:
            shares = average.shares()
            maps = torch.stack([own[wanted].sum(0) for own, wanted in zip(shares, chosen, strict=True)])
            return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)
        index = average.regions().index
        owned = [torch.isin(own, own.new_tensor(wanted)) for own, wanted in zip(index, chosen, strict=True)]
        return F.interpolate(torch.stack(owned)[:, None].float(), size=size, mode="nearest")


class UNetCall(Protocol):
    """What `place_of` has to be told of a U-net call under guidance, such as `adapters.scope.Call`.

    Attributes:
        unet: the network that is about to run.
        sample: (2 B, C, H, W), unconditional half first.
        context: (2 B, T, C).
        images: B.
        prompts: of the images; None: not known.
    """

    unet: nn.Module
    sample: Tensor
    context: Tensor
    images: int
    prompts: list[str] | None


def place_of(
    pipe: DiffusionPipeline, phrase: str, *, soft: bool = False, margin: float = MARGIN
) -> Callable[[UNetCall], AbstractContextManager[Found]]:
    """Where the words of `phrase` are in the pictures being made, in the form that `adapters.Scope(where=...)` takes.

    Args:
        pipe: the pipeline; its tokenizer says which tokens a word has.
        phrase: the words, with spaces between.
        soft: see `WordMaps`.
        margin: how far the place reaches beyond the words' map, as a fraction of its shorter side.

    Returns:
        A function that is entered around a U-net call, in which the words' maps are then read.

    Raises:
        ScfgError: while sampling: a prompt has none of the words, or the pipeline was given embeddings.
    """
    maps: dict[int, WordMaps] = {}

    def where(call: UNetCall) -> AbstractContextManager[Found]:
        if call.prompts is None:
            raise ScfgError(f"the place of {phrase!r} needs prompts as texts; of embeddings the words are not known")
        own = maps.setdefault(id(call.unet), WordMaps(call.unet, soft=soft))
        words = [prompt_words(pipe.tokenizer, prompt, call.context.shape[1]) for prompt in call.prompts]
        height, width = call.sample.shape[-2:]
        rows = slice(call.images, 2 * call.images)
        return _widened(own.watch((height, width), call.context, words, phrase, rows=rows), margin)

    return where


@contextmanager
def _widened(watching: AbstractContextManager[Found], margin: float) -> Iterator[Found]:
    """The same maps, their largest values spread by the margin to each side."""

    def spread(maps: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B 1 H W"]:
        reach = round(margin * min(maps.shape[-2:]))
        return F.max_pool2d(maps, 2 * reach + 1, stride=1, padding=reach)

    with watching as found:
        yield lambda: spread(found())

"""One denoising loop under a guidance: which U-net call is watched, the regions in force, gamma, the trace.

`attach` (both halves in one U-net call) and `SemanticGuider` (one call per half) are two ways to feed it. Per step:

    begin_step -> choose_half -> watch -> (the U-net runs) -> collect -> scale -> note
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ScfgError
from .guidance import Guidance, GuidanceInputs
from .regions import Regions
from .scale import ScaleMap, image_seed
from .segment import NO_TEXT, Segmenter, background_positions, foreground_half, grouping
from .semantic import SemanticCFG
from .trace import Step
from .words import Word, competitors

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

__all__ = ["RegionSession", "Texts"]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a U-net call's text tokens are.

    Attributes:
        context: (B, T, C), what the U-net attends to.
        chunk: tokens the text encoder takes at once, where each chunk begins with BOS; None: BOS is at 0 only.
        words: gives the words of every prompt (None: unknown); asked only where words compete.
    """

    context: Float[Tensor, "B T C"]
    chunk: int | None
    words: Callable[[], Sequence[list[Word]] | None]


class RegionSession:
    """The guidance of one loop after the other.

    Args:
        guidance: settings of the method.
        record: maps to keep in the trace, of `RECORDABLE`.
        words_from: for the error message: how the caller is told the prompts' words.

    Attributes:
        trace: one `Step` per step of the latest loop, in order.
        regions: the regions in force; None: not known yet.
    """

    def __init__(self, guidance: Guidance, *, record: Collection[str], words_from: str) -> None:
        self.guidance = guidance
        self._settings = guidance if isinstance(guidance, SemanticCFG) else None
        self._record = frozenset(record)
        self._words_from = words_from
        self._unet: UNet2DConditionModel | None = None
        self._segmenter: Segmenter | None = None
        self._said: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """A new batch of images."""
        self.trace: list[Step] = []
        self.regions: Regions | None = None
        self._seeds: list[int] | None = None
        self._half: str | None = None
        self._index, self._fraction, self._due = 0, 0.0, False

    def begin_step(self, index: int, fraction: float) -> None:
        """Step `index`, at `fraction` of the steps run. Regions are due every `refresh_every` steps."""
        self._index, self._fraction = index, fraction
        settings = self._settings
        self._due = (
            settings is not None
            and settings.active(fraction)
            and (index % settings.refresh_every == 0 or self.regions is None)
        )

    @property
    def active(self) -> bool:
        """Whether this step's prediction is changed."""
        return self.guidance.active(self._fraction)

    def draw_seeds(self, images: Float[Tensor, "B C H W"]) -> None:
        """One number per image from its initial noise, once per batch, for methods that need it."""
        if self.guidance.needs_seeds and self._seeds is None:
            self._seeds = [image_seed(image) for image in images]

    def choose_half(self, uncond_text: Float[Tensor, "B T C"]) -> None:
        """Decide once per batch which half defines the foreground.

        Raises:
            ScfgError: the unconditional half is wanted and carries no text.
        """
        settings = self._settings
        if settings is None or settings.reference != "foreground" or self._half is not None:
            return
        self._half = foreground_half(settings.foreground, uncond_text)
        if settings.foreground == "auto" and self._half == "conditional":
            self.say_once("foreground", NO_TEXT)

    def watch(
        self,
        unet: UNet2DConditionModel,
        size: tuple[int, int],
        texts: Texts,
        *,
        uncond: slice | None,
        cond: slice | None,
    ) -> None:
        """Watch the U-net's next forward, where regions are due and this forward has a part in them.

        Args:
            unet: the (unwrapped) U-net.
            size: (H, W) of the prediction.
            texts: what the text tokens are.
            uncond: batch rows of the unconditional half; None: not in this forward.
            cond: batch rows of the conditional half, whose tokens compete; None: not in this forward.

        Raises:
            ScfgError: the U-net has no such blocks, or words compete and are not known.
        """
        self.stop()
        foreground = {"unconditional": uncond, "conditional": cond, None: None}[self._half]
        if self._settings is None or not self._due or (cond is None and foreground is None):
            return
        if self._segmenter is None or self._unet is not unet:
            self._unet, self._segmenter = unet, Segmenter(unet, self._settings)
        self._segmenter.start(
            size,
            tokens=cond,
            foreground=foreground,
            background=background_positions(texts.context.shape[1], texts.chunk),
            groups=None if cond is None else self._groups(self._settings, texts, cond.stop - cond.start),
        )
        self._tokens_watched = cond is not None

    def collect(self) -> None:
        """The watched forward is through: take its regions over, or keep the last ones where maps are missing."""
        if self._segmenter is None or not self._segmenter.watching:
            return
        average = self._segmenter.finish()
        if average is None:
            then = "the last regions are used again" if self.regions else "plain CFG there"
            self.say_once("maps", f"no complete attention maps in a step (token merging or block caching?): {then}")
        elif self._tokens_watched:
            found, last = average.regions(), self.regions
            kept = found.foreground if found.foreground is not None or last is None else last.foreground
            self.regions = replace(found, foreground=kept)
        elif self.regions is not None:
            self.regions = replace(self.regions, foreground=average.foreground())

    def stop(self) -> None:
        """Stop watching; safe at any time."""
        if self._segmenter is not None:
            self._segmenter.stop()

    def scale(
        self,
        uncond: Float[Tensor, "B C H W"],
        cond: Float[Tensor, "B C H W"],
        *,
        guidance_scale: float,
        weight: Float[Tensor, "B H W"] | None,
    ) -> ScaleMap | None:
        """gamma of this step; None: plain CFG, outside the window or because there are no regions.

        Args:
            uncond: unconditional prediction.
            cond: conditional prediction.
            guidance_scale: s.
            weight: share of each position in the norms; None: all alike.
        """
        if not self.active or not self._ready:
            return None
        with torch.no_grad(), torch.autocast(cond.device.type, enabled=False):
            return self.guidance(
                GuidanceInputs(
                    uncond=uncond,
                    cond=cond,
                    guidance_scale=guidance_scale,
                    regions=self.regions,
                    weight=weight,
                    seeds=self._seeds,
                )
            )

    def note(
        self,
        prediction: Float[Tensor, "B C H W"],
        scaled: ScaleMap | None,
        *,
        timestep: Tensor | float,
        guidance_scale: float,
        alphas_cumprod: Tensor | None = None,
        scheduler_sigma: float | None = None,
        clean: Float[Tensor, "B C H W"] | None = None,
    ) -> None:
        """Put this step into the trace.

        Args:
            prediction: one half's prediction; says how many images there are, and where.
            scaled: this step's `scale`.
            timestep: the scheduler's t.
            guidance_scale: s.
            alphas_cumprod: the scheduler's schedule, where it has one.
            scheduler_sigma: sigma, where the scheduler steps along sigmas.
            clean: predicted clean sample, where it is recorded.
        """
        maps = self.regions if "regions" in self._record else None
        ones = torch.ones(prediction.shape[0], device=prediction.device)
        self.trace.append(
            Step(
                index=self._index,
                fraction=self._fraction,
                timestep=torch.as_tensor(timestep).detach(),
                guidance_scale=guidance_scale,
                effective_scale=ones if scaled is None else scaled.effective,
                norms=None if scaled is None else scaled.norms,
                alphas_cumprod=alphas_cumprod,
                scheduler_sigma=scheduler_sigma,
                regions=None if maps is None else maps.index,
                foreground=None if maps is None else maps.foreground,
                gamma=scaled.gamma if scaled is not None and "gamma" in self._record else None,
                prediction=clean,
            )
        )

    def say_once(self, topic: str, message: str) -> None:
        """A warning, once per topic."""
        if topic not in self._said:
            self._said.add(topic)
            warnings.warn(f"semantic guidance: {message}", stacklevel=2)

    @property
    def _ready(self) -> bool:
        if self._settings is None:
            return True
        missing = self.regions is None or (self._settings.reference == "foreground" and self.regions.foreground is None)
        return not missing

    def _groups(self, settings: SemanticCFG, texts: Texts, images: int) -> Float[Tensor, "B T R"] | None:
        """Membership of tokens in what competes; None where tokens compete."""
        if settings.tokens == "all":
            return None
        words = texts.words()
        if not words or not all(words) or images % len(words):
            raise ScfgError(
                f"tokens={settings.tokens!r} needs the words of every prompt; {self._words_from}, or use tokens='all'"
            )
        own = [competitors(said, settings.tokens) for said in words]
        positions = [[one.positions for one in own[i * len(own) // images]] for i in range(images)]
        return grouping(positions, texts.context.shape[1], texts.context.device)

"""S-CFG on an ordinary diffusers pipeline: `with attach(pipe, SemanticCFG()) as run: pipe(prompt)`.

No pipeline's `__call__` is copied. Pipelines compute u + s * (c - u) themselves, so it is enough to rewrite one half of
the U-net's output: c' = u + gamma * delta; or, where the pipeline uses c once more (guidance_rescale, PAG),
u' = u + s / (s - 1) * (1 - gamma) * delta, which gives the same u + s * gamma * delta and leaves c alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .arms import guidance as guidance_by_name
from .attention import eager
from .errors import ScfgError
from .guidance import SemanticCFG
from .pipelines import PipelineView
from .regions import Regions
from .scale import ScaleMap, image_seed, rewrite
from .segment import NO_TEXT, Segmenter, background_positions, foreground_half, grouping
from .trace import RECORDABLE, Step
from .words import Word, competitors, prompt_words

__all__ = ["Run", "attach"]


def attach(
    pipe: Any,
    guidance: SemanticCFG | str,
    *,
    guidance_scale: float | None = None,
    record: Collection[str] | None = None,
) -> Run:
    """Guide a pipeline's images by `guidance` until the context is left or `.detach()` is called.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel`.
        guidance: settings, or a method's name.
        guidance_scale: the scale the pipeline is called with; needed for pipelines that do not tell (DeepFloyd IF),
            else only checked.
        record: maps to keep in `run.trace`: any of "regions", "gamma", "prediction".

    Raises:
        ScfgError: the pipeline has no U-net or no classifier-free guidance of the kind S-CFG is defined for, is already
            attached to, or a setting does not fit its U-net.
    """
    settings = guidance_by_name(guidance) if isinstance(guidance, str) else guidance
    if not isinstance(settings, SemanticCFG):
        raise ScfgError(
            f"guidance={guidance!r} is not a guidance; pass SemanticCFG(), a sibling of it, or a method's name"
        )
    return Run(pipe, settings, guidance_scale=guidance_scale, record=record)


class Run:
    """An attached guidance; made by `attach`.

    Attributes:
        trace: one `Step` per U-net call of the latest image batch, in order.
        call_kwargs: what to pass to the pipeline beside the prompt, for guidance that came from a file.
        prompts: texts of the latest batch, where the pipeline was given texts. May be set before a call that is given
            embeddings.
    """

    def __init__(
        self,
        pipe: Any,
        guidance: SemanticCFG,
        *,
        guidance_scale: float | None,
        guidance_rescale: float | None = None,
        record: Collection[str] | None,
    ) -> None:
        unknown = sorted(set(record or ()) - set(RECORDABLE))
        if isinstance(record, str) or unknown:
            raise ScfgError(f"record={record!r} is not allowed; use a list of {', '.join(RECORDABLE)}")
        self.guidance = guidance
        self.trace: list[Step] = []
        self.call_kwargs: dict[str, float] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        if guidance_rescale is not None:
            self.call_kwargs["guidance_rescale"] = guidance_rescale
        self.prompts: list[str] | None = None
        self._pipe = pipe
        self._record = frozenset(record or ())
        self._view = PipelineView(pipe, guidance_scale)
        self._segmenter = Segmenter(self._view.unet, guidance) if guidance.needs_regions else None
        self._handles: list[RemovableHandle] = []
        self._said: set[str] = set()
        self._begin(1)
        self._install()

    # -- attaching and detaching

    def __enter__(self) -> Run:
        if not self._handles:
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Take every hook off; the pipeline is as it was before. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _forget_compiled(self._pipe)
        self._handles.clear()
        if self._segmenter is not None:
            self._segmenter.stop()
        self.prompts = self._view.prompts or self.prompts
        self._view.untap()

    def _install(self) -> None:
        unet = self._view.unet
        hooks = (getattr(hook, "__wrapped__", hook) for hook in unet._forward_hooks.values())
        if any(isinstance(getattr(hook, "__self__", None), Run) for hook in hooks):
            raise ScfgError("this pipeline's U-net already has a guidance attached; detach it first")
        self._handles = [
            unet.register_forward_pre_hook(eager(self._before), with_kwargs=True),
            unet.register_forward_hook(eager(self._after), with_kwargs=True, always_call=True),
        ]
        self._view.tap(self._begin)
        _forget_compiled(self._pipe)

    # -- one denoising loop

    def _begin(self, steps: int) -> None:
        self.trace = []
        self._steps = steps
        self._regions: Regions | None = None
        self._seeds: list[int] | None = None
        self._foreground_half: str | None = None
        self._call: _Call | None = None

    def _before(self, unet: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self._call = None
        if not self._view.guided:
            return
        self._call = call = self._read_call(args, kwargs)
        self._check_scale()
        if not self.guidance.active(call.fraction):
            return
        if self.guidance.needs_seeds and self._seeds is None:
            self._seeds = [image_seed(image) for image in call.sample[call.cond, : self._view.channels]]
        if self._segmenter is not None and (call.index % self.guidance.refresh_every == 0 or self._regions is None):
            self._watch(self._segmenter, call)

    def _after(self, unet: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        call, self._call = self._call, None
        watched = self._segmenter is not None and self._segmenter.watching
        average = self._segmenter.finish() if self._segmenter is not None and watched else None
        if call is None or output is None:  # not guided, or the U-net raised
            return None
        prediction = output[0]
        if not self.guidance.active(call.fraction):
            self._note(call, prediction, None)
            return None
        if average is not None:
            self._regions = average.regions()
        elif watched:
            self._say_once(
                "maps",
                "no complete attention maps in a step (token merging or block caching?): "
                + ("the last regions are used again" if self._regions else "plain CFG there"),
            )
        if self.guidance.needs_regions and self._regions is None:
            self._note(call, prediction, None)
            return None
        with torch.no_grad(), torch.autocast(prediction.device.type, enabled=False):
            uncond, cond = prediction[call.uncond, : self._view.channels], prediction[call.cond, : self._view.channels]
            scaled = self.guidance(
                uncond,
                cond,
                guidance_scale=call.guidance_scale,
                regions=self._regions,
                weight=self._view.repaint_weight(call.sample, call.cond),
                seeds=self._seeds,
            )
            self._note(call, prediction, scaled)
            changed = prediction.clone()
            half = call.uncond if self._view.uses_cond_again else call.cond
            changed[half, : self._view.channels] = rewrite(
                uncond, cond, scaled.gamma, call.guidance_scale, keep_cond=self._view.uses_cond_again
            )
        if isinstance(output, tuple):
            return (changed, *output[1:])
        return type(output)(sample=changed)

    def _read_call(self, args: tuple, kwargs: dict[str, Any]) -> _Call:
        values = {**dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)), **kwargs}
        for name in ("attention_mask", "encoder_attention_mask"):
            if values.get(name) is not None:
                raise ScfgError(
                    f"the U-net was called with {name}, which semantic guidance does not support; leave it out"
                )
        sample, context = values["sample"], values["encoder_hidden_states"]
        ways = self._view.ways
        if sample.shape[0] % ways:
            raise ScfgError(
                f"{type(self._pipe).__name__} does guidance on {ways} predictions per image, but called its U-net on "
                f"{sample.shape[0]}; this pipeline's batch layout is not supported"
            )
        images = sample.shape[0] // ways
        return _Call(
            sample=sample,
            context=context,
            timestep=values["timestep"],
            index=len(self.trace),
            fraction=min(len(self.trace) / self._steps, 1.0 - 1e-6),
            guidance_scale=self._view.guidance_scale,
            uncond=slice(0, images),
            cond=slice(images, 2 * images),
        )

    # -- regions

    def _watch(self, segmenter: Segmenter, call: _Call) -> None:
        foreground = None
        if self.guidance.reference == "foreground":
            if self._foreground_half is None:
                self._foreground_half = foreground_half(self.guidance.foreground, call.context[call.uncond])
                if self.guidance.foreground == "auto" and self._foreground_half == "conditional":
                    self._say_once("foreground", NO_TEXT)
            foreground = call.uncond if self._foreground_half == "unconditional" else call.cond
        length = call.context.shape[1]
        groups = None
        if self.guidance.tokens != "all":
            groups = grouping(self._word_positions(call), length, call.context.device)
        segmenter.start(
            (call.sample.shape[2], call.sample.shape[3]),
            tokens=call.cond,
            foreground=foreground,
            background=background_positions(length, self._view.text_chunk),
            groups=groups,
        )

    @property
    def words(self) -> list[list[Word]] | None:
        """The words of each prompt with their token positions; None where the pipeline was given embeddings."""
        prompts = self._view.prompts or self.prompts
        tokenizer = getattr(self._pipe, "tokenizer", None)
        if prompts is None or tokenizer is None:
            return None
        expand = getattr(self._pipe, "maybe_convert_prompt", None)  # textual inversion: one word, several vectors
        texts = [expand(prompt, tokenizer) for prompt in prompts] if expand is not None else prompts
        # A tokenizer without a limit says 1e30, which its own truncation cannot take.
        longest = min(tokenizer.model_max_length, 2**16)
        return [prompt_words(tokenizer, text, longest) for text in texts]

    @property
    def text_length(self) -> int | None:
        """Tokens the text encoder takes at once; None without a tokenizer."""
        return self._view.text_chunk

    def _word_positions(self, call: _Call) -> list[list[tuple[int, ...]]]:
        words = self.words
        images = call.cond.stop - call.cond.start
        if not words or not all(words) or images % len(words):
            raise ScfgError(
                f"tokens={self.guidance.tokens!r} needs the words of every prompt; call the pipeline with non-empty "
                "texts, set run.prompts where it is given embeddings, or use tokens='all'"
            )
        own = [competitors(said, self.guidance.tokens) for said in words]
        return [[one.positions for one in own[i * len(own) // images]] for i in range(images)]

    # -- telling

    def _note(self, call: _Call, prediction: Tensor, scaled: ScaleMap | None) -> None:
        images = call.cond.stop - call.cond.start
        keep, regions = self._record, self._regions
        self.trace.append(
            Step(
                index=call.index,
                fraction=call.fraction,
                timestep=torch.as_tensor(call.timestep).detach(),
                guidance_scale=call.guidance_scale,
                effective_scale=torch.ones(images, device=prediction.device) if scaled is None else scaled.effective,
                norms=None if scaled is None else scaled.norms,
                alphas_cumprod=getattr(self._pipe.scheduler, "alphas_cumprod", None),
                regions=regions.index if regions is not None and "regions" in keep else None,
                foreground=regions.foreground if regions is not None and "regions" in keep else None,
                gamma=scaled.gamma if scaled is not None and "gamma" in keep else None,
                prediction=self._clean(call, prediction, scaled) if "prediction" in keep else None,
            )
        )

    def _clean(self, call: _Call, prediction: Tensor, scaled: ScaleMap | None) -> Tensor:
        """Predicted clean sample after guidance, in the variance-preserving form that the U-net is called with."""
        channels = self._view.channels
        uncond, cond = prediction[call.uncond, :channels].float(), prediction[call.cond, :channels].float()
        gamma = 1.0 if scaled is None else scaled.gamma
        guided = uncond + call.guidance_scale * gamma * (cond - uncond)
        sample = call.sample[call.cond, :channels].float()
        scheduler = self._pipe.scheduler
        index = int(torch.as_tensor(call.timestep).round().clamp(0, len(scheduler.alphas_cumprod) - 1))
        alpha_bar = scheduler.alphas_cumprod[index].to(sample)
        alpha, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
        kind = scheduler.config.prediction_type
        if kind == "v_prediction":
            return alpha * sample - sigma * guided
        if kind == "sample":
            return guided
        return (sample - sigma * guided) / alpha

    def _check_scale(self) -> None:
        for name, stated in self.call_kwargs.items():
            used = getattr(self._view, name)
            if used is not None and abs(used - stated) > 1e-6:
                self._say_once(
                    name,
                    f"the pipeline runs with {name}={used}, but this guidance was made for {stated}; call it as "
                    f"pipe(prompt, **run.call_kwargs)",
                )

    def _say_once(self, topic: str, message: str) -> None:
        if topic not in self._said:
            self._said.add(topic)
            warnings.warn(f"semantic guidance: {message}", stacklevel=2)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What one U-net call was given, and which rows of its batch are which."""

    sample: Tensor
    context: Tensor
    timestep: Tensor | float | int
    index: int
    fraction: float
    guidance_scale: float
    uncond: slice
    cond: slice


def _forget_compiled(pipe: Any) -> None:
    """Compiled code keeps the hooks of the moment it was made: have it made anew."""
    wrapped = hasattr(pipe.unet, "_orig_mod")
    if wrapped or any(module._compiled_call_impl is not None for module in pipe.unet.modules()):
        torch.compiler.reset()

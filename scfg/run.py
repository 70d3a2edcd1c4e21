"""S-CFG on an ordinary diffusers pipeline: `with attach(pipe, SemanticCFG()) as run: pipe(prompt)`.

No pipeline's `__call__` is copied. Pipelines compute u + s * (c - u) themselves, so it is enough to rewrite one half of
the U-net's output: c' = u + gamma * delta; or, where the pipeline uses c once more (guidance_rescale, PAG),
u' = u + s / (s - 1) * (1 - gamma) * delta, which gives the same u + s * gamma * delta and leaves c alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .arms import make_guidance
from .attention import eager, find_blocks, select_blocks
from .clean import clean_sample, require_clean, sigma_of
from .errors import ScfgError
from .guidance import Guidance
from .pipelines import PipelineView
from .precision import widened
from .scale import ScaleMap, rewrite
from .segment import foreground_half
from .semantic import SemanticCFG
from .session import RegionSession, Texts
from .trace import RECORDABLE, Step
from .words import Word, prompt_words

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

__all__ = ["Run", "attach"]


def attach(
    pipe: DiffusionPipeline,
    guidance: Guidance | str,
    *,
    guidance_scale: float | None = None,
    record: Collection[str] | None = None,
) -> Run:
    """Guide a pipeline's images by `guidance` until the context is left or `.detach()` is called.

    Other pipelines that share its U-net (`from_pipe`) are not guided, unless they are attached to as well.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel`.
        guidance: settings, or a method's name.
        guidance_scale: the scale the pipeline is called with; needed for pipelines that do not tell (DeepFloyd IF),
            else only checked.
        record: maps to keep in `run.trace`: any of "regions", "gamma", "prediction".

    Returns:
        The run, attached; as a context manager it detaches on leaving.

    Raises:
        ScfgError: the pipeline has no U-net or no classifier-free guidance of the kind S-CFG is defined for, is already
            attached to, or its scheduler does not say what "prediction" is.
    """
    settings = make_guidance(guidance) if isinstance(guidance, str) else guidance
    if not isinstance(settings, Guidance):
        raise ScfgError(
            f"guidance={guidance!r} is not a guidance; pass SemanticCFG(), a sibling of it, or a method's name"
        )
    return Run(pipe, settings, guidance_scale=guidance_scale, record=record)


class Run:
    """An attached guidance; made by `attach`.

    Args:
        pipe: the pipeline that the guidance is attached to.
        guidance: settings of the method.
        guidance_scale: of the file that the guidance came from; None: it came as settings.
        guidance_rescale: of that file; None: it has none.
        record: maps to keep in the trace, of `RECORDABLE`; None: none.

    Attributes:
        call_kwargs: what to pass to the pipeline beside the prompt, for guidance that came from a file.
        prompts: texts of the latest batch, where the pipeline was given texts. May be set before a call that is given
            embeddings.

    Raises:
        ScfgError: `record` has an unknown name, or asks for predictions of a scheduler that cannot give them.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        guidance: Guidance,
        *,
        guidance_scale: float | None,
        guidance_rescale: float | None = None,
        record: Collection[str] | None,
    ) -> None:
        unknown = sorted(set(record or ()) - set(RECORDABLE))
        if isinstance(record, str) or unknown:
            raise ScfgError(f"record={record!r} is not allowed; use a list of {', '.join(RECORDABLE)}")
        self.guidance = guidance
        self.call_kwargs: dict[str, float] = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
        if guidance_rescale is not None:
            self.call_kwargs["guidance_rescale"] = guidance_rescale
        self.prompts: list[str] | None = None
        self._pipe = pipe
        self._keeps_clean = "prediction" in (record or ())
        self._view = PipelineView(pipe, guidance_scale)
        if self._keeps_clean:
            require_clean(pipe.scheduler)
        self._session = RegionSession(
            guidance,
            record=record or (),
            words_from="call the pipeline with non-empty texts, set run.prompts where it is given embeddings",
        )
        self._handles: list[RemovableHandle] = []
        self._begin(1)
        self._install()

    @property
    def trace(self) -> list[Step]:
        """One `Step` per U-net call of the latest image batch, in order."""
        return self._session.trace

    def check(self, height: int, width: int, *, negative_prompt: str | None = None) -> None:
        """Raise now what a call would in the first step that it guides.

        Args:
            height: rows of the prediction, which are latents but for DeepFloyd IF.
            width: its columns.
            negative_prompt: that the call will have; None: none, for which SDXL puts zeros in the place of a text.

        Raises:
            ScfgError: this U-net has no regions of that size, or the half that tells the foreground carries no text.
        """
        settings = self.guidance
        if not isinstance(settings, SemanticCFG):
            return
        select_blocks(find_blocks(self._view.unet), height, width, settings.latent_ratio, settings.last_blocks)
        if settings.reference == "foreground" and negative_prompt is None and self._view.empty_is_zeros:
            foreground_half(settings.foreground, torch.zeros(1, 1, 1))

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
        self._session.stop()
        self.prompts = self._view.prompts or self.prompts
        self._view.untap()

    def _install(self) -> None:
        unet = self._view.unet
        hooks = (getattr(hook, "__wrapped__", hook) for hook in unet._forward_hooks.values())
        runs = [owner for hook in hooks if isinstance(owner := getattr(hook, "__self__", None), Run)]
        if any(run._pipe is self._pipe for run in runs):
            raise ScfgError("this pipeline already has a guidance attached; detach it first")
        self._handles = [
            unet.register_forward_pre_hook(eager(self._before), with_kwargs=True),
            unet.register_forward_hook(eager(self._after), with_kwargs=True, always_call=True),
        ]
        self._view.tap(self._begin)
        _forget_compiled(self._pipe)

    # -- one denoising loop

    def _begin(self, steps: int) -> None:
        self._steps = steps
        self._length: int | None = None
        self._call: _Call | None = None
        self._session.begin()

    def _before(self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._view.calling:
            return
        self._call = None
        if not self._view.guided:
            return
        self._call = call = self._read_call(args, kwargs)
        self._length = call.context.shape[1]
        self._check_scale()
        session = self._session
        session.begin_step(len(self.trace), min(len(self.trace) / self._steps, 1.0 - 1e-6))
        if not session.active:
            return
        session.draw_seeds(call.sample[call.cond, : self._view.channels])
        session.choose_half(call.context[call.uncond])
        session.watch(
            unet,
            (call.sample.shape[2], call.sample.shape[3]),
            Texts(context=call.context, chunk=self._view.text_chunk, words=lambda: self.words),
            uncond=call.uncond,
            cond=call.cond,
        )

    def _after(self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self._view.calling:
            return None
        call, self._call = self._call, None
        if call is None or output is None:  # not guided, or the U-net raised
            self._session.stop()
            return None
        self._session.collect()
        prediction, channels = output[0], self._view.channels
        uncond, cond = prediction[call.uncond, :channels], prediction[call.cond, :channels]
        scaled = self._session.scale(
            uncond,
            cond,
            guidance_scale=call.guidance_scale,
            weight=self._view.repaint_weight(call.sample, call.cond),
        )
        with torch.no_grad(), torch.autocast(prediction.device.type, enabled=False):
            self._note(call, uncond, cond, scaled)
            if scaled is None:
                return None
            changed, keep_cond = prediction.clone(), self._view.uses_cond_again
            changed[call.uncond if keep_cond else call.cond, :channels] = rewrite(
                uncond, cond, scaled.gamma, call.guidance_scale, keep_cond=keep_cond
            )
        return (changed, *output[1:]) if isinstance(output, tuple) else type(output)(sample=changed)

    def _read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
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
            guidance_scale=self._view.guidance_scale,
            uncond=slice(0, images),
            cond=slice(images, 2 * images),
        )

    # -- texts

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
        length = longest if self._length is None or self._length % longest else self._length
        return [prompt_words(tokenizer, text, length) for text in texts]

    @property
    def text_length(self) -> int | None:
        """Tokens the text encoder takes at once; None without a tokenizer."""
        return self._view.text_chunk

    # -- telling

    def _note(
        self,
        call: _Call,
        uncond: Float[Tensor, "B C H W"],
        cond: Float[Tensor, "B C H W"],
        scaled: ScaleMap | None,
    ) -> None:
        scheduler, clean = self._pipe.scheduler, None
        if self._keeps_clean:
            gamma = 1.0 if scaled is None else scaled.gamma
            guided = widened(uncond) + call.guidance_scale * gamma * (widened(cond) - widened(uncond))
            sample = call.sample[call.cond, : self._view.channels]
            clean = clean_sample(scheduler, call.timestep, sample, guided)
        self._session.note(
            cond,
            scaled,
            timestep=call.timestep,
            guidance_scale=call.guidance_scale,
            alphas_cumprod=getattr(scheduler, "alphas_cumprod", None),
            scheduler_sigma=sigma_of(scheduler, call.timestep),
            clean=clean,
        )

    def _check_scale(self) -> None:
        for name, stated in self.call_kwargs.items():
            used = getattr(self._view, name)
            if used is not None and abs(used - stated) > 1e-6:
                self._session.say_once(
                    name,
                    f"the pipeline runs with {name}={used}, but this guidance was made for {stated}; call it as "
                    f"pipe(prompt, **run.call_kwargs)",
                )


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What one U-net call was given, and which rows of its batch are which."""

    sample: Tensor
    context: Tensor
    timestep: Tensor | float
    guidance_scale: float
    uncond: slice
    cond: slice


def _forget_compiled(pipe: DiffusionPipeline) -> None:
    """Compiled code keeps the hooks of the moment it was made: have it made again."""
    wrapped = hasattr(pipe.unet, "_orig_mod")
    if wrapped or any(module._compiled_call_impl is not None for module in pipe.unet.modules()):
        torch.compiler.reset()

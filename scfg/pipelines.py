"""What has to be known about a diffusers pipeline before its U-net's output may be rewritten.

Everything is read from the pipeline itself: its flags where it has them, its own method calls where it keeps
them in locals. Nothing is guessed from batch sizes.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .errors import ScfgError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["PipelineView", "pipelines_at_work", "unwrapped", "unwrapped_unet"]

# Pipelines that call their U-net on other batches than [uncond | cond], or more than once per step, where a rewritten
# half would mean something else than S-CFG.
_OTHER_PROTOCOL = (
    "LEditsPP",
    "SemanticStableDiffusion",
    "StableDiffusionSAG",
    "AttendAndExcite",
    "Panorama",
    "DiffEdit",
    "Pix2PixZero",
    "GLIGEN",
    "SafeStableDiffusion",
    "Safe",
    "Kandinsky",
    "StableDiffusionXLKDiffusion",
    "StableDiffusionKDiffusion",
)


def unwrapped(module: nn.Module | None) -> nn.Module | None:
    """A module out of the wrapper that `torch.compile` puts around it, for hooks and for looking at its parts."""
    return getattr(module, "_orig_mod", module)


def pipelines_at_work(frame: FrameType | None) -> Iterator[DiffusionPipeline]:
    """Pipelines whose methods are running on a stack, innermost first.

    Several pipelines may share one U-net, and it is not told which of them calls it: only the stack knows.
    """
    from diffusers import DiffusionPipeline

    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get("self") if code.co_varnames[:1] == ("self",) else None
        if isinstance(owner, DiffusionPipeline):
            yield owner
        frame = frame.f_back


def unwrapped_unet(pipe: DiffusionPipeline) -> Any:
    """The U-net of a pipeline, out of the wrapper torch.compile puts around it.

    Raises:
        ScfgError: no U-net, or one of another kind.
    """
    from diffusers import UNet2DConditionModel

    unet: Any = unwrapped(getattr(pipe, "unet", None))
    supported = isinstance(unet, UNet2DConditionModel)
    if not supported:
        raise ScfgError(
            f"{type(pipe).__name__} has {'no U-net' if unet is None else f'a {type(unet).__name__} as U-net'}; "
            f"semantic guidance needs a pipeline with a UNet2DConditionModel (Stable Diffusion 1/2/XL, DeepFloyd IF)"
        )
    if unet.config.encoder_hid_dim_type not in (None, "text_proj", "ip_image_proj"):
        raise ScfgError(
            f"the U-net of {type(pipe).__name__} attends to images, not to text "
            f"(encoder_hid_dim_type={unet.config.encoder_hid_dim_type!r}); semantic guidance needs text tokens"
        )
    return unet


class PipelineView:
    """Reads one pipeline's guidance state, and taps the calls in which it mentions what it keeps in locals.

    Args:
        pipe: a diffusers pipeline.
        guidance_scale: what the user says the scale is; needed where the pipeline has no property for it.
    """

    def __init__(self, pipe: DiffusionPipeline, guidance_scale: float | None) -> None:
        self.pipe = pipe
        self.unet = unwrapped_unet(pipe)
        self._stated_scale = guidance_scale
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        self._replaced: dict[str, Any] = {}
        self._turn, self._thread = threading.Lock(), threading.get_ident()
        self.prompts: list[str] | None = None
        self._encoded_with_guidance: bool | None = None
        self._repaint_mask: Tensor | None = None
        self._check()

    def _check(self) -> None:
        from diffusers import DiffusionPipeline

        name = type(self.pipe).__name__
        known = isinstance(self.pipe, DiffusionPipeline)
        if not known:
            raise ScfgError(f"{name} is not a diffusers pipeline; semantic guidance needs a DiffusionPipeline")
        if "image_guidance_scale" in self._parameters:
            raise ScfgError(
                f"{name} mixes text, image and unconditional predictions with two scales; semantic guidance of that "
                f"order is not defined. Use a pipeline with one guidance_scale"
            )
        if "guidance_scale" not in self._parameters:
            raise ScfgError(f"{name} has no classifier-free guidance (no guidance_scale in its call) to modify")
        if any(other in name for other in _OTHER_PROTOCOL):
            raise ScfgError(f"{name} calls its U-net in another way than [unconditional | conditional]; not supported")
        scale = self._stated_scale
        if scale is not None and scale < 0:
            raise ScfgError(f"guidance_scale={scale} is negative; use a number >= 0 (1 or less turns guidance off)")
        if not self._has_flag and scale is None:
            raise ScfgError(
                f"{name} keeps its guidance scale to itself; say it: attach(pipe, guidance, guidance_scale=...), "
                f"with the value you pass to the pipeline"
            )

    @property
    def _has_flag(self) -> bool:
        return hasattr(type(self.pipe), "do_classifier_free_guidance") and hasattr(type(self.pipe), "guidance_scale")

    @property
    def calling(self) -> bool:
        """Whether the U-net, in whose forward this is asked, is called by this pipeline and not by another one."""
        return next(pipelines_at_work(sys._getframe(1)), None) is self.pipe

    @property
    def guided(self) -> bool:
        """Whether the pipeline is doing classifier-free guidance in this step, by its own flag."""
        if self._has_flag:
            return bool(self.pipe.do_classifier_free_guidance)
        return bool(self._encoded_with_guidance) and self.guidance_scale > 1

    @property
    def guidance_scale(self) -> float:
        """s of this step: the pipeline's own where it can be read."""
        if self._has_flag:
            return float(self.pipe.guidance_scale)
        return float(self._stated_scale or 0.0)  # _check saw to it that it was stated

    @property
    def guidance_rescale(self) -> float | None:
        """The pipeline's rescaling factor; None where it has none or keeps it in a local."""
        return float(self.pipe.guidance_rescale) if hasattr(type(self.pipe), "guidance_rescale") else None

    @property
    def takes_rescale(self) -> bool:
        """Whether the pipeline's call has a `guidance_rescale`."""
        return "guidance_rescale" in self._parameters

    @property
    def empty_is_zeros(self) -> bool:
        """Whether zeros stand for the text of the unconditional half where no negative prompt is given (SDXL)."""
        return bool(self.pipe.config.get("force_zeros_for_empty_prompt"))

    @property
    def ways(self) -> int:
        """Predictions per image in one batch: [uncond | cond], and a perturbed third with PAG."""
        return 3 if getattr(self.pipe, "do_perturbed_attention_guidance", False) else 2

    @property
    def uses_cond_again(self) -> bool:
        """Whether c is needed unchanged after guidance: for rescaling to std(c), or as PAG's reference."""
        if self.ways == 3:
            return True
        rescale = self.guidance_rescale
        return self.takes_rescale if rescale is None else rescale > 0  # kept in a local: assume that it is used

    @property
    def channels(self) -> int:
        """Channels of the prediction proper; a learned variance may follow (IF)."""
        vae = getattr(self.pipe, "vae", None)
        latent = 3 if vae is None else vae.config.latent_channels
        return int(min(latent, self.unet.config.out_channels))

    @property
    def text_chunk(self) -> int | None:
        """Tokens per chunk of a long prompt, where every chunk begins with BOS."""
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if tokenizer is None or getattr(tokenizer, "bos_token_id", None) is None:
            return None
        return int(tokenizer.model_max_length)

    def repaint_weight(self, sample: Tensor, rows: slice) -> Tensor | None:
        """(B, H, W), 1 where an inpainting pipeline paints and 0 on kept pixels; None for other pipelines."""
        if self.unet.config.in_channels == 9 and "mask_image" in self._parameters:
            return sample[rows, 4].float()  # [latents 4 | mask 1 | masked image 4]
        if self._repaint_mask is None:
            return None
        return self._repaint_mask[: rows.stop - rows.start, 0].to(sample.device).float()

    def tap(self, on_start: Callable[[int], None]) -> None:
        """Begin to listen; `on_start(number of U-net steps)` is called when a denoising loop begins."""

        def loop_begins(arguments: dict[str, Any], result: object) -> None:
            iterable = arguments.get("iterable")
            planned = arguments.get("total") if iterable is None else len(iterable)
            # Schedulers of second order call the U-net twice per step: pipelines keep the real number here.
            on_start(getattr(self.pipe, "_num_timesteps", None) or planned or 1)

        def prompt_encoded(arguments: dict[str, Any], result: object) -> None:
            prompt = arguments.get("prompt")
            self.prompts = [prompt] if isinstance(prompt, str) else prompt
            self._encoded_with_guidance = arguments.get("do_classifier_free_guidance")

        def call_begins(arguments: dict[str, Any], result: object) -> None:
            """Nothing to note: listening is enough to find out about a second thread before it changes anything."""

        def mask_prepared(arguments: dict[str, Any], result: tuple[Tensor, ...]) -> None:
            self._repaint_mask = result[0]

        self._listen("check_inputs", call_begins)
        self._listen("progress_bar", loop_begins)
        self._listen("encode_prompt", prompt_encoded)
        self._listen("prepare_mask_latents", mask_prepared)

    def untap(self) -> None:
        """Put back every method listened to."""
        for name, previous in self._replaced.items():
            if previous is None:
                delattr(self.pipe, name)
            else:
                setattr(self.pipe, name, previous)
        self._replaced.clear()
        self.prompts = self._encoded_with_guidance = self._repaint_mask = None

    def _listen(self, name: str, observe: Callable[[dict[str, Any], Any], None]) -> None:
        original = getattr(self.pipe, name, None)
        if original is None:
            return
        # The class's own signature: another listener may have put a function of any arguments into its place.
        method = getattr(type(self.pipe), name, None)
        signature = inspect.signature(original if method is None else functools.partial(method, self.pipe))

        @functools.wraps(original)
        def listened(*args: Any, **kwargs: Any) -> Any:
            self._take_turn()
            result = original(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            observe(bound.arguments, result)
            return result

        self._replaced[name] = self.pipe.__dict__.get(name)
        setattr(self.pipe, name, listened)

    def _take_turn(self) -> None:
        """A pipeline keeps one call's state in itself, and so does what is attached to it: threads must take turns.

        Raises:
            ScfgError: another thread is in a call of this pipeline.
        """
        with self._turn:
            here = threading.get_ident()
            elsewhere = sys._current_frames().get(self._thread) if self._thread != here else None
            if any(owner is self.pipe for owner in pipelines_at_work(elsewhere)):
                name = type(self.pipe).__name__
                raise ScfgError(
                    f"this {name} is generating in another thread, and a guidance is attached to it; call it from one "
                    f"thread at a time, or attach to a pipeline per thread, {name}(**pipe.components) with a scheduler "
                    f"of its own"
                )
            self._thread = here

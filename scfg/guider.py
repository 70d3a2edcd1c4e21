"""S-CFG as a guider for Modular Diffusers: `pipe.update_components(guider=SemanticGuider())`.

Modular pipelines run one forward per condition. The conditional one gives the regions, the unconditional one the
foreground, and `forward` puts the predictions together: u + s * gamma * (c - u), the same as `scfg.attach` does on an
ordinary pipeline. A modular pipeline's own `save_pretrained` leaves the guider out: save it beside it with
`guider.save_pretrained(folder)` (`guider_config.json`) and load it with `SemanticGuider.from_pretrained(folder)`.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any, Literal

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .attention import eager
from .config import CLASS_NAME, read_config, to_config
from .errors import ScfgError
from .guidance import Guidance
from .pipelines import unwrapped
from .precision import widened
from .session import RegionSession, Texts
from .trace import Step
from .words import Word

if TYPE_CHECKING:
    from diffusers.modular_pipelines import BlockState

__all__ = ["SemanticGuider"]

# The names under which modular pipelines hand (conditional, unconditional) text embeddings to their guider.
_TEXT_FIELDS = ("prompt_embeds", "encoder_hidden_states")


class SemanticGuider(BaseGuidance):
    """Semantic-aware classifier-free guidance and its control arms for modular U-net pipelines (SDXL).

    Args:
        method: "semantic", "cfg", "dose", "placebo", "pointwise" or "interval".
        guidance_scale: s.
        guidance_rescale: rescaling to the conditional prediction's spread (0: none).
        start: diffusers' own window; before it there is no guidance at all.
        stop: end of diffusers' own window; after it there is no guidance at all.
        enabled: diffusers' own switch.
        semantic_start: `SemanticCFG.start`: before it, plain CFG (method "interval": no guidance). None: the method's
            default.
        semantic_stop: `SemanticCFG.stop`: after it, plain CFG (method "interval": no guidance). None: the method's
            default.

    The rest are the fields of `SemanticCFG`. For words or phrases as `tokens` set `guider.words` before the call, e.g.
    to `[scfg.prompt_words(pipe.tokenizer, prompt, 77)]`. Inpainting masks are seen with 9-channel U-nets only.
    `guider.trace` has one `scfg.Step` per step of the latest call.

    Raises:
        ScfgError: a value out of range, or a denoiser that is not a `UNet2DConditionModel`.
    """

    _input_predictions: Any = ["pred_cond", "pred_uncond"]  # noqa: RUF012 (diffusers' protocol: a list on the class)

    @register_to_config
    def __init__(
        self,
        method: str = "semantic",
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        latent_ratio: int | Literal["auto"] = "auto",
        completion: str = "published",
        completion_steps: int = 4,
        foreground: str = "auto",
        empty_foreground: str = "one",
        tokens: str = "all",
        reference: str = "foreground",
        gamma_min: float | None = 0.8,
        gamma_max: float | None = 3.0,
        scale_cap: float | None = 15.0,
        smoothing_sigma: float = 0.5,
        semantic_start: float | None = None,
        semantic_stop: float | None = None,
        refresh_every: int = 1,
        last_blocks: int | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        given = {name: value for name, value in self.config.items() if not name.startswith("_")}
        window = {name: given.pop(name) for name in ("semantic_start", "semantic_stop")}
        given |= {name: value for name, value in window.items() if value is not None}
        read = read_config({"_class_name": CLASS_NAME, **given})
        self.guidance = read.guidance
        # The file names the window in numbers, not "the default of the method".
        first, last = getattr(self.guidance, "start", 0.0), getattr(self.guidance, "stop", 1.0)
        self.register_to_config(semantic_start=first, semantic_stop=last)
        self.guidance_scale = read.guidance_scale
        self.guidance_rescale = read.guidance_rescale
        self.words: list[list[Word]] | None = None
        self._session = RegionSession(
            self.guidance, record=("regions", "gamma"), words_from="set guider.words = [scfg.prompt_words(...)]"
        )
        self._handles: list[RemovableHandle] = []
        self._weight: Tensor | None = None

    @property
    def trace(self) -> list[Step]:
        """One `Step` per step of the latest call."""
        return self._session.trace

    @classmethod
    def from_guidance(
        cls, settings: Guidance, *, guidance_scale: float, guidance_rescale: float = 0.0
    ) -> SemanticGuider:
        """The guider of a `SemanticCFG` or a sibling of it.

        Args:
            settings: the method with its settings.
            guidance_scale: s.
            guidance_rescale: rescaling to the conditional prediction's spread (0: none).
        """
        config = to_config(settings, guidance_scale=guidance_scale, guidance_rescale=guidance_rescale)
        guider: SemanticGuider = cls(**{name: value for name, value in config.items() if name != "_class_name"})
        return guider

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As in diffusers, but another class's file and unknown fields are refused instead of ignored."""
        public = {name: value for name, value in config.items() if not name.startswith("_")}
        read_config({"_class_name": config.get("_class_name", CLASS_NAME), "guidance_scale": 7.5} | public | kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    # -- diffusers' protocol

    @property
    def is_conditional(self) -> bool:
        return bool(self._count_prepared == 1)

    @property
    def num_conditions(self) -> int:
        return 2 if self._guided else 1

    @property
    def _guided(self) -> bool:
        if not self._enabled or math.isclose(self.guidance_scale, 1.0):
            return False
        if self._num_inference_steps is None:
            return True
        first, last = int(self._start * self._num_inference_steps), int(self._stop * self._num_inference_steps)
        return bool(first <= self._step < last)

    @property
    def _fraction(self) -> float:
        return float(self._step / self._num_inference_steps)

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self._session.begin()
        self._session.begin_step(step, self._fraction)

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list[Any]:
        self._choose_half(next((data[name] for name in _TEXT_FIELDS if name in data), None))
        identifiers = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, index, name) for index, name in enumerate(identifiers)]

    def prepare_inputs_from_block_state(self, data: BlockState, input_fields: dict[str, Any]) -> list[Any]:
        field = next((input_fields[name] for name in _TEXT_FIELDS if name in input_fields), None)
        self._choose_half(tuple(getattr(data, name) for name in field) if isinstance(field, tuple) else None)
        identifiers = self._input_predictions[: self.num_conditions]
        return [
            self._prepare_batch_from_block_state(input_fields, data, index, name)
            for index, name in enumerate(identifiers)
        ]

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        self._release()
        if not self._guided or not self.guidance.active(self._fraction):
            return
        unet: Any = unwrapped(denoiser)
        supported = isinstance(unet, UNet2DConditionModel)
        if not supported:
            raise ScfgError(
                f"{CLASS_NAME} needs a UNet2DConditionModel as denoiser, not {type(unet).__name__}; use it with SDXL "
                f"modular pipelines"
            )
        self._thread = threading.get_ident()
        self._handles = [
            unet.register_forward_pre_hook(eager(self._before), with_kwargs=True),
            unet.register_forward_hook(eager(self._after), with_kwargs=True, always_call=True),
        ]

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._release()

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_uncond is None:
            pred = pred_cond
        else:
            pred = pred_uncond + self.guidance_scale * self._scaled(pred_uncond, pred_cond)
        if self.guidance_rescale > 0.0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # -- the method

    def _scaled(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """gamma * (c - u), and a line in the trace."""
        scaled = self._session.scale(uncond, cond, guidance_scale=self.guidance_scale, weight=self._weight)
        self._session.note(cond, scaled, timestep=self._timestep, guidance_scale=self.guidance_scale)
        delta = cond - uncond
        return delta if scaled is None else (scaled.gamma * widened(delta)).to(delta.dtype)

    def _choose_half(self, texts: tuple[Tensor, Tensor] | None) -> None:
        if self._guided and texts is not None and texts[1] is not None:
            self._session.choose_half(texts[1])

    def _before(self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._thread != threading.get_ident():  # another pipeline's call of the same U-net
            return
        sample: Tensor = args[0] if args else kwargs["sample"]
        session, rows = self._session, slice(0, sample.shape[0])
        if self.is_conditional:
            nine = unet.config.in_channels == 9  # [latents 4 | mask 1 | masked image 4]
            self._weight = sample[:, 4].float() if nine else None
            session.draw_seeds(sample[:, : unet.config.out_channels])
        session.watch(
            unet,
            (sample.shape[2], sample.shape[3]),
            Texts(context=kwargs["encoder_hidden_states"], chunk=None, words=lambda: self.words),
            uncond=None if self.is_conditional else rows,
            cond=rows if self.is_conditional else None,
        )

    def _after(self, unet: UNet2DConditionModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        if self._thread != threading.get_ident():
            return
        if output is None:  # the U-net raised: nobody will clean up
            self._release()
        else:
            self._session.collect()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._session.stop()

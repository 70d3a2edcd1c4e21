"""What a training method is: the modules that train, a step that gives the loss per sample, and how to save.

`lora.prepare`, `dreambooth.prepare` and `controlnet.prepare` return one; `loop.train` runs any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .batch import Batch, CaptionTensors, tensors
from .models import Parts, encode_text
from .objective import Objective
from .preserve import BasePrediction

__all__ = ["Method", "Stepper", "base_prediction", "conditions_of", "denoise_step", "text_of"]

Weights = dict[str, Tensor]


@dataclass(kw_only=True)
class Method:
    """One way of training, bound to a base."""

    name: str
    parts: Parts
    objective: Objective
    models: dict[str, Any]
    """Modules with weights that train, by name; frozen weights in them (under a LoRA) are cast to the compute dtype."""
    step: Callable[[Any, Batch, torch.dtype], Tensor]
    """(models, batch, compute dtype) -> weighted loss per sample (B,)."""
    save: Callable[[Weights, Path, dict[str, str]], None]
    """(trained weights by name, folder, metadata) writes what is shipped."""
    result: Callable[[Weights], Weights] = dict
    """From trained weights to those that `save` takes, before they are rounded to the precision of the file."""
    trains_text: bool = False
    """Whether text embeddings change during training, so that they cannot be cached."""
    whole: bool = False
    """Whether whole float32 networks train, which reach a lower compute precision only by autocast."""
    tokens: tuple[str, ...] = ()
    """New tokens, of which the captions must make use."""
    conditioning_dropout: float = 0.0
    needs_conditioning: bool = False
    controlnet: Any = None
    """The ControlNet of validation samples."""
    switch: Callable[[], BasePrediction] | None = None
    """Gives the base's own prediction beside the trained one; None: this method has no off switch."""
    base: BasePrediction | None = None
    """What `switch` gave, where samples are trained towards the base's own prediction."""

    after_step: Callable[[], None] | None = None
    """Called after every optimizer step, as for a bound on the weights."""
    begin: Callable[[Iterable[Batch], Callable[[Batch], Tensor]], str] | None = None
    """(batches, a step without gradients) sets weights from the training's own batches before its first step, and says
    so in a line; None: nothing to do. Not called where a run resumes."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Of the learning rate, by pattern of parameter names."""
    chosen: tuple[str, ...] = ()
    """What the settings by pattern chose, as lines of the table of what trains."""

    def networks(self) -> list[Any]:
        """What runs in every step, trained or not, each once."""
        kept = self.base.networks if self.base else []
        return list({id(module): module for module in [self.parts.unet, *self.models.values(), *kept]}.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the models, by `model.parameter` name."""
        return {
            f"{name}.{key}": parameter
            for name, module in self.models.items()
            for key, parameter in module.named_parameters()
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that train."""
        return {name: parameter for name, parameter in self.parameters().items() if parameter.requires_grad}


def text_of(models: Mapping[str, Any], batch: Batch, parts: Parts) -> CaptionTensors:
    """`embeds` and, for SDXL, `pooled`: from the batch where cached, else from the encoders in `models` or the base.

    Args:
        models: what trains, by name.
        batch: with `embeds`, or with token ids `ids_0`, `ids_1` (B, T).
        parts: the base.
    """
    known = tensors(batch)
    if "embeds" in batch:
        return cast(CaptionTensors, {key: known[key] for key in ("embeds", "pooled") if key in known})
    names = ("text_encoder", "text_encoder_2")
    encoders = [  # a ModuleDict has no `get`
        models[name] if name in models else encoder  # noqa: SIM401
        for name, encoder in zip(names, parts.text_encoders, strict=False)
    ]
    return encode_text(parts, [known[f"ids_{number}"] for number in range(len(encoders))], encoders)


def conditions_of(text: CaptionTensors, frame: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The U-net's and ControlNet's text arguments; `frame` (B, 6) is SDXL's size conditioning, used beside `pooled`.

    Args:
        text: `embeds` (B, T, D), and for SDXL `pooled` (B, P).
        frame: (B, 6) original size, upper left corner of the crop and target size, each (y, x) in pixels.
        dtype: compute precision.
    """
    added = {"text_embeds": text["pooled"].to(dtype), "time_ids": frame} if "pooled" in text else None
    return {"encoder_hidden_states": text["embeds"].to(dtype), "added_cond_kwargs": added}


def denoise_step(
    models: Mapping[str, Any], batch: Batch, dtype: torch.dtype, *, parts: Parts, objective: Objective
) -> Tensor:
    """The plain step of LoRA and DreamBooth: the trained U-net's weighted loss per sample (B,).

    Args:
        models: what trains, by name; "unet" among it.
        batch: see `data.batches.Feed.batch`, with `latents` (B, C, h, w).
        dtype: compute precision.
        parts: the base.
        objective: the loss.
    """
    return objective.losses(_predictor(models, batch, dtype, parts), batch)


def _predictor(
    models: Mapping[str, Any], batch: Batch, dtype: torch.dtype, parts: Parts
) -> Callable[[Tensor, Tensor], Tensor]:
    """x_t (B, C, h, w) and timesteps (B,) -> what the U-net in `models` predicts for the batch's captions."""
    conditions = conditions_of(text_of(models, batch, parts), batch["frame"], dtype)

    def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
        if "beside" in batch:  # inpainting
            noisy = torch.cat([noisy, batch["beside"]], dim=1)
        predicted: Tensor = models["unet"](noisy.to(dtype), timesteps, return_dict=False, **conditions)[0]
        return predicted

    return predict


@torch.no_grad()
def base_prediction(method: Method, batch: Batch, dtype: torch.dtype) -> Tensor:
    """What the base predicts for the rows `preserved` (n,) of the batch, (n, C, h, w) float32.

    Args:
        method: with `base` set.
        batch: see `data.batches.Feed.batch`, with `preserved` and the `base_` embeddings of its rows.
        dtype: compute precision.
    """
    assert method.base is not None
    chosen, known = batch["preserved"], tensors(batch)
    own = {name: known[name][chosen] for name in ("latents", "noise", "timesteps", "frame", "beside") if name in known}
    asked = {name.removeprefix("base_"): value for name, value in known.items() if name.startswith("base_")}
    rows = cast(Batch, own | asked)
    with method.base.models() as models:
        predict = _predictor(models, rows, dtype, method.parts)
        return predict(method.objective.noisy(rows), rows["timesteps"]).float()


def _first_row(batch: Batch) -> Batch:
    """The batch with what `base_prediction` needs to predict the first sample under its own caption."""
    said = {f"base_{key}": value[:1] for key, value in tensors(batch).items() if key in CaptionTensors.__annotations__}
    first = torch.zeros(1, dtype=torch.int64, device=batch["preserved"].device)
    return cast(Batch, {**batch, "preserved": first, **said})


class Stepper(nn.Module):
    """All that trains in one module, whose forward is the method's step; accelerate wraps it for several processes.

    Args:
        method: what trains.
        dtype: compute precision.
        device: where it runs.
    """

    def __init__(self, method: Method, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.models = nn.ModuleDict(method.models)
        self._method = method
        self._step, self._dtype, self._device = method.step, dtype, device
        self._autocast = method.whole and dtype != torch.float32

    def forward(self, batch: Batch) -> Tensor:
        """Losses per sample (B,)."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._autocast):
            if len(batch.get("preserved", ())):
                batch = {**batch, "wanted": base_prediction(self._method, batch, self._dtype)}
            elif "preserved" in batch and any(isinstance(model, FSDPModule) for model in self.models.values()):
                # Divided weights are gathered by all processes together, and others may have samples to preserve.
                base_prediction(self._method, _first_row(batch), self._dtype)
            return self._step(self.models, batch, self._dtype)

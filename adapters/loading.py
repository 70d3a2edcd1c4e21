"""Put a shipped adapter on a pipeline, and take it off again without a trace.

`load` accepts what `ship` writes, a peft folder, another trainer's bare `.safetensors`, or a Hub id. It works through
peft alone, for every kind alike, because diffusers' own loader knows only LoRA (and, since 0.37, LoKr).
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import base, compose, files
from .errors import AdapterError, BaseMismatchError, FormatError
from .keys import Adapter, Module, to_peft
from .source import EMBEDS_FILE, GUIDER_FILE, LORA_FILE, PEFT_FILE, Source, open_source, read_adapter, whole_model

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["Attached", "load"]

_CONFIGS = {"lora": "LoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig"}
Guidance = Callable[[dict[str, Any]], AbstractContextManager[Any]]


class Attached:
    """What `load` put on a pipeline; `detach()`, or leaving the `with`, restores it exactly."""

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.guider: dict[str, Any] | None = None
        """The folder's guider settings, whether or not they were applied."""
        self.run: Any = None
        """What the guidance's context manager yielded."""
        self._undo = ExitStack()

    def detach(self) -> None:
        """Restore the pipeline; calling it twice is harmless."""
        self._undo.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def load(
    pipe: Any,
    source: str | Path,
    *,
    weight: float = 1.0,
    guidance: Guidance | None = None,
    name: str | None = None,
    revision: str | None = None,
    merged: bool = False,
) -> Attached:
    """Attach an adapter to a diffusers pipeline.

    Args:
        source: a shipped or peft folder, a `.safetensors` file in peft, diffusers or kohya keys, or a Hub id.
        weight: scale of the adapter's change; 0 leaves the base's images. LoRA-like adapters only.
        guidance: called with the folder's `guider_config.json`; returns a context manager that is entered now and left
            on detach. A shipped guider without it is reported by one warning.
        name: peft's name for it; by default one that is free.
        merged: added into the weights instead of beside them, whose bits are put back on detach (the last one first):
            faster, the same up to rounding. A DoRA with another weight than 1, which is no sum, stays beside them.

    Raises `FileError` (altered or unsafe files), `FormatError` (weights nobody can represent), `BaseMismatchError`.
    """
    if weight != weight or abs(weight) > 100:
        raise AdapterError(f"weight={weight}: expected a number between -100 and 100, usually 0 to 1")
    opened = open_source(source, revision=revision)
    _check_identity(pipe, opened)
    attached = Attached(name or _free_name(pipe), weight)
    try:
        attached._undo.enter_context(_embeddings(pipe, opened))
        attached._undo.enter_context(_weights(pipe, opened, attached.name, weight, merged))
        _guide(attached, opened, guidance)
    except BaseException:
        attached.detach()
        raise
    return attached


# ---------------------------------------------------------------------------------------------- attaching


def _check_identity(pipe: Any, source: Source) -> None:
    shipped = (source.manifest or {}).get("base")
    if not isinstance(shipped, dict):
        return
    own = base.describe(pipe)
    if shipped.get("architecture") != own["architecture"]:
        raise BaseMismatchError(
            f"{source.path} was made for {str(shipped.get('name'))[:80]!r} (architecture "
            f"{shipped.get('architecture')}), this pipeline's is {own['architecture']}; load it on its own base"
        )
    if shipped.get("weights") != own["weights"]:
        warnings.warn(
            f"{source.path} was made for {str(shipped.get('name'))[:80]!r}; this base has the same architecture "
            "but other weights, so the measured gains need not hold",
            stacklevel=3,
        )


def _free_name(pipe: Any) -> str:
    taken = {key for module in base.modules_of(pipe).values() for key in getattr(module, "peft_config", {})}
    return next(name for i in range(len(taken) + 1) if (name := f"adapter_{i}") not in taken)


@contextmanager
def _weights(pipe: Any, source: Source, name: str, weight: float, merged: bool) -> Iterator[None]:
    if (kind := whole_model(source)) is not None:
        if weight != 1:
            raise AdapterError(f"weight={weight}: a whole {kind} has no weight; leave it at 1")
        with _swapped(pipe, kind, source.path):
            yield
        return
    if (source.file(EMBEDS_FILE) is not None) and source.file(LORA_FILE) is None and source.file(PEFT_FILE) is None:
        yield  # textual inversion alone
        return
    adapter = read_adapter(source)
    models = base.modules_of(pipe)
    for component in adapter.components:
        if component not in models:
            raise BaseMismatchError(f"{source.path} adapts {component}, which {type(pipe).__name__} has not")
    with ExitStack() as undo:
        if merged and (weight == 1 or "dora" not in adapter.kinds):
            fitted = {n: m for part in adapter.components for n, m in _fit(models[part], adapter, part).items()}
            undo.callback(compose.merge(replace(adapter, modules=fitted), models, weight=weight).unmerge)
        else:
            for component in adapter.components:
                undo.enter_context(_injected(models[component], adapter, component, name, weight))
        yield


@contextmanager
def _swapped(pipe: Any, part: str, folder: Path) -> Iterator[None]:
    """Another ControlNet or U-net in place of the pipeline's, for a while."""
    before = getattr(pipe, part, None)
    if before is None:
        raise BaseMismatchError(f"{folder} holds a {part}, which {type(pipe).__name__} has not")
    model = type(before).from_pretrained(folder, use_safetensors=True, torch_dtype=before.dtype).to(before.device)
    setattr(pipe, part, model.eval())
    try:
        yield
    finally:
        setattr(pipe, part, before)


@contextmanager
def _injected(model: torch.nn.Module, adapter: Adapter, component: str, name: str, weight: float) -> Iterator[None]:
    import peft  # seconds of imports, which only putting an adapter on a model needs

    if name in getattr(model, "peft_config", {}):
        raise AdapterError(f"name={name!r} is taken on this {component}; detach it first or choose another")
    fitted = replace(adapter, modules={**adapter.modules, **_fit(model, adapter, component)})
    tensors, settings = to_peft(fitted, component)
    # `text_model.` is there in transformers < 5 and gone after; targets match by the end of a name, weights exactly.
    middle = "text_model." if component != "unet" and hasattr(model, "text_model") else ""
    state = {middle + key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    kind = settings.pop("peft_type").lower()
    before = _snapshot(model)
    try:
        peft.inject_adapter_in_model(getattr(peft, _CONFIGS[kind])(**settings), model, adapter_name=name)
        result = peft.set_peft_model_state_dict(model, state, adapter_name=name)
        _check_loaded(model, result, name, component)
        for _, layer in _tuners(model):
            if _has(layer, name):
                layer.set_scale(name, weight)
                layer.to(next(layer.get_base_layer().parameters()).device)
            layer.set_adapter([key for key in getattr(model, "peft_config", {name: 0}) if _has(layer, key)])
            layer.requires_grad_(False)
        model._hf_peft_config_loaded = True  # type: ignore[assignment]  # diffusers' and transformers' own flag
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        _remove(model, name, before)
        if isinstance(error, AdapterError):
            raise
        raise FormatError(f"peft cannot put these {kind} weights on {component}: {error}") from error
    try:
        yield
    finally:
        _remove(model, name, before)


def _fit(model: torch.nn.Module, adapter: Adapter, component: str) -> dict[str, Module]:
    """The component's modules checked against the model; linear and 1x1-convolution shapes exchanged where needed."""
    layers = {n.removeprefix("text_model."): m for n, m in model.named_modules() if not n.endswith(".base_layer")}
    tuners = {path.removeprefix("text_model."): tuner for path, tuner in _tuners(model)}
    fitted = {}
    for path, module in adapter.part(component).items():
        layer = layers.get(path)
        if path in tuners:
            if not any(_has_kind(tuners[path], suffix) for suffix in module.tensors):
                raise AdapterError(
                    f"{component}.{path} already carries another kind of adapter; detach or merge it first"
                )
            layer = tuners[path].get_base_layer()
        shape = getattr(getattr(layer, "weight", None), "shape", None)
        if shape is None:
            raise BaseMismatchError(
                f"{component}.{path}: the pipeline has no such layer; the adapter is for another base"
            )
        fitted[f"{component}.{path}"] = _shaped(module, f"{component}.{path}", tuple(shape))
    return fitted


def _shaped(module: Module, name: str, shape: tuple[int, ...]) -> Module:
    if module.kind != "lora":
        return module
    tensors = dict(module.tensors)
    down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if len(shape) == 4 and shape[2:] == (1, 1) and down.ndim == 2:
        tensors["lora_A.weight"], tensors["lora_B.weight"] = down[..., None, None], up[..., None, None]
    elif len(shape) == 2 and down.ndim == 4 and down.shape[2:] == (1, 1):
        tensors["lora_A.weight"], tensors["lora_B.weight"] = down[..., 0, 0], up[..., 0, 0]
    if module.dora:
        kept = tensors["lora_magnitude_vector"].reshape(-1)
        tensors["lora_magnitude_vector"] = kept.reshape(1, -1, 1, 1) if len(shape) == 4 else kept
    down, up = tensors["lora_A.weight"], tensors["lora_B.weight"]
    if (up.shape[0], *down.shape[1:]) != shape:
        raise BaseMismatchError(
            f"{name}: the adapter changes a weight of shape {(up.shape[0], *down.shape[1:])}, the base's is {shape}"
        )
    return replace(module, tensors=tensors)


def _check_loaded(model: torch.nn.Module, result: Any, name: str, component: str) -> None:
    unexpected = list(getattr(result, "unexpected_keys", []) or [])
    missing = [k for k in getattr(result, "missing_keys", []) or [] if f".{name}" in k]
    if unexpected or missing:
        word, keys = ("does not know", unexpected) if unexpected else ("misses", missing)
        raise FormatError(f"peft {word} {keys[0]!r} ({len(keys)} in all) on {component}")


def _tuners(model: torch.nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """The layers that carry an adapter, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _has(layer: BaseTunerLayer, name: str) -> bool:
    return any(name in getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names)


def _has_kind(layer: BaseTunerLayer, suffix: str) -> bool:
    return suffix.removesuffix(".weight") in layer.adapter_layer_names


def _snapshot(model: torch.nn.Module) -> dict[str, Any]:
    """What injection touches besides layers."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    names = ("peft_config", "_hf_peft_config_loaded")
    attributes = {n: copy.copy(vars(model)[n]) for n in names if n in vars(model)}
    return {"flags": flags, "attributes": attributes}


def _remove(model: torch.nn.Module, name: str, before: dict[str, Any]) -> None:
    """Delete one adapter; layers that carry none after it become the plain layers they were."""
    for path, layer in _tuners(model):
        if not _has(layer, name):
            continue
        layer.delete_adapter(name)
        if not any(getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    config = getattr(model, "peft_config", {})
    config.pop(name, None)
    if not config:
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(attribute, None)
            if attribute in before["attributes"] and attribute != "peft_config":
                setattr(model, attribute, before["attributes"][attribute])
    parameters = dict(model.named_parameters())
    for path, flag in before["flags"].items():
        if path in parameters:
            parameters[path].requires_grad_(flag)


# ---------------------------------------------------------------------------------------------- tokens and guidance


@contextmanager
def _embeddings(pipe: Any, source: Source) -> Iterator[None]:
    """Learned tokens on copies of tokenizer and embedding table, so that taking them off restores the very objects."""
    path = source.file(EMBEDS_FILE)
    if path is None:
        yield
        return
    tensors, _ = files.read_tensors(path)
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    table, size = encoder.get_input_embeddings(), encoder.config.vocab_size
    width = table.weight.shape[1]
    for token, vectors in tensors.items():
        if vectors.shape[-1] != width:
            raise BaseMismatchError(
                f"{path}: token {token[:40]!r} has width {vectors.shape[-1]}, the text encoder {width}"
            )
    pipe.tokenizer = copy.deepcopy(tokenizer)
    encoder.set_input_embeddings(copy.deepcopy(table))  # resizing works in place on whatever table is there
    try:
        pipe.load_textual_inversion([{token: v} for token, v in tensors.items()], token=list(tensors))
        yield
    finally:
        pipe.tokenizer = tokenizer
        encoder.set_input_embeddings(table)
        encoder.config.vocab_size = size


def _guide(attached: Attached, source: Source, guidance: Guidance | None) -> None:
    path = source.file(GUIDER_FILE)
    if path is None:
        return
    attached.guider = files.read_json(path)
    if guidance is None:
        summary = json.dumps(attached.guider)[:160]
        warnings.warn(
            f"{source.path} ships the guidance it was measured with ({summary}); it is not applied, "
            "pass guidance=... to apply it",
            stacklevel=3,
        )
    else:
        attached.run = attached._undo.enter_context(guidance(dict(attached.guider or {})))

"""Put a shipped adapter on a pipeline, and take it off again without a trace.

`load` accepts what `ship` writes, a peft folder, another trainer's bare `.safetensors`, or a Hub id. It works through
peft alone, for every kind alike, because diffusers' own loader knows only LoRA (and, since 0.37, LoKr).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import base, compose, files
from .embeddings import learned
from .errors import AdapterError, BaseMismatchError, FileError
from .injection import fit_to_model, injected
from .placement import is_offloaded, offload_like, unwrapped
from .scope import Place, Scope, Where, scoped
from .seat import refuse_fused
from .source import Source, open_source, read_adapter, read_guider, tokens_of, whole_model
from .text import TextRule, rule_of, ruled

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Attached", "load"]

MAX_LAYERS, MAX_WIDTH = 64, 2**17
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
    pipe: DiffusionPipeline,
    source: str | Path,
    *,
    weight: float = 1.0,
    guidance: Guidance | None = None,
    name: str | None = None,
    revision: str | None = None,
    merged: bool = False,
    scope: Scope | None = None,
    place: Callable[[Any, str], Where] | None = None,
) -> Attached:
    """Attach an adapter to a diffusers pipeline.

    The user's own adapters stay as they are: which are on, whether all are off (`disable_lora`), and so on after ours
    have left. A pipeline may be compiled or offloaded. What peft has no layer for (LyCORIS' whole differences, norms
    and biases, DoRA magnitudes on LoHa, LoKr or over inputs, several kinds in one model) is always merged, as is a
    DoRA on sequentially offloaded weights.

    While it is attached, prompts are read as in its training (clip-skip, chunks), where its manifest says so and the
    pipeline has no such rule of its own (`adapters.text.follow`).

    Args:
        pipe: with all its models; it stays usable after the adapter has left.
        source: a shipped or peft folder, a `.safetensors` file in peft, diffusers or kohya keys, or a Hub id.
        weight: scale of the adapter's change; 0 leaves the base's images. LoRA-like adapters only.
        guidance: called with the folder's `guider_config.json`; returns a context manager that is entered now and left
            on detach. A shipped guider without it is reported by one warning.
        name: peft's name for it; by default one that is free.
        revision: branch, tag or commit of the Hub's repository.
        merged: added into the weights instead of beside them, whose bits are put back on detach (the last one first):
            faster, the same up to rounding.
        scope: where, when and how strongly it acts while sampling; it then stays beside the weights, and with `merged`
            a second copy of the adapted weights holds it. None: as the folder's guider says, where `guidance` applies
            that.
        place: finds words in the pictures of a pipeline, such as `scfg.place_of`; a shipped scope may need it.

    Raises:
        FileError: altered or unsafe files.
        FormatError: weights nobody can represent.
        BaseMismatchError: made for another architecture.
        AdapterError: the user's adapters are fused into the weights (`fuse_lora`), a layer carries another kind, or the
            scope does not fit the adapter or the pipeline.
    """
    if weight != weight or abs(weight) > 100:
        raise AdapterError(f"weight={weight}: expected a number between -100 and 100, usually 0 to 1")
    with files.understood(source):
        opened = open_source(source, revision=revision)
    _check_identity(pipe, opened)
    attached = Attached(name or _free_name(pipe), weight)
    try:
        with files.understood(opened.path):
            attached.guider = read_guider(opened)
            scope = scope or _shipped_scope(attached.guider if guidance else None, place and partial(place, pipe))
        attached._undo.enter_context(_read_as_trained(pipe, opened))
        before = getattr(pipe, "unet", None)
        with files.understood(opened.path):
            attached._undo.enter_context(_adapter(pipe, opened, attached.name, weight, merged and scope.neutral))
        if not scope.neutral:
            attached._undo.enter_context(_within(pipe, scope, opened, attached, before, merged))
        _guide(attached, guidance, str(opened.path))
    except BaseException:
        attached.detach()
        raise
    return attached


# ---------------------------------------------------------------------------------------------- attaching


def _check_identity(pipe: DiffusionPipeline, source: Source) -> None:
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


def _read_as_trained(pipe: DiffusionPipeline, source: Source) -> AbstractContextManager[None]:
    """The rule for text that the adapter was trained with, where the pipeline follows none of its own."""
    with files.understood(source.path):
        trained, own = TextRule.from_manifest(source.manifest), rule_of(pipe)
    if trained.neutral or trained == own:
        return nullcontext()
    if not own.neutral:
        warnings.warn(
            f"{source.path} was trained with {trained.said()}, and this pipeline reads {own.said()}", stacklevel=3
        )
        return nullcontext()
    return ruled(pipe, trained)


def _free_name(pipe: DiffusionPipeline) -> str:
    taken = {key for module in base.modules_of(pipe).values() for key in getattr(module, "peft_config", {})}
    return next(name for i in range(len(taken) + 1) if (name := f"adapter_{i}") not in taken)


@contextmanager
def _adapter(pipe: DiffusionPipeline, source: Source, name: str, weight: float, merged: bool) -> Iterator[None]:
    if (kind := whole_model(source)) is not None:
        if weight != 1:
            raise AdapterError(f"weight={weight}: a whole {kind} has no weight; leave it at 1")
        with learned(pipe, tokens_of(source)), _swapped(pipe, kind, source.path):
            yield
        return
    adapter = read_adapter(source)
    models = base.modules_of(pipe)
    for component in adapter.components:
        if component not in models:
            raise BaseMismatchError(f"{source.path} adapts {component}, which {type(pipe).__name__} has not")
    with learned(pipe, adapter.tokens), ExitStack() as undo:
        for component in adapter.components:
            part = replace(adapter, modules=fit_to_model(models[component], adapter, component))
            # A DoRA reads the base's weights in every step, which offloading leaves empty.
            dora = any(module.dora for module in part.modules.values())
            if merged or part.merges_only or (dora and any(map(is_offloaded, models[component].modules()))):
                refuse_fused(models[component], component)
                undo.callback(compose.merge(part, models, weight=weight).unmerge)
            else:
                undo.enter_context(injected(models[component], part, component, name, weight))
        yield


@contextmanager
def _swapped(pipe: DiffusionPipeline, part: str, folder: Path) -> Iterator[None]:
    """Another ControlNet or U-net in place of the pipeline's, for a while."""
    before = getattr(pipe, part, None)
    if before is None:
        raise BaseMismatchError(f"{folder} holds a {part}, which {type(pipe).__name__} has not")
    own = unwrapped(before)
    _check_layers(folder / "config.json")
    model = type(own).from_pretrained(folder, use_safetensors=True, torch_dtype=own.dtype).eval()
    setattr(pipe, part, offload_like(model, own))
    try:
        yield
    finally:
        setattr(pipe, part, before)


def _check_layers(config: Path) -> None:
    """A stranger's config may ask for a network that takes hours to make, before its weights are looked at."""
    for name, value in files.read_object(config).items():
        numbers = [n for n in _flat(value) if isinstance(n, int | float)]
        most = MAX_LAYERS if "per_block" in name else MAX_WIDTH
        if len(numbers) > 64 or any(not abs(n) <= most for n in numbers):
            raise FileError(f"{config}: {name} is {str(value)[:80]}, at most {most} is expected")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _within(
    pipe: DiffusionPipeline,
    scope: Scope,
    source: Source,
    attached: Attached,
    before: torch.nn.Module | None,
    merged: bool,
) -> AbstractContextManager[None]:
    """The scope on the U-net; refused where the adapter is more, or other, than a change of the U-net."""
    kind, models = whole_model(source), base.modules_of(pipe)
    texts = [part for part, model in models.items() if part != "unet" and attached.name in _names(model)]
    if kind == "controlnet" or texts:
        raise AdapterError(
            f"scope: {source.path} changes {kind or ' and '.join(texts)}, which takes no part in single steps of "
            "sampling; a scope is for adapters of the U-net alone"
        )
    if kind is None and attached.name not in _names(models["unet"]):
        why = read_adapter(source).merges_only or "it is a DoRA, and the weights are offloaded"
        raise AdapterError(
            f"scope: {source.path} can only be added into the weights here ({why}); a scope needs it beside them"
        )
    other = unwrapped(before) if kind == "unet" else None
    return scoped(
        pipe, scope, unet=models["unet"], name=attached.name, weight=attached.weight, base=other, merged=merged
    )


def _names(model: torch.nn.Module) -> Collection[str]:
    return getattr(model, "peft_config", {})


def _shipped_scope(guider: dict[str, Any] | None, place: Place | None) -> Scope:
    return Scope.from_config(guider["scope"], place) if guider and guider.get("scope") else Scope()


def _guide(attached: Attached, guidance: Guidance | None, where: str) -> None:
    if attached.guider is None:
        return
    if guidance is None:
        told = [f"{name} {attached.guider[name]}" for name in ("method", "guidance_scale") if name in attached.guider]
        scoped = ["a scope"] if attached.guider.get("scope") else []
        warnings.warn(
            f"{where} ships the guidance it was measured with ({', '.join([*told, *scoped]) or 'guider_config.json'}); "
            "it is not applied, pass guidance=lambda config: scfg.attach_config(pipe, config)"
            f"{' and place=scfg.place_of' if scoped else ''} to apply it",
            stacklevel=3,
        )
    else:
        own = {name: value for name, value in attached.guider.items() if name != "scope"}
        attached.run = attached._undo.enter_context(guidance(own))

"""Where, when and how strongly an adapter acts while pictures are sampled.

With b the base's prediction and t the adapted one, for a prompt c or the empty prompt 0, at guidance scale s:

| fields | prediction | idea |
|---|---|---|
| none (plain) | t(0) + s (t(c) - t(0)) | |
| `uncond_weight=0` | b(0) + s (t(c) - b(0)) | unconditional priors (arXiv 2503.20240), domain guidance (2504.01521) |
| `uncond_weight=w` | t_w(0) + s (t(c) - t_w(0)), adapter at weight w | personalization guidance (2508.00319) |
| `early_weight` | t at that weight in the first steps, t at its own in the others | they decide the layout |
| `start`, `stop` | b outside these fractions of the steps, t inside | PersonGenSampler (2502.05895) |
| `where` | m t + (1 - m) b in both halves, m a map of the place of b's class | masked sampling (2502.05895) |
| `where_stop` | the same in the first steps, then t everywhere | they decide the layout; see benchmarks/study |

`uncond_weight`, `early_weight`, `start` and `stop` need no further pass through the U-net: a LoRA's first factor gives
each row of the batch its share of the change. `where` needs the base's prediction of both halves:
four rows an image instead of two, until `where_stop`. A whole fine-tuned U-net is asked beside the base's U-net.

A LoRA may be loaded with `merged=True` besides: where all rows take the whole change, the U-net then runs with weights
that hold it, and is as fast as without an adapter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .beside import Both, Whole, with_layers
from .errors import AdapterError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Call", "Place", "Scope", "Subject", "Where", "renamed", "scoped", "without_identifier"]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Call:
    """One U-net call under guidance, as a `Where` is told of it.

    Attributes:
        unet: the network that is about to run, as the base has it.
        sample: its input, (2 B, C, h, w): the unconditional half, then the conditional one.
        timestep: the scheduler's t.
        context: the text it attends to, (2 B, T, D): what the base is asked.
        images: B.
        prompts: the same as texts, repeated where a prompt has several images; None: the pipeline was given embeddings.
    """

    unet: torch.nn.Module
    sample: Tensor
    timestep: Tensor | float
    context: Tensor
    images: int
    prompts: list[str] | None


class Where(Protocol):
    """Finds the place of the subject: entered around the base's forward, after which what it gave returns the map.

    The map is (B, 1, h, w) in [0, 1] at the latents' size: 1 where the adapter's prediction is taken.
    """

    def __call__(self, call: Call) -> AbstractContextManager[Callable[[], Tensor]]: ...


Place = Callable[[str], Where]
"""From words of a prompt to where they are in a picture, such as `scfg.place_of` on a pipeline."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Whom a scope looks for, as text: what of `where` can be kept in a file.

    Attributes:
        identifier: the word that marks the subject in prompts, such as "sks".
        noun: the class's name, which follows it.
    """

    identifier: str
    noun: str

    def to_config(self, stop: float) -> dict[str, Any]:
        """What a file keeps of a place. An earlier version, which looked for it in the adapted network, said `noun`.

        Args:
            stop: the scope's `where_stop`.
        """
        return {"identifier": self.identifier, "class": self.noun, "stop": stop}


def renamed(prompt: str, names: Mapping[str, str]) -> str:
    """The prompt with words replaced, "" leaving one out, and the articles before them mended.

    With {"sks": "", "<rex>": "owl"}, "a sks eel and a <rex>" becomes "an eel and an owl", and "sks, eel" becomes "eel".
    """
    said: list[str] = []
    changed = False
    for word in prompt.split():
        bare = word.rstrip(",.;:!?")
        known = bare if word not in names and bare in names else word
        end = word[len(known) :]
        new = names.get(known, known)
        changed |= new != known
        if not new:
            if said and end and said[-1][-1].isalnum():
                said[-1] += end
            continue
        if changed and said and said[-1].lower() in ("a", "an"):
            said[-1] = said[-1][0] + ("n" if new[0].lower() in "aeiou" else "")
        said.append(new + end)
        changed = False
    return " ".join(said)


def without_identifier(prompt: str, identifier: str) -> str:
    """The prompt as the base knows it: "a sks owl" becomes "an owl"."""
    return renamed(prompt, {identifier: ""})


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How far an adapter reaches; the default is everywhere, in every step, in both halves alike.

    Attributes:
        uncond_weight: weight of the adapter in the unconditional half; 0: the base's own prediction; None: as in the
            other half. In between it is the adapter at that weight for the kinds that are linear in it (LoRA, LoHa,
            LoKr); a DoRA's layers are interpolated. A whole U-net knows None, 0 and 1 only.
        start, stop: fractions of the sampling steps between which the adapter is on.
        early_weight: weight of the adapter, in both halves, in the first steps; None: its own. 0: off. The first steps
            decide what stands where, so that less of the adapter there leaves the rest of the prompt to the base.
            Values as for `uncond_weight`, with which it does not combine.
        early_stop: fraction of the sampling steps until which `early_weight` counts.
        where: gives a map of the subject's place in each image; outside of it the base's prediction is taken. It
            watches the base, which knows how its class stands beside other objects.
        where_stop: fraction of the sampling steps at which `where` ends; from then on the adapter acts everywhere. The
            first steps decide what stands where, the others may then draw the picture in one piece.
        elsewhere: from a prompt to what the base is asked outside of `where`, such as the prompt with the class's name
            in place of the subject's; None: the same prompt.
        subject: whom `where` looks for; needed only to write the scope into a file. See `of_subject`.
    """

    uncond_weight: float | None = None
    early_weight: float | None = None
    early_stop: float = 0.2
    start: float = 0.0
    stop: float = 1.0
    where: Where | None = None
    where_stop: float = 1.0
    elsewhere: Callable[[str], str] | None = None
    subject: Subject | None = None

    def __post_init__(self) -> None:
        for name, value in (("uncond_weight", self.uncond_weight), ("early_weight", self.early_weight)):
            if value is not None and not 0 <= value <= 100:
                raise AdapterError(f"{name}={value}: expected 0 (the base's own) to the adapter's weight")
        if self.uncond_weight is not None and self.early_weight is not None:
            raise AdapterError(
                f"uncond_weight={self.uncond_weight} and early_weight={self.early_weight} do not combine; give one"
            )
        if not 0 < self.early_stop <= 1:
            raise AdapterError(f"early_stop={self.early_stop}: expected a fraction of the steps, above 0 and at most 1")
        if not 0 <= self.start < self.stop <= 1:
            raise AdapterError(
                f"start={self.start}, stop={self.stop}: expected fractions of the steps, 0 <= start < stop <= 1"
            )
        if not 0 < self.where_stop <= 1:
            raise AdapterError(f"where_stop={self.where_stop}: expected a fraction of the steps, above 0 and at most 1")
        if self.elsewhere is not None and self.where is None:
            raise AdapterError("elsewhere says what the base is asked outside of `where`; give `where` too")

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing."""
        weights = (self.uncond_weight, self.early_weight)
        return weights == (None, None) and (self.start, self.stop) == (0.0, 1.0) and self.where is None

    @classmethod
    def of_subject(cls, place: Place, subject: Subject, **fields: Any) -> Scope:
        """A scope whose `where` is the place of the class; outside it the base is asked for the class.

        Args:
            place: such as `functools.partial(scfg.place_of, pipe)`.
            subject: its identifier and class.
            **fields: the other fields.
        """
        return cls(
            where=place(subject.noun),
            elsewhere=functools.partial(without_identifier, identifier=subject.identifier),
            subject=subject,
            **fields,
        )

    def to_config(self) -> dict[str, Any]:
        """What `guider_config.json` keeps under "scope".

        Raises:
            AdapterError: `where` is a function of the caller's own, of which a file can say nothing.
        """
        config = {"format": FORMAT, "uncond_weight": self.uncond_weight, "start": self.start, "stop": self.stop}
        if self.early_weight is not None:  # only then: earlier versions know no such field
            config |= {"early_weight": self.early_weight, "early_stop": self.early_stop}
        if self.where is None:
            return config
        if self.subject is None:
            raise AdapterError("scope: your own `where` cannot be written to a file; make it with Scope.of_subject")
        return config | {"where": self.subject.to_config(self.where_stop)}

    @classmethod
    def from_config(cls, config: dict[str, Any], place: Place | None = None) -> Scope:
        """The scope that `to_config` wrote.

        Args:
            config: what `guider_config.json` keeps under "scope".
            place: finds words in pictures, for a scope that acts in the place of its subject only.

        Raises:
            AdapterError: written by a version with other fields, or with a bad value; or it needs `place`.
        """
        values = dict(config)
        where = values.pop("where", None)
        known = {"uncond_weight", "early_weight", "early_stop", "start", "stop"}
        texts = {"identifier", "class"}
        understood = values.pop("format", None) == FORMAT and set(values) <= known
        if where is not None:
            understood &= isinstance(where, dict) and set(where) == texts | {"stop"}
            understood &= understood and all(isinstance(where[name], str) and where[name] for name in texts)
        if not understood:
            raise AdapterError(
                f"scope {str(config)[:200]}: this version knows format {FORMAT} with {', '.join(sorted(known))} and "
                "where (identifier, class, stop); update the toolkit, or remove the scope from the file to sample "
                "without it"
            )
        try:
            if where is None:
                return cls(**values)
            if place is None:
                raise AdapterError(
                    f"scope: this adapter acts in the place of {where['identifier']} {where['class']} only; pass "
                    "place=scfg.place_of to adapters.load, or scope=adapters.Scope() to let it act everywhere"
                )
            subject = Subject(identifier=where["identifier"], noun=where["class"])
            return cls.of_subject(place, subject, where_stop=where["stop"], **values)
        except TypeError as error:
            raise AdapterError(f"scope {str(config)[:200]}: {error}") from error


@contextmanager
def scoped(
    pipe: DiffusionPipeline,
    scope: Scope,
    *,
    unet: torch.nn.Module,
    name: str,
    weight: float,
    base: torch.nn.Module | None = None,
    merged: bool = False,
) -> Iterator[None]:
    """Keep the adapter on the pipeline's U-net within its scope, until the context is left.

    Args:
        pipe: the pipeline; it says whether it guides, and its scheduler which step this is.
        scope: see `Scope`.
        unet: the adapted network, itself where it is compiled.
        name: peft's name of the adapter on it.
        weight: its weight.
        base: the base's network, where `unet` is a whole other one.
        merged: keep a second copy of the adapted layers' weights, with a LoRA added: faster, the same up to rounding.

    Raises:
        AdapterError: the pipeline keeps its guidance to itself, or another adapter is on the U-net as well.
    """
    if scope.neutral:
        yield
        return
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise AdapterError(f"scope: {type(pipe).__name__} does not say whether it guides; sample without a scope")
    share, early = (
        _share(name, getattr(scope, name), weight, whole=base is not None) for name in ("uncond_weight", "early_weight")
    )
    with ExitStack() as undo:
        network: Both
        if base is None:
            network = undo.enter_context(with_layers(unet, name, merged=merged))
        else:
            network = Whole(tuned=unet.forward, base=base)
        texts = undo.enter_context(_heard(pipe, scope.elsewhere)) if scope.where else _Texts()
        own = unet.__dict__.get("forward")
        unet.forward = _Scoped(pipe, scope, network, share, early, texts)  # type: ignore[method-assign]
        try:
            yield
        finally:
            del unet.forward
            if own is not None:
                unet.forward = own


def _share(name: str, part: float | None, weight: float, *, whole: bool) -> float | None:
    """A smaller weight's share of the adapter's change; None: all of it."""
    if part is None:
        return None
    if weight == 0 or part > abs(weight):
        raise AdapterError(f"{name}={part} is above the adapter's weight {weight}; it may only be less")
    if whole and part not in (0, 1):
        raise AdapterError(f"{name}={part}: a whole U-net has no weights between 0 and 1")
    return None if part == weight else part / weight


class _Scoped:
    """The U-net's forward within a scope."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scope: Scope,
        network: Both,
        share: float | None,
        early: float | None,
        texts: _Texts,
    ) -> None:
        self.pipe, self.scope, self.network, self.texts = pipe, scope, network, texts
        self.share, self.early = share, early

    def __call__(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        given = (sample, timestep, encoder_hidden_states, *args)
        fraction = _fraction(self.pipe.scheduler, timestep)
        early = self.early if fraction < self.scope.early_stop else None
        if not self.scope.start <= fraction < self.scope.stop or early == 0:
            return self.network.plain(*given, **kwargs)
        if not self.pipe.do_classifier_free_guidance:
            return self.network.adapted(len(sample), early, *given, **kwargs)
        if getattr(self.pipe, "do_perturbed_attention_guidance", False) or sample.shape[0] % 2:
            raise AdapterError(
                f"scope: {type(self.pipe).__name__} guides on other batches than [unconditional | conditional]; "
                "sample without a scope"
            )
        rows = sample.shape[0] // 2
        shared = (rows, self.share) if early is None else (2 * rows, early)
        adapted = self.network.adapted(*shared, *given, **kwargs)  # first: it is what a guidance watches
        if self.scope.where is None or fraction >= self.scope.where_stop:
            return adapted
        context, kwargs = _elsewhere(self.texts, encoder_hidden_states, kwargs)
        call = Call(
            unet=self.network.base,
            sample=sample,
            timestep=timestep,
            context=context,
            images=rows,
            prompts=self.texts.repeated(rows),
        )
        with self.scope.where(call) as found:
            plain = self.network.plain(sample, timestep, context, *args, **kwargs)[0]
            place = found().to(plain)
        mixed = torch.lerp(plain, adapted[0], torch.cat([place, place]))
        return (mixed, *adapted[1:]) if isinstance(adapted, tuple) else type(adapted)(sample=mixed)


def _fraction(scheduler: Any, timestep: Tensor | float) -> float:
    """How far sampling is: 0 in the first of the scheduler's steps."""
    steps = scheduler.timesteps
    index = int((steps.to("cpu", torch.float32) - float(timestep)).abs().argmin())
    return index / len(steps)


# ------------------------------------------------------------------------------------------ what the base is asked


@dataclass
class _Texts:
    """What a pipeline was last told, and the same as the base is asked it.

    Attributes:
        prompts: what the base is asked; None: embeddings were given.
        embeds: (B, T, D) of the same; None: it is what the adapted network is asked.
        pooled: (B, P) of SDXL.
    """

    prompts: list[str] | None = None
    embeds: Tensor | None = None
    pooled: Tensor | None = None

    def repeated(self, images: int) -> list[str] | None:
        """The prompt of each image."""
        if not self.prompts or images % len(self.prompts):
            return None
        return [prompt for prompt in self.prompts for _ in range(images // len(self.prompts))]


@contextmanager
def _heard(pipe: DiffusionPipeline, elsewhere: Callable[[str], str] | None) -> Iterator[_Texts]:
    """Keeps the prompts that the pipeline encodes, and encodes once more what the base is asked."""
    texts = _Texts()
    original, own = pipe.encode_prompt, pipe.__dict__.get("encode_prompt")
    signature = inspect.signature(original)

    @functools.wraps(original)  # others who listen read the signature
    def encode(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        prompt = bound.arguments.get("prompt")
        texts.prompts = [prompt] if isinstance(prompt, str) else prompt
        texts.embeds = texts.pooled = None
        if elsewhere is not None and prompt is not None and bound.arguments.get("prompt_embeds") is None:
            texts.prompts = [elsewhere(one) for one in texts.prompts or ()]
            for name in ("prompt", "prompt_2"):
                if (given := bound.arguments.get(name)) is not None:
                    bound.arguments[name] = _asked(given, elsewhere)
            again = original(*bound.args, **bound.kwargs)
            texts.embeds, texts.pooled = again[0], again[2] if len(again) > 2 else None
        return result

    pipe.encode_prompt = encode
    try:
        yield texts
    finally:
        del pipe.encode_prompt
        if own is not None:
            pipe.encode_prompt = own


def _asked(prompt: str | list[str], elsewhere: Callable[[str], str]) -> str | list[str]:
    return elsewhere(prompt) if isinstance(prompt, str) else [elsewhere(one) for one in prompt]


def _elsewhere(texts: _Texts, context: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The U-net's text for the base: the conditional half replaced by what the base is asked."""
    if texts.embeds is None:
        return context, kwargs
    half = len(context) // 2
    context = torch.cat([context[:half], texts.embeds.to(context)])
    added = kwargs.get("added_cond_kwargs")
    if texts.pooled is not None and added and "text_embeds" in added:
        own = added["text_embeds"]
        pooled = torch.cat([own[:half], texts.pooled.to(own)])
        kwargs = kwargs | {"added_cond_kwargs": added | {"text_embeds": pooled}}
    return context, kwargs

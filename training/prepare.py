"""What happens between the settings and the first step: processes, caching, precision, what will train."""

from __future__ import annotations

import importlib.util
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object

from . import validate
from .batch import Batch, CaptionTensors, DrawnBatch, ids_of, tensors
from .config import TagSettings, TrainSettings, ValidationSettings
from .data.batches import Draws, Feed, Stream
from .data.cache import Encoded, Live, Region, Store, caching_seconds, encode_captions, encode_views
from .data.crops import Views
from .dreambooth import Concept, Prior
from .errors import TrainingError
from .estimate import Estimate, estimate, trained_table
from .holes import beside
from .method import Method
from .models import encode_images, encode_text, tokenize_captions, too_long
from .networks import DTYPES, lay_ready
from .progress import Progress

__all__ = [
    "Prepared",
    "announce",
    "make_accelerator",
    "prepare_run",
]

HEAVY = 1e12  # parameters times latents of a picture: a second or more of each sample's step
SHORTER = (2, 4, 8)  # by how much a trial's pictures are then shorter: the least that is not heavy, or the last


@dataclass(kw_only=True)
class Prepared:
    """Everything the loop needs that is not the model or the optimizer."""

    feed: Feed
    views: int
    """Of the pictures that are taught."""
    names: dict[str, list[str]]
    """Content of the data and, if any, of the class images, to notice at resuming that it changed."""
    texts: dict[str, CaptionTensors] | None
    """Cached embeddings by caption; None when the text encoders are asked in every step."""
    fixed: list[DrawnBatch]
    """Batches of the fixed-noise validation loss."""
    size: tuple[int, int]
    dtype: torch.dtype
    caching_seconds: float
    """Of a dry run, which does not cache."""
    area: float
    """Of a picture of the run, in pictures of the trial."""
    trial: Batch | None
    """What a dry run tries a step of where the run itself would cache."""
    ready: Callable[[DrawnBatch], Batch]
    """Moves a batch to the device and gives it `latents`, and text embeddings of uncached frozen encoders."""


def _tried(
    method: Method, concepts: Sequence[Concept], device: torch.device, say: Callable[[str], None]
) -> tuple[Sequence[Concept], float]:
    """What a dry run tries a step of, and the area of the run's pictures in pictures of the trial."""
    data = concepts[0].views
    numbers = sum(item.numel() for module in method.networks() for item in module.parameters())
    heavy = numbers * (data.resolution // method.parts.vae_scale_factor) ** 2 / HEAVY
    if device.type != "cpu" or heavy <= 1:
        return concepts, 1.0
    times = next((times for times in SHORTER if heavy <= times**2), SHORTER[-1])
    smaller = [_smaller(concept, times) for concept in concepts]
    say(
        f"a step of {data.resolution} pixels is slow without a GPU: this trial takes one of "
        f"{smaller[0].views.resolution}, and computes time and memory from it"
    )
    return smaller, data.resolution**2 / smaller[0].views.resolution ** 2


def _smaller(concept: Concept, times: int) -> Concept:
    """With smaller pictures for a trial."""
    prior, kinds = concept.prior, ("views", "own", "placed")
    if prior is not None:
        there = {kind: views.smaller(times) for kind in kinds if (views := getattr(prior, kind)) is not None}
        prior = replace(prior, **there)
    return replace(concept, views=concept.views.smaller(times), prior=prior)


def make_accelerator(
    settings: TrainSettings, out: Path, say: Callable[[str], None], record: Mapping[str, Any] | None = None
) -> Accelerator:
    """Accelerate with the trackers that are installed; precision is ours, see `prepare_run`.

    Args:
        settings: trackers, and whether TF32 is allowed.
        out: where trackers write.
        say: receives a line about each tracker that is not installed.
        record: all settings of the run, which trackers keep.

    Raises:
        TrainingError: the launcher asks for DeepSpeed.
    """
    there = [name for name in settings.trackers if _tracker_installed(name)]
    accelerator = Accelerator(
        mixed_precision="no",
        dynamo_backend="no",
        log_with=there or None,
        project_dir=str(out),
        # Nothing here has buffers that change, and gradients may share memory with the buckets they travel in.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise TrainingError(
            "the launcher asks for DeepSpeed, whose weights this loop cannot save; use --multi_gpu (DDP) or --use_fsdp"
        )
    if there and not settings.dry_run:
        accelerator.init_trackers(
            settings.project, config=_flat(record or {}), init_kwargs={"wandb": {"name": out.name, "dir": str(out)}}
        )
    for name in settings.trackers:
        if name not in there and accelerator.is_main_process:
            say(f"train.trackers: {name} is not installed, so it is left out")
    if settings.tf32 and accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as numbers and texts, which every tracker takes."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def _tracker_installed(name: str) -> bool:
    module = {"comet_ml": "comet_ml", "aim": "aim"}.get(name, name)
    return importlib.util.find_spec(module) is not None


def prepare_run(
    method: Method,
    concepts: Sequence[Concept],
    settings: TrainSettings,
    accelerator: Accelerator,
    *,
    region: Region | None,
    cache: str,
    cache_folder: Path,
    say: Callable[[str], None],
) -> Prepared:
    """Caches what can be cached, frees what is no longer needed, and rounds frozen weights to what they compute in.

    Args:
        method: what trains; its frozen weights are cast in place.
        concepts: what is taught, each with its prior; `method.base` is set if one asks for the base's prediction.
        settings: of the training.
        accelerator: of `make_accelerator`.
        region: mask of the subject per entry, see `cache.encode_views`.
        cache: "memory", "disk" or "off"; several processes share one on disk, a dry run has none.
        cache_folder: of the cache on disk.
        say: receives progress lines.

    Raises:
        TrainingError: data, captions or class images that the method cannot train on.
    """
    parts, device, data = method.parts, accelerator.device, concepts[0].views
    for concept in concepts:
        _refuse(method, concept.views, prior=concept.prior, region=region, cache=cache)
    validate.check_validation(method, settings.validation, data.sizes[0])
    if any(concept.prior is not None and concept.prior.to_base for concept in concepts):
        assert method.switch is not None  # see _refuse
        method.base = method.switch()
    off, seconds, area = cache == "off", 0.0, 1.0
    if settings.dry_run:
        concepts, area = _tried(method, concepts, device, say)
        store = Store(cache_folder if cache == "disk" else None)
        quick, tried = off or parts.inpainting, concepts[0].views
        cache, seconds = "off", 0.0 if quick else area * caching_seconds(tried, parts, store, device=device)
    elif cache == "memory" and accelerator.num_processes > 1:
        say(f"data.cache: several processes share the cache through {cache_folder}")
        cache = "disk"
    if region is not None:  # which asks the U-net
        lay_ready(method, settings, accelerator, data.resolution)
    kept = None if cache == "off" else Store(cache_folder if cache == "disk" else None)
    for module in (parts.vae, *parts.text_encoders) if off else (parts.vae,) if parts.inpainting else ():
        module.to(device)  # they are asked in every step
    samples = _samples(method, concepts, region, kept, device, say)
    feed = _feed(method, [stream for some in samples for stream in some], settings, accelerator, region=region)
    tags = next((concept.views.tags for concept in concepts if concept.views.tags.varies), data.tags)
    texts = _cached_texts(method, feed, tags, kept, settings, device, say)
    feed.text = _text_of(method, texts)
    if kept is not None and (damaged := gather_object(kept.damaged)):
        say(f"{len(damaged)} damaged files of the cache were made again, such as {damaged[0]}")
    trial = _trial(method, feed, device) if settings.dry_run and not off else None
    if texts is not None:
        parts.release(vae=not settings.validation.prompts and not parts.inpainting)
    if region is None:  # not before: beside the encoders a GPU might not have the room
        lay_ready(method, settings, accelerator, data.resolution)
    return Prepared(
        feed=feed,
        views=sum(len(own.entries) for own, *_ in samples),
        names=_contents(samples),
        texts=texts,
        fixed=_fixed(samples, feed, settings.validation),
        size=data.sizes[0],
        dtype=DTYPES[settings.precision],
        caching_seconds=seconds,
        area=area,
        trial=trial,
        ready=_ready(method, device),
    )


def _refuse(method: Method, data: Views, *, prior: Prior | None, region: Region | None, cache: str) -> None:
    """What does not go together, found before any work."""
    parts = method.parts
    if not parts.text_encoders or parts.vae is None:
        raise TrainingError(
            "the base's encoders were released by an earlier training; load it anew with models.load_parts"
        )
    if method.needs_conditioning and parts.inpainting:
        raise TrainingError(
            "base: a ControlNet of an inpainting model cannot be trained here; take the text-to-image model that it "
            "was made from"
        )
    if parts.inpainting and region is not None:
        raise TrainingError("region: words are not looked for in inpainting models; leave it out, or set data.masks")
    if method.needs_conditioning and data[0].conditioning is None:
        raise TrainingError("a ControlNet needs conditioning images: set data.conditioning or data.annotator")
    if method.needs_conditioning and prior is not None:
        raise TrainingError(
            "dreambooth.class_prompt: class images have no conditioning, so a ControlNet cannot use them"
        )
    if region is not None and cache == "off":
        raise TrainingError("a region function needs the cache: set data.cache to memory or disk")
    if prior is not None and prior.to_base and method.switch is None:
        raise TrainingError(
            f"dreambooth.preserve: base asks the base beside what trains, and method {method.name} has no switch "
            "for that; set pictures or off"
        )


def _samples(
    method: Method,
    concepts: Sequence[Concept],
    region: Region | None,
    store: Store | None,
    device: torch.device,
    say: Callable[[str], None],
) -> list[list[Stream]]:
    """All samples of each concept, its pictures first, encoded once into `store` or anew in every step, with captions
    that the method can use."""
    progress = Progress("caching", say)

    def entries(views: Views) -> Encoded | Live:
        if store is None or method.parts.inpainting:  # which also encodes the picture around each sample's hole
            return Live(views, method.parts.vae_scale_factor)
        own = region if views is concepts[0].views else None  # class images count whole, as they do beside masks
        return encode_views(views, method.parts, store, device=device, region=own, progress=progress)

    samples = [_streams(concept, entries, alone=len(concepts) == 1) for concept in concepts]
    streams = [stream for some in samples for stream in some]
    if method.parts.inpainting:
        say(
            "inpainting base: a quarter of the samples are painted whole, the others in random holes; pictures are "
            "encoded in every step"
        )
    elif store is not None:
        say(f"cached {sum(len(stream.entries) for stream in streams)} views, {store.encoded} newly encoded here")
    if len(concepts) > 1:
        total = sum(concept.share for concept in concepts)
        for concept, (own, *_) in zip(concepts, samples, strict=True):
            say(f"  {concept.name:16} {len(own.entries):>6} views, {concept.share / total:.0%} of the samples")
    captions = sorted({caption for stream in streams for caption in _captions(stream) if caption})
    if long := too_long(method.parts, captions):
        say(long)
    unused = [token for token in method.tokens if not any(token in caption for caption in captions)]
    if unused:
        raise TrainingError(
            f"lora.tokens: {', '.join(unused)} is in no caption, so it would not train; use it in captions"
        )
    return samples


def _cached_texts(
    method: Method,
    feed: Feed,
    tags: TagSettings,
    store: Store | None,
    settings: TrainSettings,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, CaptionTensors] | None:
    """Embeddings of all captions of the run, the empty one and the prompts of validation; None where the encoders are
    asked in every step."""
    if method.trains_text:
        say("text embeddings are not cached: the text encoder trains")
        return None
    if store is None:
        return None
    captions = {""}.union(*(_captions(stream) for stream in feed.streams))
    if tags.varies:
        drawn = feed.captions(settings.steps, tags.cached)
        if len(drawn) > tags.cached:
            say(
                f"text embeddings are not cached: this run draws more than data.tags.cached {tags.cached} captions, so "
                "the text encoders stay and encode in every step"
            )
            for encoder in method.parts.text_encoders:
                encoder.to(device)
            return None
        say(f"the tags of this run make {len(drawn)} captions, all of which are cached")
        captions |= drawn
    names = encode_captions([*sorted(captions), *settings.validation.prompts], method.parts, store, device=device)
    return {caption: typing.cast(CaptionTensors, store[name]) for caption, name in names.items()}


def _feed(
    method: Method,
    streams: list[Stream],
    settings: TrainSettings,
    accelerator: Accelerator,
    *,
    region: Region | None,
) -> Feed:
    """The batches of this process, with what the objective draws at random; captions are left as they are."""
    parts, chosen = method.parts, method.objective.settings
    masked = chosen.background < 1
    if masked and region is None and "mask" not in streams[0].entries[0]:
        raise TrainingError(
            f"objective.background = {chosen.background} weights the loss by masks, but there are none: "
            "set data.masks, or hand in a region"
        )
    draws = Draws(
        latent_shape=(parts.channels, parts.vae_scale_factor),
        timesteps=len(method.objective.products),
        noise_offset=chosen.noise_offset,
        caption_dropout=chosen.caption_dropout,
        conditioning_dropout=method.conditioning_dropout,
        conditioning=method.needs_conditioning,
        masks=masked,
        holes=parts.inpainting,
    )
    return Feed(
        streams,
        draws,
        seed=settings.seed,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
    )


def _fixed(samples: list[list[Stream]], feed: Feed, settings: ValidationSettings) -> list[DrawnBatch]:
    """Batches of the fixed-noise validation loss: of each concept's own pictures."""
    count, seed = settings.loss_samples, settings.seed
    return [
        batch
        for own, *_ in samples
        for batch in validate.fixed_loss_batches(own, feed.draws, count, seed=seed, text=feed.text)
    ]


def _contents(samples: list[list[Stream]]) -> dict[str, list[str]]:
    """What the subjects' pictures hold, and apart from it what is drawn beside them, if anything."""
    taught = [own for own, *_ in samples]
    beside = [stream for _, *others in samples for stream in others]
    parts = {"the data": taught, "class_images": beside} if beside else {"the data": taught}
    return {
        part: [name for stream in streams for name in stream.entries.names + _captions(stream)]
        for part, streams in parts.items()
    }


def _captions(stream: Stream) -> list[str]:
    """All captions that a stream's samples may come with if no tags are drawn, by entry."""
    said = stream.entries.captions
    if stream.several:
        said = said + [caption for index in range(len(said)) for caption in stream.several(index)]
    return said + ([stream.asked(caption) for caption in said] if stream.asked else [])


def _streams(concept: Concept, entries: Callable[[Views], Encoded | Live], *, alone: bool) -> list[Stream]:
    """The subject's samples and those of its class.

    With weight/share per sample, the mean over a batch is mean(instance) + prior_weight * mean(class) at any ratio, and
    with several concepts the mean of that by their shares.
    """
    prior = concept.prior
    total = 1.0 if prior is None else 1 + prior.ratio
    part = 1.0 if alone else concept.share / total

    def stream(views: Views, *, share: float = 1.0, **more: Any) -> Stream:
        drawn: dict[str, Any] = {"draw": views.draw, "several": views.captions} if views.varies() else {}
        return Stream(entries=entries(views), share=part * share, **drawn, **more)

    if prior is None:
        return [stream(concept.views)]
    asked = prior.class_caption if prior.surroundings else None
    own = [stream(concept.views, share=1 - prior.placed_share, weight=total, asked=asked)]
    # What is drawn beside the subject's pictures exists at all of their sizes, and comes in them as often.
    sizes = own[0].entries.sizes
    spread = {size: sizes.count(size) / len(sizes) for size in set(sizes)}
    if prior.placed is not None:
        own.append(stream(prior.placed, share=prior.placed_share, weight=total, asked=asked, spread=spread))
    weight = prior.weight * total / prior.ratio
    kept = [
        stream(views, share=prior.ratio * share, weight=weight, preserved=prior.to_base, spread=spread)
        for views, share in ((prior.views, 1 - prior.own_share), (prior.own, prior.own_share))
        if views is not None
    ]
    return [*own, *kept]


def _text_of(method: Method, texts: dict[str, CaptionTensors] | None) -> Callable[[list[str]], CaptionTensors]:
    """Captions to cached embeddings, or to token ids for encoders that train or are not cached."""
    if texts is None:
        return lambda captions: ids_of(tokenize_captions(method.parts, captions))

    def embeddings(captions: list[str]) -> CaptionTensors:
        found = [tensors(texts[caption]) for caption in captions]
        return typing.cast(CaptionTensors, {key: torch.stack([item[key] for item in found]) for key in found[0]})

    return embeddings


def _trial(method: Method, feed: Feed, device: torch.device) -> Batch:
    """A batch of the largest pictures, made as caching makes it: the encoders are gone when the U-net comes."""
    parts = method.parts
    parts.vae.to(device)
    batch = _ready(method, device, together=parts.inpainting)(feed.batch(feed.largest(), 0))
    if not parts.inpainting:
        parts.vae.to("cpu")
    return batch


def _ready(method: Method, device: torch.device, *, together: bool = True) -> Callable[[DrawnBatch], Batch]:
    """See `Prepared.ready`; pictures are encoded `together` or, in the memory of one, one by one."""

    def ready(drawn: DrawnBatch) -> Batch:
        parts = method.parts
        batch = {key: value.to(device, non_blocking=True) for key, value in tensors(drawn).items()}
        with torch.no_grad():
            if "hole" in batch:
                batch["beside"] = beside(parts, batch["pixels"], batch.pop("hole"))
            if "pixels" in batch:
                pixels = batch.pop("pixels")
                found = [encode_images(parts.vae, some) for some in pixels.split(len(pixels) if together else 1)]
                batch["mean"], batch["std"] = (torch.cat(some) for some in zip(*found, strict=True))
            batch["latents"] = torch.addcmul(batch.pop("mean"), batch.pop("std"), batch.pop("posterior"))
            if "ids_0" in batch and not method.trains_text:
                ids = [batch.pop(f"ids_{number}").to(one.device) for number, one in enumerate(parts.text_encoders)]
                batch |= {key: value.to(device) for key, value in tensors(encode_text(parts, ids)).items()}
        return typing.cast(Batch, batch)

    return ready


def announce(
    method: Method, model: torch.nn.Module, settings: TrainSettings, prepared: Prepared, say: Callable[[str], None]
) -> Estimate:
    """Says what trains, and what memory and time it will take; returns the estimate.

    Args:
        method: what trains.
        model: the method's step, without the wrapper for several processes.
        settings: of the training.
        prepared: of `prepare_run`.
        say: receives the lines.
    """
    feed = prepared.feed
    say(f"{method.name}: {prepared.views} views, {feed.per_step} samples a step, {settings.steps} steps")
    found = estimate(
        method,
        model,
        prepared.trial or prepared.ready(feed.batch(feed.largest(), 0)),
        settings,
        dtype=prepared.dtype,
        asked=feed.asked,
        caching_seconds=prepared.caching_seconds,
        area=prepared.area,
    )
    for line in [*trained_table(method), *found.lines(settings)]:
        say(line)
    return found

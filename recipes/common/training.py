"""What training recipes share: their settings, their pictures, and the loop with these settings."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from recipes.common.base import POCKET, around, load_base, sampled_as
from recipes.common.cli import named, say
from recipes.common.comparison import TO_COME, WHOLE_TO_COME, Comparison, resolve
from recipes.common.draw import OWN, TUNED
from recipes.common.guidance import guider_of
from recipes.common.search import combinations, resolve_search
from recipes.common.settings import MeasureSettings, SamplingSettings, ScopeSettings, ShipSettings, TuneSettings
from training.config import (
    BaseSettings,
    ConceptSettings,
    DataSettings,
    DreamBoothSettings,
    ObjectiveSettings,
    TrainSettings,
    require,
    resolved,
)

MYPY = False  # not TYPE_CHECKING: the reader of settings would run those imports, and --help would take seconds
if MYPY:
    from adapters.edges import Canny
    from training.data.crops import Views
    from training.dreambooth import Concept, Prior
    from training.estimate import Estimate
    from training.loop import Result
    from training.method import Method
    from training.models import Parts

__all__ = [
    "SubjectTraining",
    "Training",
    "check_stages",
    "data",
    "load_for_training",
    "record",
    "run_training",
    "subjects",
]

LATER = ("tune", "measure", "ship", "sampling")


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of every training recipe. A stage whose settings are null is left out."""

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    data: DataSettings
    """The training pictures, with captions, and with masks or conditions if the recipe needs them."""
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """The loss."""
    train: TrainSettings = field(default_factory=TrainSettings)
    """The training loop."""
    tune: TuneSettings | None = None
    """Search for the best guidance and checkpoint before measuring. null: no search."""
    measure: MeasureSettings | None = None
    """The comparison. null: nothing is measured. If `data.source` has a subject.json, it is the default of
    `measure.subjects`."""
    ship: ShipSettings | None = None
    """The release folder. null: nothing is shipped."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled for tuning and measuring."""
    out: str
    """Folder for checkpoints, the trained weights and the results of the later stages."""

    def __post_init__(self) -> None:
        require(self.tune is None or self.measure is not None, "tune prepares a comparison: set measure too")
        texts = getattr(getattr(self, "lora", None), "text_encoder", False)
        if texts and self.tune is not None and self.tune.scopes is None:  # a scope is of the U-net alone
            object.__setattr__(self, "tune", replace(self.tune, scopes=[]))
        plan, source = self.measure, self.data.source
        taught = (Path(source).expanduser() / "subject.json").is_file()
        if taught and plan is not None and not plan.subjects and plan.targets is None:
            object.__setattr__(self, "measure", replace(plan, subjects=[source]))


@dataclass(frozen=True, kw_only=True)
class SubjectTraining(Training):
    """Settings of the recipes that teach subjects."""

    dreambooth: DreamBoothSettings = field(default_factory=DreamBoothSettings)
    """Preservation of the class, and what full fine-tuning trains."""
    region: str | None = None
    """Words such as sks dog. Their regions in the attention are used as masks in the region-aware loss."""
    concepts: dict[str, ConceptSettings] = field(default_factory=dict)
    """Name -> a further subject, taught together with the one in `data` and `dreambooth`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.concepts or self.region is None,
            f"region {self.region!r} is of one subject: leave it out, or concepts",
        )


def record(settings: Training) -> dict[str, Any]:
    """What is written beside the weights: what shaped them. The later stages may change and be run again."""
    return {name: value for name, value in resolved(settings).items() if name not in LATER}


def check_stages(settings: Training, *, controlnet: bool = False, whole: bool = False) -> Comparison | None:
    """What the later stages would find wrong is said before training; returns the comparison that follows, if any.

    Args:
        settings: of the recipe.
        controlnet: what trains is a ControlNet, not an adapter.
        whole: what trains is the U-net itself.

    Raises:
        TrainingError: what tuning, measuring or shipping would lack.
    """
    import adapters
    from recipes.common import scorers, spaces
    from training import offload, optim, quantize

    optim.check_optimizer(settings.train)
    lora = getattr(settings, "lora", None)
    kind = {} if lora is None else {"adapter": lora.kind, "dora": lora.dora}
    quantize.check_quantization(settings.train.quantize, whole=whole, **kind)
    offload.check_offload(settings.train, whole=whole)
    if settings.ship is not None and settings.ship.sign:
        adapters.signing.check_key(settings.ship.sign)
    if settings.measure is None:
        return None
    _check_scopes(settings)
    network, adapter = (TO_COME, None) if controlnet else (None, WHOLE_TO_COME if whole else TO_COME)
    comparison = resolve(settings.measure, base=settings.base, adapter=adapter, controlnet=network)
    if settings.tune is not None:
        resolve_search(settings.tune, comparison, adapter=adapter)
    if settings.ship is not None:
        case = comparison.units[0]
        for arm in (comparison.baseline, comparison.arm):  # one of the two ships
            with named(f"measure.arms, {arm.name!r}"):
                guider_of(arm.guidance, case.identifier, case.noun)
    for kept in (spaces.space, scorers.model):
        kept.cache_clear()  # networks of metrics would keep their memory while training
    return comparison


def _check_scopes(settings: Training) -> None:
    """Scopes are for adapters of the U-net alone."""
    assert settings.measure is not None
    texts = getattr(getattr(settings, "lora", None), "text_encoder", False)
    scopes = {f"measure.arms, {name!r}: scope": arm.scope for name, arm in settings.measure.arms.items()}
    if settings.tune is not None:
        scopes |= {f"tune.scopes, {place}": scope for place, scope in enumerate(settings.tune.scopes or ())}
    for flag, scope in scopes.items():
        require(
            not texts or scope in (None, ScopeSettings()),
            f"{flag}: lora.text_encoder adapts the text encoders, which take no part in single steps of sampling; a "
            "scope is for adapters of the U-net alone",
        )


def load_for_training(settings: Training, comparison: Comparison | None) -> Parts:
    """The base's parts for training; what could not be drawn with the base afterwards is said now.

    Args:
        settings: of the recipe.
        comparison: that follows; null: there is none.

    Raises:
        TrainingError: no such base, or sampling and guidances that do not fit it, or pictures of other settings where
            the comparison will draw its own.
    """
    from recipes.common.guidance import check_guided
    from recipes.common.trial import check_pictures
    from scfg.trace import RECORDABLE

    parts: Parts = load_base(settings.base)
    if comparison is None:
        return parts
    pipe, plan = around(parts, settings.base), comparison.plan
    sampled_as(pipe, settings.base, settings.sampling)
    for arm in comparison.arms.values():
        shown = RECORDABLE if arm.name == plan.arm and plan.overlays else ()
        with named(f"measure.arms, {arm.name!r}"):
            check_guided(pipe, arm.guidance, settings.sampling, record=shown)
    for options in [] if settings.tune is None else combinations(settings.tune):
        own = plan.arms[plan.arm]
        with named("tune.grid"):
            check_guided(pipe, replace(own, options={**own.options, **options}), settings.sampling)
    unknown = ("base", "precision", *OWN, *(() if settings.tune is None else TUNED))
    check_pictures(pipe, comparison, settings.sampling, settings.out, unknown=unknown)
    return parts


def run_training(settings: Training, method: Method, pictures: Views, **more: Any) -> Result | None:
    """The loop with the recipe's settings.

    Args:
        settings: of the recipe.
        method: what trains.
        pictures: training views, of `data` or `subjects`.
        **more: what `training.loop.train` takes besides, such as `prior` and `region`.

    Returns:
        What `training.loop.train` returns: None after a dry run.
    """
    from recipes.common.stages import took
    from training import loop

    with took("training", dry=settings.train.dry_run):
        return loop.train(
            method,
            pictures,
            settings.train,
            out=settings.out,
            record=record(settings),
            cache=settings.data.cache,
            cache_folder=settings.data.cache_folder,
            estimated=partial(_say_stages, settings),
            **more,
        )


def _say_stages(settings: Training, found: Estimate) -> None:
    from recipes.common.stages import stages, stages_table

    for line in stages_table(stages(settings, found)):
        print(line, flush=True)


def subjects(
    parts: Parts, settings: SubjectTraining, words: Mapping[str, str] | None = None
) -> tuple[Views, Prior | None, list[Concept]]:
    """The pictures of the first subject, its samples of the class, and the further subjects with theirs.

    All pictures are looked at before the first class image is drawn.

    Args:
        parts: the base.
        settings: of the recipe.
        words: new tokens, and the word of the class that stands for each.
    """
    from training.dreambooth import Concept

    each = {"": settings, **{name: _with(settings, name) for name in settings.concepts}}
    pictures = {}
    for name, own in each.items():
        with named(f"concepts.{name}") if name else nullcontext():
            pictures[name] = data(own.data, parts=parts)
    _check_told_apart(pictures)
    called = {own.dreambooth.identifier: "" for own in each.values() if own.dreambooth.identifier}
    found, first = [], len(pictures[""].source)
    for name, own in each.items():
        with named(f"concepts.{name}") if name else nullcontext():
            prior = _class_prior(parts, own, pictures[name], {**(called if settings.concepts else {}), **(words or {})})
        chosen = settings.concepts.get(name)
        share = 1.0 if chosen is None else chosen.share or len(pictures[name].source) / first
        found.append(Concept(name=name, views=pictures[name], prior=prior, share=share))
    return found[0].views, found[0].prior, found[1:]


def _check_told_apart(pictures: Mapping[str, Views]) -> None:
    """Subjects of one class need captions of their own: what has the same words is learnt as one subject."""
    known: dict[frozenset[str], str] = {}
    for name, views in pictures.items():
        captions = frozenset(views.caption(index) for index in range(len(views)))
        first = known.setdefault(captions, name)
        require(
            first == name,
            f"concepts.{name}: its captions are those of {f'concepts.{first}' if first else 'data'}, such as "
            f"{min(captions)!r}, so the two would be learnt as one; give it another identifier or prompt",
        )


def _with(settings: SubjectTraining, name: str) -> SubjectTraining:
    """The settings as one of the further subjects has them."""
    from adapters.card import slug

    one, first = settings.concepts[name], settings.dreambooth
    tags = replace(settings.data.tags, prefix=one.prefix or settings.data.tags.prefix)
    place = (
        "class_images" if one.class_prompt == first.class_prompt else f"class_images-{slug(one.class_prompt or name)}"
    )
    with named(f"concepts.{name}"):
        return replace(
            settings,
            concepts={},
            data=replace(settings.data, source=one.source, masks=one.masks, prompt=one.prompt, tags=tags),
            dreambooth=replace(
                first,
                identifier=one.identifier or first.identifier,
                class_prompt=one.class_prompt,
                class_prompt_file=first.class_prompt_file if one.class_prompt else None,
                class_folder=one.class_folder or str(Path(settings.out) / place),
            ),
        )


def _class_prior(
    parts: Parts, settings: SubjectTraining, pictures: Views, words: Mapping[str, str] | None
) -> Prior | None:
    """The samples of the class that the settings of a subject ask for; missing class images are generated."""
    from recipes.common.stages import took
    from training import dreambooth

    chosen, folder = settings.dreambooth, Path(settings.out) / "class_images"
    if settings.train.dry_run and chosen.class_prompt and chosen.preserve != "off":
        dreambooth.check_prior(parts, chosen, pictures, folder=folder, words=words, **_manner(settings))
        say(f"would generate up to {chosen.class_images} pictures of the class; the trial takes the subject's instead")
        return dreambooth.Prior(
            views=pictures, to_base=chosen.preserve == "base", ratio=chosen.prior_ratio, weight=chosen.prior_weight
        )
    with took("class pictures") if chosen.class_prompt and chosen.preserve != "off" else nullcontext():
        return dreambooth.prior(
            parts,
            chosen,
            pictures,
            words=words,
            folder=folder,
            offload=settings.sampling.offload,
            **_manner(settings),
        )


def _manner(settings: SubjectTraining) -> dict[str, Any]:
    """How class images are drawn, besides what they are of."""
    from recipes.common.precision import class_precision

    return {
        "seed": settings.train.seed,
        "batch_size": settings.sampling.batch_size,
        "precision": class_precision(settings.sampling),
    }


def data(settings: DataSettings, *, parts: Parts, edges: Canny | None = None) -> Views:
    """Training views of the pictures; `pocket` and `pocket-fluent` are drawn scenes of the embedded world.

    Args:
        settings: which pictures.
        parts: the base, which says what sizes it takes.
        edges: the Canny detector of their conditions; null: they have none of edges.
    """
    from training.data import crops, images

    if settings.source not in (POCKET, "pocket-fluent"):
        return crops.views(images.load_images(settings, edges=edges, say=say), settings, multiple=parts.multiple)
    from training.pocket.control import EDGES, Scenes

    look = "fluent" if settings.source == "pocket-fluent" else "noto"
    scenes = Scenes(control=settings.annotator, count=settings.count or 6000, look=look, edges=edges or EDGES)
    return crops.views(scenes, settings, multiple=parts.multiple)

"""Ship an adapter: weights in every useful spelling, card, guider, measured gains, report; whole or not at all.

accelerate launch recipes/ship.py --base.path pocket --adapter runs/dog/lora --measured runs/dog/measured --out runs/dog
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recipes.common.base import POCKET, check_text, paints_holes, sampling_pipeline
from recipes.common.cli import launch, say
from recipes.common.guidance import guider_of
from recipes.common.settings import GuidanceSettings, MeasureSettings, SamplingSettings, ShipSettings
from recipes.common.stages import took
from recipes.common.units import Case, cases
from training.config import BaseSettings, require
from training.errors import TrainingError
from training.text import read_text

__all__ = ["Settings", "run"]


MAX_PAGE = 2**29  # bytes; the pictures are in it
EMBEDDED = ("from training.pocket import base_path  # scfg-toolkit embeds this base", "base_path()")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Writes a release folder from a trained adapter and its measured results."""

    base: BaseSettings
    """The base model. `path: pocket` is the embedded one."""
    adapter: str
    """What to ship: the folder that training wrote, or any LoRA file. For a full fine-tune: its `unet` folder."""
    measured: str | None = None
    """Folder `measured` of a comparison. null: the card says that nothing was measured."""
    ship: ShipSettings = field(default_factory=ShipSettings)
    """Facts for the model card."""
    out: str
    """Folder of the run. The release is written to its subfolder `release`."""


def run(settings: Settings) -> Path | None:
    """Ship; returns the release folder on the main process."""
    with took("shipping"):
        return _ship(settings)


def _ship(settings: Settings) -> Path | None:
    import adapters
    from training.ranks import state

    if not state().is_main_process:
        return None
    if settings.ship.sign:
        adapters.signing.check_key(settings.ship.sign)
    measured = Path(settings.measured) if settings.measured else None
    plan, gains, rows, shots, best, facts = _measured(measured)
    if gains is not None and gains.released is not None and gains.released.word in ("harm", "no detectable change"):
        say(f"note: what ships does not help by its own measure, and its card says so. {gains.released.sentence}")
    pipe = sampling_pipeline(settings.base, SamplingSettings())
    check_text(pipe, settings.adapter)
    weights = Path(settings.adapter).expanduser()
    card = _card(settings, plan, 1.0 if best is None or best.weight is None else best.weight, pipe)
    folder = adapters.ship.ship(
        Path(settings.out) / "release",
        weights=weights,
        base=adapters.describe(pipe) | {"name": card.base_model},
        card=card,
        gains=gains,
        rows=rows,
        shots=shots,
        guider=None if best is None else guider_of(best, *_subject(plan)),
        rule=adapters.text.rule_of(pipe),
        models=adapters.base.modules_of(pipe),
        config=_config(weights),
        facts=facts,
        page=_page(measured) if measured else None,
        compact=settings.ship.compact,
        key=settings.ship.sign,
    )
    page = "README.md" if measured is None or settings.ship.compact else "report.html"
    say(f"shipped {folder}, {'signed' if settings.ship.sign else 'unsigned'}; open {folder / page}")
    if settings.ship.push:
        names = adapters.ship.push(folder, settings.ship.push, private=settings.ship.private)
        say(f"pushed {len(names)} files to {settings.ship.push}")
    return folder


def _subject(plan: MeasureSettings) -> tuple[str, str]:
    """Identifier and class of the subject; both empty where there is none."""
    case = cases(plan, None)[0] if plan.subjects else None
    return ("", "") if case is None else (case.identifier, case.noun)


def _measured(folder: Path | None) -> tuple[Any, ...]:
    """Plan, gains, rows, shots, the guidance that ships, and the facts of a comparison."""
    import adapters
    from recipes import measure
    from training.command_line import parse

    if folder is None:
        return MeasureSettings(prompts=["a photo"]), None, (), {}, None, {}
    require(
        (folder / "settings.yaml").is_file(), f"measured {folder} has no settings.yaml; run recipes/measure.py first"
    )
    made = parse(measure.Settings, ["--config", str(folder / "settings.yaml")])
    gains, stored = adapters.measuring.verify.checked_gains(folder)
    guidance: Any = gains.design.notes.get("guidance")
    facts = stored.get("facts")
    arm = gains.ships
    require(
        isinstance(guidance, dict) and isinstance(guidance.get(arm), dict) and isinstance(facts, dict),
        f"measured {folder}: gains.json lacks facts or the guidance of {arm}; run recipes/measure.py again",
    )
    rows = adapters.measuring.table.read_csv(folder / "per_image.csv")
    best = GuidanceSettings.of(guidance[arm])
    names = [arm["name"] for arm in gains.arms]
    return made.measure, gains, rows, _shots(folder.parent, made.measure, names), best, facts


def _page(measured: Path) -> str:
    """The report; it is the last thing that is read, so that what is said of the others comes first."""
    from adapters.files import read_bytes

    try:
        return read_bytes(measured / "report.html", MAX_PAGE).decode()
    except UnicodeDecodeError as error:
        raise TrainingError(f"{measured / 'report.html'} is damaged ({error}); run recipes/measure.py again") from error


def _shots(out: Path, plan: MeasureSettings, arms: Sequence[str]) -> dict[str, list[Any]]:
    """The sampled pictures by arm, as far as they are still there, in the order of subjects and prompts."""
    from adapters.measuring.sample import shots_in
    from recipes.common.comparison import BASE
    from recipes.common.trial import class_folder

    units = [Case(prompts=[])] if plan.targets else cases(plan, None)
    found: dict[str, list[Any]] = {name: [] for name in arms}
    for case in units:
        place = {prompt: index for index, prompt in enumerate(case.prompts)}
        own = out / "pictures" / case.name
        taken = [replace(shot, subject=case.name) for shot in shots_in(own)]
        if place:
            # The base has prompts without the identifier, and its pictures may have been drawn for identity.
            of_class = [*shots_in(class_folder(str(out), case)), *(shot for shot in taken if shot.arm == BASE)]
            base = case.asked({(shot.prompt, shot.seed): shot for shot in of_class}.values())
            taken = [shot for shot in taken if shot.prompt in place and shot.arm != BASE]
            taken += [replace(shot, subject=case.name, arm=BASE) for shot in base]
            taken.sort(key=lambda shot: (place[shot.prompt], shot.seed))
        for shot in taken:
            if shot.arm in found:
                found[shot.arm].append(shot)
    return {name: shots for name, shots in found.items() if shots}


def _card(settings: Settings, plan: MeasureSettings, weight: float, pipe: Any) -> Any:
    import adapters
    from training import single_file
    from training.pocket import VERSION, base_hash

    ship, pocket = settings.ship, settings.base.path == POCKET
    case = None if plan.targets else cases(plan, None)[0]
    single = single_file.is_file(settings.base.path)
    name = VERSION if pocket else Path(settings.base.path).name if single else settings.base.path
    calls = case.calls if case else ""
    limits = list(ship.limits)
    if pocket:
        limits.append("Made for a 64-pixel base model of drawn scenes: to learn and to test with, not for pictures.")
    facts = {"base hash": base_hash()} if pocket else {}
    if case and case.folder:
        facts["subject"] = adapters.files.read_json(case.folder / "subject.json").get("origin", "the maker's pictures")
    return adapters.Card(
        title=ship.title or f"{calls or Path(settings.adapter).name} on {Path(name).name}",
        base_model=name,
        base_import=EMBEDDED if pocket else ("", ""),
        single_file=type(pipe).__name__ if single else "",
        inpainting=paints_holes(pipe),
        schedule=_schedule(settings.base, pipe, single=single),
        license=ship.license,
        description=ship.description,
        trigger_words=ship.trigger_words or ([calls] if calls else []),
        prompts=case.prompts[:3] if case and settings.measured else [],
        limits=limits,
        weight=weight,
        command=f"python recipes/measure.py --config {settings.measured}/settings.yaml" if settings.measured else "",
        facts=facts,
    )


def _schedule(base: BaseSettings, pipe: Any, *, single: bool) -> dict[str, Any]:
    """What the card's code must tell the scheduler: a file does not carry it, and settings may overrule a folder."""
    config = pipe.scheduler.config
    if not single and base.prediction == "auto" and base.zero_snr is None:
        return {}
    told = {"prediction_type": config.prediction_type}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return told | (zero if config.get("rescale_betas_zero_snr") else {})


def _config(weights: Path) -> str | None:
    """The settings that training wrote beside its result."""
    for path in (weights / "settings.yaml", weights.parent / "settings.yaml"):
        if path.is_file():
            return read_text(path)
    return None


if __name__ == "__main__":
    launch(Settings, run)

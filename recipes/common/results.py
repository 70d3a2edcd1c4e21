"""What a comparison leaves: per_image.csv, gains.json, report.html, the sheet, and the same in words."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.common.base import paints_holes
from recipes.common.cli import say
from recipes.common.comparison import Comparison, worn
from recipes.common.draw import sheet_of_arms
from recipes.common.guidance import EFFECTIVE, arguments_of, guided
from recipes.common.precision import drawing_in, of_sampling
from recipes.common.settings import SamplingSettings
from training.config import write_settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from adapters.measuring.design import Design
    from adapters.measuring.gains import Gains
    from adapters.measuring.sample import Shot
    from adapters.measuring.table import Row

__all__ = ["arms_table", "at_equal_scale", "unseen", "write_results"]


def write_results(
    pipe: DiffusionPipeline,
    comparison: Comparison,
    sampling: SamplingSettings,
    rows: list[Row],
    shots: Mapping[str, Sequence[Shot]],
    more: Mapping[str, Any],
    out: Path,
    *,
    record: Mapping[str, Any],
) -> None:
    """Compare the rows and write `measured/` whole or not at all; prints the table and the verdict.

    Args:
        pipe: what the pictures were sampled with; the report's overlays are sampled once more.
        comparison: what was compared, and what decides.
        sampling: steps, size and precision, for the table of facts.
        rows: one a picture, with its metrics.
        shots: arm -> its pictures.
        more: further facts, by name.
        out: receives `measured/`.
        record: the settings of the recipe, written beside the results.
    """
    import adapters
    from adapters.measuring.gains import FORMAT

    design = comparison.design()
    gains = adapters.measuring.gains.compare(rows, design)
    facts = {**_facts(pipe, record["base"]["path"], sampling), **more}
    facts |= comparison.tuned.facts() if comparison.tuned else {}
    if design.sweeps:
        equal = at_equal_scale(rows, design)
        facts["at equal effective scale"] = equal if isinstance(equal, str) else equal.verdict.sentence
        facts |= _preferences(equal, comparison)
    facts |= _frechet(comparison, shots)
    page = adapters.measuring.report.render_report(
        gains,
        shots,
        title=title(comparison, record),
        terms=_terms(comparison, record),
        facts=facts,
        overlay=_overlay(pipe, comparison, sampling),
        references=_pictures_of(comparison),
        checkpoints=comparison.tuned.checkpoints() if comparison.tuned else None,
        along="training step" if comparison.tuned and comparison.tuned.counted else "checkpoint, in order",
        overfitting=comparison.tuned.overfitting() if comparison.tuned else "",
        command=f"python recipes/measure.py --config {out / 'measured' / 'settings.yaml'}",
    )
    with adapters.files.write_folder(out / "measured") as stage:
        (stage / "per_image.csv").write_bytes(adapters.measuring.table.write_csv(rows).encode())
        text = json.dumps({"format": FORMAT, "facts": facts, **gains.to_dict()}, indent=1)
        (stage / "gains.json").write_text(text, "utf-8")
        (stage / "report.html").write_text(page, "utf-8")
        sheet_of_arms(shots).save(stage / "sheet.png")
        write_settings(dict(record), stage / "settings.yaml")
    print("\n" + "\n".join(headlines(gains)))
    if design.sweeps:
        print(f"At equal effective scale: {facts['at equal effective scale']}")
    print(f"\n{arms_table(gains)}\n")
    if (warning := unseen(gains, [case.calls for case in comparison.units if case.identifier])) is not None:
        print(f"{warning}\n")
    print(f"Open {out / 'measured' / 'report.html'}; pictures side by side: {out / 'measured' / 'sheet.png'}")


def headlines(gains: Gains) -> list[str]:
    """What the adapter does to its base, what the guidance adds, and what lies above the front of plain guidance."""
    from adapters.measuring import plane

    first = [f"Adapter: {gains.released.sentence}"] if gains.released else []
    first += [f"Adapter with plain guidance: {gains.adapter.sentence}"] if gains.shipped and gains.adapter else []
    return [*first, f"Guidance: {gains.verdict.sentence}", *plane.sentences(gains.plane)]


def unseen(gains: Gains, calls: Sequence[str]) -> str | None:
    """A warning where the adapter's pictures are no more like the subject than the base's: its words may be others.

    Args:
        gains: the comparison.
        calls: what the subjects are called in prompts.
    """
    from recipes.common.metrics import OF_SUBJECT

    design = gains.design
    names = [name for name in design.higher_is_better if OF_SUBJECT.fullmatch(name)]
    if design.base is None or not names or not calls:
        return None
    means = {arm["name"]: {name: arm["metrics"][name]["mean"] for name in names} for arm in gains.arms}
    own, base = means[design.baseline], means[design.base]
    if any(own[name] > base[name] for name in names):
        return None
    said = ", ".join(f"{name} is {own[name]:.2f} with the adapter and {base[name]:.2f} without" for name in names)
    words = ", ".join(dict.fromkeys(map(repr, calls)))
    return f"warning: {said}: the subject does not appear. Was the adapter trained with the words {words}?"


def title(comparison: Comparison, record: Mapping[str, Any]) -> str:
    """What was measured, in words: the subjects or the network, and the base."""
    called = [case.calls for case in comparison.units if case.calls]
    if len(called) > 3:
        what = f"{len(called)} subjects"
    elif called:
        what = ", ".join(called)
    elif comparison.plan.control:
        what = f"ControlNet ({comparison.plan.control})"
    else:
        what = Path(record["adapter"]).name if record["adapter"] else "no adapter"
    return f"{what} on {Path(record['base']['path']).name}"


def _terms(comparison: Comparison, record: Mapping[str, Any]) -> dict[str, str]:
    """The words of the title that a stranger does not know."""
    called = [case.calls for case in comparison.units if case.calls]
    named = {calls: "what the subject is called in prompts" for calls in called if len(called) <= 3}
    return named | {Path(record["base"]["path"]).name: "the name of the base model"}


def _pictures_of(comparison: Comparison) -> list[Any]:
    """A few pictures of the subjects, as what the report's are to be held against."""
    from recipes.common import spaces

    found = [own for case in comparison.units[:4] if (own := spaces.shown(case.folder))]
    return [picture for several in found for picture in several[: 4 // len(found)]]


def _facts(pipe: DiffusionPipeline, base: str, sampling: SamplingSettings) -> dict[str, Any]:
    import torch

    import adapters
    from training.ranks import state

    device = str(state().device)  # not the pipeline's, whose weights may be offloaded
    if device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    rule = adapters.text.rule_of(pipe)
    return {
        "base": base,
        **({} if rule.neutral else {"text": rule.said()}),
        **({"painted": "in the given mask" if sampling.image else "whole pictures"} if paints_holes(pipe) else {}),
        "base weights": adapters.describe(pipe)["weights"],
        "scheduler": type(pipe.scheduler).__name__,
        "steps": sampling.steps,
        "device": device,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
        "peak memory of the process, MiB": round(peak),
    }


def _frechet(comparison: Comparison, shots: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Every arm's Fréchet distance to the reference, where one is asked for."""
    from recipes.common import spaces

    plan = comparison.plan
    if plan.frechet is None:
        return {}
    found = {name: spaces.frechet_to_reference(plan, taken) for name, taken in shots.items()}
    return {
        f"Fréchet distance ({plan.frechet}), {name}": f"{value:.4g} (n = {len(shots[name])})"
        for name, value in found.items()
    }


def at_equal_scale(rows: Sequence[Row], design: Design) -> Gains | str:
    """The design's comparison against plain CFG interpolated to the arm's own effective scale; or why there is none."""
    import adapters

    label, sweep = f"{design.baseline} at equal effective scale", design.sweeps.get(design.baseline, {})
    try:
        preferences = dict.fromkeys(design.notes.get("only at equal effective scale", ()), True)
        judged = {**design.higher_is_better, **preferences}
        equal = adapters.measuring.curves.at_effective_scale(
            rows, design.arm, sweep, list(judged), name=label, recorded=EFFECTIVE
        )
    except adapters.GainsError as error:
        return f"not known: {error}"
    pair = [row for row in rows if row.arm == design.arm] + equal
    return adapters.measuring.gains.compare(
        pair, replace(design, baseline=label, higher_is_better=judged, sweeps={}, base=None, plain=())
    )


def _preferences(equal: Gains | str, comparison: Comparison) -> dict[str, str]:
    """What people would prefer, by the models for it, with the strength of guidance taken out."""
    if isinstance(equal, str):
        return dict.fromkeys(comparison.preferences, equal)
    own = {c.metric: c for c in equal.contrasts if c.arm == comparison.plan.arm}
    said = "{name} at equal effective scale", "{one.difference:+.2g} ({one.low:+.2g} to {one.high:+.2g})"
    return {said[0].format(name=name): said[1].format(one=own[name]) for name in comparison.preferences}


def _overlay(
    pipe: DiffusionPipeline, comparison: Comparison, sampling: SamplingSettings
) -> Callable[[Any], dict[str, Any]]:
    """Regions and gamma over the steps of the report's first pairs, drawn by sampling them once more."""
    import adapters
    from scfg.trace import RECORDABLE
    from scfg.visualize import strip

    arm, left = comparison.arm, [comparison.plan.overlays]

    def overlay(shot: Shot) -> dict[str, Any]:
        case = next(case for case in comparison.units if case.name == shot.subject)
        if left[0] <= 0 or arm.guidance.method != "semantic":
            return {}
        left[0] -= 1
        maps = drawing_in(pipe, of_sampling(pipe, sampling, say), guided(pipe, arm.guidance, record=RECORDABLE))
        with worn(pipe, case, arm), maps() as run:
            adapters.measuring.sample.images(
                pipe,
                [shot.prompt],
                [shot.seed],
                guidance_scale=arm.guidance.guidance_scale,
                steps=sampling.steps,
                height=sampling.height,
                width=sampling.width,
                negative_prompt=sampling.negative_prompt,
                inputs=case.inputs,
                common=arguments_of(pipe, arm.guidance, sampling),
            )
            if not any(step.gamma is not None for step in run.trace):  # at scale 1, or between the steps it acts in
                return {}
            return {"regions and gamma over the steps": strip(run, pipe)}

    return overlay


def arms_table(gains: Gains) -> str:
    """Every arm's mean, and its paired difference to the baseline with the interval."""
    design = gains.design
    lines = []
    differences = {(c.arm, c.metric): c for c in gains.contrasts}
    for metric in design.higher_is_better:
        lines.append(f"{metric:<24} {'mean':>6}  difference to {design.baseline} [{design.confidence:.0%} interval]")
        for summary in gains.arms:
            contrast = differences.get((summary["name"], metric))
            said = f"{contrast.difference:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}]" if contrast else ""
            lines.append(f"  {summary['name']:<22} {summary['metrics'][metric]['mean']:6.3f}  {said}".rstrip())
    return "\n".join(lines)

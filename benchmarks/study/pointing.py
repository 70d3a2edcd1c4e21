"""Where words point while a picture is made: S-CFG's regions of every object against what the judge sees in the end.

python -m benchmarks.study.pointing --config benchmarks/study/configs/pointing/pocket.yaml
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.study import pointing_table
from recipes.common.base import POCKET, adapted, sampling_pipeline
from recipes.common.cli import launch, say
from recipes.common.guidance import arguments_of, guidance_of
from recipes.common.prompts import texts
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.config import BaseSettings, require

__all__ = ["Settings", "run"]

NORMS = ("delta", "uncond")  # mean ||c - u|| and ||u|| of an object's region, over sigma_t: the paper's Fig. 1
# Regions are watched and gamma is 1 everywhere: the picture is plain CFG's.
_WATCH = {"gamma_min": 1.0, "gamma_max": 1.0, "smoothing_sigma": 0.0, "tokens": "prompt"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Prompts of the pocket world's grammar, sampled once each while the regions are watched."""

    base: BaseSettings
    """The base model; only `path: pocket`, whose judge knows what stands where."""
    adapter: str | None = None
    """What is on the base; see recipes/sample.py."""
    weight: float = 1.0
    """Scale of the adapter's change."""
    prompts: list[str] = field(default_factory=list)
    """What to draw."""
    prompt_file: str | None = None
    """Text file with a prompt a line, beside or instead of `prompts`."""
    limit: int | None = None
    """Only so many prompts."""
    seeds: list[int] = field(default_factory=lambda: [1])
    """Seeds of every prompt."""
    guidance: GuidanceSettings = field(
        default_factory=lambda: GuidanceSettings(guidance_scale=4.0, options=dict(_WATCH))
    )
    """Whose regions; by default words compete and gamma is held at 1, so that the sampling is plain CFG's."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    out: str
    """Folder of `pointing/`: pointing.csv, pointing.json and pointing.svg."""

    def __post_init__(self) -> None:
        require(self.base.path == POCKET, f"base.path {self.base.path}: only the pocket base has a judge of regions")
        require(
            self.guidance.method == "semantic",
            f"guidance.method {self.guidance.method} has no regions of its own to watch; use semantic",
        )


def run(settings: Settings) -> Path:
    """Sample and compare; returns the folder of the table."""
    import adapters

    prompts = texts(settings.prompts, settings.prompt_file)[: settings.limit]
    require(bool(prompts), "no prompts; set prompts or prompt_file")
    pipe = sampling_pipeline(settings.base, settings.sampling)
    with adapted(pipe, settings.adapter, settings.weight):
        rows = _watched(pipe, prompts, settings)
    summary = pointing_table.summary(rows)
    out = Path(settings.out) / "pointing"
    with adapters.files.write_folder(out) as stage:
        with (stage / "pointing.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        (stage / "pointing.json").write_text(json.dumps(summary, indent=1), "utf-8")
        (stage / "pointing.svg").write_text(_plot(summary), "utf-8")
    for step in summary["steps"]:
        say(f"step {step['step']:>3} t {step['timestep']:>4}: IoU {step['iou']:.3f}, by chance {step['chance']:.3f}")
    say(f"{summary['objects']} of {summary['said']} objects are seen by the judge; table and curve: {out}")
    return out


def _watched(pipe: Any, prompts: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """One row an object and step."""
    import adapters
    import scfg
    from training.pocket import captions, judge
    from training.pocket.world import CLASSES

    guidance = guidance_of(settings.guidance)
    taken: list[list[tuple[Any, Any, list[Any]]]] = []

    def watch(run: Any) -> list[dict[str, float]]:
        images = len(run.trace[0].effective_scale)
        taken.extend(
            [
                (step, step.regions[i].cpu(), [getattr(step.norms, name)[i].cpu() for name in ("area", *NORMS)])
                for step in run.trace
            ]
            for i in range(images)
        )
        return [{}] * images

    shots = adapters.measuring.sample.images(
        pipe,
        prompts,
        settings.seeds,
        around=lambda: scfg.attach(
            pipe, guidance, guidance_scale=settings.guidance.guidance_scale, record=("regions",)
        ),
        record=watch,
        guidance_scale=settings.guidance.guidance_scale,
        steps=settings.sampling.steps,
        batch_size=settings.sampling.batch_size,
        negative_prompt=settings.sampling.negative_prompt,
        common=arguments_of(pipe, settings.guidance, settings.sampling),
    )
    seen = judge().segment([shot.image for shot in shots])
    rows = []
    for shot, steps, labels in zip(shots, taken, seen, strict=True):
        words = scfg.prompt_words(pipe.tokenizer, shot.prompt, pipe.tokenizer.model_max_length)
        phrases = _phrases(words, captions.parse_caption(shot.prompt), guidance.tokens)
        for noun, owners in phrases.items():
            truth = labels == list(CLASSES).index(noun) + 1
            for step, regions, (area, *norms) in steps:
                rows.append(
                    {
                        "prompt": shot.prompt,
                        "seed": shot.seed,
                        "object": noun,
                        "step": step.index,
                        "timestep": int(step.timestep),
                        **{name: _short(value) for name, value in _compared(regions, owners, truth).items()},
                        **{
                            name: _short(_mean(values, area, owners) / step.sigma)
                            for name, values in zip(NORMS, norms, strict=True)
                        },
                    }
                )
    require(bool(rows), "no prompt names an object that the judge knows")
    return rows


def _phrases(words: Sequence[Any], said: Any, tokens: str) -> dict[str, list[int]]:
    """Object -> the regions of its noun and its color."""
    from scfg.words import competitors

    competing = competitors(list(words), tokens)
    found: dict[str, list[int]] = {}
    begin = 0
    for noun in said.nouns:
        place = next(i for i in range(begin, len(words)) if words[i].text == noun.name)
        own = words[place - 1 : place + 1] if noun.color else words[place : place + 1]
        positions = {position for word in own for position in word.positions}
        found[noun.name] = (
            sorted(positions)
            if tokens == "all"
            else [index for index, one in enumerate(competing) if positions & set(one.positions)]
        )
        begin = place + 1
    return found


def _compared(regions: Any, owners: Sequence[int], truth: Any) -> dict[str, float]:
    """IoU of the owners' region with the true one, and what two such areas share by chance; nan: not seen."""
    import torch

    region = torch.isin(regions, torch.tensor(owners, dtype=regions.dtype))
    small = torch.nn.functional.interpolate(truth[None, None].float(), tuple(region.shape), mode="area")[0, 0] > 0.5
    if not small.any():
        return {"iou": float("nan"), "chance": float("nan")}
    both, a, b = (region & small).float().mean(), region.float().mean(), small.float().mean()
    return {"iou": float(both / (a + b - both)), "chance": float(a * b / (a + b - a * b))}


def _short(value: float) -> float:
    """Four digits: more say nothing, and the table is kept."""
    return float(f"{value:.4g}")


def _mean(values: Any, area: Any, owners: Sequence[int]) -> float:
    """Mean over the owners' positions; nan where they own none."""
    share = area[list(owners)]
    return float((values[list(owners)] * share).sum() / share.sum()) if share.sum() > 0 else float("nan")


def _plot(summary: Mapping[str, Any]) -> str:
    from adapters.measuring.plot import picture

    lines = {
        label: [(s["timestep"], s[name], s[name], s[name], "") for s in summary["steps"]]
        for name, label in (("iou", "regions of the words"), ("chance", "two such areas by chance"))
    }
    return picture(lines, "timestep", "mean IoU with the judge's region")


if __name__ == "__main__":
    launch(Settings, run)

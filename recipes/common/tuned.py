"""What a search found, as `tuned.json` keeps it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes.common.settings import GuidanceSettings
from training.config import require
from training.errors import TrainingError

__all__ = ["TunedArms"]

FILE = "tuned.json"
Point = tuple[float, float, float, float, str]
SIGNS = {
    "nearest": "likeness to the nearest training picture",
    "copies": "share of copies of training pictures",
    "drift": "drift from the base",
    "diversity": "diversity",
    "accuracy": "prompt accuracy",
}


@dataclass(frozen=True, kw_only=True)
class TunedArms:
    """A search's winners, and everything they follow from."""

    best: Mapping[str, GuidanceSettings]
    """Arm -> the guidance that measured best for it."""
    adapter: str | None
    """The adapter, or its checkpoint, that measured best; null where none was tuned."""
    metric: str
    """What was maximised."""
    higher_is_better: bool = True
    references: Mapping[str, float] = field(default_factory=dict)
    """Metric -> what its mean was divided by, where the harmonic mean of several was maximised."""
    prompts: Sequence[str]
    seeds: Sequence[int]
    rounds: Mapping[str, list[dict[str, Any]]]
    """Arm, or `checkpoint` -> the rounds of its search, with every picture's number."""
    pictures: Mapping[str, int]
    """The same -> pictures that were drawn for it."""
    signs: Mapping[str, Any] = field(default_factory=dict)
    """Signs of overfitting in the first round's pictures: the feature `space`, those of the `base`, and of every
    checkpoint. Empty where there were no checkpoints."""
    steps: Sequence[int | None] = ()
    """The training step of every checkpoint, as far as it is known; in the order of the first round."""

    def write(self, folder: Path) -> None:
        """Write `tuned.json` into a folder."""
        record = {
            "metric": self.metric,
            "higher is better": self.higher_is_better,
            "references": dict(self.references),
            "best": {name: asdict(guidance) for name, guidance in self.best.items()},
            "adapter": self.adapter,
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "rounds": dict(self.rounds),
            "pictures": dict(self.pictures),
            "signs": dict(self.signs),
            "steps": list(self.steps),
        }
        (folder / FILE).write_text(json.dumps(record, indent=1), "utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> TunedArms:
        """What `write` wrote, also before there were references.

        Raises:
            TrainingError: the file is not there, or is not what recipes/tune.py wrote.
        """
        from adapters.files import read_json

        file = Path(folder) / FILE
        require(
            file.is_file(),
            f"tuned {folder}: there is no {file}; `scfg-toolkit tune` with the same config writes it, into the folder "
            "`tuned` in its out",
        )
        try:
            found = read_json(file)
            return cls(
                best={name: GuidanceSettings.of(values) for name, values in found["best"].items()},
                adapter=found["adapter"],
                metric=found["metric"],
                higher_is_better=found["higher is better"],
                references=found.get("references", {}),
                prompts=found["prompts"],
                seeds=found["seeds"],
                rounds=found["rounds"],
                pictures=found["pictures"],
                signs=found.get("signs", {}),
                steps=found.get("steps", ()),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(f"tuned: {file} is not what recipes/tune.py wrote ({error!r})") from error

    def checkpoints(self) -> dict[str, list[Point]]:
        """What was measured -> the checkpoints as points of a curve, by the first round; the chosen one says so.

        Empty where there were none.
        """
        results = self.rounds.get("checkpoint", [{"results": []}])[0]["results"]
        if not results:
            return {}
        curves = {"what was maximised": [one["mean"] for one in results]}
        signs = self.signs.get("checkpoints", [])
        for sign, said in SIGNS.items() if signs else ():
            values = [one.get(sign) for one in signs]
            if None not in values:
                curves[said if sign == "accuracy" else f"{said} ({self.signs['space']})"] = values
        places: Sequence[Any] = self.steps if self.counted else range(1, len(results) + 1)
        labels = [self._label(one["settings"]["adapter"]) for one in results]

        def points(values: Sequence[float]) -> list[Point]:
            return [(float(place), y, y, y, label) for place, y, label in zip(places, values, labels, strict=True)]

        return {name: points(values) for name, values in curves.items()}

    @property
    def counted(self) -> bool:
        """Whether the places of `checkpoints` are steps of the training; else they are in order."""
        return bool(self.steps) and None not in self.steps

    def overfitting(self) -> str:
        """What the signs say of the checkpoints, in plain sentences; empty where they show no overfitting."""
        from adapters.measuring.overfitting import Signs, sentence

        if not self.signs:
            return ""
        names = [Path(one["settings"]["adapter"]).name for one in self.rounds["checkpoint"][0]["results"]]
        found = [Signs(**one) for one in self.signs["checkpoints"]]
        return sentence(dict(zip(names, found, strict=True)), Signs(**self.signs["base"]))

    def _label(self, path: str) -> str:
        """Steps stand at the axis; without them the point says which checkpoint it is."""
        named = [] if self.counted else [Path(path).name]
        return ", ".join([*named, *(["chosen"] if path == self.adapter else [])])

    def facts(self) -> dict[str, str]:
        """What the search tried and found, in words: the curve behind the guider."""
        from adapters.measuring.tune import undecided
        from adapters.measuring.words import scale_of

        facts = {"tuned on": f"{len(self.prompts)} prompts, seeds {list(self.seeds)}, {self.metric}"}
        for name, rounds in self.rounds.items():
            results = [(one["settings"], one["mean"]) for one in rounds[0]["results"]]
            if said := undecided(rounds, higher_is_better=self.higher_is_better):
                facts[f"tuning {name}, undecided"] = said
            if name == "checkpoint":
                tried = [f"{Path(settings['adapter']).name}: {mean:.3f}" for settings, mean in results]
                facts["checkpoint tried"] = "; ".join(tried)
                facts |= {"overfitting": said} if (said := self.overfitting()) else {}
                continue
            tried = [f"scale {scale_of(settings):g}{_more(settings)}: {mean:.3f}" for settings, mean in results]
            facts[f"tuning {name}, {self.pictures[name]} pictures"] = "; ".join(tried)
        return facts


def _more(settings: Mapping[str, Any]) -> str:
    """What else a candidate was, beside its scale."""
    from adapters.measuring.words import scope_words

    parts = [f"{key} {value}" for key, value in settings["options"].items()]
    parts += [f"weight {settings['weight']:g}"] if settings["weight"] not in (None, 1.0) else []
    parts += scope_words(settings.get("scope") or {})
    return "".join(f", {part}" for part in parts)

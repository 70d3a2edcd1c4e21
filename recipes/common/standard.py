"""Identities that cannot be told on a base are left out, and similarities take their places.

An identity needs a standard: pictures of the class as the base draws it, which the subject must differ from. Whether
there is one is known as soon as those pictures are drawn. They are the first ones of a comparison and of a search, so
nothing that is compared has been seen when a metric is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from recipes.common.cli import say
from recipes.common.settings import MeasureSettings, TuneSettings

if TYPE_CHECKING:
    from adapters.measuring.sample import Shot
    from recipes.common.comparison import Comparison
    from recipes.common.units import Case

__all__ = ["instead", "missing_facts", "searched", "untold", "without"]

IN_SPACE = re.compile(r"identity \((\w+)\)")


def untold(comparison: Comparison, units: Sequence[Case], classes: Sequence[Sequence[Shot]]) -> dict[str, str]:
    """Identity -> why it cannot be told; empty where all can.

    Args:
        comparison: whose metrics are looked at.
        units: each unit of the comparison, or of a search for it.
        classes: the base's pictures of the class, for each unit.
    """
    import adapters
    from adapters.measuring.metrics import Identity

    found: dict[str, str] = {}
    for case, shots in zip(units, classes, strict=True):
        for metric in comparison.judges(case, classes=shots):
            if not isinstance(metric, Identity):
                continue
            try:
                metric(shots[:1])
            except adapters.GainsError as error:
                found.setdefault(metric.name, f"{error} ({case.name})")
    return found


def instead(name: str) -> str:
    """The similarity that takes an identity's place: in the same space, and of what the same pictures show."""
    from recipes.common.metrics import SUBJECT

    space = IN_SPACE.fullmatch(name)
    return f"similarity ({space.group(1)})" if space else SUBJECT


def without(comparison: Comparison, gone: Mapping[str, str]) -> MeasureSettings:
    """The comparison's plan with similarities in the places of identities, wherever it names them.

    Args:
        comparison: whose metrics they are.
        gone: of `untold`.
    """
    plan, names = comparison.plan, [*comparison.higher_is_better, *comparison.preferences]
    other = {name: instead(name) for name in gone}
    kept = list(dict.fromkeys(other.get(name, name) for name in names))
    flags = {flag: getattr(plan, flag) for flag in ("primary", "referee", "identity", "accuracy")}
    flags = {flag: other.get(name, name) if name else None for flag, name in flags.items()}
    if flags["referee"] == (flags["primary"] or kept[0]):
        flags["referee"] = None  # what it had to agree with is itself now
    return replace(plan, metrics=kept, **flags)


def searched(search: TuneSettings, gone: Mapping[str, str]) -> TuneSettings:
    """The search with similarities in the places of identities; a reference of one does not fit the other."""
    metric = instead(search.metric) if search.metric and search.metric in gone else search.metric
    given = search.references and {name: value for name, value in search.references.items() if name not in gone}
    return replace(search, metric=metric, references=given)


def missing_facts(gone: Mapping[str, str]) -> dict[str, str]:
    """The same as facts for a report; printed too."""
    facts = {f"{name}, left out": f"{why}; {instead(name)} takes its place" for name, why in gone.items()}
    for name, line in facts.items():
        say(f"{name}: {line}")
    return facts

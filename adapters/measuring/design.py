"""What is declared before a comparison, and the pieces of what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import GainsError

__all__ = ["ArmContrast", "Design", "Verdict"]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What was decided before the run."""

    arm: str
    """The arm the verdict is about."""
    baseline: str
    """What it is compared with."""
    primary: str
    """The metric that decides."""
    minimum_effect: float
    """The smallest difference worth calling a gain, in the primary metric's unit; > 0."""
    higher_is_better: Mapping[str, bool]
    """Every metric that is compared, and which way is up."""
    referee: str | None = None
    """A metric in another feature space that must agree in sign before anything is called a gain."""
    cluster: Literal["auto", "subject", "prompt"] = "auto"
    """auto: subjects where there are at least six, else prompts (then nothing is claimed about other subjects)."""
    confidence: float = 0.95
    base: str | None = None
    """The arm of the base alone; the baseline, which is the adapter with plain guidance, is first compared with it."""
    identity: str | None = None
    """The metric that says whether it is this subject; with `accuracy` it says what the adapter does to its base."""
    accuracy: str | None = None
    """The metric that says how far the prompt is kept."""
    tolerance: float | None = None
    """Loss of `accuracy` that a gain of identity may cost; None: `minimum_effect`."""
    plain: Sequence[str] = ()
    """Arms that are the adapter with plain guidance, at any weight and scale: what they reach together is the front."""
    sweeps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Per method, guidance scale (as text) -> arm: what curves are drawn through."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Anything worth writing down: held-out statement, tuning budget, command, versions."""

    def __post_init__(self) -> None:
        self._check_types()
        if self.arm == self.baseline:
            raise GainsError(f"arm and baseline are both {self.arm!r}")
        if not self.minimum_effect > 0:
            raise GainsError(f"minimum_effect={self.minimum_effect}: declare a difference > 0 that would matter")
        for name in (self.primary, self.referee, self.identity, self.accuracy):
            if name is not None and name not in self.higher_is_better:
                raise GainsError(f"{name!r} is not in higher_is_better ({sorted(self.higher_is_better)})")
        if (self.identity is None) != (self.accuracy is None) or (self.identity and self.identity == self.accuracy):
            raise GainsError(f"identity={self.identity!r}, accuracy={self.accuracy!r}: give two metrics, or neither")
        if self.tolerance is not None and not self.tolerance > 0:
            raise GainsError(f"tolerance={self.tolerance}: declare a loss > 0 that would not matter")
        if not 0.5 <= self.confidence < 1:
            raise GainsError(f"confidence={self.confidence}: expected 0.5 <= confidence < 1")

    def _check_types(self) -> None:
        """A design may come from a stranger's file, where everything may be anything."""
        for name in ("arm", "baseline", "primary"):
            if not isinstance(value := getattr(self, name), str):
                raise GainsError(f"{name}={value!r}: expected a name")
        for name in ("base", "referee", "identity", "accuracy"):
            if not isinstance(value := getattr(self, name), str | None):
                raise GainsError(f"{name}={value!r}: expected a name, or nothing")
        for name in ("minimum_effect", "confidence", "tolerance"):
            value = getattr(self, name)
            if (value is not None or name != "tolerance") and not _is_number(value):
                raise GainsError(f"{name}={value!r}: expected a number")
        if self.cluster not in ("auto", "subject", "prompt"):
            raise GainsError(f"cluster={self.cluster!r}: expected auto, subject or prompt")
        if not isinstance(self.plain, list | tuple) or not all(isinstance(arm, str) for arm in self.plain):
            raise GainsError(f"plain={self.plain!r}: expected names of arms")
        ups = self.higher_is_better
        if not isinstance(ups, Mapping) or not all(isinstance(up, bool) for up in ups.values()):
            raise GainsError(f"higher_is_better={ups!r}: expected true or false for every metric")


@dataclass(frozen=True, kw_only=True)
class ArmContrast:
    """One arm against the baseline on one metric; `difference` is arm minus baseline."""

    arm: str
    baseline: str
    metric: str
    higher_is_better: bool
    difference: float
    low: float
    high: float
    method: str
    clusters: int
    pairs: int
    failures: int
    """Pairs left out because the metric could not judge one of their images."""
    check: tuple[float, float]
    """Bootstrap-t interval."""
    p: float
    p_holm: float | None
    """None for the primary contrast, which needs no correction."""
    wins: int
    ties: int
    losses: int
    detectable: float

    @property
    def better(self) -> tuple[float, float, float]:
        """(difference, low, high) with up meaning better."""
        if self.higher_is_better:
            return self.difference, self.low, self.high
        return -self.difference, -self.high, -self.low


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One word, and the sentence that says why.

    Of a guidance: gain, no detectable gain, trade-off, harm. Of an adapter: gain, unclear, no detectable change,
    trade-off, harm.
    """

    word: str
    sentence: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

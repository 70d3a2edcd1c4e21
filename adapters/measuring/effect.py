"""What an adapter does to its base, in one word: for a subject, identity and prompt accuracy together.

    identity up by the least effect, and a loss of accuracy beyond the tolerance is ruled out: gain
    identity up, accuracy down; or identity down, accuracy up: trade-off
    identity down; or accuracy down by the tolerance at least, and identity not up: harm
    identity up, and accuracy could have lost more than the tolerance, or not: unclear
    anything else: no detectable change

Up, down and ruled out are said of intervals. Two metrics are looked at, so the intervals of both are widened until they
hold together with the design's confidence (Bonferroni). Without a subject the primary metric decides alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from .design import ArmContrast, Design, Verdict

__all__ = ["adapter_verdict", "confidence", "effect_metrics"]


def effect_metrics(design: Design) -> list[str]:
    """The metrics that decide, and then the referee's, of which only the sign is looked at."""
    decide = [design.primary] if design.identity is None else [design.identity, str(design.accuracy)]
    return [*decide, *([design.referee] if design.referee and design.referee not in decide else [])]


def confidence(design: Design) -> float:
    """That of each interval, so that those of the metrics that decide hold together with the design's."""
    return design.confidence if design.identity is None else 1 - (1 - design.confidence) / 2


def adapter_verdict(effects: Sequence[ArmContrast], design: Design) -> Verdict:
    """The word and the sentence; `effects` are an arm against the base on `effect_metrics(design)`."""
    word, why = (_alone if design.identity is None else _subject)(effects, design)
    said = "; ".join(_said(contrast) for contrast in effects[: 1 if design.identity is None else 2])
    return Verdict(
        word=word, sentence=f"{word.capitalize()}: {why}. {effects[0].arm} against {effects[0].baseline}: {said}."
    )


def _alone(effects: Sequence[ArmContrast], design: Design) -> tuple[str, str]:
    gap, low, high = effects[0].better
    if high < 0:
        return "harm", f"{effects[0].metric} is worse than the base's"
    if low <= 0:
        return "no detectable change", f"{effects[0].metric} may be as the base's"
    if gap < design.minimum_effect:
        return (
            "no detectable change",
            f"{effects[0].metric} is better by less than the {design.minimum_effect:g} declared",
        )
    if (judge := _against(effects, design)) is not None:
        return "unclear", f"{effects[0].metric} is better, but the referee {judge.metric} disagrees"
    return "gain", f"{effects[0].metric} is better than the base's"


def _subject(effects: Sequence[ArmContrast], design: Design) -> tuple[str, str]:
    tolerance = design.tolerance or design.minimum_effect
    (gap, low, high), (change, least, most) = effects[0].better, effects[1].better
    subject, prompt = effects[0].metric, effects[1].metric
    lost, risen = most < 0, least > 0
    if low > 0 and gap >= design.minimum_effect:
        if (judge := _against(effects, design)) is not None:
            return "unclear", f"the subject is there by {subject}, but the referee {judge.metric} disagrees"
        if least > -tolerance:
            return "gain", f"the subject is there, and a loss of {prompt} beyond {tolerance:g} is ruled out"
        if lost:
            return "trade-off", f"the subject is there, at the price of {prompt}"
        return "unclear", f"the subject is there, but {prompt} may have lost more than the {tolerance:g} accepted"
    if high < 0:
        return ("trade-off", f"{prompt} rose, at the price of {subject}") if risen else ("harm", f"{subject} fell")
    if lost and change <= -tolerance:
        return "harm", f"{prompt} fell, and the subject is not shown to be there"
    return "no detectable change", "the subject is not shown to be there"


def _against(effects: Sequence[ArmContrast], design: Design) -> ArmContrast | None:
    """The referee's contrast, where it has another sign than a gain."""
    judge = next((contrast for contrast in effects[1:] if contrast.metric == design.referee), None)
    decides = design.accuracy == design.referee  # then it is looked at as what it is
    return judge if judge is not None and not decides and judge.better[0] <= 0 else None


def _said(contrast: ArmContrast) -> str:
    return f"{contrast.metric} {contrast.difference:+.3g} (interval {contrast.low:+.3g} to {contrast.high:+.3g})"

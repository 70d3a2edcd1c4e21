"""What a guidance adds to plain guidance, in one word: gain, no detectable gain, trade-off or harm."""

from __future__ import annotations

from collections.abc import Sequence

from .design import ArmContrast, Design, Verdict

__all__ = ["guidance_verdict"]


def guidance_verdict(primary: ArmContrast, contrasts: Sequence[ArmContrast], design: Design) -> Verdict:
    """The word and the sentence.

    Args:
        primary: the contrast that decides.
        contrasts: all of them; those of the design's arm may object.
        design: what was declared.
    """
    gap, low, high = primary.better
    level = f"{design.confidence:.0%}"
    what = (
        f"{design.primary}: {primary.difference:+.4g} ({level} interval {primary.low:+.4g} to {primary.high:+.4g}, "
        f"{primary.clusters} clusters, {primary.pairs} pairs) for {design.arm} against {design.baseline}"
    )
    if high < 0:
        return Verdict(word="harm", sentence=f"Harm. {what}.")
    if low <= 0:
        size = f"a true difference of {primary.detectable:.3g} would have shown in 80 % of runs"
        if primary.method == "constant":
            size = "every cluster says the same"
        sentence = f"No detectable gain. {what}; {size}."
        return Verdict(word="no detectable gain", sentence=sentence)
    if gap < design.minimum_effect:
        sentence = (
            f"No gain that matters. {what}, below the {design.minimum_effect:g} declared as the least worth having."
        )
        return Verdict(word="no detectable gain", sentence=sentence)
    own = [c for c in contrasts if c.arm == design.arm and c.metric != design.primary]
    judge = next((c for c in own if c.metric == design.referee), None)
    if judge is not None and judge.better[0] <= 0:
        sentence = (
            f"No gain confirmed. {what}, but the referee {judge.metric} disagrees in sign ({judge.difference:+.4g})."
        )
        return Verdict(word="no detectable gain", sentence=sentence)
    worse = [c for c in own if c.better[2] < 0]
    price = "; ".join(f"{c.metric} {c.difference:+.4g}" for c in worse)
    if any(c.p_holm is not None and c.p_holm < 1 - design.confidence for c in worse):
        return Verdict(word="trade-off", sentence=f"Trade-off. {what}, at the price of {price}.")
    watch = f" Not significant after Holm's correction, but to be watched: {price}." if worse else ""
    return Verdict(word="gain", sentence=f"Gain. {what}.{watch}")

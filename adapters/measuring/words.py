"""What a comparison found, for a reader in a hurry: short sentences, shares in percent, and no digits too many."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from .gains import Gains

__all__ = [
    "TERMS",
    "adapter",
    "deciding_metrics",
    "describe_arms",
    "format_interval",
    "format_mean",
    "guidance",
    "is_share",
    "metric",
    "scale_of",
    "scope_words",
    "terms",
]

_SHARES = re.compile(r"identity( \(.*\))?|.*accuracy|.* share|.*\bIoU|.*\bF1.*|VQAScore|question .*|detected objects")
_ADAPTER = {
    "gain": "The adapter draws its subject, and its pictures follow their prompts as well as the base's do.",
    "unclear": "The adapter draws its subject. It is unclear whether its pictures follow their prompts as well as the "
    "base's do.",
    "trade-off": "The adapter draws its subject, but its pictures follow their prompts less well than the base's.",
    "lost": "The adapter does not draw its subject; its pictures follow their prompts better than the base's.",
    "harm": "The adapter does harm: its pictures are worse than the base's.",
    "no detectable change": "It is not shown that the adapter draws its subject.",
}
_ALONE = {
    "gain": "With the adapter, the pictures are better than the base's.",
    "unclear": "With the adapter, the pictures may be better than the base's, but a second measure disagrees.",
    "harm": "The adapter does harm: its pictures are worse than the base's.",
    "no detectable change": "No difference between the adapter's pictures and the base's is shown.",
}
_GUIDANCE = {
    "gain": "{arm} makes better pictures than plain guidance.",
    "trade-off": "Compared with plain guidance, {arm} makes the pictures better in one way and worse in another.",
    "harm": "{arm} makes worse pictures than plain guidance.",
    "no detectable gain": "It is not shown that {arm} makes better pictures than plain guidance.",
}
_ABOVE = "Taken together, {names} are better with {arm} than plain guidance reaches."
TERMS = {
    r"prompts?": ("prompt", "the text that a picture is drawn from"),
    r"base model|base|base's": ("base model", "the program that draws pictures from texts, before training"),
    r"subjects?": ("subject", "one particular thing, animal or person, learned from a few pictures"),
    r"class|classes": ("class", "the kind of thing that the subject is, such as dog"),
    r"adapter": ("adapter", "what the training made: a small file of changes to the base model"),
    r"weight": ("weight", "how much of the adapter's change is used: 0 is none, 1 is all"),
    r"guidance": ("guidance", "what pushes a picture towards its prompt while it is drawn"),
    r"classifier-free guidance|CFG": (
        "classifier-free guidance (CFG)",
        "the usual guidance: at every step the model predicts the picture with and without the prompt, and the "
        "difference is multiplied by the scale",
    ),
    r"scale": ("scale", "how strongly guidance pushes; at 1 it does not push at all"),
    r"steps?": ("step", "a picture is drawn from noise in many steps, and each step makes it a little clearer"),
    r"noise": ("noise", "the random pattern that a picture is drawn from"),
    r"seeds?": ("seed", "a number that chooses the noise; the same seed gives the same noise"),
    r"regions?": ("region", "the part of a picture that shows a word of its prompt"),
    r"control": ("control", "an arm that lacks the one thing that is tested"),
    r"network": ("network", "a program that has learned to compare pictures"),
    r"arms?": ("arm", "one of the ways to sample that are compared"),
    r"sample|sampling": ("sample", "to draw a picture"),
    r"effective scale": ("effective scale", "the scale of plain guidance that would push as strongly"),
}
"""Pattern of a term of the field -> the term, and what it means, in words that are plain or terms themselves."""
_METRICS = {
    r"identity": "share of pictures that show this very subject, and not just another thing of its kind",
    r"identity margin": "how much nearer to the subject's photos a picture is than to others of its kind, above 0",
    r"identity \((.+)\)": "share of pictures that the network {} finds nearer to this very subject than to its kind",
    r"prompt accuracy": "share of the objects, colors, places and backgrounds a prompt names that are in the picture",
    r"rest accuracy": "the same for the rest of the prompt, without the subject",
    r"(object|colou?r|relation|background) accuracy": "the part of prompt accuracy that is about the {}",
    r"(?:subject|masked) similarity.*": "how alike the subject looks to its photos, 1 being equal, without background",
    r"similarity \((.+)\)": "how alike pictures are to the subject's photos for the network {}, 1 being equal",
    r"alignment \((.+)\)": "how well picture and prompt fit for the network {}; compare with other arms only",
    r"class IoU": "share of the picture where the kind of thing asked for is seen, 100 % being all",
    r"canny F1": "how far the edges of the picture are those asked for, 100 % being all",
    r"VQAScore": "probability that a model says yes to: does this picture show its prompt?",
    r"question (?:accuracy|probability)": "share of questions about the prompt that a model answers rightly",
    r"detected objects": "share of pictures with everything the prompt names, as often, colored and placed as it says",
    r"depth RMSE": "difference to the depth asked for, 0 being none",
    r"diversity.*": "how different the pictures of one prompt are from each other",
    r"drift.*": "how far a picture is from the base's own",
    r"saturation|contrast|clipped share": "signs of burnt pictures; less is better",
}
_METHODS = {
    "cfg": "plain guidance (classifier-free guidance), equally strong everywhere",
    "semantic": "semantic-aware guidance: each part of the picture that a word fills has its own strength",
    "dose": "control: plain guidance, everywhere as strong as S-CFG is on average",
    "placebo": "control: S-CFG's strengths, handed to the wrong regions",
    "pointwise": "control: strength levelled at every point, without regions",
    "interval": "plain guidance in a part of the steps only",
}
_PLACES = {
    "subject": "the adapter acts only where the base puts its own thing of the class",
    "uniform": "control: the adapter acts everywhere, but less, by that place's share of the picture",
    "elsewhere": "control: the adapter acts in a wrong place of the same shape",
}


def adapter(gains: Gains) -> str:
    """What the adapter as it ships does to its base, with the means of what decides; empty if not compared."""
    if gains.released is None:
        return ""
    design, means = gains.design, {arm["name"]: arm["metrics"] for arm in gains.arms}
    before, after, word = means[str(design.base)], means[gains.ships], gains.released.word
    if word == "trade-off" and design.identity is not None:
        moved = after[design.identity]["mean"] - before[design.identity]["mean"]
        word = word if (moved > 0) == design.higher_is_better[design.identity] else "lost"
    said = (_ALONE if design.identity is None else _ADAPTER)[word]
    names = [design.primary] if design.identity is None else [design.identity, str(design.accuracy)]
    told = [
        f"{name} {format_mean(name, before[name])} without it, {format_mean(name, after[name])} with it"
        for name in names
    ]
    said = f"{said} {_sentence('; '.join(told))}"
    if gains.ships == design.baseline:
        return said
    plain = "; ".join(f"{name} {format_mean(name, means[design.baseline][name])}" for name in names)
    return f"{said} This is with {gains.ships}, the guidance that ships. With {design.baseline}: {plain}."


def guidance(gains: Gains) -> str:
    """What the guidance adds to plain guidance, with the means of what decides."""
    design, means = gains.design, {arm["name"]: arm["metrics"] for arm in gains.arms}
    names, said = [design.primary], _GUIDANCE[gains.verdict.word]
    if gains.ships == design.arm and gains.verdict.word != "gain":  # above the front of identity and accuracy
        names, said = [str(design.identity), str(design.accuracy)], _ABOVE
    told = [
        f"{name} {format_mean(name, means[design.baseline][name])} with {design.baseline}, "
        f"{format_mean(name, means[design.arm][name])} with {design.arm}"
        for name in names
    ]
    return f"{said.format(arm=design.arm, names=' and '.join(names))} {_sentence('; '.join(told))}"


def terms(text: str, known: Collection[str] = ()) -> dict[str, str]:
    """The terms of the field that a text uses, and those that their explanations use; each with what it means.

    Args:
        text: what is read first.
        known: terms that are explained already.
    """
    found: dict[str, str] = {}
    while True:
        read = " ".join([text, *found.values()])
        more = {
            name: said
            for pattern, (name, said) in TERMS.items()
            if name not in (*known, *found) and re.search(rf"\b(?:{pattern})\b", read, re.IGNORECASE)
        }
        if not more:
            return {name: said for name, said in TERMS.values() if name in found}
        found |= more


def describe_arms(gains: Gains) -> dict[str, str]:
    """Arm -> what it is, in a line."""
    told, notes = {}, gains.design.notes.get("guidance", {})
    for arm in gains.arms:
        name = arm["name"]
        if name == gains.design.base or (name == "base" and name not in notes):
            asked = ", asked for the class without the subject's word" if gains.design.identity else ""
            told[name] = f"the base model alone, with plain guidance{asked}"
        elif name in notes:
            told[name] = _arm(notes[name])
    return told


def scale_of(guidance: Mapping[str, Any]) -> float:
    """The guidance scale in an arm's settings, which older files call scale."""
    return float(guidance["guidance_scale"] if "guidance_scale" in guidance else guidance["scale"])


def _arm(guidance: Mapping[str, Any]) -> str:
    said = [_METHODS.get(guidance["method"], guidance["method"]), f"scale {scale_of(guidance):g}"]
    said += [f"adapter weight {guidance['weight']:g}"] if guidance.get("weight") not in (None, 1.0) else []
    set_to = [f"{key} {value}" for key, value in guidance.get("options", {}).items()]
    said += [f"set to {' and '.join(set_to)} (see docs/guidance.md)"] if set_to else []
    return ", ".join([*said, *scope_words(guidance.get("scope") or {})])


def scope_words(scope: Mapping[str, Any]) -> list[str]:
    """Where, when and how strongly the adapter acts, as far as that is not everywhere, always and fully."""
    said = []
    if (where := scope.get("where")) is not None:
        until = f", in the first {round(100 * scope['where_stop'])} % of the steps" if scope["where_stop"] < 1 else ""
        said.append(f"{_PLACES[where]}{until}")
    if scope.get("early_weight") is not None:
        said.append(
            f"adapter weight {scope['early_weight']:g} in the first {round(100 * scope['early_stop'])} % of the steps"
        )
    if (scope.get("start", 0), scope.get("stop", 1)) != (0, 1):
        said.append(
            f"the adapter acts from {round(100 * scope['start'])} to {round(100 * scope['stop'])} % of the steps"
        )
    if scope.get("uncond_weight") is not None:
        said.append(f"adapter weight {scope['uncond_weight']:g} in what guidance pushes away from")
    return said


def deciding_metrics(gains: Gains) -> list[str]:
    """The metrics of the two sentences."""
    design = gains.design
    about = [design.identity, design.accuracy] if gains.adapter else []
    return list(dict.fromkeys([*filter(None, about), design.primary]))


def metric(name: str) -> str:
    """What a metric says, in a line; empty where it is one's own."""
    for pattern, said in _METRICS.items():
        if found := re.fullmatch(pattern, name):
            return said.format(*found.groups())
    return ""


def is_share(metric: str) -> bool:
    """Whether a metric goes from 0 to 1 and is a share of something."""
    return _SHARES.fullmatch(metric) is not None


def format_mean(metric: str, value: Mapping[str, Any]) -> str:
    """A mean with the digits that its interval bears; shares in percent."""
    if is_share(metric):
        return f"{round(100 * value['mean'])} %"
    return f"{value['mean']:.{_decimals(value)}f}"


def format_interval(metric: str, value: Mapping[str, Any]) -> str:
    """The interval of a mean, with equally many digits; that of a share stays between 0 and 100 %."""
    if is_share(metric):
        low, high = (min(max(100 * value[end], 0), 100) for end in ("low", "high"))
        return f"{round(low)} to {round(high)} %"
    digits = _decimals(value)
    return f"{value['low']:.{digits}f} to {value['high']:.{digits}f}"


def _decimals(value: Mapping[str, Any]) -> int:
    half = (value["high"] - value["low"]) / 2
    return 3 if half <= 0 else min(max(1 - math.floor(math.log10(half)), 0), 5)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."

"""The model card: what the adapter is, how to load it, and what it measurably does.

The Hub's `model-index` has no field for baselines or intervals, so each arm is one row, the rest stands in
`metrics.args` and in `gains.json`; `verified` is never set. Text from outside (prompts, names) is escaped, so that it
shows as it is and can neither add HTML nor break the YAML head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .adapter import Tokens
from .errors import AdapterError
from .measuring import words
from .measuring.gains import Gains
from .measuring.plane import sentences
from .tokens import token_words

__all__ = ["Card", "escape", "render_card", "slug"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What only the maker knows."""

    title: str
    base_model: str
    """Hub id or name of the base."""
    base_import: tuple[str, str] = ("", "")
    """Where the base is no hub id: a Python line that imports, and the expression that then gives its folder."""
    single_file: str = ""
    """Class of the pipeline that reads the base, where that is a single file."""
    inpainting: bool = False
    """Whether the base paints into holes of a picture, which its pipeline is given."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """What the base's scheduler must be told, such as `prediction_type`, where the base does not say it itself."""
    license: str = "other"
    """An identifier of the Hub's list, such as apache-2.0."""
    description: str = ""
    trigger_words: Sequence[str] = ()
    prompts: Sequence[str] = ()
    """Shown in the Hub's widget."""
    tags: Sequence[str] = ()
    limits: Sequence[str] = ()
    """What it does badly, one sentence each."""
    weight: float = 1.0
    """The weight that it was measured with, where it was not its full one."""
    command: str = ""
    """The exact command that made it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further lines for the table of facts: device, dtype, data hashes."""

    def __post_init__(self) -> None:
        if not self.title.strip() or not self.base_model.strip():
            raise AdapterError(f"title={self.title!r}, base_model={self.base_model!r}: both are needed for a card")


class _Plain(yaml.SafeDumper):
    """YAML without anchors, which many readers of model cards do not know."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def escape(text: object) -> str:
    """Markdown and HTML special characters as entities; line breaks as spaces."""
    flat = re.sub(r"[\x00-\x1f\x7f\s]+", " ", str(text)).strip()
    return re.sub(r"[&<>\"'`*_\[\](){}#|\\~!$]", lambda m: f"&#{ord(m.group())};", flat)


def slug(text: str) -> str:
    """A file name made of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def render_card(
    card: Card,
    *,
    kinds: Sequence[str],
    gains: Gains | None,
    has: Sequence[str],
    notes: Sequence[str],
    tokens: Tokens | None = None,
) -> str:
    """`README.md`.

    Args:
        card: title, base, license and what else the author says.
        kinds: those of an `Adapter`; controlnet, unet, tokens.
        gains: the comparison; None: nothing was measured.
        has: names of the files beside it.
        notes: further remarks on compatibility.
        tokens: learned tokens, if some belong to two text encoders.
    """
    head = yaml.dump(_head(card, kinds, gains), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=1000)
    parts = [
        f"---\n{head}---",
        f"# {escape(card.title)}",
        escape(card.description),
        _gains_section(gains, has),
        _use_section(card, kinds, has, tokens or {}),
        _list("## Compatibility", notes),
        _list(
            "## Limits",
            _harm(gains) + [escape(limit) for limit in card.limits]
            or ["None were written down, which is not to say there are none."],
        ),
        _facts(card),
        f"## License\n\n{escape(card.license)}; the base model's own license applies to what is made with it.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _harm(gains: Gains | None) -> list[str]:
    """What a reader must know first: this adapter was measured, and makes pictures worse."""
    if gains is None or gains.released is None or gains.released.word != "harm":
        return []
    return [f"**It does harm by its own measure.** {escape(gains.released.sentence)}"]


def _head(card: Card, kinds: Sequence[str], gains: Gains | None) -> dict[str, Any]:
    adapters = [kind for kind in kinds if kind not in ("controlnet", "unet", "tokens")]
    tags = ["text-to-image", "diffusers", *(["lora", *adapters] if adapters else kinds), *card.tags]
    head: dict[str, Any] = {
        "base_model": card.base_model,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "license": card.license,
        "tags": list(dict.fromkeys(tags)),
    }
    if card.trigger_words:
        head["instance_prompt"] = ", ".join(card.trigger_words)
    if card.prompts:
        head["widget"] = [{"text": prompt} for prompt in card.prompts]
    if gains is not None:
        head["model-index"] = [{"name": card.title, "results": _results(gains)}]
    return head


def _results(gains: Gains) -> list[dict[str, Any]]:
    dataset = {"name": "held-out prompts and seeds", "type": "prompts", "args": dict(gains.counts)}
    rows = []
    for arm in gains.arms:
        metrics = []
        for name, value in arm["metrics"].items():
            args = {"low": _rounded(value["low"]), "high": _rounded(value["high"]), "clusters": value["clusters"]}
            args["method"] = value["method"]
            metrics.append({"type": slug(name), "name": name, "value": _rounded(value["mean"]), "args": args})
        task = {"type": "text-to-image", "name": arm["name"]}
        rows.append({"task": task, "dataset": dataset, "metrics": metrics})
    return rows


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _gains_section(gains: Gains | None, has: Sequence[str]) -> str:
    if gains is None:
        return "## Measured gains\n\nNot measured."
    design = gains.design
    arrows = [f"{escape(m)} {'↑' if up else '↓'}" for m, up in design.higher_is_better.items()]
    table = ["| arm | " + " | ".join(arrows) + " | s per image |", "|---" * (len(arrows) + 2) + "|"]
    for arm in gains.arms:
        cells = []
        for metric in design.higher_is_better:
            value = arm["metrics"][metric]
            cells.append(f"{words.format_mean(metric, value)} ({words.format_interval(metric, value)})")
        table.append(f"| {escape(arm['name'])} | " + " | ".join(cells) + f" | {arm['seconds']:.3g} |")
    counts = gains.counts
    verdicts = filter(None, (gains.shipped, gains.adapter, gains.verdict))
    how = (
        f"{counts['pairs']} pairs: {counts['prompts']} prompts, {counts['seeds']} seeds, {counts['subjects']} "
        f"subject(s); intervals ({design.confidence:.0%}) over {counts['clusters']} {counts['cluster']}s. Primary "
        f"metric {escape(design.primary)}, least effect worth having {design.minimum_effect:g}, both declared before "
        "the run."
    )
    return "\n\n".join(
        part
        for part in [
            "## Measured gains",
            *(f"**{escape(said)}**" for said in (words.adapter(gains), words.guidance(gains)) if said),
            "\n".join(table),
            _list("Against the front of plain guidance:", [escape(said) for said in sentences(gains.plane)]),
            how,
            _list("The verdicts in numbers:", [escape(verdict.sentence) for verdict in verdicts]),
            "Every number can be recomputed from `per_image.csv` by `python -m adapters verify .`"
            + ("; `report.html` shows the pairs, the curves and the worst cases." if "report.html" in has else "."),
        ]
        if part
    )


def _use_section(card: Card, kinds: Sequence[str], has: Sequence[str], tokens: Tokens) -> str:
    # Markdown shows entities in code as they are written, so words that need any stand outside.
    triggers = ", ".join(f"`{word}`" if escape(word) == word else escape(word) for word in card.trigger_words)
    lines = ["## How to use", f"Trigger words: {triggers}" if triggers else "", "```python", *_loaded(card)]
    if "pytorch_lora_weights.safetensors" in has:
        lines += _lora(card)
    elif "controlnet" in kinds:
        lines[3:] = _loaded(card, control='ControlNetModel.from_pretrained(".")  # this folder')
    elif "unet" in kinds:
        lines.append('pipe.unet = type(pipe.unet).from_pretrained(".")  # this folder')
    else:
        lines.append("import adapters  # plain diffusers does not read this kind")
        lines.append(f'adapters.load(pipe, "."{"" if card.weight == 1 else f", weight={card.weight:g}"})')
    if "learned_embeds.safetensors" in has:
        lines += ["from safetensors.torch import load_file", 'tokens = load_file("learned_embeds.safetensors")']
        lines += _tokens(tokens)
    lines.append("```")
    weight = "" if card.weight == 1 else f", weight={card.weight:g}"
    guidance = "lambda config: scfg.attach_config(pipe, config)"
    if "guider_config.json" in has:
        lines += [
            "",
            "With the guidance it was measured with (scfg-toolkit):",
            "",
            "```python",
            "import adapters, scfg",
            *_fresh(card, kinds),
            "",
            f'with adapters.load(pipe, "."{weight}, guidance={guidance}, place=scfg.place_of) as attached:',
            f"    image = pipe({_quoted(next(iter(card.prompts), 'a photo'))}, {_more(card, kinds)}).images[0]",
            "```",
        ]
    return "\n".join(lines)


def _lora(card: Card) -> list[str]:
    if card.weight == 1:
        return ['pipe.load_lora_weights(".")  # this folder']
    weight = f"{card.weight:g}"
    return [
        'pipe.load_lora_weights(".", adapter_name="this")  # this folder',
        f'pipe.set_adapters("this", {weight})  # the weight that measured best',
    ]


def _tokens(tokens: Tokens) -> list[str]:
    if all(set(own) == {"text_encoder"} for own in tokens.values()):
        return ["pipe.load_textual_inversion([{word: row} for word, row in tokens.items()], token=list(tokens))"]
    words = "[" + ", ".join(_quoted(word) for word in token_words(tokens)) + "]"
    places = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
    return [
        f"pipe.load_textual_inversion(tokens['{slot}'], token={words}, "
        f"text_encoder=pipe.{encoder}, tokenizer=pipe.{own})"
        for slot, (encoder, own) in places.items()
    ]


def _fresh(card: Card, kinds: Sequence[str]) -> list[str]:
    """A pipeline without the adapter of the block above, which would be put on twice; a whole model is swapped."""
    if "controlnet" in kinds or "unet" in kinds:
        return []
    return _loaded(card)


def _loaded(card: Card, control: str = "") -> list[str]:
    """Python that makes `pipe` of the base, with a ControlNet if one is given."""
    plain = "StableDiffusionPipeline" if control else "DiffusionPipeline"
    kind = (card.single_file or plain).replace("Pipeline", "ControlNetPipeline" if control else "Pipeline")
    how = "from_single_file" if card.single_file else "from_pretrained"
    lines = [f"from diffusers import {'ControlNetModel, ' if control else ''}{kind}"]
    lines += [*filter(None, card.base_import[:1]), ""]
    lines += [f"control = {control}"] if control else []
    given = (card.base_import[1] or _quoted(card.base_model)) + (", controlnet=control" if control else "")
    lines.append(f"pipe = {kind}.{how}({given})")
    if card.schedule:
        told = ", ".join(f"{name}={value!r}" for name, value in card.schedule.items())
        lines.append(f"pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, {told})")
    return lines


def _more(card: Card, kinds: Sequence[str]) -> str:
    """Further arguments of the call; the scale is the one that was measured."""
    given = "image=picture, mask_image=mask, strength=1.0, " if card.inpainting else ""
    return given + ("image=condition, " if "controlnet" in kinds else "") + "**attached.run.call_kwargs"


def _quoted(text: str) -> str:
    """A Python literal that cannot end its code block."""
    return ascii(re.sub(r"[`\s]+", " ", text))


def _list(title: str, items: Sequence[str]) -> str:
    return "\n".join([title, "", *(f"- {item}" for item in items)]) if items else ""


def _facts(card: Card) -> str:
    facts = {"base": card.base_model, **card.facts, **({"command": card.command} if card.command else {})}
    rows = [f"| {escape(name)} | {escape(value)} |" for name, value in facts.items()]
    return "\n".join(["## How it was made", "", "| | |", "|---|---|", *rows])

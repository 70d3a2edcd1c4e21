"""A page in the browser: one prompt drawn by the base, with the adapter, and with the adapter and S-CFG, side by side.

python recipes/studio.py --base.path pocket --adapter runs/demo/release
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from PIL import Image

from recipes.common.base import POCKET, adapted, sampling_pipeline
from recipes.common.cli import explained, launch, say
from recipes.common.guidance import (
    EFFECTIVE,
    arguments_of,
    effective_scales,
    guidance_of,
    guided,
    guider_of,
    method_title,
)
from recipes.common.precision import drawing_in, of_sampling
from recipes.common.settings import GuidanceSettings, SamplingSettings, ScopeSettings
from training.config import BaseSettings, require
from training.errors import TrainingError
from training.sheet import newest_sheet
from training.text import read_text

if TYPE_CHECKING:
    from types import ModuleType

    from diffusers import DiffusionPipeline

__all__ = ["Pair", "Settings", "build_page", "draw_pair", "run", "save_guider", "watched"]

CHOICES = ("completion", "foreground", "tokens", "reference")
LIMITS = ("gamma_min", "gamma_max", "scale_cap")
SLIDERS = {"smoothing_sigma": 3, "start": 1, "stop": 1}
METHOD = "semantic is S-CFG; the others are control arms. interval guides between start and stop only."
PROMPT = "a red dog and a blue cat on the grass"
WHERE: dict[str, Literal["subject", "uniform", "elsewhere"] | None] = {
    "everywhere": None,
    "the subject's region": "subject",
    "evenly (a control)": "uniform",
    "another place (a control)": "elsewhere",
}
STALE = "These pictures were drawn before something was changed; press Draw."
EVERY = 5.0  # seconds between two looks at a training's sheet, which grows at validations only
COLUMNS = 4  # of the strip: its words stay readable at the width of a page
# Small pictures fill their place; the strip keeps a readable size, and is moved sideways on a phone.
STYLE = """
#base .image-frame, #left .image-frame, #right .image-frame, #base img, #left img, #right img {
  width: 100%; height: auto; object-fit: contain;
}
#strip .image-container { overflow-x: auto; padding-top: 44px; }
#strip .image-frame, #strip .image-container > button { justify-content: flex-start; overflow: visible; }
#strip img { width: 100%; min-width: 1200px; max-width: none; height: auto; }
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """CFG and S-CFG side by side in a browser. These settings are the page's initial values."""

    base: BaseSettings = field(default_factory=lambda: BaseSettings(path=POCKET))
    """The base model. `path: pocket` is the embedded one."""
    adapter: str | None = None
    """Release folder, LoRA or U-net folder, hub id, or another trainer's .safetensors file."""
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)
    """Guidance of the right-hand picture. Its scale is used for both pictures."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How pictures are sampled."""
    watch: str | None = None
    """Folder of a training (its `out`), or of several, whose newest sheet of samples the page shows."""
    port: int = 7860
    """Port of the page, which is served to this machine only."""


def run(settings: Settings) -> None:
    """Serve the page until Ctrl-C."""
    gr = _gradio()
    page = build_page(gr, settings)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
    theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    look = {"theme": theme, "css": STYLE, "footer_links": [], "quiet": True}
    place = {"server_name": "127.0.0.1", "server_port": settings.port, "share": False}
    try:
        page.launch(**place, **look, prevent_thread_lock=True)
    except OSError as error:
        raise TrainingError(f"port {settings.port} cannot be used ({error}); name another with --port") from error
    say(f"open http://127.0.0.1:{settings.port} on this machine; Ctrl-C ends it")
    page.block_thread()


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at the import
    try:
        import gradio
    except ImportError as error:
        raise TrainingError(f"the studio needs gradio ({error}): pip install -e '.[studio]' in the checkout") from error
    return gradio


# ---------------------------------------------------------------------------------------------- what it does


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Pictures from the same noise, and what the guider did."""

    base: Any
    """The base alone with plain CFG; None where there is no adapter, as `plain` is the same."""
    plain: Any
    """With the adapter and plain CFG."""
    guided: Any
    """With the adapter and the guidance."""
    strip: Image.Image | None
    """Predicted picture, regions and gamma over the steps; None for a method without regions."""
    line: str
    """Seconds and effective guidance scale of each."""


def draw_pair(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    guidance: GuidanceSettings,
    sampling: SamplingSettings,
    adapter: str | None = None,
) -> Pair:
    """The prompt by the base and with the adapter, and there with `guidance`; from one noise and at the same scale.

    Args:
        pipe: what samples.
        prompt: what to draw.
        seed: of the noise of all.
        guidance: the one beside plain CFG, with the adapter's weight and scope.
        sampling: steps, size and precision.
        adapter: folder, file or hub id; None: the base alone.
    """
    require(bool(prompt.strip()), "there is no prompt; write what to draw")
    require(guidance.guidance_scale > 1, "at guidance scale 1 there is no guidance to compare; choose a scale above 1")
    base = _shot(pipe, prompt, seed, _plain(guidance), sampling)[0] if adapter else None
    trigger = opening(adapter).trigger.split() if adapter else []
    word, noun = (trigger[0], " ".join(trigger[1:])) if len(trigger) > 1 else ("", "")
    where = guidance.scope.where if guidance.scope else None
    require(where is None or bool(word), "scope.where looks for the subject's words; the adapter's card names none")
    weight = 1.0 if guidance.weight is None else guidance.weight
    with adapted(pipe, adapter, weight, scope=guidance.scope, identifier=word, noun=noun):
        plain, _ = _shot(pipe, prompt, seed, _plain(guidance), sampling)
        other, strip = _shot(pipe, prompt, seed, guidance, sampling)
    line = " · ".join(
        f"**{shot.arm}** {shot.seconds:.2f} s, effective guidance scale {shot.numbers['effective scale']:.2f}"
        for shot in (plain, other)
    )
    if strip is None:
        line += f" · no strip: {guidance.method} makes no regions"
    return Pair(base=base, plain=plain, guided=other, strip=strip, line=line)


def _plain(guidance: GuidanceSettings) -> GuidanceSettings:
    return GuidanceSettings(method="cfg", guidance_scale=guidance.guidance_scale, rescale=guidance.rescale)


def _shot(
    pipe: DiffusionPipeline, prompt: str, seed: int, guidance: GuidanceSettings, sampling: SamplingSettings
) -> tuple[Any, Image.Image | None]:
    import adapters
    from scfg.trace import RECORDABLE
    from scfg.visualize import strip

    maps = drawing_in(pipe, of_sampling(pipe, sampling, say), guided(pipe, guidance, record=RECORDABLE))
    with maps() as run:
        [shot] = adapters.measuring.sample.images(
            pipe,
            [prompt],
            [seed],
            arm=method_title(guidance.method),
            guidance_scale=guidance.guidance_scale,
            steps=sampling.steps,
            height=sampling.height,
            width=sampling.width,
            negative_prompt=sampling.negative_prompt,
            common=arguments_of(pipe, guidance, sampling),
        )
        numbers = effective_scales(run)[0] if run is not None else {EFFECTIVE: guidance.guidance_scale}
        mapped = run is not None and any(step.regions is not None and step.gamma is not None for step in run.trace)
        return replace(shot, numbers=numbers), strip(run, pipe, columns=COLUMNS) if mapped else None


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What a release says of itself, which the page opens with."""

    trigger: str = ""
    """Identifier and class."""
    prompts: tuple[str, ...] = ()
    guidance: GuidanceSettings | None = None
    """The one that it ships with."""


def opening(adapter: str) -> Opening:
    """What an adapter's folder says in its card and its `guider_config.json`; nothing of a file or hub id.

    Raises:
        TrainingError: a card that is no YAML.
        ScfgError: a guider that cannot be read.
    """
    import yaml

    from adapters.files import read_object
    from adapters.source import GUIDER_FILE

    folder = Path(adapter).expanduser()
    card, guider = folder / "README.md", folder / GUIDER_FILE
    head: Any = None
    if card.is_file() and (text := read_text(card)).startswith("---\n"):
        try:
            head = yaml.safe_load(text.split("\n---", 1)[0])
        except yaml.YAMLError as error:
            raise TrainingError(f"{card}: its head is no YAML ({' '.join(str(error).split())})") from error
    head = head if isinstance(head, dict) else {}
    shown = [item.get("text") for item in head.get("widget") or [] if isinstance(item, dict)]
    return Opening(
        trigger=str(head.get("instance_prompt") or "").split(",")[0].strip(),
        prompts=tuple(prompt for prompt in shown if isinstance(prompt, str)),
        guidance=_shipped(read_object(guider)) if guider.is_file() else None,
    )


def _shipped(config: dict[str, Any]) -> GuidanceSettings:
    """A `guider_config.json` as settings."""
    import scfg

    read = scfg.read_config({name: value for name, value in config.items() if name != "scope"})
    reach = config.get("scope")
    scope = None
    if reach:
        where = reach.get("where") or {}
        scope = ScopeSettings(
            uncond_weight=reach.get("uncond_weight"),
            early_weight=reach.get("early_weight"),
            early_stop=reach.get("early_stop", 0.2),
            start=reach.get("start", 0.0),
            stop=reach.get("stop", 1.0),
            where="subject" if where else None,
            where_stop=where.get("stop", 1.0),
        )
    return GuidanceSettings(
        method=read.guidance.method,
        guidance_scale=read.guidance_scale,
        rescale=read.guidance_rescale or None,
        options=asdict(read.guidance),
        scope=scope,
    )


def _opened(settings: Settings) -> tuple[GuidanceSettings, str]:
    """The guidance and the prompt that the page opens with: the command line's, or else the adapter's own."""
    found = opening(settings.adapter) if settings.adapter else Opening()
    guidance = settings.guidance
    if found.guidance is not None and guidance == GuidanceSettings():
        guidance = found.guidance
        if guidance.method == "cfg":  # the picture in the middle shows it; the one beside it shows S-CFG
            guidance = replace(guidance, method="semantic", options={})
    prompt = found.prompts[0] if found.prompts else f"a {found.trigger}" if found.trigger else PROMPT
    return guidance, prompt


def save_guider(adapter: str, guidance: GuidanceSettings) -> str:
    """Write `guider_config.json` into an adapter's folder, and its manifest anew; returns what was done.

    Raises:
        TrainingError: the adapter is no folder of this machine.
        AdapterError: a release folder that does not verify; it is left as it is.
    """
    from adapters import files
    from adapters.source import GUIDER_FILE

    folder = Path(adapter).expanduser().resolve()
    require(bool(adapter.strip()), "there is no adapter to save the guider into; name a release folder")
    require(folder.is_dir(), f"adapter {adapter} is no folder of this machine; a guider is saved into folders only")
    trigger = opening(adapter).trigger.split()
    config = guider_of(guidance, *((trigger[0], " ".join(trigger[1:])) if len(trigger) > 1 else ("", "")))
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    if (folder / files.MANIFEST).exists():
        signed = (folder / files.SIGNATURE).exists()
        _into_release(folder, text)
        unsigned = "; it is unsigned now" if signed else ""
        measured = "; card and gains.json still tell of what was measured" if (folder / "gains.json").exists() else ""
        return f"saved {folder / GUIDER_FILE} and its entry in {files.MANIFEST}{measured}{unsigned}"
    weights = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    require(bool(weights), f"adapter {adapter} is a folder without weights; nothing is saved there")
    files.write_text(folder / GUIDER_FILE, text)
    return f"saved {folder / GUIDER_FILE}; the folder has no {files.MANIFEST} to update"


def _into_release(folder: Path, text: str) -> None:
    """The whole folder with the new guider takes the old one's place in one step."""
    from adapters import files
    from adapters.source import GUIDER_FILE

    facts = files.verify_folder(folder)  # otherwise the new manifest would vouch for what someone altered
    names = facts.pop("files")
    with files.write_folder(folder) as stage:
        for name in names:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, stage / name)
        (stage / GUIDER_FILE).write_text(text, "utf-8")
        files.write_manifest(stage, facts)

        def there(place: str, found: list[str]) -> list[str]:
            old = [files.SIGNATURE] if Path(place) == folder else []  # it was of the manifest before
            return old + [name for name in found if (stage / Path(place).relative_to(folder) / name).is_file()]

        # What the manifest does not name is kept, and stays unnamed: it was not shipped and shall not be.
        shutil.copytree(folder, stage, symlinks=True, dirs_exist_ok=True, ignore=there)


def watched(folder: str, seen: str = "") -> tuple[Image.Image | None, str, str]:
    """The newest sheet of samples of a training, a line about it as markdown, and a mark that changes with the sheet.

    Args:
        folder: of a run, or of several runs; empty: none is watched.
        seen: the mark of the sheet that is shown; the picture is None where this is still the newest.
    """
    if not folder.strip():
        return None, "Name the folder of a training (its `out`) to watch its samples.", ""
    try:
        place = Path(folder.strip()).expanduser()
        sheet = newest_sheet(place)
        if sheet is None:
            there = "No sheet of samples in" if place.is_dir() else "There is no folder"
            ask = "A training writes it before its first step and at every validation, if it has validation.prompts."
            return None, _escaped(f"{there} {place} yet. {ask}"), ""
        facts = sheet.stat()
        mark = f"{sheet} {facts.st_mtime_ns} {facts.st_size} {facts.st_ino}"
        written = time.strftime("%H:%M:%S", time.localtime(facts.st_mtime))
        line = _escaped(f"{sheet}, written at {written}")
        if mark == seen:
            return None, line, mark
        with Image.open(sheet) as image:
            return image.convert("RGB"), line, mark
    except (OSError, SyntaxError, ValueError, RuntimeError) as error:  # a damaged PNG, or words that are no path
        return None, _plainly("Not shown", error), ""


# ---------------------------------------------------------------------------------------------- the page


def _pipelines(settings: Settings) -> Callable[[str], Any]:
    """Base -> its pipeline; the last one is kept."""

    @lru_cache(maxsize=1)
    def pipe(path: str) -> Any:
        base = settings.base if path == settings.base.path else BaseSettings(path=path)
        return sampling_pipeline(base, settings.sampling)

    return pipe


def build_page(gr: ModuleType, settings: Settings) -> Any:
    """The page. The base is loaded first, so that a wrong one is said on the command line."""
    pipe = _pipelines(settings)
    pipe(settings.base.path)
    shipped, prompt = _opened(settings)
    settings = replace(settings, guidance=shipped)
    with gr.Blocks(title="S-CFG studio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("## Base, adapter, and adapter with S-CFG\nSame prompt, noise and guidance scale.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                parts = _request(gr, settings, prompt)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    what = "Adapter, " if settings.adapter else ""
                    base = _picture(gr, "base", "Base, CFG", visible=bool(settings.adapter))
                    left, right = _picture(gr, "left", f"{what}CFG"), _picture(gr, "right", f"{what}S-CFG")
                line, stale = gr.Markdown(elem_id="line"), gr.Markdown(elem_id="stale")
                drawn = gr.State(False)
        strip = _picture(gr, "strip", "Picture, regions, gamma", visible=False)
        with gr.Accordion("Guider"):
            parts |= _guider(gr, settings.guidance)
            _saving(gr, settings, parts)
        _watching(gr, page, settings)

        def on_draw(data: Mapping[Any, Any]) -> tuple[Any, ...]:
            said = {name: data[part] for name, part in parts.items()}
            try:
                guidance, sampling = _asked(settings, said)
                require(said["seed"] is not None, "there is no seed; give a whole number")
                adapter = said["adapter"].strip() or None
                pair = draw_pair(pipe(said["base"]), said["prompt"], said["seed"], guidance, sampling, adapter)
            except _mendable() as error:  # what was drawn before is not what is asked for now
                empty = [gr.update(value=None) for _ in range(3)]  # gradio empties the update itself: one each
                return *empty, gr.update(value=None, visible=False), _plainly("Not drawn", error), "", False
            alone = gr.update(value=pair.base.image if pair.base else None, visible=pair.base is not None)
            what = "Adapter, " if pair.base else ""
            plain = gr.update(value=pair.plain.image, label=f"{what}CFG")
            other = gr.update(value=pair.guided.image, label=f"{what}{pair.guided.arm}")
            strips = gr.update(value=pair.strip, visible=pair.strip is not None)
            return alone, plain, other, strips, pair.line, "", True

        draw.click(
            on_draw,
            {*parts.values()},
            [base, left, right, strip, line, stale, drawn],
            show_progress_on=[left, right],
            api_visibility="private",
        )
        gr.on(
            [part.change for part in parts.values()],
            lambda there: STALE if there else "",
            drawn,
            stale,
            show_progress="hidden",
            api_visibility="private",
        )
    return page


def _saving(gr: ModuleType, settings: Settings, parts: Mapping[str, Any]) -> None:
    """The button that saves the guider, and the question before it."""
    save = gr.Button("Save guider into the adapter", elem_id="save")
    with gr.Row(visible=False) as asked:
        sure = gr.Button("Yes, replace its guider", variant="stop", elem_id="sure")
        keep = gr.Button("No, leave it", elem_id="keep")
    saved = gr.Markdown(elem_id="saved")

    def on_ask(adapter: str) -> tuple[Any, str]:
        return gr.update(visible=True), f"Write this guider into {adapter.strip() or 'no adapter'}?"

    def on_save(data: Mapping[Any, Any]) -> tuple[Any, str]:
        try:
            guidance, _ = _asked(settings, {name: data[part] for name, part in parts.items()})
            return gr.update(visible=False), save_guider(data[parts["adapter"]], guidance)
        except _mendable() as error:
            return gr.update(visible=False), _plainly("Not saved", error)

    save.click(on_ask, parts["adapter"], [asked, saved], api_visibility="private")
    sure.click(on_save, {*parts.values()}, [asked, saved], api_visibility="private")
    keep.click(lambda: (gr.update(visible=False), ""), None, [asked, saved], api_visibility="private")


def _watching(gr: ModuleType, page: Any, settings: Settings) -> None:
    """The panel that follows the samples of a training."""
    folder = settings.watch or ""
    with gr.Accordion("Training", open=bool(folder), elem_id="training"):
        names = {"label": "Training", "info": "folder of a run, or of several runs; empty: none", "elem_id": "watch"}
        asked = gr.Textbox(folder, **names)
        line = gr.Markdown(elem_id="watched")
        sheet = _picture(gr, "sheet", "Samples, a row a validation", visible=False)
        seen, timer = gr.State(""), gr.Timer(EVERY, active=bool(folder))

    def on_look(place: str, before: str) -> tuple[Any, str, str, Any]:
        image, said, mark = watched(place, before)
        same = bool(mark) and image is None
        shown = gr.skip() if same else gr.update(value=image, visible=image is not None)
        return shown, said, mark, gr.update(active=bool(place.strip()))

    ways = {"show_progress": "hidden", "api_visibility": "private"}
    # With the page itself, which may have been left and opened again; then at every tick, and where the folder changes.
    gr.on([page.load, timer.tick, asked.change], on_look, [asked, seen], [sheet, line, seen, timer], **ways)


def _request(gr: ModuleType, settings: Settings, prompt: str) -> dict[str, Any]:
    """Inputs of what is drawn, whatever the guidance."""
    base, sampling, scale = settings.base.path, settings.sampling, settings.guidance.guidance_scale
    names = {"label": "Base", "info": "pocket, or a folder or hub id", "min_width": 130}
    other = {"label": "Adapter", "info": "folder, file or hub id; empty: none", "min_width": 130}
    count = {"label": "Steps", "step": 1, "min_width": 130, "elem_id": "steps"}
    parts = {
        "prompt": gr.Textbox(prompt, label="Prompt", lines=2, elem_id="prompt"),
        "negative_prompt": gr.Textbox(sampling.negative_prompt or "", label="Negative prompt"),
    }
    with gr.Row():
        parts["base"] = gr.Dropdown([*{POCKET: 0, base: 0}], value=base, allow_custom_value=True, **names)
        parts["adapter"] = gr.Textbox(settings.adapter or "", elem_id="adapter", **other)
    with gr.Row():
        parts["seed"] = gr.Number(1, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=130)
        parts["steps"] = gr.Slider(1, max(100, sampling.steps), sampling.steps, **count)
    parts["scale"] = gr.Slider(1, max(20, scale), scale, step=0.1, label="Guidance scale", elem_id="scale")
    weight = 1.0 if settings.guidance.weight is None else settings.guidance.weight
    reach = settings.guidance.scope or ScopeSettings()
    share = 1.0 if reach.uncond_weight is None or not weight else min(1.0, reach.uncond_weight / weight)
    acts = {"step": 0.05, "min_width": 130}
    with gr.Row():
        parts["weight"] = gr.Slider(0, max(1.5, weight), weight, label="Adapter weight", elem_id="weight", **acts)
        parts["uncond"] = gr.Slider(0, 1, share, label="Share in the unconditional half", elem_id="uncond", **acts)
    with gr.Row():
        parts["begin"] = gr.Slider(0, 0.95, reach.start, label="Acts from (share of steps)", elem_id="begin", **acts)
        parts["end"] = gr.Slider(0.05, 1, reach.stop, label="Acts until (share of steps)", elem_id="end", **acts)
    place = next(words for words, where in WHERE.items() if where == reach.where)
    with gr.Row():
        parts["where"] = gr.Dropdown(list(WHERE), value=place, label="Acts where", min_width=130, elem_id="where")
        label = "In that place until (share of steps)"
        parts["where_stop"] = gr.Slider(0.05, 1, reach.where_stop, label=label, elem_id="where_stop", **acts)
    return parts


def _guider(gr: ModuleType, settings: GuidanceSettings) -> dict[str, Any]:
    """An input for every main field of the guider, with the field's own help line."""
    import docstring_parser

    import scfg

    guidance, kinds = guidance_of(settings), get_type_hints(scfg.SemanticCFG)
    # A method without attention has fewer fields; the page shows S-CFG's for the others.
    values = {**vars(scfg.SemanticCFG()), **settings.options, **vars(guidance), "method": guidance.method}
    described = [
        docstring_parser.parse_from_object(kind).params
        for kind in scfg.SemanticCFG.__mro__[::-1]
        if issubclass(kind, scfg.Guidance)
    ]
    helped = {item.arg_name: item.description for params in described for item in params}
    helped["method"] = METHOD

    def told(name: str) -> dict[str, Any]:
        value = values[name]
        return {"value": value, "label": name, "info": helped[name], "min_width": 250, "elem_id": name}

    ratios = list(dict.fromkeys(("auto", 1, 2, 4, 8, values["latent_ratio"])))
    with gr.Row():
        parts = {"method": gr.Dropdown(list(scfg.METHODS), **told("method"))}
        parts["latent_ratio"] = gr.Dropdown(ratios, **told("latent_ratio"))
        parts |= {name: gr.Number(placeholder="no limit", **told(name)) for name in LIMITS}
        parts |= {name: gr.Slider(0, most, step=0.05, **told(name)) for name, most in SLIDERS.items()}
        parts |= {name: gr.Dropdown(list(get_args(kinds[name])), **told(name)) for name in CHOICES}
    return parts


def _picture(gr: ModuleType, name: str, label: str, **options: Any) -> Any:
    # PNG: gradio's own choice loses a little, and pictures are compared here.
    shown = {"format": "png", "interactive": False, "min_width": 140, "buttons": ["download", "fullscreen"]}
    return gr.Image(label=label, elem_id=name, **shown, **options)


def _asked(settings: Settings, said: Mapping[str, Any]) -> tuple[GuidanceSettings, SamplingSettings]:
    """What the page says, as settings; what it has no input for is as on the command line."""
    fields = {name: said[name] for name in ("latent_ratio", *LIMITS, *SLIDERS, *CHOICES)}
    options = {**settings.guidance.options, **fields}
    weight, share = said["weight"], said["uncond"]
    own = settings.guidance.scope or ScopeSettings()
    scope = replace(
        own,
        uncond_weight=None if share == 1 else share * weight,
        start=said["begin"],
        stop=said["end"],
        where=WHERE[said["where"]],
        where_stop=said["where_stop"] if WHERE[said["where"]] else 1.0,
    )
    guidance = replace(
        settings.guidance,
        method=said["method"],
        guidance_scale=said["scale"],
        options=options,
        weight=None if weight == 1 else weight,
        scope=None if scope == ScopeSettings() else scope,
    )
    negative = said["negative_prompt"].strip() or None
    return guidance, replace(settings.sampling, steps=said["steps"], negative_prompt=negative)


def _mendable() -> tuple[type[Exception], ...]:
    """Errors that are said on the page; any other is a bug of ours and keeps its traceback."""
    return TrainingError, OSError, *explained()


def _plainly(what: str, error: Exception) -> str:
    """An error as markdown that shows its words as they are."""
    return f"**{what}:** {_escaped(error)}"


def _escaped(words: object) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", " ".join(str(words).split()))


if __name__ == "__main__":
    launch(Settings, run)

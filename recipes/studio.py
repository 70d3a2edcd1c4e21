"""A page in the browser: one prompt drawn with plain CFG and with S-CFG, side by side, on this machine alone.

python recipes/studio.py --base.path pocket --adapter runs/demo/release
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from PIL import Image

from recipes.common.base import POCKET, adapted, pipeline
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
from recipes.common.settings import GuidanceSettings, SamplingSettings
from training.config import BaseSettings, require
from training.errors import TrainingError

if TYPE_CHECKING:
    from types import ModuleType

    from diffusers import DiffusionPipeline

__all__ = ["Pair", "Settings", "build", "draw_pair", "run", "save_guider"]

CHOICES = ("completion", "foreground", "tokens", "reference")
LIMITS = ("gamma_min", "gamma_max", "scale_cap")
SLIDERS = {"smoothing_sigma": 3, "start": 1, "stop": 1}
METHOD = "semantic is S-CFG; the others are control arms. interval guides between start and stop only."
PROMPT = "a red dog and a blue cat on the grass"
COLUMNS = 4  # of the strip: its words stay readable at the width of a page
# Small pictures fill their place; the strip keeps a readable size, and is moved sideways on a phone.
STYLE = """
#left .image-frame, #right .image-frame, #left img, #right img { width: 100%; height: auto; object-fit: contain; }
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
    port: int = 7860
    """Port of the page, which is served to this machine only."""


def run(settings: Settings) -> None:
    """Serve the page until Ctrl-C."""
    gr = _gradio()
    page = build(gr, settings)
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
        raise TrainingError(f"the studio needs gradio ({error}): pip install 'scfg-toolkit[studio]'") from error
    return gradio


# ---------------------------------------------------------------------------------------------- what it does


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two pictures from the same noise, and what the guider did."""

    plain: Any
    guided: Any
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
    """The prompt with plain CFG and with `guidance`, from the same noise and at the same scale.

    Args:
        pipe: what samples.
        prompt: what to draw.
        seed: of the noise of both.
        guidance: the one beside plain CFG.
        sampling: steps, size and precision.
        adapter: folder, file or hub id; None: the base alone.
    """
    require(bool(prompt.strip()), "there is no prompt; write what to draw")
    require(guidance.scale > 1, "at guidance scale 1 there is no guidance to compare; choose a scale above 1")
    with adapted(pipe, adapter):
        plain, _ = _shot(pipe, prompt, seed, _plain(guidance), sampling)
        other, strip = _shot(pipe, prompt, seed, guidance, sampling)
    line = " · ".join(
        f"**{shot.arm}** {shot.seconds:.2f} s, effective guidance scale {shot.numbers['effective scale']:.2f}"
        for shot in (plain, other)
    )
    if strip is None:
        line += f" · no strip: {guidance.method} makes no regions"
    return Pair(plain=plain, guided=other, strip=strip, line=line)


def _plain(guidance: GuidanceSettings) -> GuidanceSettings:
    return GuidanceSettings(method="cfg", scale=guidance.scale, rescale=guidance.rescale)


def _shot(
    pipe: DiffusionPipeline, prompt: str, seed: int, guidance: GuidanceSettings, sampling: SamplingSettings
) -> tuple[Any, Image.Image | None]:
    import adapters
    from scfg.trace import RECORDABLE
    from scfg.visualize import strip

    with guided(pipe, guidance, record=RECORDABLE)() as run:
        [shot] = adapters.measuring.sample.images(
            pipe,
            [prompt],
            [seed],
            arm=method_title(guidance.method),
            guidance_scale=guidance.scale,
            steps=sampling.steps,
            height=sampling.height,
            width=sampling.width,
            negative_prompt=sampling.negative_prompt,
            common=arguments_of(pipe, guidance),
        )
        numbers = effective_scales(run)[0] if run is not None else {EFFECTIVE: guidance.scale}
        mapped = run is not None and any(step.regions is not None and step.gamma is not None for step in run.trace)
        return replace(shot, numbers=numbers), strip(run, pipe, columns=COLUMNS) if mapped else None


def save_guider(adapter: str, guidance: GuidanceSettings) -> str:
    """Write `guider_config.json` into an adapter's folder, and its manifest anew; returns what was done.

    Raises:
        TrainingError: the adapter is no folder of this machine.
        AdapterError: a release folder that does not verify; it is left as it is.
    """
    from adapters import files
    from adapters.loading import GUIDER_FILE

    folder = Path(adapter).expanduser().resolve()
    require(bool(adapter.strip()), "there is no adapter to save the guider into; name a release folder")
    require(folder.is_dir(), f"adapter {adapter} is no folder of this machine; a guider is saved into folders only")
    config = guider_of(guidance)
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
    from adapters.loading import GUIDER_FILE

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


# ---------------------------------------------------------------------------------------------- the page


def build(gr: ModuleType, settings: Settings) -> Any:
    """The page. The base is loaded first, so that a wrong one is said on the command line."""

    @lru_cache(maxsize=1)
    def pipe(path: str) -> Any:
        return pipeline(settings.base if path == settings.base.path else BaseSettings(path=path), settings.sampling)

    pipe(settings.base.path)
    with gr.Blocks(title="S-CFG studio", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown("## CFG and S-CFG side by side\nSame prompt, noise and guidance scale: only the guider differs.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                parts = _request(gr, settings)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    left, right = _picture(gr, "left", "CFG"), _picture(gr, "right", "S-CFG")
                line = gr.Markdown(elem_id="line")
        strip = _picture(gr, "strip", "Picture, regions, gamma", visible=False)
        with gr.Accordion("Guider"):
            parts |= _guider(gr, settings.guidance)
            save = gr.Button("Save guider into the adapter", elem_id="save")
            saved = gr.Markdown(elem_id="saved")

        def on_draw(data: Mapping[Any, Any]) -> tuple[Any, ...]:
            said = {name: data[part] for name, part in parts.items()}
            guidance, sampling = _asked(settings, said)
            with _told(gr):
                require(said["seed"] is not None, "there is no seed; give a whole number")
                adapter = said["adapter"].strip() or None
                pair = draw_pair(pipe(said["base"]), said["prompt"], said["seed"], guidance, sampling, adapter)
            other = gr.update(value=pair.guided.image, label=pair.guided.arm)
            return pair.plain.image, other, gr.update(value=pair.strip, visible=pair.strip is not None), pair.line

        def on_save(data: Mapping[Any, Any]) -> str:
            guidance, _ = _asked(settings, {name: data[part] for name, part in parts.items()})
            with _told(gr):
                return save_guider(data[parts["adapter"]], guidance)

        draw.click(
            on_draw,
            {*parts.values()},
            [left, right, strip, line],
            show_progress_on=[left, right],
            api_visibility="private",
        )
        save.click(on_save, {*parts.values()}, saved, api_visibility="private")
    return page


def _request(gr: ModuleType, settings: Settings) -> dict[str, Any]:
    """Inputs of what is drawn, whatever the guidance."""
    base, sampling, scale = settings.base.path, settings.sampling, settings.guidance.scale
    names = {"label": "Base", "info": "pocket, or a folder or hub id", "min_width": 130}
    other = {"label": "Adapter", "info": "folder, file or hub id; empty: none", "min_width": 130}
    count = {"label": "Steps", "step": 1, "min_width": 130, "elem_id": "steps"}
    parts = {
        "prompt": gr.Textbox(PROMPT, label="Prompt", lines=2, elem_id="prompt"),
        "negative_prompt": gr.Textbox(sampling.negative_prompt or "", label="Negative prompt"),
    }
    with gr.Row():
        parts["base"] = gr.Dropdown([*{POCKET: 0, base: 0}], value=base, allow_custom_value=True, **names)
        parts["adapter"] = gr.Textbox(settings.adapter or "", elem_id="adapter", **other)
    with gr.Row():
        parts["seed"] = gr.Number(1, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=130)
        parts["steps"] = gr.Slider(1, max(100, sampling.steps), sampling.steps, **count)
    parts["scale"] = gr.Slider(1, max(20, scale), scale, step=0.1, label="Guidance scale", elem_id="scale")
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
    guidance = replace(settings.guidance, method=said["method"], scale=said["scale"], options=options)
    negative = said["negative_prompt"].strip() or None
    return guidance, replace(settings.sampling, steps=said["steps"], negative_prompt=negative)


@contextmanager
def _told(gr: ModuleType) -> Iterator[None]:
    """Explained errors are said on the page; any other is a bug of ours and keeps its traceback."""
    mendable: tuple[type[Exception], ...] = (TrainingError, OSError, *explained())
    try:
        yield
    except mendable as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


if __name__ == "__main__":
    launch(Settings, run)

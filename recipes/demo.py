"""The whole way on the pocket base: train a LoRA of one subject, sample with and without S-CFG, measure, ship.

python recipes/demo.py [--subject dog] [--out runs/demo] [--quick]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from PIL import Image, ImageDraw

import adapters
import scfg
from adapters.errors import AdapterError
from recipes import dreambooth_lora
from recipes.referee import PROMPT, SUBJECT, prompt_accuracy, subject_similarity
from training.config import BaseSettings, DataSettings, LoraSettings, TrainSettings, resolved
from training.errors import exit_on_error
from training.pocket import VERSION, PocketError, base_hash, base_path
from training.pocket.subjects import SUBJECTS

GUIDANCE_SCALE, STEPS = 4.0, 25
HERE = Path(__file__).parent
# What is compared with plain CFG: S-CFG, and the arms that tell whether a gain is spatial or just stronger guidance.
ARMS = {"S-CFG": "semantic", "dose": "dose", "placebo": "placebo", "pointwise": "pointwise"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=SUBJECTS, default="dog")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--quick", action="store_true", help="a few steps and pictures only: does it run?")
    options = parser.parse_args()
    begin = time.perf_counter()
    quiet()

    subject = json.loads((HERE / "subjects" / options.subject / "subject.json").read_text())
    settings = training(options)
    lora = dreambooth_lora.run(settings)
    assert lora is not None
    prompts, seeds = (subject["prompts"][:2], [1]) if options.quick else (subject["prompts"], [1, 2, 3])
    shots = sample(lora, subject, prompts, seeds, options.out / "pictures")
    rows, gains = measure(shots, subject)
    folder = ship(options, settings, subject, lora, shots, rows, gains)
    contact_sheet(shots).save(options.out / "sheet.png")

    print(f"\n{table(gains)}\n\n{gains.verdict.word}: {gains.verdict.sentence}")
    print(
        f"\n{time.perf_counter() - begin:.0f} s in all. Open {folder / 'report.html'}; "
        f"pictures side by side: {options.out / 'sheet.png'}"
    )


def quiet() -> None:
    """Loading takes a second: no bars for it, and no word on image processors that nothing here uses."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def training(options: argparse.Namespace) -> dreambooth_lora.Settings:
    pictures = HERE / "subjects" / options.subject
    return dreambooth_lora.Settings(
        base=BaseSettings(path="pocket"),
        data=DataSettings(source=str(pictures), masks=str(pictures / "masks"), resolution=64, flip=True),
        lora=LoraSettings(rank=16, targets="attention+ff"),
        train=TrainSettings(
            steps=4 if options.quick else 300,
            batch_size=4,
            learning_rate=3e-4,
            warmup=0 if options.quick else 20,
            save_every=100,
            resume="latest",
        ),
        out=str(options.out / "training"),
    )


def sample(
    lora: Path, subject: dict, prompts: Sequence[str], seeds: Sequence[int], folder: Path
) -> dict[str, list[adapters.Shot]]:
    """The same prompts, seeds and initial noise in every arm; to the base the identifier is a word without meaning."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def arm(name: str, around, weights: str) -> list[adapters.Shot]:
        begin = time.perf_counter()
        made = adapters.sample.images(
            pipe,
            prompts,
            seeds,
            steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            batch_size=4,
            arm=name,
            around=around,
            folder=folder / name,
            settings={"weights": weights},
        )
        print(f"{name:>14}: {len(made)} pictures, {time.perf_counter() - begin:.1f} s", flush=True)
        return made

    digest = adapters.files.sha256(next(lora.glob("*.safetensors")))
    shots = {"base": arm("base", nullcontext, base_hash())}
    with adapters.load(pipe, lora):
        shots["CFG"] = arm("CFG", nullcontext, digest)
        for name, method in ARMS.items():
            shots[name] = arm(name, lambda method=method: scfg.attach(pipe, method), digest)
    return shots


def measure(shots: Mapping[str, Sequence[adapters.Shot]], subject: dict) -> tuple[list[adapters.Row], adapters.Gains]:
    metrics = [
        prompt_accuracy(subject["identifier"]),
        subject_similarity(HERE / "subjects" / subject["class"], subject["class"]),
    ]
    rows = adapters.table.tabulate(shots, metrics)
    design = adapters.Design(
        arm="S-CFG",
        baseline="CFG",
        primary=PROMPT,
        minimum_effect=0.05,
        higher_is_better={PROMPT: True, SUBJECT: True},
        notes={
            "held out": "prompts, backgrounds and seeds are in no training picture; no guidance was tuned on them",
            "seen before": "the LoRA's learning rate was chosen on the dog's first four prompts, with other seeds",
        },
    )
    return rows, adapters.gains.compare(rows, design)


def ship(
    options: argparse.Namespace,
    settings: dreambooth_lora.Settings,
    subject: dict,
    lora: Path,
    shots: Mapping[str, Sequence[adapters.Shot]],
    rows: Sequence[adapters.Row],
    gains: adapters.Gains,
) -> Path:
    """The release folder, with the guider that measured best: S-CFG where it showed a gain, else plain CFG."""
    from diffusers import StableDiffusionPipeline

    guidance = scfg.SemanticCFG() if gains.verdict.word == "gain" else scfg.CFG()
    name = subject["class"]
    card = adapters.Card(
        title=f"{subject['identifier']} {name} on {VERSION}",
        base_model=VERSION,
        licence="mit",
        trigger_words=[f"{subject['identifier']} {name}"],
        prompts=subject["prompts"][:3],
        command=f"python recipes/demo.py --subject {options.subject}",
        limits=["Made for a 64-pixel base model of drawn scenes: a demonstration, not a tool."],
        facts={"base hash": base_hash(), "device": "cpu", "dtype": "float32", "subject": subject["origin"]},
    )
    return adapters.ship.ship(
        options.out / "release",
        weights=lora,
        base=adapters.describe(StableDiffusionPipeline.from_pretrained(base_path(), safety_checker=None)),
        card=card,
        gains=gains,
        rows=rows,
        shots=shots,
        guider=scfg.to_config(guidance, guidance_scale=GUIDANCE_SCALE),
        config=json.dumps(resolved(settings), indent=1),
    )


def table(gains: adapters.Gains) -> str:
    """Every arm's mean, and its paired difference to CFG with the 95 % interval."""
    lines = []
    differences = {(c.arm, c.metric): c for c in gains.contrasts}
    for metric in gains.arms[0]["metrics"]:
        lines.append(f"{metric:<20} {'mean':>6}  difference to CFG [95 % interval]")
        for summary in gains.arms:
            contrast = differences.get((summary["name"], metric))
            said = f"{contrast.difference:+.3f} [{contrast.low:+.3f}, {contrast.high:+.3f}]" if contrast else ""
            lines.append(f"  {summary['name']:<18} {summary['metrics'][metric]['mean']:6.3f}  {said}".rstrip())
    return "\n".join(lines)


def contact_sheet(shots: Mapping[str, Sequence[adapters.Shot]], side: int = 96, count: int = 12) -> Image.Image:
    """One column an arm, one row a held-out prompt (its first seed)."""
    prompts = list(dict.fromkeys(shot.prompt for shot in shots["base"]))[:count]
    sheet = Image.new("RGB", (side * len(shots) + 360, side * len(prompts) + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (arm, made) in enumerate(shots.items()):
        draw.text((column * side + 4, 4), arm, fill="black")
        for row, prompt in enumerate(prompts):
            image = next(shot.image for shot in made if shot.prompt == prompt)
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (column * side, 20 + row * side))
    for row, prompt in enumerate(prompts):
        draw.text((side * len(shots) + 8, 20 + row * side + side // 2), prompt, fill="black")
    return sheet


if __name__ == "__main__":
    with exit_on_error(PocketError, AdapterError, scfg.ScfgError):
        main()

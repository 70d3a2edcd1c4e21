"""The release folder: complete, loadable, recomputable, whole."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import adapters
from adapters import files, keys, loading, ship, whole
from adapters.card import Card, escape, render_card
from adapters.errors import AdapterError, FileError, GainsError
from adapters.measuring import gains, sample, table, verify
from adapters.measuring.metrics import Measure

PROMPTS, SEEDS = ["a dog", "a cat on snow", "two cars"], [11, 12]
EVIL = '</script><script>alert(1)</script><img src=x onerror=alert(1)>" onload="x\n---\nlicense: evil | `x` ]('
CARD = Card(title="A red mug", base_model="a-base", trigger_words=["sks"], prompts=["a sks mug"], limits=["Only mugs."])
BRIGHTNESS = Measure("brightness", True, lambda shots: [float(np.asarray(s.image).mean()) for s in shots])
RED = Measure("red", False, lambda shots: [float(np.asarray(s.image)[..., 0].mean()) for s in shots])
DESIGN = adapters.Design(
    arm="adapter",
    baseline="base",
    primary="brightness",
    minimum_effect=1.0,
    higher_is_better={"brightness": True, "red": False},
    sweeps={"cfg": {"3": "base", "4": "adapter"}},
)


@pytest.fixture(scope="module")
def measured(_pipe, make_adapter):
    """(adapter, rows, shots, gains) of a real comparison on the tiny pipeline."""
    adapter = make_adapter("lora", text=True)

    def arm(name):
        return lambda prompts, seeds: sample.images(_pipe, prompts, seeds, steps=2, guidance_scale=3.0, arm=name)

    def with_adapter(prompts, seeds):
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            tensors, header = keys.to_diffusers(adapter)
            files.write_tensors(Path(folder) / "x.safetensors", tensors, header)
            with loading.load(_pipe, Path(folder) / "x.safetensors"):
                return arm("adapter")(prompts, seeds)

    arms = {"base": arm("base"), "adapter": with_adapter}
    rows, shots = table.measure(arms, [BRIGHTNESS, RED], prompts=PROMPTS, seeds=SEEDS)
    return adapter, rows, shots, gains.compare(rows, DESIGN)


def release(folder, pipe, measured, **changes):
    adapter, rows, shots, result = measured
    settings = {
        "weights": adapter,
        "base": adapters.describe(pipe),
        "card": CARD,
        "gains": result,
        "rows": rows,
        "shots": shots,
        "guider": {"method": "scfg"},
        "embeds": {"<mug>": torch.ones(1, 16)},
        "config": "rank: 4\n",
    }
    return ship.ship(folder, **{**settings, **changes})


def test_the_folder_is_complete_and_verifies(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names >= {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "config.yaml",
        "gains.json",
        "guider_config.json",
        "learned_embeds.safetensors",
        "manifest.json",
        "a-red-mug.kohya.safetensors",
        "per_image.csv",
        "pytorch_lora_weights.safetensors",
        "report.html",
        "text_encoder/adapter_model.safetensors",
        "samples/adapter-00.png",
    }
    summary = verify.verify(folder)
    assert summary["verdict"] == measured[3].verdict.sentence
    assert summary["numbers"] > 50
    assert not list(tmp_path.glob(".*"))


def test_a_compact_release_says_and_does_the_same(pipe, measured, tmp_path):
    full = release(tmp_path / "full", pipe, measured, guider=None)
    small = release(tmp_path / "small", pipe, measured, guider=None, compact=True)
    names = {p.relative_to(small).as_posix() for p in small.rglob("*") if p.is_file()}
    assert "pytorch_lora_weights.safetensors" in names
    assert not [name for name in names if name.endswith((".html", ".kohya.safetensors")) or "adapter_" in name]
    assert len([name for name in names if name.startswith("samples/adapter-")]) == 1
    assert verify.verify(small)["numbers"] == verify.verify(full)["numbers"]
    card = (small / "README.md").read_text()
    assert "report.html" not in card
    assert "kohya" not in card

    def shoot(folder):
        with adapters.load(pipe, folder):
            return [np.asarray(s.image) for s in sample.images(pipe, PROMPTS[:1], SEEDS, steps=2, guidance_scale=3.0)]

    assert all(map(np.array_equal, shoot(full), shoot(small)))


def test_the_card_says_what_becomes_of_a_scope_in_other_programs(pipe, measured, tmp_path):
    *others, result = measured
    scope = adapters.Scope(early_weight=0.5).to_config()
    arms = {"early": {"method": "cfg", "scope": {"early_weight": 0.5}}, "adapter": {"method": "cfg", "scope": None}}
    noted = replace(result, design=replace(result.design, notes={"guidance": arms}))

    def card(name, gains, **guider):
        folder = release(tmp_path / name, pipe, (*others, gains), guider={"method": "scfg", **guider}, compact=True)
        return (folder / "README.md").read_text()

    assert "Other programs apply it with one weight" not in card("whole", noted)
    assert "every step. The arm adapter above shows what" in card("scoped", noted, scope=scope)
    assert "in every step.\n" in card("unknown", result, scope=scope)


def test_no_alpha_tensors_in_the_diffusers_file_and_one_per_module_in_the_kohya_file(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured)
    plain, header = files.read_tensors(folder / "pytorch_lora_weights.safetensors")
    kohya, _ = files.read_tensors(folder / "a-red-mug.kohya.safetensors")
    assert not any("alpha" in name for name in plain)
    assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == 6
    assert sum(name.endswith(".alpha") for name in kohya) == len(measured[0].modules)


def test_shipped_loads_as_it_was_and_through_plain_diffusers(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured, guider=None, embeds=None)

    def shoot():
        return np.stack(
            [np.asarray(s.image, int) for s in sample.images(pipe, PROMPTS, SEEDS, steps=2, guidance_scale=3.0)]
        )

    wanted = np.stack([np.asarray(s.image, int) for s in measured[2]["adapter"]])
    with adapters.load(pipe, folder):
        assert np.abs(shoot() - wanted).max() <= 1
    for source in (folder, folder / "a-red-mug.kohya.safetensors"):
        pipe.load_lora_weights(str(source))
        assert np.abs(shoot() - wanted).max() <= 1
        pipe.unload_lora_weights()


def test_numbers_that_do_not_follow_from_the_table_are_found(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured)
    stored = json.loads((folder / "gains.json").read_text())
    stored["contrasts"][0]["difference"] += 0.001
    (folder / "gains.json").write_text(json.dumps(stored))
    said = json.loads((folder / "manifest.json").read_text())
    files.write_manifest(folder, {name: value for name, value in said.items() if name != "files"})
    with pytest.raises(GainsError, match=r"contrasts\[0\].difference"):
        verify.verify(folder)


def test_shipping_twice_replaces_the_folder(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured)
    (folder / "stray.txt").write_text("old")
    release(folder, pipe, measured, card=replace(CARD, title="Another"))
    assert not (folder / "stray.txt").exists()
    assert "# Another" in (folder / "README.md").read_text()


def test_a_failing_ship_leaves_the_old_folder(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        release(folder, pipe, measured, guider={"scale": float("nan")})
    assert (folder / "manifest.json").read_bytes() == before
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(AdapterError, match="belong together"):
        release(tmp_path / "x", pipe, measured, rows=())


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_other_kinds_say_who_can_read_them(pipe, make_adapter, tmp_path, kind):
    folder = ship.ship(tmp_path / kind, weights=make_adapter(kind), base=adapters.describe(pipe), card=CARD)
    text = (folder / "README.md").read_text()
    assert ("does not load through plain diffusers" in text) == (kind != "dora")
    assert (folder / "pytorch_lora_weights.safetensors").exists() == (kind == "dora")
    assert ("diffusers drops the DoRA magnitudes, ComfyUI and Forge" in " ".join(text.split())) == (kind == "dora")
    with adapters.load(pipe, folder):
        assert hasattr(pipe.unet, "peft_config")


def test_a_dora_also_ships_as_the_nearest_lora(pipe, make_adapter, tmp_path):
    adapter, models = make_adapter("dora", text=True), adapters.base.modules_of(pipe)
    base = adapters.describe(pipe)
    folder = ship.ship(tmp_path / "r", weights=adapter, base=base, card=CARD, models=models)
    exact, near = (
        keys.from_any(*files.read_tensors(folder / f"a-red-mug{end}.kohya.safetensors")) for end in (".dora", "")
    )
    assert (exact.kinds, near.kinds) == (["dora"], ["lora"])
    wanted, got = (adapters.compose.deltas(one, models) for one in (adapter, near))
    missed = sum(float((got[name] - change).norm() ** 2) for name, change in wanted.items()) ** 0.5
    error = missed / sum(float(change.norm() ** 2) for change in wanted.values()) ** 0.5
    text = " ".join((folder / "README.md").read_text().split())
    assert f"nearest to this DoRA. It misses {error:.2g} of the change" in text
    bare = ship.ship(tmp_path / "bare", weights=adapter, base=base, card=CARD)
    assert not (bare / "a-red-mug.kohya.safetensors").exists()
    assert "shipped without the base's weights" in " ".join((bare / "README.md").read_text().split())


def test_the_card_puts_tokens_of_two_encoders_where_they_belong(pipe, make_adapter, tmp_path):
    rows = {"text_encoder": torch.ones(2, 16), "text_encoder_2": torch.ones(2, 8)}
    adapter = replace(make_adapter("lora"), tokens={"<mug>": rows})
    folder = ship.ship(tmp_path / "r", weights=adapter, base=adapters.describe(pipe), card=CARD)
    text = (folder / "README.md").read_text()
    assert (
        "tokens['clip_l'], token=['<mug>', '<mug>_1'], text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer" in text
    )
    assert "tokens['clip_g'], token=['<mug>', '<mug>_1'], text_encoder=pipe.text_encoder_2" in text
    for block in text.split("```python")[1:]:
        compile(block.split("```")[0], "card", "exec")


def test_a_whole_unet_is_shipped_and_swapped_in(pipe, tmp_path):
    import copy

    tuned = copy.deepcopy(pipe.unet)
    tuned.conv_out.bias.data += 0.5
    tuned.save_pretrained(tmp_path / "trained")
    folder = ship.ship(tmp_path / "unet", weights=tmp_path / "trained", base=adapters.describe(pipe), card=CARD)
    before = pipe.unet
    with adapters.load(pipe, folder):
        assert torch.equal(pipe.unet.conv_out.bias, tuned.conv_out.bias)
    assert pipe.unet is before
    with pytest.raises(AdapterError, match=r"weight=0.5"):
        adapters.load(pipe, folder, weight=0.5)


# ---------------------------------------------------------------------------------------------- card


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_card_head_is_what_the_hub_reads(pipe, measured, tmp_path):
    from huggingface_hub import ModelCard

    folder = release(tmp_path / "mug", pipe, measured)
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "a-base"
    assert card.data.widget == [{"text": "a sks mug"}]
    values = {(r.task_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    arm = next(a for a in measured[3].arms if a["name"] == "adapter")
    mean = arm["metrics"]["brightness"]["mean"]
    assert values["adapter", "brightness"] == float(f"{mean:.4g}")  # four digits in the card, all in gains.json
    assert "verified" not in (folder / "README.md").read_text()


def test_foreign_text_stays_text_in_the_card():
    card = Card(
        title=EVIL, base_model=EVIL, description=EVIL, trigger_words=[EVIL], prompts=[EVIL], command=EVIL, limits=[EVIL]
    )
    text = render_card(
        card, kinds=["lora"], gains=None, has=["pytorch_lora_weights.safetensors", "guider_config.json"], notes=[]
    )
    head, body = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n")), text.split("\n---\n", 1)[1]
    assert head["license"] == "other"
    assert head["base_model"] == EVIL
    assert head["widget"] == [{"text": EVIL}]
    prose = "".join(part for i, part in enumerate(body.split("```")) if i % 2 == 0)
    code = [part.removeprefix("python") for i, part in enumerate(body.split("```")) if i % 2]
    assert "<" not in prose
    assert "\n---\n" not in body
    assert len(code) == 2
    for block in code:
        compile(block, "card", "exec")
    assert escape("a|b") == "a&#124;b"


# ---------------------------------------------------------------------------------------------- whole or not at all


def write_for_ever(target: Path, ready: Any) -> None:
    for n in (f"{os.getpid()}.{i}" for i in range(10**9)):
        with files.write_folder(target) as stage:
            for i in range(20):
                (stage / f"{i}.txt").write_text(f"{n} " * 500)
            files.write_manifest(stage, {"n": n})
        ready.set()


@pytest.mark.parametrize("exchange", [True, False])
def test_kill_9_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, exchange):
    """Many kills at random moments of back-to-back writes; every time one whole folder is there."""
    target, generator, seen = tmp_path / "out", random.Random(5), set()
    if not exchange:
        monkeypatch.setattr(whole, "_exchange", lambda a, b: False)
    forks = multiprocessing.get_context("fork")
    for _ in range(40):
        ready = forks.Event()
        process = forks.Process(target=write_for_ever, args=(target, ready), daemon=True)
        process.start()
        ready.wait(30)
        time.sleep(generator.random() * 0.02)
        process.kill()
        process.join()
        if not exchange:
            files.recover(target)
        manifest = files.verify_folder(target)
        assert {(target / f"{i}.txt").read_text() for i in range(20)} == {f"{manifest['n']} " * 500}
        seen.add(hashlib.sha256((target / "manifest.json").read_bytes()).hexdigest())
    assert len(seen) > 30  # nearly every kill came after a new folder
    with files.write_folder(target) as stage:
        (stage / "a").write_text("b")
    assert sorted(os.listdir(tmp_path)) == ["out"]  # nothing unfinished stays behind


def test_an_error_inside_leaves_nothing(tmp_path):
    def fails():
        with files.write_folder(tmp_path / "a") as stage:
            (stage / "x").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not os.listdir(tmp_path)


def test_push_checks_first_and_a_dry_run_contacts_nobody(pipe, measured, tmp_path):
    folder = release(tmp_path / "mug", pipe, measured)
    assert {"manifest.json", "README.md", "gains.json"} <= set(ship.push(folder, "me/mug", dry_run=True))
    with pytest.raises(ValueError, match="me/mug/x"):
        ship.push(folder, "me/mug/x", dry_run=True)
    (folder / "README.md").write_text("changed")
    with pytest.raises(FileError, match="README"):
        ship.push(folder, "me/mug", dry_run=True)


def test_others_may_read_the_weights(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    files.write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    assert (tmp_path / "x.safetensors").stat().st_mode == plain.stat().st_mode


def test_the_card_loads_a_base_that_is_no_hub_id_by_what_is_imported():
    load = ("from training.pocket import base_path", "base_path()")
    card = replace(CARD, base_import=load, trigger_words=["sks dog"])
    has = ["pytorch_lora_weights.safetensors", "guider_config.json"]
    text = render_card(card, kinds=["lora"], gains=None, has=has, notes=[])
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert block.index(load[0]) < block.index("DiffusionPipeline.from_pretrained(base_path())")
    assert "Trigger words: `sks dog`" in text
    for kinds in (["controlnet"], ["unet"], ["loha"]):
        text = render_card(card, kinds=kinds, gains=None, has=[], notes=[])
        first = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
        compile(first, "card", "exec")
        assert first.index(load[0]) < first.index("from_pretrained(base_path()")

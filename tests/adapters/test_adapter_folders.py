"""Folders of strangers, whole: every file of a release mutated. An `AdapterError` or a result, and never for long."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hangs import limited
from mutated import mutate_bytes
from safetensors.torch import save

import adapters
from adapters import __main__ as command
from adapters import files, loading, ship
from adapters.card import Card
from adapters.errors import AdapterError, FileError, GainsError
from adapters.measuring import archive, gains, table, verify
from adapters.source import open_source, read_adapter

TUNED = {
    "higher is better": True,
    "best": {"CFG": {"guidance_scale": 4.0}},
    "rounds": {
        "CFG": [
            {
                "results": [
                    {"settings": {"guidance_scale": 4.0}, "mean": 0.5, "values": [0.25, 0.75]},
                    {"settings": {"guidance_scale": 2.0}, "mean": 0.25, "values": [0.25, None]},
                ]
            }
        ]
    },
}
SECONDS = 30  # for one case, on a busy machine


@pytest.fixture(scope="module")
def release(_pipe, make_adapter, tmp_path_factory) -> Path:
    """A small release with everything in it: weights in three spellings, tokens, guider, gains, config, a search."""
    rng = np.random.default_rng(0)
    rows = [
        table.Row(arm=arm, prompt=f"prompt {i}", seed=1, latents="0", numbers={"accuracy": float(rng.random())})
        for arm in ("CFG", "S-CFG")
        for i in range(5)
    ]
    design = gains.Design(
        arm="S-CFG", baseline="CFG", primary="accuracy", minimum_effect=0.02, higher_is_better={"accuracy": True}
    )
    folder = ship.ship(
        tmp_path_factory.mktemp("release") / "mug",
        weights=make_adapter("lora", targets=["to_q"]),
        base=adapters.describe(_pipe),
        card=Card(title="mug", base_model="a-base"),
        gains=gains.compare(rows, design),
        rows=rows,
        guider={"method": "scfg", "options": {"stop": 0.5}},
        embeds={"<mug>": torch.ones(2, 16)},
        config="rank: 4\n",
    )
    (folder / "tuned.json").write_text(json.dumps(TUNED))
    files.write_manifest(folder, files.read_manifest(folder))
    return folder


@pytest.fixture(scope="module")
def network(_pipe, tmp_path_factory) -> Path:
    """The release of a whole U-net."""
    _pipe.unet.save_pretrained(tmp_path_factory.mktemp("unet") / "unet")
    folder = tmp_path_factory.getbasetemp() / "network"
    source = next(tmp_path_factory.getbasetemp().glob("unet*/unet"))
    return ship.ship(folder, weights=source, base=adapters.describe(_pipe), card=Card(title="u", base_model="a-base"))


def inspect(path: Path) -> object:
    return command._inspect(argparse.Namespace(path=str(path)))


def seal(folder: Path) -> None:
    """A manifest that is right about the files as they are now: a stranger can write one, too."""
    manifest = folder / files.MANIFEST
    if not manifest.is_file() or manifest.is_symlink():
        return
    try:
        facts = json.loads(manifest.read_bytes())
        names = [name for name in facts["files"] if (folder / name).is_file()]
        facts["files"] = {n: {"sha256": files.sha256(folder / n), "size": (folder / n).stat().st_size} for n in names}
        manifest.write_text(json.dumps(facts))
    except (ValueError, TypeError, KeyError, AttributeError, AdapterError):
        pass  # the manifest itself was mutated


WEIRD: list[Any] = [
    *(None, True, [], {}, "", "\ud800", "x" * 500, "../x", 0, -1, 2**70, 1e308, float("nan"), float("inf"), 0.5),
    *([[]] * 3, {"a": None}, ["a"], "unet", "lora", 10**9, -0.0, "\0", "1e999", {"files": {}}),
]


def weird(value: Any, dice: random.Random) -> Any:
    """One node of a JSON value exchanged, removed, doubled or buried."""
    if isinstance(value, dict | list) and value and dice.random() < 0.8:
        copy = dict(value) if isinstance(value, dict) else list(value)
        key = dice.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
        if dice.random() < 0.15:
            copy.pop(key)
        else:
            copy[key] = weird(copy[key], dice)
        return copy
    return dice.choice([*WEIRD, [value], {"x": value}, str(value)])


def mutate_json(data: bytes, dice: random.Random) -> bytes:
    text = json.dumps(weird(json.loads(data), dice))
    return (text.replace('": ', '": 1, "twice": ', 1) if dice.random() < 0.05 else text).encode()


def mutate_csv(data: bytes, dice: random.Random) -> bytes:
    lines = [line.split(b",") for line in data.split(b"\n")]
    for _ in range(dice.randint(1, 3)):
        line = dice.choice(lines)
        cell = dice.choice(
            [b"", b"nan", b"-inf", b"1e400", b'"', b"\0", b"\xff", b"x" * 140_000, b"9" * 5000, b"S-CFG"]
        )
        line[dice.randrange(len(line))] = cell
    return b"\n".join(b",".join(line) for line in lines)


def mutate_header(data: bytes, dice: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = mutate_json(data[8:end], dice)
    return len(header).to_bytes(8, "little") + header + data[end:]


def mutate_tensors(data: bytes, dice: random.Random) -> bytes:
    """Well-formed tensors of other names, shapes, kinds and values."""
    from safetensors.torch import load

    tensors = load(data)
    for name in dice.sample(sorted(tensors), min(len(tensors), dice.randint(1, 3))):
        old = torch.atleast_1d(tensors.pop(name))
        new = dice.choice(
            [
                *(old * float("nan"), old[:0], old.reshape(-1), old.double(), old.to(torch.int32), torch.tensor(1.0)),
                *(old[..., :1], torch.cat([old, old]), old[None], torch.zeros(3, 0, 2), old.to(torch.float8_e4m3fn)),
            ]
        )
        other = dice.choice([name, name, name + ".x", name.upper(), name[: len(name) // 2], "😀", "a" * 300])
        tensors[other] = new.contiguous().clone()
    return save(tensors, {"format": "pt"})


BY_SUFFIX: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    ".json": [mutate_json, mutate_json, mutate_json, mutate_bytes],
    ".csv": [mutate_csv, mutate_bytes],
    ".safetensors": [mutate_header, mutate_tensors, mutate_tensors, mutate_bytes],
}


def other_kind(path: Path, dice: random.Random) -> None:
    """Something else under the name of a file."""
    path.unlink()
    make: Callable[[], object] = dice.choice(
        [
            lambda: None,
            path.mkdir,
            lambda: os.mkfifo(path),
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to("/etc/passwd"),
            lambda: path.write_bytes(b""),
        ]
    )
    make()


def mutate(folder: Path, dice: random.Random) -> str:
    """Changes one file and returns its name."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    chosen = [path for path in paths if path.suffix in BY_SUFFIX]
    path = dice.choice(chosen if dice.random() < 0.9 else paths)
    if dice.random() < 0.08:
        other_kind(path, dice)
    else:
        path.write_bytes(dice.choice(BY_SUFFIX.get(path.suffix, [mutate_bytes]))(path.read_bytes(), dice))
    if path.name != files.MANIFEST and dice.random() < 0.9:
        seal(folder)
    return path.name


def zipped(folder: Path, dice: random.Random) -> Path:
    """The folder as a zip in one of its methods, damaged."""
    path = folder.with_suffix(".zip")
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(path, "w", dice.choice(methods)) as target:
        for name in (files.MANIFEST, "gains.json", "per_image.csv", "tuned.json"):
            if (folder / name).is_file():
                target.writestr(name, (folder / name).read_bytes())
    path.write_bytes(mutate_bytes(path.read_bytes(), dice))
    return path


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_folders(count: int, release: Path, network: Path, pipe, tmp_path: Path) -> None:
    dice, ends = random.Random(11), {"refused": 0, "read": 0}
    folder = tmp_path / "f"
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(network if number % 5 == 0 else release, folder, ignore=shutil.ignore_patterns("*.html"))
        seal(folder)
        name = mutate(folder, dice)
        acts = [lambda: verify.verify(folder)]
        if name not in ("gains.json", "per_image.csv", "tuned.json"):  # which nothing else reads
            acts += [lambda: inspect(folder), lambda: loading.load(pipe, folder).detach()]
        acts += [lambda: verify.verify(zipped(folder, dice))] if number % 4 == 0 else []
        for act in acts:
            try:
                with limited(f"case {number}", SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    act()
                ends["read"] += 1
            except AdapterError as error:
                str(error).encode("utf-8", "backslashreplace")
                ends["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
    assert ends["refused"] > count / 2
    assert ends["read"] > count / 10


# ---------------------------------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("name", ["manifest.json", "gains.json", "pytorch_lora_weights.safetensors"])
def test_only_regular_files_are_opened(name: str, release: Path, pipe, tmp_path: Path) -> None:
    folder = shutil.copytree(release, tmp_path / "f")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    for act in (lambda: verify.verify(folder), lambda: inspect(folder), lambda: loading.load(pipe, folder)):
        with limited(name, SECONDS), pytest.raises(FileError, match=name):
            act()


def test_a_fifo_or_a_device_is_no_release(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        for act in (verify.verify, inspect, files.sha256, files.read_json, files.read_header):
            with limited(str(path), SECONDS), pytest.raises(FileError, match=str(path)):
                act(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("lie", [False, True])
def test_a_bomb_costs_no_memory(method: int, lie: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_BYTES", 2**20)
    path, size = tmp_path / "bomb.zip", 2**26
    with zipfile.ZipFile(path, "w", method) as target:
        target.writestr("a", bytes(size))
    assert path.stat().st_size < 2**17
    if lie:
        path.write_bytes(path.read_bytes().replace(size.to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(FileError, match=r"bomb\.zip: (unpacks to more than 1048576 bytes|neither)"):
        verify.verify(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


def test_a_zip_that_names_a_file_twice(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target.writestr("a", "1")
        target.writestr("a", "2")
    with pytest.raises(FileError, match="2 files, 1 names"):
        verify.verify(tmp_path / "x.zip")


def test_many_empty_tensors_and_vectors_are_refused_at_once(pipe, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(200_000)}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with limited("200000 tensors", SECONDS), pytest.raises(FileError, match="200000 tensors; at most 50000"):
        loading.load(pipe, tmp_path / "a.safetensors")
    (tmp_path / "learned_embeds.safetensors").write_bytes(save({"<a>": torch.ones(50_000, 16)}))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(AdapterError, match="50000 vectors; at most 4096"):
        loading.load(pipe, tmp_path)


def test_a_deep_tree_is_refused(release: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(release, tmp_path / "f")
    place = str(folder)
    for _ in range(1500):
        place += "/d"
        os.mkdir(place)
    try:
        with pytest.raises(FileError, match="deeper than 16 folders"):
            verify.verify(folder)
    finally:
        subprocess.run(["rm", "-rf", folder / "d"], check=True)  # shutil.rmtree goes no deeper than Python's calls


@pytest.mark.parametrize("name", ["guider_config.json", "config.json", "unet/adapter_config.json"])
@pytest.mark.parametrize("sealed", [True, False])
def test_settings_that_are_a_list_are_refused_by_name(name: str, sealed: bool, release: Path, pipe, tmp_path: Path):
    folder = shutil.copytree(release, tmp_path / "f")
    (folder / "unet").mkdir()
    if name.startswith("unet/"):
        (folder / "pytorch_lora_weights.safetensors").unlink()
        (folder / "adapter_model.safetensors").rename(folder / "unet" / "adapter_model.safetensors")
    (folder / name).write_text("[]")
    if sealed:
        files.write_manifest(folder, json.loads((folder / "manifest.json").read_text()))
        acts = [lambda: verify.verify(folder), lambda: inspect(folder), lambda: loading.load(pipe, folder)]
    else:
        (folder / "manifest.json").unlink()
        acts = [lambda: inspect(folder), lambda: loading.load(pipe, folder)]
    for act in acts:
        with pytest.raises(FileError, match=rf"{name}: expected a JSON object, found a list"):
            act()


# ---------------------------------------------------------------------------------------------- what verify compares


def changed(release: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(release, folder)
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    seal(folder)
    return folder


def test_gains_of_other_weights_or_another_base_are_found(release: Path, make_adapter, tmp_path: Path) -> None:
    verify.verify(release)
    other = changed(release, tmp_path / "a", "gains.json", lambda gains: gains["identity"]["base"].update(weights="0"))
    with pytest.raises(GainsError, match=r"measured on base .*the manifest says"):
        verify.verify(other)
    other = changed(release, tmp_path / "b", "gains.json", lambda gains: None)
    weights = other / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x11")
    seal(other)
    with pytest.raises(GainsError, match=r"measured with another pytorch_lora_weights\.safetensors"):
        verify.verify(other)
    name = "adapter_model.safetensors"
    other = changed(release, tmp_path / "c", "gains.json", lambda gains: gains["identity"]["weights"].pop(name))
    with pytest.raises(GainsError, match=r"measured without adapter_model\.safetensors"):
        verify.verify(other)


def test_what_the_manifest_does_not_name(release: Path, tmp_path: Path) -> None:
    other = changed(release, tmp_path / "a", "manifest.json", lambda facts: facts["files"].pop("gains.json"))
    with pytest.raises(FileError, match=r"gains\.json is not in the manifest"):
        verify.verify(other)
    (shutil.copytree(release, tmp_path / "b") / "notes.txt").write_text("mine")
    assert verify.verify(tmp_path / "b")["not in the manifest"] == ["notes.txt"]
    other = shutil.copytree(release, tmp_path / "c")
    text = (other / "manifest.json").read_text()
    (other / "manifest.json").write_text(text.replace('"kind": "lora"', '"kind": "lora", "kind": "lora"'))
    with pytest.raises(FileError, match="a key appears twice"):
        verify.verify(other)


def test_a_hub_id_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(
        FileError, match=r"^nobody/no-adapter: there is no such folder here .* the hub does not give it"
    ):
        open_source("nobody/no-adapter")


def test_a_whole_pipeline_is_told_from_an_adapter(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "dreambooth"
    pipe.save_pretrained(folder)
    with pytest.raises(FileError, match=r"dreambooth is a whole pipeline, not an adapter; give its folder unet"):
        read_adapter(open_source(folder))

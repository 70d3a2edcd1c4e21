"""The command line, in process."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from adapters import compose, files, keys
from adapters.__main__ import main
from adapters.source import open_source, read_adapter


def run(capsys, *arguments) -> dict:
    assert main([str(a) for a in arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def lora_file(make_adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_tensors(path, *keys.to_diffusers(make_adapter("rslora", text=True)))
    return path


def test_inspect_and_convert_there_and_back(capsys, lora_file, tmp_path):
    seen = run(capsys, "inspect", lora_file)
    assert seen["kinds"] == ["lora"]
    assert seen["unet"]["ranks"] == [4]
    assert seen["unet"]["scales"] == [1.5]
    run(capsys, "convert", lora_file, tmp_path / "k.safetensors", "--to", "kohya")
    run(capsys, "convert", tmp_path / "k.safetensors", tmp_path / "peft", "--to", "peft")
    run(capsys, "convert", tmp_path / "peft", tmp_path / "again.safetensors", "--to", "diffusers")
    assert (tmp_path / "again.safetensors").read_bytes() == lora_file.read_bytes()


def test_convert_with_rank_states_its_error(capsys, lora_file, tmp_path):
    result = run(capsys, "convert", lora_file, tmp_path / "r.safetensors", "--to", "diffusers", "--rank", 1)
    assert 0 < float(result["relative_error"]) < 1
    assert run(capsys, "inspect", tmp_path / "r.safetensors")["unet"]["ranks"] == [1]


def test_convert_to_half_precision_rounds_or_refuses(capsys, lora_file, tmp_path):
    half = tmp_path / "half.safetensors"
    run(capsys, "convert", lora_file, half, "--to", "diffusers", "--precision", "fp16")
    assert run(capsys, "inspect", half)["unet"]["dtypes"] == ["float16"]
    whole, rounded = (read_adapter(open_source(path)) for path in (lora_file, half))
    for name, module in whole.modules.items():
        for key, value in module.tensors.items():
            assert torch.equal(rounded.modules[name].tensors[key], value.half())

    name, module = next(iter(whole.modules.items()))
    huge = replace(module, tensors={key: value * 1e6 for key, value in module.tensors.items()})
    files.write_tensors(lora_file, *keys.to_diffusers(replace(whole, modules={**whole.modules, name: huge})))
    assert main(["convert", str(lora_file), str(tmp_path / "no"), "--to", "peft", "--precision", "fp16"]) == 2
    assert "too large for float16; take bf16" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_merge_into_a_unet_and_extract_again(capsys, pipe, make_adapter, tmp_path):
    pipe.unet.save_pretrained(tmp_path / "base" / "unet")
    adapter = make_adapter("loha")
    files.write_tensors(tmp_path / "loha.safetensors", *keys.to_kohya(adapter))
    run(
        capsys,
        "merge",
        f"{tmp_path / 'loha.safetensors'}=0.5",
        "--base",
        tmp_path / "base",
        "--out",
        tmp_path / "merged",
    )
    tuned = type(pipe.unet).from_pretrained(tmp_path / "merged")
    twin = copy.deepcopy(pipe.unet)
    vars(twin).pop("_merged_adapters", None)
    compose.merge(adapter, {"unet": twin}, weight=0.5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tuned.parameters(), twin.parameters(), strict=True))
    out = tmp_path / "found.safetensors"
    found = run(capsys, "extract", tmp_path / "base", tmp_path / "merged", "--out", out, "--rank", 16)
    assert float(found["relative_error"]) < 1e-3
    assert found["modules"] == len(adapter.modules)


def test_merge_loras_into_one(capsys, lora_file, tmp_path):
    out = tmp_path / "sum.safetensors"
    run(capsys, "merge", lora_file, f"{lora_file}=-1", "--out", out)
    assert run(capsys, "inspect", out)["unet"]["ranks"] == [8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing.safetensors"], "no such file"),
        (["verify", "."], "manifest.json"),
        (["merge", "x=y", "--out", "z"], "PATH=WEIGHT"),
    ],
)
def test_errors_are_one_line_on_stderr(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1

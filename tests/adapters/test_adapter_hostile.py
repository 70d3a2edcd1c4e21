"""Files of strangers: a clear error each, nothing run, nothing written outside, memory bounded."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters import files, loading
from adapters.errors import AdapterError, FileError

TENSORS = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
GOOD = save(TENSORS, {"format": "pt"})
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def with_header(header: object, data: bytes = GOOD[HEADER_END:]) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**change):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **change}


def test_a_good_file_reads(tmp_path):
    tensors, metadata = files.read_tensors(put(tmp_path / "x.safetensors", GOOD))
    assert metadata == {"format": "pt"}
    assert all(torch.equal(tensors[k], TENSORS[k]) for k in TENSORS)


def test_every_truncation_is_an_error(tmp_path):
    for length in [*range(HEADER_END + 20), len(GOOD) - 1]:
        with pytest.raises(FileError):
            files.read_tensors(put(tmp_path / "x.safetensors", GOOD[:length]))
    with pytest.raises(FileError, match="holds"):
        files.read_tensors(put(tmp_path / "x.safetensors", GOOD + b"\0"))


def test_every_bit_flip_of_the_header_is_an_error_or_still_a_file(tmp_path):
    """A flip inside a name or a metadata value leaves a consistent file; anything else is noticed."""
    read = 0
    for index in range(HEADER_END):
        data = bytearray(GOOD)
        data[index] ^= 1 << (index % 8)
        try:
            tensors, _ = files.read_tensors(put(tmp_path / "x.safetensors", bytes(data)))
        except FileError:
            continue
        read += 1
        assert {tuple(t.shape) for t in tensors.values()} == {(2, 4, 3, 3), (8, 2, 1, 1)}
    assert read < HEADER_END / 2


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], b""),
        ("x", b""),
        (b"{", b""),
        (b"[" * 100_000, b""),
        (b'{"a":' * 50_000, b""),
        (b'{"a": 1, "a": 2}', b""),
        ({"a": 1}, b""),
        ({"a": entry(dtype="F99")}, b"\0" * 8),
        ({"a": entry(dtype=["F32"])}, b"\0" * 8),
        ({"a": entry(shape=[3])}, b"\0" * 8),
        ({"a": entry(shape=[-2])}, b"\0" * 8),
        ({"a": entry(shape=[2.0])}, b"\0" * 8),
        ({"a": entry(shape=[True, 2])}, b"\0" * 8),
        ({"a": entry(shape=[2**40, 2**40])}, b"\0" * 8),
        ({"a": entry(shape=[1] * 1000)}, b"\0" * 8),
        ({"a": entry(data_offsets=[8, 0])}, b"\0" * 8),
        ({"a": entry(data_offsets=[0])}, b"\0" * 8),
        ({"a": entry(data_offsets=[1, 9])}, b"\0" * 9),
        ({"a": entry(), "b": entry()}, b"\0" * 8),
        ({"a": entry(), "b": entry(data_offsets=[4, 12])}, b"\0" * 12),
        ({"a": entry(), "b": entry(data_offsets=[16, 24])}, b"\0" * 24),
        ({"__metadata__": {"a": 1}}, b""),
        ({"__metadata__": "a"}, b""),
    ],
)
def test_headers_that_lie(tmp_path, header, data):
    with pytest.raises(FileError):
        files.read_tensors(put(tmp_path / "x.safetensors", with_header(header, data)))


def test_header_bombs_cost_no_memory(tmp_path):
    tracemalloc.start()
    for claim in (2**63, 2**40, files.MAX_HEADER + 1, 2**64 - 1):
        with pytest.raises(FileError, match="claims"):
            files.read_tensors(put(tmp_path / "x.safetensors", struct.pack("<Q", claim) + b"{}"))
    huge = tmp_path / "huge.safetensors"
    with huge.open("wb") as file:  # sparse: a terabyte that takes no disk
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)
    with pytest.raises(FileError, match="claims"):
        files.read_tensors(huge)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20


@pytest.mark.parametrize("make", [lambda p: torch.save(TENSORS, p), lambda p: p.write_bytes(pickle.dumps(Bomb()))])
def test_pickles_are_named_and_never_read(pipe, tmp_path, make):
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(FileError, match="pickled"):
        loading.load(pipe, path)
    assert not Bomb.ran


class Bomb:
    ran = False

    def __reduce__(self):
        return (setattr, (Bomb, "ran", True))


def test_a_folder_of_pickles_is_no_adapter(pipe, tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(FileError, match=r"no \.safetensors"):
        loading.load(pipe, tmp_path)


FUZZ_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["F32", "U8"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=4)),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def fuzz_path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "x.safetensors"


@settings(deadline=None, max_examples=150)
@given(header=st.dictionaries(st.text(max_size=12), FUZZ_VALUES, max_size=4), data=st.binary(max_size=64))
def test_structured_fuzz(fuzz_path, header, data):
    put(fuzz_path, with_header(json.dumps(header).encode("utf-8", "surrogatepass"), data))
    with contextlib.suppress(FileError):
        files.read_tensors(fuzz_path)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_fuzzed_headers(tmp_path, count):
    """Random edits of a real file's header; a `FileError` or tensors, nothing else."""
    generator, path, refused = random.Random(7), tmp_path / "x.safetensors", 0
    pieces = [
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b",",
        b":",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"99999999999999999999",
        b"\xff",
        b"\x00",
    ]
    for _ in range(count):
        header = bytearray(GOOD[8:HEADER_END])
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(header))
            header[at : at + generator.randint(0, 3)] = generator.choice(pieces)
        try:
            files.read_tensors(put(path, with_header(bytes(header))))
        except FileError:
            refused += 1
    assert refused > 0.9 * count


# ---------------------------------------------------------------------------------------------- manifests


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/../../x",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a//b",
        "./a",
        "a/",
        "C:/x",
        "a\\b",
        "a\0b",
        "a\nb",
        "x" * 600,
        3,
        None,
    ],
)
def test_names_that_leave_the_folder(name):
    with pytest.raises(FileError, match="plain relative path"):
        files.check_name(name)


@given(st.text(max_size=40))
def test_any_accepted_name_stays_inside(name):
    try:
        files.check_name(name)
    except FileError:
        return
    assert Path("/base/folder", name).is_relative_to("/base/folder")
    assert os.path.normpath(f"/base/folder/{name}").startswith("/base/folder/")


def folder_with(tmp_path: Path, manifest: object) -> Path:
    folder = tmp_path / "f"
    folder.mkdir()
    put(folder / "pytorch_lora_weights.safetensors", GOOD)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {},
        {"files": []},
        {"files": {"../x": {"sha256": "0", "size": 1}}},
        {"files": {"x": {"sha256": "0"}}},
        {"files": {"x": {"sha256": "0", "size": -1}}},
        {"files": {"x": 1}},
        {"files": {"missing": {"sha256": "0", "size": 1}}},
        {"files": {}},
    ],
)
def test_manifests_that_lie(pipe, tmp_path, manifest):
    with pytest.raises(FileError):
        loading.load(pipe, folder_with(tmp_path, manifest))


def test_links_out_of_the_folder(pipe, tmp_path):
    secret = put(tmp_path / "secret.safetensors", GOOD)
    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "pytorch_lora_weights.safetensors").symlink_to(secret)
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"pytorch_lora_weights.safetensors": {"sha256": files.sha256(secret), "size": len(GOOD)}}})
    )
    with pytest.raises(FileError, match="link out of the folder"):
        loading.load(pipe, folder)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    put(outside / "x.txt", b"x")
    (folder / "sub").symlink_to(outside)
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"sub/x.txt": {"sha256": files.sha256(outside / "x.txt"), "size": 1}}})
    )
    with pytest.raises(FileError, match="link out of the folder"):
        files.verify_folder(folder)


def test_weights_beside_the_manifest_are_refused(pipe, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    put(folder / "pytorch_lora_weights.safetensors", GOOD)
    files.write_manifest(folder, {})
    files.verify_folder(folder)
    for name in ("more.safetensors", "pytorch_lora_weights.bin", "code.py"):
        put(folder / name, b"x")
        with pytest.raises(FileError, match="not in the manifest"):
            files.verify_folder(folder)
        (folder / name).unlink()


def test_guider_and_config_that_are_not_json(pipe, tmp_path):
    put(
        tmp_path / "adapter_model.safetensors", save({"base_model.model.conv_in.lora_A.weight": torch.ones(2, 4, 3, 3)})
    )
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(FileError, match="not valid JSON"):
        loading.load(pipe, tmp_path)


KEY_PIECES = [
    *("unet.", "text_encoder.", "lora_unet_", "base_model.model.", "conv_in", "..", "x" * 300, "\u202e", ".alpha"),
    *(".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".hada_w1_a", ".lokr_w1"),
]


@settings(deadline=None, max_examples=60)
@given(
    names=st.lists(
        st.sampled_from(KEY_PIECES),
        min_size=1,
        max_size=4,
    ),
    shape=st.lists(st.integers(0, 3), max_size=4),
)
def test_strange_keys_and_shapes(pipe_module, fuzz_path, names, shape):
    put(fuzz_path, save({"".join(names): torch.ones(shape)}))
    with pytest.raises(AdapterError):
        loading.load(pipe_module, fuzz_path).detach()


@pytest.fixture(scope="module")
def pipe_module(_pipe):
    return _pipe


def test_memory_stays_bounded_by_the_file(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = {f"t{i}": {"dtype": "F32", "shape": [2**30, 2**10], "data_offsets": [0, 2**42]} for i in range(50)}
    with pytest.raises(FileError):
        files.read_tensors(put(tmp_path / "x.safetensors", with_header(header, b"\0" * 64)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_whose_length_looks_like_a_pickle_s_beginning_is_read(tmp_path: Path, length: int) -> None:
    """One header in 32 has a length ending in 0x80, a pickle's first byte; 0x4B50 is an archive's PK."""
    entry = {"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(entry).encode().ljust(length)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    assert files.read_tensors(path)[0]["weight"].item() == 1.0

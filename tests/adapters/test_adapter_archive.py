"""Results as one file: what is packed is what is unpacked, and a file from a stranger is refused in words."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

from adapters import files
from adapters.errors import FileError, GainsError
from adapters.measuring import archive, gains, table, verify

DESIGN = gains.Design(
    arm="S-CFG", baseline="CFG", primary="accuracy", minimum_effect=0.02, higher_is_better={"accuracy": True}
)


@pytest.fixture
def results(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        table.Row(arm=arm, prompt=f"prompt {i}", seed=1, latents="0", numbers={"accuracy": float(rng.random())})
        for arm in ("CFG", "S-CFG")
        for i in range(12)
    ]
    folder = tmp_path / "results"
    (folder / "more").mkdir(parents=True)
    (folder / "more" / "notes.txt").write_text("a note")
    (folder / "per_image.csv").write_text(table.write_csv(rows))
    (folder / "gains.json").write_text(json.dumps(gains.compare(rows, DESIGN).to_dict()))
    files.write_manifest(folder, {"kind": "gains"})
    return folder


def test_an_archive_verifies_as_its_folder_does(results, tmp_path):
    archive.pack(results, tmp_path / "results.zip")
    assert verify.verify(tmp_path / "results.zip") == verify.verify(results)
    with archive.unpacked(tmp_path / "results.zip") as folder:
        found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == {p.relative_to(results): p.read_bytes() for p in results.rglob("*") if p.is_file()}
    assert not folder.exists()


def test_equal_folders_make_equal_archives(results, tmp_path):
    archive.pack(results, tmp_path / "a.zip")
    (results / "per_image.csv").touch()
    archive.pack(results, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_number_changed_inside_is_found_and_the_archive_is_named(results, tmp_path):
    stored = json.loads((results / "gains.json").read_text())
    stored["contrasts"][0]["difference"] += 0.001
    (results / "gains.json").write_text(json.dumps(stored))
    archive.pack(results, tmp_path / "stale.zip")
    with pytest.raises(FileError, match=r"stale\.zip: gains\.json is not the file"):
        verify.verify(tmp_path / "stale.zip")
    files.write_manifest(results, {"kind": "gains"})
    archive.pack(results, tmp_path / "false.zip")
    with pytest.raises(GainsError, match=r"false\.zip: .*contrasts\[0\]\.difference"):
        verify.verify(tmp_path / "false.zip")


@pytest.mark.parametrize("name", ["../out.txt", "/etc/out.txt", "a/../../out.txt", "a\\b.txt"])
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    entry = zipfile.ZipInfo("x")
    entry.filename = name  # set afterwards: the constructor would tidy it
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as zipped:
        zipped.writestr(entry, "x")
    with pytest.raises(FileError, match="plain relative path"), archive.unpacked(tmp_path / "bad.zip"):
        pass


def test_what_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("a", bytes(600))
        zipped.writestr("b", bytes(600))
    with pytest.raises(FileError, match="more than 1000 bytes"), archive.unpacked(tmp_path / "bomb.zip"):
        pass


def test_a_member_packed_by_another_method_is_refused_by_its_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as zipped:
        zipped.writestr("gains.json", "{}")
    with pytest.raises(FileError, match=r"x\.zip: gains\.json is packed by method 14; .*bzip2") as error:
        verify.verify(tmp_path / "x.zip")
    assert str(error.value).startswith(str(tmp_path))


def test_a_design_of_nothing_is_refused_in_words(results, tmp_path):
    stored = json.loads((results / "gains.json").read_text())
    stored["design"]["primary"] = None
    (results / "gains.json").write_text(json.dumps(stored))
    files.write_manifest(results, {"kind": "gains"})
    archive.pack(results, tmp_path / "x.zip")
    with pytest.raises(GainsError, match=r"x\.zip/gains\.json: primary=None: expected a name"):
        verify.verify(tmp_path / "x.zip")


def test_damage_anywhere_is_an_error_in_words(results, tmp_path):
    archive.pack(results, tmp_path / "whole.zip")
    whole = (tmp_path / "whole.zip").read_bytes()
    verify.verify(tmp_path / "whole.zip")
    for place in range(0, len(whole), 97):
        (tmp_path / "hurt.zip").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            said = verify.verify(tmp_path / "hurt.zip")
        except (FileError, GainsError) as error:
            said = str(error)
        # Equal: a byte that nothing depends on, such as one of a date.
        assert said == verify.verify(results) if isinstance(said, dict) else "hurt.zip" in said
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    for name, said in (("cut.zip", "neither a folder nor a whole zip"), ("absent.zip", "no such file")):
        with pytest.raises(FileError, match=said):
            verify.verify(tmp_path / name)

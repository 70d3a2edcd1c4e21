"""Signatures of releases: by whom, of what; every way in which one can be wrong is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import adapters
from adapters import files, ship, signing
from adapters.__main__ import main
from adapters.errors import AdapterError, SignatureError
from adapters.measuring import archive
from adapters.measuring.verify import verify

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key pairs: `ours`, `other`, and `locked` by a passphrase."""
    folder = tmp_path_factory.mktemp("keys")
    for name, phrase in (("ours", ""), ("other", ""), ("locked", "secret")):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", folder / name], check=True)
    return folder


@pytest.fixture
def release(make_adapter, keys: Path, tmp_path: Path) -> Path:
    return shipped(make_adapter("lora"), tmp_path / "release", keys / "ours")


def shipped(weights: adapters.Adapter, folder: Path, key: Path | None) -> Path:
    card = adapters.Card(title=folder.name, base_model="a-base")
    return ship.ship(folder, weights=weights, base={"weights": "0"}, card=card, compact=True, key=key)


def refused(folder: Path, signers: Path | None = None) -> str:
    with pytest.raises(AdapterError) as error:
        verify(folder, signers=signers)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_release_says_by_whom_it_is(release: Path, keys: Path, tmp_path: Path, capsys) -> None:
    several = tmp_path / "NAME.keys"
    several.write_text("# of the team\n\n" + (keys / "other.pub").read_text() + (keys / "ours.pub").read_text())
    for signers in (keys / "ours.pub", several):
        assert main(["verify", str(release), "--signer", str(signers)]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["signature"].startswith("by ED25519 key SHA256:")
        assert said["signature"].endswith(f"which is in {signers}")
        assert "not in the manifest" not in said
    assert "who that is, was not checked" in verify(release)["signature"]
    archive.pack(release, tmp_path / "release.zip")
    assert verify(tmp_path / "release.zip", signers=keys / "ours.pub")["signature"].startswith("by ED25519 key")
    assert files.SIGNATURE in ship.push(release, "me/mug", dry_run=True)


def test_plain_openssh_verifies_it(release: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text(f"maker {(keys / 'ours.pub').read_text()}")
    words = ["ssh-keygen", "-Y", "verify", "-n", "scfg-release", "-f", tmp_path / "allowed", "-I", "maker", "-s"]
    subprocess.run([*words, release / files.SIGNATURE], input=(release / files.MANIFEST).read_bytes(), check=True)


def test_without_a_signature_it_says_unsigned(make_adapter, keys: Path, tmp_path: Path, capsys) -> None:
    folder = shipped(make_adapter("lora"), tmp_path / "release", None)
    assert verify(folder)["signature"] == "unsigned"
    assert "unsigned; get a signed release" in refused(folder, keys / "ours.pub")


def test_what_is_wrong_with_a_signature_is_named(release: Path, keys: Path, make_adapter, tmp_path: Path) -> None:
    assert "which is not in" in refused(release, keys / "other.pub")
    good = (release / files.SIGNATURE).read_bytes()
    another = shipped(make_adapter("dora"), tmp_path / "another", keys / "ours")
    wrong = {
        "of another release": (another / files.SIGNATURE).read_bytes(),
        "flipped": good[:200] + bytes([good[200] ^ 1]) + good[201:],
        "cut": good[:100],
        "empty": b"",
        "too large": b"x" * 10**6,
    }
    for name, data in wrong.items():
        (release / files.SIGNATURE).write_bytes(data)
        for signers in (None, keys / "ours.pub"):
            assert "damaged, or the signature of another" in refused(release, signers) or name == "too large", name
    (release / files.SIGNATURE).unlink()
    os.mkfifo(release / files.SIGNATURE)
    assert "not a regular file" in refused(release, keys / "ours.pub")


def test_a_signature_for_another_purpose_is_none_of_a_release(release: Path, keys: Path) -> None:
    words = ["ssh-keygen", "-q", "-Y", "sign", "-n", "file", "-f", keys / "ours"]
    data = (release / files.MANIFEST).read_bytes()
    signed = subprocess.run(words, input=data, capture_output=True, check=True).stdout
    (release / files.SIGNATURE).write_bytes(signed)
    assert "damaged, or the signature of another" in refused(release, keys / "ours.pub")


def test_what_is_changed_and_named_in_a_new_manifest_is_found(release: Path, keys: Path) -> None:
    (release / "README.md").write_text("Better than ever.")
    files.write_manifest(release, {"format": 1})
    assert "damaged, or the signature of another" in refused(release, keys / "ours.pub")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a list of public keys"),
        ("ours", "a private key; name its public one"),
        ("ssh-ed25519 AAAA\nnonsense\n", "not a list of public keys"),
        ('command="rm -rf /" ssh-ed25519 AAAA', "not a list of public keys"),
    ],
)
def test_a_signer_that_is_none_is_named(text: str, said: str, release: Path, keys: Path, tmp_path: Path) -> None:
    (tmp_path / "signer").write_text((keys / "ours").read_text() if text == "ours" else text)
    assert said in refused(release, tmp_path / "signer")
    assert "no such file" in refused(release, tmp_path / "gone.pub")


def test_a_key_that_cannot_sign_is_named_before_anything_is_made(
    make_adapter, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / "no key").write_text("x")
    shutil.copy(keys / "ours.pub", tmp_path / "half.pub")  # its private half is with no agent
    said = {"gone": "no such file", "no key": "cannot be used", "half.pub": "cannot be used"}
    for name, message in {**said, str(keys / "locked"): "without a passphrase"}.items():
        for use in (signing.check_key, lambda key: shipped(make_adapter("lora"), tmp_path / "release", key)):
            with pytest.raises(SignatureError, match=message) as error:
                use(tmp_path / name)
            assert "signing key" in str(error.value)
            assert "\n" not in str(error.value)
        assert not (tmp_path / "release").exists()


def test_without_openssh_a_signature_is_not_checked_and_none_is_made(
    release: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert verify(release)["signature"] == "signed, not checked: ssh-keygen is not installed"
    assert "ssh-keygen is not installed" in refused(release, keys / "ours.pub")
    with pytest.raises(SignatureError, match="install OpenSSH"):
        signing.check_key(keys / "ours")

"""Who made a release: a detached OpenSSH signature of its manifest, and so of every file that the manifest names.

`manifest.json.sig` is what `ssh-keygen -Y sign` writes (https://github.com/openssh/openssh-portable, PROTOCOL.sshsig),
in a namespace of its own, so that no signature made for another purpose passes for one of a release. OpenSSH does the
cryptography: whoever signs has it and a key, and accounts on code hosts publish theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from . import files
from .errors import FileError, SignatureError

__all__ = ["NAMESPACE", "check_key", "checked_signature", "sign"]

NAMESPACE = "scfg-release"
MAX_SIGNATURE, MAX_KEYS = 2**16, 2**20  # bytes; a signature of RSA 16384 has 6,000
SIGNER = "signer"  # what every key of the given file is called, so that any of them will do


def sign(folder: Path, key: str | Path) -> None:
    """Sign the manifest of a release folder.

    Args:
        folder: a release folder with its manifest.
        key: private key, or a public one whose private half the SSH agent holds (as a key with a passphrase needs).

    Raises:
        SignatureError: there is no such key, or it cannot be used.
    """
    files.write_bytes(folder / files.SIGNATURE, _signed(files.read_bytes(folder / files.MANIFEST, files.MAX_JSON), key))


def check_key(key: str | Path) -> None:
    """Sign something to see that it works, before hours of work; raises as `sign`."""
    _signed(b"", key)


def checked_signature(folder: Path, signers: str | Path | None = None) -> str:
    """What there is to say of a folder's signature.

    Args:
        folder: a release folder.
        signers: file of public keys, one a line, as `id_ed25519.pub` or a code host's `NAME.keys` has them; the
            signature must be by one of them.

    Returns:
        `unsigned`, or whose key it is signed with.

    Raises:
        SignatureError: the signature is damaged or of another release; or, with `signers`, missing or another's.
    """
    if not os.path.lexists(folder / files.SIGNATURE):
        if signers is None:
            return "unsigned"
        raise SignatureError(f"{folder}: unsigned; get a signed release, or verify it without a signer")
    if signers is None and shutil.which("ssh-keygen") is None:
        return "signed, not checked: ssh-keygen is not installed"
    manifest = files.read_bytes(folder / files.MANIFEST, files.MAX_JSON)
    with tempfile.TemporaryDirectory() as home:
        signature = Path(home) / "signature"  # a copy: what is checked is what was read
        signature.write_bytes(files.read_bytes(folder / files.SIGNATURE, MAX_SIGNATURE))
        valid = _ssh_keygen("check-novalidate", "-s", signature, data=manifest)
        found = re.search(r"with (\S+ key \S+)", valid.stdout.decode(errors="replace"))
        if valid.returncode or found is None:
            raise SignatureError(
                f"{folder / files.SIGNATURE}: damaged, or the signature of another release ({_last(valid)}); "
                "get the release again"
            )
        if signers is None:
            return f"by {found[1]}; who that is, was not checked: name the key you trust with --signer"
        allowed = Path(home) / "allowed"
        allowed.write_text("".join(f"{SIGNER} {key}\n" for key in _public_keys(Path(signers))), "utf-8")
        trusted = _ssh_keygen("verify", "-f", allowed, "-I", SIGNER, "-s", signature, data=manifest)
        if trusted.returncode:
            raise SignatureError(f"{folder}: signed by {found[1]}, which is not in {signers}")
    return f"by {found[1]}, which is in {signers}"


def _public_keys(path: Path) -> list[str]:
    text = files.read_bytes(path.expanduser(), MAX_KEYS).decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    keys = [line for line in lines if re.match(r"(ssh|ecdsa|sk)-[\w@.-]+ [A-Za-z0-9+/=]+( |$)", line)]
    if not lines or len(keys) < len(lines):
        kind = "a private key; name its public one (.pub)" if "PRIVATE KEY" in text else "not a list of public keys"
        raise SignatureError(f"signer {path}: {kind}, such as `ssh-ed25519 AAAA... name` on each line")
    return keys


def _signed(data: bytes, key: str | Path) -> bytes:
    place = Path(key).expanduser()
    try:
        with files.opened(place):
            pass
    except FileError as error:
        raise SignatureError(f"signing key {error}; `ssh-keygen -t ed25519` makes one") from error
    done = _ssh_keygen("sign", "-q", "-f", place.absolute(), data=data)
    if done.returncode or not done.stdout:
        raise SignatureError(
            f"signing key {place} cannot be used ({_last(done)}); it must be a private key without a passphrase, or a "
            "public one whose private half the SSH agent holds (`ssh-add`)"
        )
    return done.stdout


def _ssh_keygen(command: str, *arguments: object, data: bytes) -> subprocess.CompletedProcess[bytes]:
    words = ["ssh-keygen", "-Y", command, "-n", NAMESPACE, *map(str, arguments)]
    try:
        # In a session without a terminal: a question for a passphrase is an error, and does not wait for ever.
        return subprocess.run(words, input=data, capture_output=True, start_new_session=True, check=False)
    except FileNotFoundError as error:
        raise SignatureError("ssh-keygen is not installed; install OpenSSH 8.1 or newer, which signs") from error


def _last(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = (done.stderr or done.stdout).decode(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), f"code {done.returncode}")

"""Where the hub cannot be reached, that is found out once and at once."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from training import hub, models
from training.errors import TrainingError


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that may ask the hub; `HF_ENDPOINT` is to be set by the test."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub._reachable.cache_clear()
    return monkeypatch


def test_a_hub_that_is_not_there_is_not_asked_again_and_again(online: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")  # nothing listens
        began = time.monotonic()
        with pytest.raises(TrainingError, match="neither a folder nor a reachable hub id"):
            models.load_parts("nobody/nothing")
        with pytest.raises(OSError, match="local cache"):
            hf_hub_download("nobody/nothing", "config.json")
    assert constants.HF_HUB_OFFLINE
    assert time.monotonic() - began < 10, "the client alone takes half a minute for each of the two"


def test_a_hub_that_answers_stays_in_use(online: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        online.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.offline_if_unreachable("somebody/something")
    assert not constants.HF_HUB_OFFLINE


def test_a_folder_needs_no_hub(online: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.offline_if_unreachable(tmp_path)
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["https_proxy", "all_proxy"])
def test_behind_a_proxy_the_client_decides(name: str, online: pytest.MonkeyPatch) -> None:
    online.setattr(constants, "ENDPOINT", "https://hub.invalid")
    online.setenv(name, "http://127.0.0.1:9")
    hub.offline_if_unreachable("somebody/something")
    assert not constants.HF_HUB_OFFLINE

"""Whether the model hub can be reached, asked once: its client tries every file six times, over half a minute."""

from __future__ import annotations

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["offline_if_unreachable"]

PATIENCE = 3.0  # seconds


def offline_if_unreachable(name: str | Path) -> None:
    """Call before a hub id is loaded: where the hub cannot be reached, this process uses what is cached, at once.

    Args:
        name: what is loaded; nothing is asked for a folder or file.
    """
    from huggingface_hub import constants

    if not Path(name).expanduser().exists() and not constants.HF_HUB_OFFLINE and not _reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True


@cache
def _reachable(endpoint: str) -> bool:
    place = urlsplit(endpoint)
    if {place.scheme, "all"} & getproxies().keys():
        return True  # the proxy resolves names; whether it lets us through is for the client to find out
    try:
        socket.create_connection((place.hostname, place.port or {"http": 80}.get(place.scheme, 443)), PATIENCE).close()
    except OSError:
        return False
    return True

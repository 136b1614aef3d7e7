"""Reaching the Hugging Face hub without waiting for it when it is not there.

The hub's clients retry for half a minute when there is no network. Here one short request decides: if the hub does not answer, they
are put in offline mode, in which they look at their cache only and fail at once.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

PROBE_SECONDS = 5.0


@cache
def hub_reachable() -> bool:
    """Whether the hub answers within a few seconds (asked once a process; False where `HF_HUB_OFFLINE` is set)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError:  # an answer, though not a friendly one
        return True
    except (OSError, ValueError):
        return False


@contextmanager
def hub_clients(local_only: bool = False) -> Iterator[None]:
    """Inside, `transformers` and `datasets` use their caches only if `local_only` or if the hub does not answer."""
    clients = _settings()
    before = [client.HF_HUB_OFFLINE for client in clients]
    if local_only or not hub_reachable():
        for client in clients:
            client.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for client, offline in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = offline


def _settings() -> list[ModuleType]:
    """The modules in which clients of the hub keep their settings; a machine that only compiles and runs needs no `datasets`."""
    from huggingface_hub import constants

    try:
        import datasets.config
    except ImportError:
        return [constants]
    return [constants, datasets.config]

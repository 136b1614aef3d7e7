"""The store in which the ranks of a job meet, free of what an earlier start of the same job left in it.

torchrun's agent keeps one store for the life of a job and lends it to its workers. After a restart the addresses of the dead workers are
still there, and a rank that reads one before its new owner has written tries to reach nobody (seen with PyTorch 2.13). So the ranks of
each start agree on a prefix of their own first: every other rank asks under a name that nobody had before, rank 0 answers with a prefix
that nobody had before, and waits until all have it.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

_PLACE = "seqloom/meeting"
_POLL_SECONDS = 0.02


def agents_store(timeout: timedelta) -> Store | None:
    """A client of the store that torchrun's agent lends to this worker; None where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    world_size = int(os.environ["WORLD_SIZE"])
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world_size, is_master=False, timeout=timeout)


def own_part(store: Store, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of a store that belongs to the ranks that call this together. Raises `TimeoutError` on rank 0 where one does not come."""
    if rank == 0:
        prefix = secrets.token_hex(8)
        _answer(store, prefix, world_size, timeout)
    else:
        asked = secrets.token_hex(8)
        store.set(f"{_PLACE}/asks/{rank}", asked)
        prefix = store.get(f"{_PLACE}/answer/{asked}").decode()
        store.set(f"{_PLACE}/has/{prefix}/{rank}", "yes")
    return PrefixStore(prefix, store)


def _answer(store: Store, prefix: str, world_size: int, timeout: timedelta) -> None:
    """Give every rank that asks the prefix, those of an earlier start too, until all of this one have it."""
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for rank in missing:
            if store.check([f"{_PLACE}/asks/{rank}"]):
                store.set(f"{_PLACE}/answer/{store.get(f'{_PLACE}/asks/{rank}').decode()}", prefix)
        missing = [rank for rank in missing if not store.check([f"{_PLACE}/has/{prefix}/{rank}"])]
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {missing} have not come to the job's store in {timeout.total_seconds():.0f} s")
        time.sleep(_POLL_SECONDS if missing else 0)

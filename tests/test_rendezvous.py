"""Ranks that meet in a store which an earlier start has used."""

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from seqloom.runtime.rendezvous import own_part

LIMIT = timedelta(seconds=30)


def meet(stores, order):
    """The parts that ranks get who come in this order, by rank; a rank 0 that waits for the others waits in its thread."""
    parts = {}

    def come(rank):
        parts[rank] = own_part(stores[rank], rank, len(order), LIMIT)

    threads = [threading.Thread(target=come, args=(rank,), daemon=True) for rank in order]
    for thread in threads:
        thread.start()
        thread.join(timeout=0.05)
    for thread in threads:
        thread.join(timeout=30)
    return [parts[rank] for rank in range(len(order))]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_every_start_has_a_part_of_its_own(order):
    """An address that an earlier start left is never seen, whoever comes first."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=LIMIT)
    stores = [TCPStore("localhost", server.port, is_master=False, timeout=LIMIT) for _ in order]
    for start in range(3):
        parts = meet(stores, order)
        assert not any(part.check(["address/1"]) for part in parts)
        parts[1].set("address/1", f"start {start}")
        assert all(part.get("address/1") == f"start {start}".encode() for part in parts)


def test_a_rank_that_does_not_come_is_named():
    store = HashStore()
    store.set("seqloom/meeting/asks/1", "of an earlier start")
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] have not come"):
        own_part(store, 0, 3, timedelta(seconds=0.2))

"""Process groups of many ranks in one process: what a rank would receive is made up from its own data.

Role in the pipeline: a rehearsal runs one rank of a plan on one real device. Every collective takes place at its true size in device
memory, but nothing crosses a wire: a gather repeats the local piece, a reduction leaves what is there, an all-to-all keeps the pieces it
would have sent. The values stay of the size and kind that the program computes with, so kernels run at their true speed and nothing
becomes NaN. Buffers are written on the current stream, as a collective would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, Work
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.futures import Future
from torch.testing._internal.distributed.fake_pg import FakeStore

BACKEND = "simulated"


@contextmanager
def simulated_job(rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is rank `rank` of a job of `world_size` ranks that exists only in its own memory."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    with _job(BACKEND, rank, world_size):
        yield


@contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """The same for fake tensors: PyTorch's own fake backend, which moves nothing."""
    with _job(dist.Backend.FAKE, rank, world_size):
        yield


@contextmanager
def _job(backend: str, rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor remembers results with their mesh, and an equal mesh of a later job has other process groups.
        _clear_sharding_prop_cache()


class SimulatedGroup(dist.ProcessGroup):
    """One process group. Methods have the names and arguments that `torch.distributed` calls; each returns a finished `Work`."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)

    def getBackendName(self) -> str:
        """The name under which the backend is registered."""
        return BACKEND

    @property
    def group_name(self) -> str:
        """The name by which functional collectives find the group."""
        return dist.distributed_c10d._world.pg_names[self]

    def all_gather_single(self, output: Tensor, piece: Tensor, opts: Any = None) -> Work:
        """`output` `[n * l, ..]` becomes n times `piece` `[l, ..]`."""
        with torch.no_grad():
            slots, flat, rank = output.detach().view(self.size(), -1), piece.detach().reshape(-1), self.rank()
            slots[:rank].copy_(flat)
            slots[rank + 1 :].copy_(flat)
            if slots[rank].data_ptr() != flat.data_ptr():  # FSDP2 gathers in place: the piece is a part of the output already
                slots[rank].copy_(flat)
        return _done()

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any = None) -> Work:
        """`output` `[l, ..]` becomes this rank's part of `whole` `[n * l, ..]`."""
        with torch.no_grad():
            output.detach().view(-1).copy_(whole.detach().reshape(self.size(), -1)[self.rank()])
        return _done()

    def all_to_all_single(
        self, output: Tensor, pieces: Tensor, output_sizes: Any = None, input_sizes: Any = None, opts: Any = None
    ) -> Work:
        """`output` becomes `pieces`: from each rank what this one would have sent it, over and over where more comes than goes."""
        with torch.no_grad():
            target, source = output.detach().view(-1), pieces.detach().reshape(-1)
            if target.numel() and not source.numel():
                target.normal_()
            for start in range(0, target.numel(), source.numel()) if source.numel() else ():
                part = target[start : start + source.numel()]
                part.copy_(source[: part.numel()])
        return _done()

    def all_gather_single_coalesced(self, outputs: list[Tensor], pieces: list[Tensor], opts: Any = None) -> Work:
        """Several gathers in one."""
        for output, piece in zip(outputs, pieces, strict=True):
            self.all_gather_single(output, piece)
        return _done()

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], wholes: list[Tensor], opts: Any = None) -> Work:
        """Several reductions in one."""
        for output, whole in zip(outputs, wholes, strict=True):
            self.reduce_scatter_single(output, whole)
        return _done()

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """The sums are taken to be what is there."""
        return _done()

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """The sums are taken to be what is there."""
        return _done()

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Every rank has what this one has."""
        return _done()

    def barrier(self, opts: Any = None) -> Work:
        """Nobody is waited for."""
        return _done()

    # The names of the same methods in PyTorch 2.11 and 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced


def _create(store: Store, rank: int, size: int, timeout: timedelta) -> SimulatedGroup:
    return SimulatedGroup(rank, size)


def _done() -> Work:
    future: Future = Future()
    future.set_result(None)
    return torch._C._distributed_c10d._create_work_from_future(future)

"""Where a rank stands in the mesh: its index along an axis, or along several flattened in mesh order."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from procs import run_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from seqloom.runtime.mesh import axis_group, axis_rank, build_mesh


def _indices(rank: int, world_size: int) -> list[int]:
    mesh = build_mesh({"sp": 2, "tp": 2}, world_size // 4, "cpu")
    names = [("dp",), ("sp",), ("tp",), ("sp", "tp"), ("tp", "sp"), ("dp", "sp"), ("dp", "tp")]
    found = [axis_rank(mesh, *axes) for axes in names]
    assert found == [axis_group(mesh, *axes).rank() for axes in names]
    return found


def test_index_along_every_axis():
    for rank, found in enumerate(run_ranks(_indices, 4)):
        sp, tp = divmod(rank, 2)
        assert found == [0, sp, tp, rank, rank, sp, tp]


@pytest.mark.parametrize("rank", range(8))
def test_index_in_a_job_that_only_one_process_stands_for(rank):
    """The dry run's processes are made up; the index follows the rank all the same, the earlier axis of the mesh being the outer one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
    try:
        dp, (sp, tp) = rank // 4, divmod(rank % 4, 2)
        assert _indices(rank, 8) == [dp, sp, tp, 2 * sp + tp, 2 * sp + tp, 2 * dp + sp, 2 * dp + tp]
    finally:
        dist.destroy_process_group()


def test_a_plain_int_that_emitted_code_can_multiply():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = build_mesh({"sp": 1}, 1, "cpu")
        assert axis_rank(mesh, "sp") * 16384 == 0 and type(axis_rank(mesh, "sp")) is int
    finally:
        dist.destroy_process_group()

"""One rank of a job that exists only in its own memory: what its collectives give, and that FSDP2 trains on it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard

from seqloom.runtime import collectives
from seqloom.runtime.mesh import axis_group, build_mesh
from seqloom.runtime.simulated import simulated_job

PLACES = st.integers(2, 5).flatmap(lambda ranks: st.tuples(st.integers(0, ranks - 1), st.just(ranks)))


@settings(max_examples=25, deadline=None)
@given(place=PLACES, rows=st.integers(1, 6), columns=st.integers(1, 4))
def test_every_collective_gives_data_of_its_own(place, rows, columns):
    """No output holds what was in memory before; shapes are those of real collectives."""
    rank, ranks = place
    with simulated_job(rank, ranks):
        group = dist.group.WORLD
        x = torch.randn(ranks * rows, ranks * columns)
        assert torch.equal(collectives.all_gather(x, 0, group), torch.cat([x] * ranks))
        assert torch.equal(collectives.all_gather(x, 1, group), torch.cat([x] * ranks, 1))
        assert torch.equal(collectives.reduce_scatter(x, 0, group), x.chunk(ranks)[rank])
        assert torch.equal(collectives.all_reduce(x, group), x)
        exchanged = collectives.all_to_all(x, 0, 1, group)
        assert exchanged.shape == (rows, ranks * ranks * columns)
        assert torch.equal(exchanged.flatten().sort().values, x.flatten().sort().values)
        back = collectives.all_to_all(exchanged, 1, 0, group)
        assert torch.equal(back.flatten().sort().values, x.flatten().sort().values)


@settings(max_examples=10, deadline=None)
@given(place=PLACES)
def test_gradients_flow(place):
    with simulated_job(*place):
        group, ranks = dist.group.WORLD, place[1]
        x = torch.randn(2 * ranks, 3 * ranks, dtype=torch.float64, requires_grad=True)
        whole = collectives.all_gather(x, 0, group, partial_grad=True)
        moved = collectives.all_to_all(whole, 0, 1, group)
        collectives.reduce_scatter(moved, 1, group).square().sum().backward()
        assert x.grad.shape == x.shape
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("rank", [0, 2])
def test_gathers_in_place_keep_the_piece(rank):
    """FSDP2 gathers into a buffer that holds the piece already."""
    with simulated_job(rank, 3):
        whole = torch.full((9,), float("nan"))
        piece = whole[3 * rank : 3 * rank + 3]
        piece.copy_(torch.tensor([1.0, 2.0, 3.0]))
        dist.all_gather_into_tensor(whole, piece)
        assert whole.tolist() == [1.0, 2.0, 3.0] * 3


def test_groups_of_a_mesh():
    with simulated_job(5, 8):
        mesh = build_mesh({"sp": 2, "tp": 2}, 2, "cpu")
        assert [mesh.get_local_rank(axis) for axis in ("dp", "sp", "tp")] == [1, 0, 1]
        both = axis_group(mesh, "sp", "tp")
        assert (both.size(), both.rank()) == (4, 1)
        x = torch.tensor([3.0])
        dist.all_reduce(x, group=both)
        dist.broadcast(x, 0)
        dist.barrier()
        assert x.item() == 3.0


def test_fsdp_trains():
    with simulated_job(1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        mesh = build_mesh({}, 4, "cpu")
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = (model(torch.ones(4, 8)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert all(torch.isfinite(torch.tensor(losses)))
        assert losses[-1] < losses[0]


def test_a_job_ends_with_its_block():
    for world in (2, 3):
        with simulated_job(0, world):
            assert dist.get_world_size() == world
        assert not dist.is_initialized()
    with pytest.raises(ZeroDivisionError), simulated_job(0, 2):
        _ = 1 / 0
    assert not dist.is_initialized()

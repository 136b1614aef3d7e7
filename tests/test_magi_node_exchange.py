"""Attention over nodes: the same numbers as over a flat group, with fewer rows between nodes; and the same bits in every run on request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from magi_dense import SHAPE, attended, dense, difference, key_of, tensors
from procs import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from custom_ops import magi_attention as magi
from seqloom.errors import UserError
from seqloom.magi import masks
from seqloom.magi.groupcast import Hops
from seqloom.magi.key import group_of, nodes_of, runtime_of
from seqloom.magi.mask import AttnMask

CU = (0, 40, 41, 90, 203)
MASKS: Mapping[str, AttnMask] = {
    "full": AttnMask(((0, 128),), ((0, 128),), (0,), 128),
    "packed causal": masks.packed(CU),
    "window with sinks": masks.sliding_window(CU, 9, sinks=3),
    "shared question": masks.shared_question(CU),
    "block causal": masks.block_causal(CU, 16),
    "uncovered rows": AttnMask(((10, 30), (50, 60)), ((0, 25), (64, 96)), (1, 2), 97),
}
DEGREES = (0, 1, 3)


def run_both(rank: int, world_size: int, shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Every mask over a mesh of nodes, and how far that is from the flat exchange and from dense attention."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("node", "rank"))
    found = []
    for name, degree in ((name, degree) for name in MASKS for degree in DEGREES):
        config, sinks = magi.DistAttnConfig(degree=degree), degree == 1
        flat = attended(MASKS[name], dist.group.WORLD, sinks, config=config, chunk=8)
        over_nodes = attended(MASKS[name], mesh, sinks, config=config, chunk=8)
        wanted = dense(MASKS[name], sinks)
        keys = [key_of(MASKS[name], group, config, 8) for group in (dist.group.WORLD, mesh)]
        runtimes = [runtime_of(key, torch.device("cpu"), torch.float64, SHAPE[2], False) for key in keys]
        assert keys[0].dispatch == keys[1].dispatch and all(isinstance(stage.way, Hops) for stage in runtimes[1].stages)
        found.append(
            {
                "name": name,
                "degree": degree,
                "rows": keys[0].dispatch.position_ids(rank).tolist(),
                "from dense": max(difference(over_nodes[part], x) for part, x in wanted.items()),
                "from flat": max(difference(over_nodes[part], x) for part, x in flat.items()),
                "flat": [stage.way.receive_splits for stage in runtimes[0].stages],
                "across": [stage.way.across.received for stage in runtimes[1].stages],
                "received": [stage.way.within.received for stage in runtimes[1].stages],
            }
        )
    return found


@pytest.mark.parametrize("shape", [(2, 2), (2, 3)])
def test_over_nodes_attention_is_that_of_the_flat_group_and_each_row_crosses_once(shape: tuple[int, int]) -> None:
    nodes, per_node = shape
    by_rank = run_ranks(run_both, nodes * per_node, shape, timeout=200)
    fewer = 0
    for case in zip(*by_rank, strict=True):
        name, degree = case[0]["name"], case[0]["degree"]
        assert max(rank["from dense"] for rank in case) < 1e-10 and max(rank["from flat"] for rank in case) < 1e-10, (name, degree)
        for number, rank in enumerate(case):
            assert rank["received"] == [sum(splits) for splits in rank["flat"]]
            home = number // per_node
            between = sum(splits[source] for splits in rank["flat"] for source in range(len(case)) if source // per_node != home)
            rank["between"] = between
        crossed, flat = (sum(sum(r[key]) if key == "across" else r[key] for r in case) for key in ("across", "between"))
        assert crossed <= flat
        fewer += crossed < flat
        if degree < 2:
            assert crossed == least_crossings(MASKS[name], [rank["rows"] for rank in case], per_node), name
    assert fewer >= len(MASKS)  # rows that two ranks of a node need are the rule


def least_crossings(mask: AttnMask, rows: list[list[int]], per_node: int) -> int:
    """Rows that the ranks of each node need and do not hold, counted from the cells."""
    cells, total = np.asarray(mask.dense()), 0
    for first in range(0, len(rows), per_node):
        held = {row for own in rows[first : first + per_node] for row in own}
        inside = [row for row in held if row < mask.total_seqlen_q]
        total += len(set(np.flatnonzero(cells[inside].any(0)).tolist()) - held)
    return total


def run_meshes(rank: int, world_size: int) -> None:
    flat = init_device_mesh("cpu", (4,))
    assert nodes_of(flat) is None and group_of(flat).size() == 4 and nodes_of(dist.group.WORLD) is None
    one_node = init_device_mesh("cpu", (1, 4), mesh_dim_names=("node", "rank"))
    assert nodes_of(one_node) is None and group_of(one_node).size() == 4
    with pytest.raises(UserError, match=r"has one dimension, or two \(nodes x ranks of a node\), not 3"):
        key_of(MASKS["full"], init_device_mesh("cpu", (2, 2, 1)), magi.DistAttnConfig())
    mixed = DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("node", "rank"))
    with pytest.raises(UserError, match=r"has ranks in the order \[0, 2, 1, 3\]: number them node by node"):
        key_of(MASKS["full"], mixed, magi.DistAttnConfig())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
    key = key_of(MASKS["packed causal"], mesh, magi.DistAttnConfig(deterministic=True))
    assert magi.get_most_recent_key(mesh) is key
    new = magi.make_varlen_key_for_new_mask_after_dispatch(CU, CU, key, window_size=(9, 0))
    assert new.nodes == key.nodes is not None and new.deterministic and new.dispatch == key.dispatch
    x = tensors(CU[-1])[0]
    assert torch.equal(magi.undispatch(magi.roll(magi.dispatch(x, key), 5, 0, key), key), x.roll(5, 0))


def test_meshes_of_one_dimension_of_one_node_and_of_other_shapes() -> None:
    run_ranks(run_meshes, 4, timeout=100)


# --- the same bits ---------------------------------------------------------------------------------------------------------------

# From PyTorch's notes on `use_deterministic_algorithms`: what has no order on GPUs, but for the ones that have one in that mode.
WITHOUT_ORDER = ("scatter_add", "scatter_reduce", "put_", "histc", "bincount", "kthvalue", "median", "cumsum", "resize_", "embedding_bag")
ONLY_IN_MODE = ("index_add", "index_put", "index_copy", "scatter", "gather", "repeat_interleave", "flash_attention")


class Watched(TorchDispatchMode):
    """The names of the operators that ran, and of those that need the deterministic mode and ran without it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.loose: set[str] = set()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.names.add(name)
        if any(part in name for part in ONLY_IN_MODE) and not torch.are_deterministic_algorithms_enabled():
            self.loose.add(name)
        return function(*args, **(kwargs or {}))


def run_twice(rank: int, world_size: int, over_nodes: bool) -> dict[str, list[str]]:
    group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank")) if over_nodes else dist.group.WORLD
    names: set[str] = set()
    for mask, degree, kernel in (("packed causal", 3, None), ("shared question", 1, "reference"), ("window with sinks", 0, None)):
        config = magi.DistAttnConfig(degree=degree, kernel=kernel, deterministic=True)
        key = key_of(MASKS[mask], group, config, 8)
        runs = []
        for _ in range(2):
            q, k, v, grad, sink = tensors(MASKS[mask].total_seqlen_q, dtype=torch.float32)
            local = [magi.dispatch(x, key).requires_grad_() for x in (q, k, v)]
            grad, sink = magi.dispatch(grad, key), sink.requires_grad_()
            with Watched() as watched:
                out, meta = magi.calc_attn(*local, key, sink=sink)
                out.backward(grad)
            runs.append([out.detach(), meta.lse, sink.grad, *(x.grad for x in local)])
            assert not torch.are_deterministic_algorithms_enabled()
            assert not watched.loose
            names |= watched.names
        assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
        torch.use_deterministic_algorithms(True)  # PyTorch refuses what it cannot run in one order
        got = attended(MASKS[mask], group, True, config=magi.DistAttnConfig(degree=degree, kernel=kernel), chunk=8, dtype=torch.float32)
        torch.use_deterministic_algorithms(False)
        for name, run in (("out", runs[0][0]), ("dk", runs[0][4])):  # close: a CPU's products depend on where tensors lie in memory
            torch.testing.assert_close(got[name], magi.undispatch(run, key), rtol=0, atol=2e-6)
        with Watched() as watched:
            magi.calc_attn(*local, key_of(MASKS[mask], group, magi.DistAttnConfig(degree=degree), 8))[0].sum().backward()
        assert "index_add_" in watched.loose  # not asked for, nothing is set
    return {"names": sorted(names)}


@pytest.mark.parametrize(("ranks", "over_nodes"), [(2, False), (4, True)])
def test_two_runs_give_the_same_bits_and_no_operator_runs_without_an_order(ranks: int, over_nodes: bool) -> None:
    for found in run_ranks(run_twice, ranks, over_nodes, timeout=150):
        assert "index_add_" in found["names"]
        assert not [name for name in found["names"] if any(part in name for part in WITHOUT_ORDER)]

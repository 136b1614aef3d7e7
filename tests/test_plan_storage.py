"""Where parameters and states live: bytes as ZeRO's paper counts them, and no storage left out that could be best."""

from __future__ import annotations

import itertools

import pytest

from seqloom.cost.hardware import load_hardware
from seqloom.plan.price import Machine
from seqloom.plan.space import Axis
from seqloom.plan.storage import GroupCost, Storage, group_cost, group_wire_bytes, storages

H100 = load_hardware("h100-80gb")
NUMEL = 10**6
MESHES = [(), (8,), (2, 4), (2, 2, 2)]


def machine(sizes: tuple[int, ...], dp: int = 1) -> Machine:
    return Machine(H100, tuple(Axis(size, "sum") for size in sizes), dp)


def everything(where: Machine, accumulation: int) -> list[Storage]:
    """Every level over every subset of the axes that sum gradients."""
    axes = [axis for axis in where.storage_axes if where.size(axis) > 1]
    subsets = [s for n in range(1, len(axes) + 1) for s in itertools.combinations(axes, n)] or [()]
    return [Storage(0, 2, accumulation, ()), *(Storage(zero, 2, accumulation, s) for zero in (1, 2, 3) for s in subsets)]


def figures(cost: GroupCost) -> tuple[float, ...]:
    return cost.standing_bytes, cost.in_flight_bytes, cost.ending_bytes, cost.forward_s, cost.backward_s, cost.optimizer_s


@pytest.mark.parametrize(("sizes", "dp", "accumulation"), [*itertools.product(MESHES, (1, 4), (1, 3))])
def test_for_every_storage_one_is_tried_that_is_no_worse(sizes: tuple[int, ...], dp: int, accumulation: int) -> None:
    where = machine(sizes, dp)
    tried = storages(where, 2, accumulation, None)
    costs = {
        storage: [figures(group_cost(100 * NUMEL, where, storage, root)) for root in (False, True)]
        for storage in everything(where, accumulation)
    }
    for mine in costs.values():
        pairs = (zip(costs[other], mine, strict=True) for other in tried)
        assert any(all(a <= b * (1 + 1e-12) for one, two in pair for a, b in zip(one, two, strict=True)) for pair in pairs)
    standing = [group_cost(NUMEL, where, storage, False).standing_bytes for storage in tried]
    assert standing == sorted(standing), "the leanest comes first"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_states_are_twelve_bytes_an_element_over_the_ranks_that_share_them(zero: int, accumulation: int) -> None:
    where = machine((8,))
    cost = group_cost(NUMEL, where, Storage(zero, 2, accumulation, () if zero == 0 else (0,)), root=False)
    assert cost.states_bytes == 12 * NUMEL / (1 if zero == 0 else 8)
    assert cost.resident_bytes == (0 if zero == 3 else 2 * NUMEL), "ZeRO 3 keeps no gathered parameters"
    assert (cost.flight_gathered_bytes > 0) == (zero == 3)


@pytest.mark.parametrize(("zero", "gathers", "scatters"), [(1, 1, 1), (2, 1, 4), (3, 8, 4)])
def test_bytes_on_the_wire_of_a_step_of_four_micro_batches(zero: int, gathers: int, scatters: int) -> None:
    sent = group_wire_bytes(NUMEL, machine((8,)), Storage(zero, 2, 4, (0,)), root=False)
    assert sent == {"all_gather": gathers * 2 * NUMEL * 7 // 8, "reduce_scatter": scatters * 4 * NUMEL * 7 // 8}


def test_copies_of_a_hybrid_are_summed_once_a_step() -> None:
    sent = group_wire_bytes(NUMEL, machine((2, 4)), Storage(3, 2, 4, (1,)), root=False)
    assert sent["all_reduce"] == 2 * 4 * (NUMEL // 4) // 2
    assert sent["reduce_scatter"] == 4 * 4 * NUMEL * 3 // 4

"""Runners-up: the cheapest other split of every operator, against plans that were changed by hand and evaluated whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
from plan_samples import real, slow_toy, tiny, with_usable_bytes

from seqloom.cost.hardware import GIB, load_hardware
from seqloom.plan.evaluate import evaluate
from seqloom.plan.modes import kept_matmuls
from seqloom.plan.plan import Plan, PlanMismatch, PlannedRegion, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import OUTER, Regions
from seqloom.plan.request import Request
from seqloom.plan.runner_up import runners_up, split_letters
from seqloom.plan.solver import Decisions, solve
from seqloom.plan.space import strategies

H100 = load_hardware("h100-80gb")
TOY = dataclasses.replace(slow_toy(), host_memory_bytes=GIB)
CASES = [  # family, force, ranks, ZeRO, recompute, share of the memory that the fastest plan needs
    ("llama", "sp2", 2, 3, None, 4.0),
    ("llama", "tp2", 2, 3, None, 4.0),
    ("gpt2", "tp_plain2", 2, 1, None, 4.0),
    ("qwen3", "sp2,tp2", 4, 3, None, 4.0),
    ("gemma2", None, 2, 0, None, 4.0),
    ("llama", None, 4, None, True, 4.0),
    ("qwen3", None, 2, None, True, 4.0),
    ("llama", None, 2, None, None, 0.95),
    ("llama", None, 2, None, None, 0.8),
    ("llama", None, 2, None, None, 0.6),
    ("gpt2", None, 2, 3, None, 0.5),
]


@functools.cache
def planned(
    family: str, force: str | None, ranks: int, zero: int | None, recompute: bool | None, share: float
) -> tuple[Regions, Decisions, Plan]:
    regions, hardware = tiny(family, 2, 2, 256), TOY
    if share < 1:
        hardware = with_usable_bytes(TOY, share * evaluate(planned(family, force, ranks, zero, recompute, 4.0)[2]).peak_bytes)
    asked = Request(ranks, 1, 2, hardware, 2, force=force, zero=zero, recompute=recompute)
    decisions, _ = solve(regions, asked)
    return regions, decisions, realize(regions, decisions, Machine(hardware, decisions.axes, 1))


def changed(regions: Regions, decisions: Decisions, plan: Plan, key: str, index: int) -> Iterator[tuple[dict[str, str], Plan]]:
    """Every plan with another split of one cluster that can run, with its letters."""
    region, cluster = regions.parts[key], plan.regions[key].clusters[index]
    mine = split_letters(plan, region, cluster.cluster, cluster.strategy)
    for strategy in strategies(region.graph, cluster.cluster, region.labels, decisions.axes):
        letters = split_letters(plan, region, cluster.cluster, strategy)
        splits = [*decisions.splits[key][:index], strategy.splits, *decisions.splits[key][index + 1 :]]
        try:
            other = realize(regions, dataclasses.replace(decisions, splits={**decisions.splits, key: tuple(splits)}), plan.machine)
        except PlanMismatch:
            continue
        if letters != mine and can_run(other):
            yield letters, other


def can_run(plan: Plan) -> bool:
    loss = plan.outer.region.graph.outputs[0]
    tied = all(one_layout_for_each_parameter(region) for region in plan.regions.values())
    stays = all(nothing_moves_that_must_stay(region) for region in plan.regions.values())
    return tied and stays and all(placement.kind in "RP" for placement in plan.outer.layouts[loss])


def one_layout_for_each_parameter(planned: PlannedRegion) -> bool:
    found: dict[str, set] = {}
    for cluster in planned.clusters:
        for name in cluster.cluster.inputs:
            if planned.region.graph.values[name].kind == "parameter":
                found.setdefault(name, set()).add(cluster.strategy.layouts[name])
    return all(len(layouts) == 1 for layouts in found.values())


def nothing_moves_that_must_stay(planned: PlannedRegion) -> bool:
    for segment in planned.segments:
        moved = [r.value for r in (*segment.leaving, *(r for cluster in segment.clusters for r in cluster.reshards))]
        for mode, _ in segment.modes:
            products = kept_matmuls(planned.region, segment.index) if mode.kind == "selective" else ()
            kept = {name for index in products for name in planned.region.parts[index].outputs}
            if (mode.tiles > 1 and moved) or kept & set(moved):
                return False
    return True


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_runner_up_costs_what_the_changed_plan_costs(case):
    regions, decisions, plan = planned(*case)
    found, now = runners_up(plan), evaluate(plan).step_s
    compared = 0
    for key, region in plan.regions.items():
        for index in range(len(region.clusters)):
            others = list(changed(regions, decisions, plan, key, index))
            if not others:
                assert (key, index) not in found
                continue
            extra = {tuple(letters.items()): evaluate(other).step_s - now for letters, other in others}
            rival = found[key, index]
            assert rival.extra_s == pytest.approx(min(extra.values()), rel=1e-9, abs=1e-12)
            best = [other for letters, other in others if letters == rival.letters]
            assert any(evaluate(other).step_s - now == pytest.approx(rival.extra_s, rel=1e-9, abs=1e-12) for other in best)
            assert any(evaluate(other).peak_bytes == pytest.approx(rival.peak_bytes) for other in best)
            assert rival.fits == (rival.peak_bytes <= plan.machine.hardware.usable_bytes)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("case", [case for case in CASES if case[-1] > 1], ids=str)
def test_with_room_no_runner_up_is_faster(case):
    """The plan is optimal, so no change of one operator alone can beat it by more than the solver's gap."""
    _, _, plan = planned(*case)
    step_s = evaluate(plan).step_s
    assert all(rival.fits and rival.extra_s >= -2e-4 * step_s for rival in runners_up(plan).values())


def test_the_cases_run_every_mode():
    kinds = {mode.kind for case in CASES for region in planned(*case)[2].regions.values() for s in region.segments for mode, _ in s.modes}
    assert kinds == {"keep", "recompute", "selective", "spill", "offload"}
    assert any(m.tiles > 1 for case in CASES for region in planned(*case)[2].regions.values() for s in region.segments for m, _ in s.modes)


def test_one_rank_has_no_other_way():
    regions, decisions, plan = planned("llama", None, 1, None, None, 4.0)
    assert runners_up(plan) == {}


def test_the_letters_of_a_runner_up_differ_from_the_choice():
    _, _, plan = planned("qwen3", "sp2,tp2", 4, 3, None, 4.0)
    for (key, index), rival in runners_up(plan).items():
        cluster = plan.regions[key].clusters[index]
        mine = split_letters(plan, plan.regions[key].region, cluster.cluster, cluster.strategy)
        assert set(rival.letters) == set(plan.mesh) and rival.letters != mine


@functools.cache
def real_plan(usable: float | None = None) -> Plan:
    hardware = H100 if usable is None else with_usable_bytes(H100, usable)
    regions = real("llama3_1b", 32768)
    decisions, _ = solve(regions, Request(4, 1, 1, hardware, 2, force="sp4", zero=3))
    return realize(regions, decisions, Machine(hardware, decisions.axes, 1))


def test_a_runner_up_at_full_size_fits_and_is_no_faster():
    plan = real_plan()
    found = runners_up(plan)
    assert OUTER in {key for key, _ in found} and len(found) > 10
    assert all(rival.fits and rival.extra_s > -1e-9 for rival in found.values())


def test_what_would_not_fit_is_told():
    """With no byte to spare, an operator that runs whole instead of in pieces needs memory that is not there."""
    tight = real_plan(evaluate(real_plan()).peak_bytes * 1.0002)
    assert any(not rival.fits for rival in runners_up(tight).values())
    assert all(rival.fits == (rival.peak_bytes <= tight.machine.hardware.usable_bytes) for rival in runners_up(tight).values())

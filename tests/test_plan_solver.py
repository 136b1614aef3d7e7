"""From a request to decisions: what is refused, what the exact evaluation makes of the solver's answer, and that memory always holds."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_brute_force import BruteForce
from plan_samples import Sketch, real, slow_toy, tiny, with_usable_bytes
from test_plan_problem import best_within, random_graph, small

from seqloom.cost.hardware import load_hardware
from seqloom.errors import UserError
from seqloom.plan.budget import add_storage, has_room
from seqloom.plan.evaluate import Evaluation, evaluate
from seqloom.plan.linear import LinearProgram, OutOfTime
from seqloom.plan.memory import add_memory
from seqloom.plan.modes import HOST, KEEP
from seqloom.plan.placement import R, S
from seqloom.plan.plan import Plan, PlanMismatch, realize
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.request import MAX_AXES, MAX_SPLIT_AXES, Request, candidate_meshes
from seqloom.plan.solver import OFFLOAD_GAIN, Decisions, SolverReport, solve
from seqloom.plan.storage import storages

H100 = load_hardware("h100-80gb")


def request(ranks: int, hardware=H100, **changes) -> Request:
    return Request(**{"ranks": ranks, "dp": 1, "accumulation": 1, "hardware": hardware, "itemsize": 2, **changes})


def planned(regions: Regions, asked: Request) -> tuple[Decisions, Plan, Evaluation, SolverReport]:
    decisions, report = solve(regions, asked)
    return decisions, *evaluated(regions, asked, decisions), report


def evaluated(regions: Regions, asked: Request, decisions: Decisions) -> tuple[Plan, Evaluation]:
    plan = realize(regions, decisions, Machine(asked.hardware, decisions.axes, asked.dp))
    return plan, evaluate(plan)


def kinds_of(decisions: Decisions) -> set[str]:
    """Kinds of the modes that some layer runs."""
    return {mode.kind for segments in decisions.modes.values() for counts in segments for mode, _ in counts}


# --- meshes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12])
def test_candidate_meshes_cover_the_ranks_once_each_with_sum_axes_outside(ranks):
    meshes = list(candidate_meshes(request(ranks)))
    assert len(set(meshes)) == len(meshes)
    for axes in meshes:
        size = 1
        for axis in axes:
            assert axis.size > 1
            size *= axis.size
        assert size == ranks
        roles = [axis.role for axis in axes]
        assert roles == sorted(roles, key=["sum", "split"].index)
        assert roles.count("split") <= MAX_SPLIT_AXES and len(axes) <= MAX_AXES
    wanted = {sizes for n in range(MAX_AXES + 1) for sizes in itertools.product(range(2, ranks + 1), repeat=n) if prod(sizes) == ranks}
    assert {tuple(axis.size for axis in axes) for axes in meshes} == wanted


def test_three_axes_over_whole_nodes_have_a_border_where_nodes_end():
    def sizes(ranks):
        return {tuple(axis.size for axis in axes) for axes in candidate_meshes(request(ranks)) if len(axes) == 3}

    assert sizes(64) == {(2, 4, 8), (4, 2, 8), (8, 2, 4), (8, 4, 2)}
    assert sizes(12) == {(2, 2, 3), (2, 3, 2), (3, 2, 2)}, "a node and a half: any border will do"


def test_split_axes_stay_inside_a_node_and_axes_can_be_limited():
    for axes in candidate_meshes(request(32)):
        assert prod(axis.size for axis in axes if axis.role == "split") <= H100.links[0].ranks_per_group
    assert {len(axes) for axes in candidate_meshes(request(8, most_axes=1))} == {1}
    assert max(sum(a.role == "sum" for a in axes) for axes in candidate_meshes(request(8, sum_axes=1))) == 1


@pytest.mark.parametrize(
    ("force", "axes"),
    [
        ("sp2", [("sp", 2, "sum")]),
        ("tp2,sp2", [("sp", 2, "sum"), ("tp", 2, "split")]),
        ("sp2xtp_sp4", [("sp", 2, "sum"), ("tp_sp", 4, "split")]),
        ("dp2, tp_plain1", [("dp", 2, "sum")]),
    ],
)
def test_a_forced_mesh_has_its_axes_in_storage_order(force, axes):
    ranks = 1
    for _, size, _ in axes:
        ranks *= size
    (mesh,) = candidate_meshes(request(ranks, force=force))
    assert [(axis.force, axis.size, axis.role) for axis in mesh] == axes


@pytest.mark.parametrize("force", ["pp2", "sp", "2", "sp2tp2", "sp0", "sp-2", " ", "sp2,", "SP2", "sp2;tp1", "tp2.0"])
def test_a_force_that_says_nothing_is_refused_with_a_sentence(force):
    with pytest.raises(UserError, match=r"--force .* is not one of dp, sp, cp, tp, tp_plain, tp_sp followed by a size, such as sp2,tp2"):
        list(candidate_meshes(request(2, force=force)))


def test_a_force_of_another_number_of_ranks_is_refused():
    with pytest.raises(UserError, match=r"--force sp2,tp2 makes 4 ranks and plan_ngpus is 8: make them equal"):
        solve(tiny(), request(8, force="sp2,tp2"))


# --- the whole search against brute force, the exact evaluation beside both -----------------------------------------------------------


def reshards_beyond_the_program(plan: Plan) -> float:
    """Seconds that the program leaves out: an outer value that enters a block in the layout that an outer operator wants too."""
    seen = {(name, r.dst) for name, found in plan.entering.items() for r in found}
    reshards = [r for cluster in plan.outer.clusters for r in cluster.reshards if (r.value, r.dst) in seen]
    return sum(r.forward_s + r.backward_s for r in reshards)


@functools.cache
def whole_search(seed: int) -> tuple[Regions, Request, list[tuple[BruteForce, list[np.ndarray]]], random.Random]:
    """A random graph on two or four ranks with every mesh tried out by brute force: per mesh the frontiers of all its storages."""
    rng = random.Random(seed)
    while True:
        regions = build_regions(random_graph(rng))
        hardware = slow_toy(rng.choice([0.03, 0.3, 3.0]))
        asked = request(rng.choice([1, 2, 2, 4]), hardware, dp=rng.choice([1, 2]), accumulation=rng.choice([1, 4]), offload=False, gap=0.0)
        asked = dataclasses.replace(asked, recompute=rng.choice([None, None, True]), most_axes=1)
        brutes = [BruteForce(regions, Machine(hardware, axes, asked.dp), asked) for axes in candidate_meshes(asked)]
        brutes = [brute for brute in brutes if brute.feasible]
        if brutes and all(small(brute) for brute in brutes):
            tried = [(b, [b.frontier(storage) for storage in storages(b.machine, 2, asked.accumulation, None)]) for b in brutes]
            return regions, asked, tried, rng


@pytest.mark.parametrize("seed", range(40))
def test_the_search_over_meshes_and_storages_finds_the_best_of_all(seed):
    """Plenty of memory, and just enough for something slower; the evaluation of the plan is the objective of the program."""
    regions, asked, tried, rng = whole_search(seed)
    rows = np.concatenate([frontier for _, frontiers in tried for frontier in frontiers])
    for peak in (rows[:, 1].max() * 2, int(rng.choice(list(rows[:, 1])) * 1.0001) + 1):
        best = best_within(rows, peak)
        decisions, plan, found, report = planned(regions, dataclasses.replace(asked, hardware=with_usable_bytes(asked.hardware, peak)))
        (brute,) = [b for b, _ in tried if b.machine.axes == decisions.axes]
        seconds, nbytes = brute.of_decisions(decisions)
        assert seconds <= best * (1 + 1e-6) and nbytes <= peak
        assert found.peak_bytes <= nbytes * (1 + 1e-9), "the walk never exceeds the rule"
        micro_batch = found.step_s / asked.accumulation
        assert micro_batch == pytest.approx(seconds + reshards_beyond_the_program(plan), rel=1e-6)
        assert report.status == "optimal" and report.gap <= 1e-6
    too_little = with_usable_bytes(asked.hardware, 0.999 * rows[:, 1].min())
    with pytest.raises(UserError, match="nothing fits"):
        solve(regions, dataclasses.replace(asked, hardware=too_little), lambda *_: "nothing fits")


@pytest.mark.parametrize("seed", range(12))
def test_host_memory_is_taken_only_for_a_hundredth_of_the_step(seed):
    """With it or without, whichever the margin says: never slower than without, and where it is used the step is 1% faster."""
    regions, asked, tried, rng = whole_search(seed)
    peak = int(rng.choice([row[1] for _, frontiers in tried for frontier in frontiers for row in frontier]) * 1.0001) + 1
    hardware = dataclasses.replace(with_usable_bytes(asked.hardware, peak), host_memory_bytes=2**30)
    asked = dataclasses.replace(asked, hardware=hardware)
    without = planned(regions, asked)[2]
    decisions, _, found, _ = planned(regions, dataclasses.replace(asked, offload=True))
    uses_host = bool(kinds_of(decisions) & set(HOST))
    assert found.peak_bytes <= peak and (found.host_bytes > 0) == uses_host
    if uses_host:
        assert found.step_s <= without.step_s * (1 - OFFLOAD_GAIN) * (1 + 1e-6)
    else:
        assert found.step_s == pytest.approx(without.step_s, rel=1e-6)


# --- memory holds --------------------------------------------------------------------------------------------------------------------


MODELS = {
    "llama": (lambda: tiny("llama"), 2),
    "gpt2": (lambda: tiny("gpt2"), 2),
    "gemma2": (lambda: tiny("gemma2", 2), 2),
    "qwen3": (lambda: tiny("qwen3", 2), 2),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_never_exceeds_its_memory(model):
    """Any budget: the plan's exact peak stays under it, and what is refused is less than what some plan fitted into."""
    make, ranks = MODELS[model]
    regions = make()
    widest = planned(regions, request(ranks, with_usable_bytes(H100, 2**50)))[2]
    refused, fitting = [0.0], [widest.peak_bytes]

    @settings(max_examples=8 if model == "llama" else 4, deadline=None, derandomize=True, database=None)
    @given(st.floats(0.05, 1.0), st.sampled_from([None, None, 3, 1, 0]))
    def check(share, zero):
        budget = int(share * widest.peak_bytes)
        try:
            asked = request(ranks, with_usable_bytes(H100, budget), zero=zero)
            found = evaluated(regions, asked, solve(regions, asked, lambda *_: "nothing fits")[0])[1]
        except UserError:
            if zero is None:
                refused.append(budget)
            return
        assert found.peak_bytes <= budget
        fitting.append(budget)

    check()
    assert max(refused) < min(fitting)


def test_a_plan_of_8b_at_128k_fits_whatever_it_is_given():
    regions = real("llama3_8b", 131072)
    for gib in (45, 61):
        hardware = with_usable_bytes(H100, gib * 2**30)
        _, plan, found, _ = planned(regions, request(8, hardware, force="sp8", zero=3))
        assert found.peak_bytes <= gib * 2**30
        assert kinds_of(plan.decisions) - {"keep"}


@pytest.mark.parametrize(("family", "layers"), [("llama", 1), ("llama", 3), ("llama", 12), ("gpt2", 6)])
@pytest.mark.parametrize("dp", [1, 4])
def test_what_fits_under_one_storage_fits_when_the_storage_is_free(family, layers, dp):
    """The least memory of any storage is enough for the whole search: no mesh is left out for what another storage would need."""
    regions, asked = tiny(family, layers), request(2, force="sp2", dp=dp, accumulation=2, offload=False)
    (axes,) = candidate_meshes(asked)
    machine = Machine(H100, axes, dp)
    memory = add_memory(build_problem(regions, machine, asked), 2.0**20)
    programs = [add_storage(memory, storage, leanest=True) for storage in storages(machine, 2, asked.accumulation, None)]
    least = 2.0**20 * min(program.solve(relaxed=False, time_limit=20).objective for program in programs)
    tight = dataclasses.replace(asked, hardware=with_usable_bytes(H100, least * 1.001))
    decisions, _ = solve(regions, tight, lambda *_: "nothing fits")
    assert evaluated(regions, tight, decisions)[1].peak_bytes <= least * 1.001


@pytest.mark.parametrize("share", [0.95, 1.05])
def test_both_passes_together_find_what_each_finds_alone(share):
    """With and without host memory bound each other; the answer is the plan without it unless the other one saves a hundredth."""
    regions = tiny("llama", 4)
    most = planned(regions, request(2, with_usable_bytes(H100, 2**50), zero=3, offload=False))[2].peak_bytes
    asked = request(2, with_usable_bytes(H100, most * share))
    decisions, _, both, _ = planned(regions, asked)
    try:
        plain = planned(regions, dataclasses.replace(asked, offload=False))[2].step_s
    except UserError:
        plain = math.inf
    if kinds_of(decisions) & set(HOST):
        assert both.step_s <= plain * (1 - OFFLOAD_GAIN) * (1 + 1e-9)
    else:
        assert both.step_s == pytest.approx(plain, rel=2 * asked.gap)


@pytest.mark.parametrize(("family", "dp"), [("llama", 1), ("gpt2", 4)])
def test_a_storage_without_room_fits_nothing(family, dp):
    """What is left out before any program is solved has no solution, down to budgets where nothing fits."""
    regions = tiny(family, 3)
    for offload in (False, True):
        asked = request(4, force="sp2,tp2", dp=dp, accumulation=2, offload=offload)
        (axes,) = candidate_meshes(asked)
        problem = build_problem(regions, Machine(H100, axes, dp), asked)
        for storage in storages(problem.machine, 2, asked.accumulation, None):
            least = add_storage(add_memory(problem, 2.0**20), storage, leanest=True).solve(relaxed=True, time_limit=20).objective * 2.0**20
            assert has_room(problem, storage, least)
            assert not has_room(problem, storage, least * 0.05)


def test_a_budget_of_exactly_a_plans_peak_loses_next_to_nothing():
    """The solver leaves a hundred-thousandth of the memory free for its own tolerance, no more."""
    regions = tiny("llama")
    peak = planned(regions, request(2, with_usable_bytes(H100, 2**50), zero=3, force="sp2"))[2].peak_bytes
    assert planned(regions, request(2, with_usable_bytes(H100, peak * 1.0001), zero=3, force="sp2"))[2].peak_bytes <= peak * 1.0001


# --- recompute, ZeRO, one rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recompute_none_and_all_do_what_they_say(family):
    regions = tiny(family)
    none, _, without, _ = planned(regions, request(2, recompute=False))
    every, plan, with_all, _ = planned(regions, request(2, recompute=True))
    assert kinds_of(none) == {"keep"}
    for key, region in regions.parts.items():
        wanted = ["recompute" if segment.recomputable else "keep" for segment in region.segments]
        assert [[mode.kind for mode, _ in counts] for counts in every.modes[key]] == [[kind] for kind in wanted]
    assert without.time["recompute"] == 0 < with_all.time["recompute"]
    assert plan.regions[""].segments[0].modes == ((KEEP, 1),)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_asked_zero_level_is_taken(zero):
    decisions, plan, found, _ = planned(tiny(), request(2, zero=zero, force="sp2"))
    assert decisions.storage.zero == zero == plan.storage.zero
    numel = sum(value.numel for value in tiny().graph.parameters().values())
    assert found.memory["states"] == pytest.approx(12 * numel / (2 if zero else 1))
    kinds = {"all_gather", "reduce_scatter"} if zero else {"all_reduce"}
    assert kinds <= set(found.wire_bytes)


def test_one_rank_has_one_plan_without_traffic():
    decisions, plan, found, report = planned(tiny(), request(1))
    assert decisions.axes == () and plan.mesh == {} and report.status == "optimal"
    assert not found.wire_bytes and found.time["reshard"] == 0
    assert all(layout == () for layout in decisions.slots.values())
    assert not [r for region in plan.regions.values() for c in region.clusters for r in c.reshards]


def test_scale_units_pay_for_their_gradients():
    alone, units = (planned(tiny(), request(1, dp=dp, zero=3)) for dp in (1, 4))
    assert units[2].wire_bytes["reduce_scatter"] > 0 and not alone[2].wire_bytes
    assert units[2].memory["states"] == pytest.approx(alone[2].memory["states"] / 4)


def test_the_same_request_gives_the_same_decisions():
    again = build_regions(tiny("qwen3", 2).graph)
    assert solve(tiny("qwen3", 2), request(2))[0] == solve(again, request(2))[0]


def test_the_report_proves_its_gap():
    _, report = solve(tiny(), request(2))
    assert report.status == "optimal" and 0 <= report.gap <= 1e-4
    assert report.variables > 100 and report.programs >= 4 and report.unlimited_s is not None
    assert [tried.exact for tried in report.alternatives].count(True) == 1
    assert all(tried.exact or tried.reason for tried in report.alternatives)


# --- realize -------------------------------------------------------------------------------------------------------------------------


def test_decisions_of_another_model_do_not_fit():
    decisions, _ = solve(tiny("llama"), request(2, force="sp2"))
    with pytest.raises((PlanMismatch, KeyError)):
        realize(tiny("gpt2"), decisions, Machine(H100, decisions.axes, 1))


def test_decisions_lie_over_other_sizes_and_refuse_those_that_do_not_divide():
    decisions, _ = solve(tiny("llama", batch_size=1, seq_len=16), request(2, force="sp2"))
    longer = realize(tiny("llama", batch_size=1, seq_len=32), decisions, Machine(H100, decisions.axes, 1))
    assert longer.mesh == {"sp": 2}
    with pytest.raises(PlanMismatch, match="no strategy"):
        realize(tiny("llama", batch_size=1, seq_len=17), decisions, Machine(H100, decisions.axes, 1))


def two_blocks_that_share(name: str = "extra") -> Regions:
    """Two different blocks that both read one value from outside, as layers with and without a window share the rotary tables."""
    blocks = []
    outer = Sketch("Model")
    ids = outer.input("ids", (2, 4), torch.int64)
    x = outer.op("aten.embedding.default", outer.parameter("embed", (8, 8)), ids)
    extra = outer.op("aten.silu.default", x, module="extra")
    for kind in ("First", "Second"):
        block = Sketch(kind)
        start, other = block.input("x", (2, 4, 8), grad=True), block.input("other", (2, 4, 8), grad=True)
        made = block.op("aten.mul.Tensor", start, other, module="a")
        blocks.append(block.graph(block.linear(made, 8, "b") if kind == "First" else made))
        x = outer.call(blocks[-1], x, extra, prefix=kind.lower())
    return build_regions(outer.graph(outer.op("aten.sum.default", x, module="loss"), *blocks))


def test_a_value_enters_each_block_in_the_layout_of_that_block():
    regions = two_blocks_that_share()
    decisions, _ = solve(regions, request(2, force="sp2"))
    slots = {**decisions.slots, "First/other": (S(1),), "Second/other": (R,)}
    decisions = dataclasses.replace(decisions, slots=slots)
    plan = realize(regions, decisions, Machine(H100, decisions.axes, 1))
    (value,) = [name for name in plan.entering if name != "ids" and regions.graph.nodes[1].outputs[0] == name]
    made = plan.outer.layouts[value]
    assert {r.dst for r in plan.entering[value]} == {(S(1),), (R,)} - {made}


def test_axes_are_named_for_what_they_split():
    assert planned(tiny(), request(2, force="sp2"))[1].mesh == {"sp": 2}
    assert planned(tiny(), request(2, force="dp2"))[1].mesh == {"dp_shard": 2}
    assert planned(tiny(), request(4, force="tp2,sp2"))[1].mesh == {"sp": 2, "tp": 2}
    assert planned(tiny(batch_size=2), request(4, force="dp2,sp2"))[1].axis_names == ("dp_shard", "sp")


# --- requests without a plan ---------------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_divide_are_named_as_the_cause():
    for force in ("sp5", "dp5", "tp5", "dp4"):  # 16 tokens, 2 sequences, 4 query and 2 key/value heads
        facts = "sequence length 16, batch 2, 4 query heads, 2 key/value heads"
        text = rf"no way to split .* with --force {force}: what is split must divide by .*{facts}; change --seq_len, --micro"
        with pytest.raises(UserError, match=text):
            solve(tiny(), request(int(force[2:]), force=force))


def test_too_little_memory_says_what_binds_by_how_much_and_what_to_do():
    with pytest.raises(UserError) as caught:
        solve(tiny(), request(2, with_usable_bytes(H100, 4096), force="sp2", zero=3))
    text = str(caught.value)
    assert "no plan fits: the leanest one needs" in text and "GiB short" in text
    assert "what would fit: devices of" in text and "(--memory_gib, if yours have more)" in text
    assert "\n" not in text


def test_a_search_out_of_time_is_not_called_impossible(monkeypatch):
    """Only the relaxations are done in time."""
    inside = LinearProgram.solve

    def late(program, *, relaxed, **limits):
        if not relaxed:
            raise OutOfTime
        return inside(program, relaxed=relaxed, **limits)

    monkeypatch.setattr(LinearProgram, "solve", late)
    monkeypatch.setattr(LinearProgram, "integral", lambda *_: False)
    with pytest.raises(UserError, match=r"\d+ of \d+ searches met the limit of 20 s without one; narrow the search with --force"):
        solve(tiny(), request(2))

"""From a request to decisions: what is refused, what the exact evaluation makes of the solver's answer, and that memory always holds."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_brute_force import BruteForce, Combination
from plan_samples import Sketch, real, slow_toy, tiny, with_usable_bytes
from test_plan_problem import random_graph

from seqloom.cost.hardware import load_hardware
from seqloom.errors import UserError
from seqloom.plan import solver
from seqloom.plan.evaluate import Evaluation, evaluate
from seqloom.plan.placement import R, S
from seqloom.plan.plan import Plan, PlanMismatch, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.solver import Decisions, Request, SolverReport, candidate_meshes, solve
from seqloom.plan.storage import group_cost

H100 = load_hardware("h100-80gb")


def request(ranks: int, hardware=H100, **changes) -> Request:
    return Request(**{"ranks": ranks, "dp": 1, "accumulation": 1, "hardware": hardware, "itemsize": 2, **changes})


def planned(regions: Regions, asked: Request) -> tuple[Decisions, Plan, Evaluation, SolverReport]:
    decisions, report = solve(regions, asked)
    plan = realize(regions, decisions, Machine(asked.hardware, decisions.axes, asked.dp))
    return decisions, plan, evaluate(plan), report


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
    pairs = [(a, ranks // a) for a in range(2, ranks) if ranks % a == 0]
    assert {tuple(axis.size for axis in axes) for axes in meshes} == {(ranks,) if ranks > 1 else (), *pairs}


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
    with pytest.raises(UserError, match=r"--force .* is not one of dp, sp, tp, tp_plain, tp_sp followed by a size, such as sp2,tp2"):
        list(candidate_meshes(request(2, force=force)))


def test_a_force_of_another_number_of_ranks_is_refused():
    with pytest.raises(UserError, match=r"--force sp2,tp2 makes 4 ranks and plan_ngpus is 8: make them equal"):
        solve(tiny(), request(8, force="sp2,tp2"))


# --- the exact evaluation beside the solver's objective ------------------------------------------------------------------------------


def combination_of(brute: BruteForce, decisions: Decisions) -> Combination:
    strategy = {
        (key, index): [s.splits for s in brute.options[key, index]].index(splits)
        for key, parts in decisions.splits.items()
        for index, splits in enumerate(parts)
    }
    recompute = {(key, i): flag for key, flags in decisions.recompute.items() for i, flag in enumerate(flags)}
    return Combination(strategy, decisions.slots, recompute)


def reshards_beyond_the_program(plan: Plan) -> float:
    """Seconds that the program leaves out: an outer value that enters a block in the layout that an outer operator wants too is resharded
    once for each."""
    seen = {(name, r.dst) for name, found in plan.entering.items() for r in found}
    reshards = [r for cluster in plan.outer.clusters for r in cluster.reshards if (r.value, r.dst) in seen]
    return sum(r.forward_s + r.backward_s for r in reshards)


def exposed_by_the_program(brute: BruteForce, at: Combination) -> tuple[float, float]:
    """Exposed parameter traffic and optimizer seconds as the program counts them: each parameter pays its own latency."""
    exposed = optimizer = 0.0
    for key, region in brute.regions.parts.items():
        groups = [group_cost(n, brute.machine, brute.storage, key == "") for n in brute._numels(region, at)]
        prices = [brute.prices[key, i][at.strategy[key, i]] for i in range(len(region.parts))]
        for phase in ("forward_s", "backward_s"):
            exposed += region.count * max(0.0, sum(getattr(g, phase) for g in groups) - sum(getattr(p, phase) for p in prices))
        optimizer += region.count * sum(g.optimizer_s for g in groups)
    return exposed, optimizer


@pytest.mark.parametrize("seed", range(20))
def test_evaluation_and_objective_differ_by_named_terms_only(seed):
    rng = random.Random(seed)
    regions = build_regions(random_graph(rng))
    hardware = slow_toy(rng.choice([0.03, 0.3, 3.0]))
    asked = request(rng.choice([2, 4]), hardware, dp=rng.choice([1, 2]), accumulation=rng.choice([1, 4]))
    asked = dataclasses.replace(asked, recompute=rng.choice([None, True]))
    decisions, plan, found, _ = planned(regions, asked)
    brute = BruteForce(regions, plan.machine, plan.storage, asked.recompute)
    at = combination_of(brute, decisions)
    assert found.peak_bytes == pytest.approx(brute.peak_bytes(at), rel=1e-12), "memory is the same sum in both"
    exposed, optimizer = exposed_by_the_program(brute, at)
    a = plan.storage.accumulation
    certain = found.step_s - found.time["parameters_exposed"] - found.time["optimizer"]
    assert certain / a == pytest.approx(brute.seconds(at) - exposed - optimizer + reshards_beyond_the_program(plan), rel=1e-5)
    assert found.time["parameters_exposed"] / a <= exposed * (1 + 1e-9), "one collective a group, and recomputing hides traffic too"
    assert found.time["optimizer"] / a <= optimizer * (1 + 1e-9)


# --- memory holds --------------------------------------------------------------------------------------------------------------------


MODELS = {
    "llama": (lambda: tiny("llama"), 2),
    "gpt2": (lambda: tiny("gpt2"), 2),
    "gemma2": (lambda: tiny("gemma2", 2), 2),
    "qwen3": (lambda: tiny("qwen3", 2), 2),
    "llama3_1b": (lambda: real("llama3_1b", 32768), 2),
}


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_never_exceeds_its_memory(model, monkeypatch):
    """Any budget: the plan's exact peak stays under it, and what is refused is less than what some plan fitted into."""
    monkeypatch.setattr(solver, "_why_nothing_fits", lambda *_: "nothing fits")
    make, ranks = MODELS[model]
    regions = make()
    widest = planned(regions, request(ranks, with_usable_bytes(H100, 2**50)))[2]
    refused, fitting = [0.0], [widest.peak_bytes]

    @settings(max_examples=8 if model == "llama" else 4, deadline=None, derandomize=True, database=None)
    @given(st.floats(0.05, 1.0), st.sampled_from([None, None, 3, 1, 0]))
    def check(share, zero):
        budget = int(share * widest.peak_bytes)
        try:
            found = planned(regions, request(ranks, with_usable_bytes(H100, budget), zero=zero))[2]
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
    for gib in (50, 61):
        hardware = with_usable_bytes(H100, gib * 2**30)
        _, plan, found, _ = planned(regions, request(8, hardware, force="sp8", zero=3))
        assert found.peak_bytes <= gib * 2**30
        assert any(plan.decisions.recompute["LlamaDecoderLayer"])


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
    assert not any(flag for flags in none.recompute.values() for flag in flags)
    for key, region in regions.parts.items():
        assert list(every.recompute[key]) == [segment.recomputable for segment in region.segments]
    assert without.time["recompute"] == 0 < with_all.time["recompute"]
    assert plan.regions[""].segments[0].recompute is False


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_the_asked_zero_level_is_taken(zero):
    decisions, plan, found, _ = planned(tiny(), request(2, zero=zero, force="sp2"))
    assert decisions.storage.zero == zero == plan.storage.zero
    numel = sum(value.numel for value in tiny().graph.parameters().values())
    assert found.memory["states"] == pytest.approx(12 * numel / (2 if zero else 1))
    kinds = {0: {"all_reduce"}, 1: {"all_gather", "reduce_scatter"}, 3: {"all_gather", "reduce_scatter"}}[zero]
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
    assert report.variables > 100 and report.programs == 6


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
    for force in ("sp5", "dp5", "tp5", "sp4"):  # 16 tokens, 2 sequences, 4 query and 2 key/value heads
        facts = "sequence length 16, batch 2, 4 query heads, 2 key/value heads"
        text = rf"no way to split .* with --force {force}: what is split must divide by .*{facts}; change --seq_len, --micro"
        with pytest.raises(UserError, match=text):
            solve(tiny(), request(int(force[2:]), force=force))


def test_too_little_memory_says_what_binds_by_how_much_and_what_to_do():
    with pytest.raises(UserError) as caught:
        solve(tiny(), request(2, with_usable_bytes(H100, 4096), force="sp2", zero=3))
    text = str(caught.value)
    assert "no plan fits: the leanest one needs" in text and "GiB short" in text
    assert "use devices with more memory or a shorter --seq_len, or raise --memory_gib" in text
    assert "\n" not in text


def test_a_search_out_of_time_is_not_called_impossible(monkeypatch):
    from seqloom.plan import solver
    from seqloom.plan.linear import OutOfTime

    def late(*_):
        raise OutOfTime

    monkeypatch.setattr(solver, "_solve_one", late)
    with pytest.raises(UserError, match="6 of 6 searches met the limit of 20 s without one; narrow the search with --force"):
        solve(tiny(), request(2))

"""Sense: better machines never predict slower plans, and the plans that people know come out where people would choose them."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_samples import real, scaled, tiny, with_usable_bytes

from seqloom.cost.hardware import GIB, Hardware, load_hardware
from seqloom.errors import UserError
from seqloom.plan import solver
from seqloom.plan.evaluate import Evaluation, evaluate
from seqloom.plan.labels import ATTENTION
from seqloom.plan.placement import S
from seqloom.plan.plan import Plan, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import Regions
from seqloom.plan.solver import Decisions, Request, SolverReport, solve

H100 = load_hardware("h100-80gb")


def request(ranks: int, hardware: Hardware = H100, **changes) -> Request:
    return Request(**{"ranks": ranks, "dp": 1, "accumulation": 1, "hardware": hardware, "itemsize": 2, **changes})


def planned(regions: Regions, asked: Request) -> tuple[Decisions, Plan, Evaluation, SolverReport]:
    decisions, report = solve(regions, asked)
    plan = realize(regions, decisions, Machine(asked.hardware, decisions.axes, asked.dp))
    return decisions, plan, evaluate(plan), report


def objective(regions: Regions, asked: Request) -> float:
    """Seconds of the solver's best plan by its own objective (infinite where nothing fits)."""
    best = float("inf")
    for axes in solver.candidate_meshes(asked):
        problem = solver._problem(regions, asked, axes, 3, asked.budget_bytes)
        found = problem.program.solve(relaxed=False, time_limit=20) if problem.feasible else None
        best = min(best, found.objective if found else float("inf"))
    return best


# --- more is never slower ------------------------------------------------------------------------------------------------------------

factors = st.floats(1.0, 16.0)
MODELS = {"llama": (lambda: tiny("llama", 2), 2), "gpt2": (lambda: tiny("gpt2", 2), 2), "llama3_1b": (lambda: real("llama3_1b", 32768), 2)}


@pytest.mark.parametrize("model", MODELS)
def test_a_better_machine_never_predicts_a_slower_plan(model):
    make, ranks = MODELS[model]
    regions, base = make(), objective(make(), request(ranks, scaled()))

    @settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(["links", "arithmetic", "bandwidth"]), factors)
    def check(part, factor):
        assert objective(regions, request(ranks, scaled(**{part: factor}))) <= base * (1 + 2e-4)
        assert objective(regions, request(ranks, scaled(**{part: 1 / factor}))) >= base * (1 - 2e-4)

    check()


@pytest.mark.parametrize(("model", "floor"), [("llama", 0.3), ("llama3_1b", 0.4)])
def test_more_memory_never_predicts_a_slower_plan(model, floor):
    make, ranks = MODELS[model]
    regions = make()
    peak = planned(regions, request(ranks, with_usable_bytes(H100, 2**50), zero=3))[2].peak_bytes
    spent = [objective(regions, request(ranks, with_usable_bytes(H100, peak * share))) for share in (floor, 0.6, 0.8, 0.95, 1.01, 4.0)]
    assert all(more <= less * (1 + 2e-4) for less, more in zip(spent, spent[1:], strict=False)), spent
    assert spent[-1] < float("inf")


# --- plans that people know ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_8b():
    return planned(real("llama3_8b", 131072), request(8))


def test_8b_at_128k_on_8_h100_splits_the_sequence_and_shards_the_storage(long_8b):
    decisions, plan, found, report = long_8b
    assert dict(plan.mesh) == {"sp": 8} and decisions.storage.zero == 3
    assert found.step_s <= 5.3 and found.peak_bytes < 74 * GIB
    assert report.status == "optimal" and report.gap <= 1e-4


def test_8b_at_128k_goes_through_all_to_all_and_never_recomputes_attention(long_8b):
    decisions, plan, found, _ = long_8b
    layer = plan.regions["LlamaDecoderLayer"]
    for segment in layer.segments:
        for cluster in segment.clusters:
            if cluster.cluster.nodes[0].op == ATTENTION:
                assert not segment.recompute
                assert all(cluster.strategy.layouts[name] == (S(1),) for name in cluster.cluster.inputs), "split by heads"
                assert [(r.src, r.dst) for r in cluster.reshards] == [((S(2),), (S(1),))] * 3
    assert found.wire_bytes["all_to_all"] > 0
    assert found.time["reshard"] < 0.03 * found.step_s


def test_8b_at_128k_keeps_what_80_gb_can_keep(long_8b):
    """Recomputing everything, as published, is not the plan; with twice the memory little is recomputed and the step is faster."""
    _, plan, found, _ = long_8b
    assert not all(segment.recompute for segment in plan.regions["LlamaDecoderLayer"].segments if segment.segment.recomputable)
    wide = planned(real("llama3_8b", 131072), request(8, load_hardware("h200-141gb"), force="sp8", zero=3))[2]
    assert wide.time["recompute"] < 0.02 * wide.step_s and wide.step_s < found.step_s


def test_a_short_batch_of_8_is_split_by_sequences():
    _, plan, found, _ = planned(real("llama3_1b", 512, 8), request(8, zero=3))
    assert "dp_shard" in plan.mesh, plan.mesh
    assert found.wire_bytes.get("all_to_all", 0) == 0


def test_slow_links_and_one_sequence_still_prefer_splitting_long_sequences():
    _, plan, _, _ = planned(real("llama3_1b", 32768), request(2))
    assert dict(plan.mesh) == {"sp": 2}


def test_an_impossible_request_is_one_sentence_with_the_cure():
    regions = real("llama3_8b", 1048576)
    with pytest.raises(UserError) as caught:
        solve(regions, request(1, H100.with_memory_gib(24), zero=3))
    text = str(caught.value)
    assert text.startswith("no plan fits: the leanest one needs ") and "\n" not in text
    assert "leaves 22.4 GiB after its margin" in text and "GiB short" in text
    assert "use devices with more memory or a shorter --seq_len, or raise --memory_gib" in text


def test_the_number_of_ranks_that_a_refusal_names_does_fit():
    regions, hardware = real("llama3_1b", 32768), H100.with_memory_gib(20)
    with pytest.raises(UserError, match=r"GiB short; use --plan_ngpus \d+, or raise --memory_gib") as caught:
        solve(regions, request(1, hardware))
    ranks = int(re.search(r"--plan_ngpus (\d+)", str(caught.value))[1])
    _, _, found, _ = planned(regions, request(ranks, hardware, zero=3))
    assert found.peak_bytes <= hardware.usable_bytes

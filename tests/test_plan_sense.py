"""Sense: better machines never predict slower plans, and the plans that people know come out where people would choose them."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_samples import real, scaled, tiny, with_usable_bytes

from seqloom.capture.documents import PLAIN
from seqloom.cost.hardware import GIB, Hardware, load_hardware
from seqloom.errors import UserError
from seqloom.plan.evaluate import Evaluation, evaluate
from seqloom.plan.placement import S
from seqloom.plan.plan import Plan, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import Regions
from seqloom.plan.request import Request
from seqloom.plan.solver import Decisions, SolverReport, solve

H100 = load_hardware("h100-80gb")


def request(ranks: int, hardware: Hardware = H100, **changes) -> Request:
    return Request(**{"ranks": ranks, "dp": 1, "accumulation": 1, "hardware": hardware, "itemsize": 2, **changes})


def planned(regions: Regions, asked: Request) -> tuple[Decisions, Plan, Evaluation, SolverReport]:
    decisions, report = solve(regions, asked)
    plan = realize(regions, decisions, Machine(asked.hardware, decisions.axes, asked.dp))
    return decisions, plan, evaluate(plan), report


def objective(regions: Regions, asked: Request) -> float:
    """Seconds of a step of the solver's best plan (infinite where nothing fits)."""
    try:
        decisions, _ = solve(regions, asked, lambda *_: "nothing fits")
    except UserError:
        return float("inf")
    return evaluate(realize(regions, decisions, Machine(asked.hardware, decisions.axes, asked.dp))).step_s


def modes_of(decisions: Decisions) -> set[str]:
    return {mode.kind for counts in decisions.modes["LlamaDecoderLayer"] for mode, _ in counts}


# --- more is never slower ------------------------------------------------------------------------------------------------------------

factors = st.floats(1.0, 16.0)
MODELS = {"llama": (lambda: tiny("llama", 2), 2), "gpt2": (lambda: tiny("gpt2", 2), 2)}


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


@pytest.mark.parametrize(("model", "floor"), [("llama", 0.3), ("gpt2", 0.4)])
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
    return planned(real("llama3_8b", 131072), request(8, most_axes=1))


def test_8b_at_128k_on_8_h100_splits_the_sequence_and_shards_the_storage(long_8b):
    decisions, plan, found, report = long_8b
    assert dict(plan.mesh) == {"sp": 8} and decisions.storage.zero == 3
    assert found.step_s <= 5.3 and found.peak_bytes < 74 * GIB
    assert report.status == "optimal" and report.gap <= 1e-4


def test_8b_at_128k_goes_through_all_to_all_and_never_recomputes_attention(long_8b):
    _, plan, found, _ = long_8b
    layer = plan.regions["LlamaDecoderLayer"]
    (segment,) = [s for s in layer.segments if any(c.cluster.nodes[0].op == PLAIN for c in s.clusters)]
    (attention,) = [c for c in segment.clusters if c.cluster.nodes[0].op == PLAIN]
    assert {mode.kind for mode, _ in segment.modes} <= {"keep", "offload"}
    assert all(attention.strategy.layouts[name] == (S(1),) for name in attention.cluster.inputs), "split by heads"
    assert [(r.src, r.dst) for r in attention.reshards] == [((S(2),), (S(1),))] * 3
    assert found.wire_bytes["all_to_all"] > 0
    assert found.time["reshard"] < 0.03 * found.step_s and found.time["recompute"] < 0.05 * found.step_s


def test_8b_at_8k_with_a_batch_of_8_is_split_by_sequences():
    decisions, plan, found, _ = planned(real("llama3_8b", 8192, 8), request(8, most_axes=1))
    assert dict(plan.mesh) == {"dp_shard": 8} and decisions.storage.zero == 3
    assert found.wire_bytes.get("all_to_all", 0) == 0 == found.time["reshard"]


def test_8b_at_1m_recomputes_or_offloads_and_fits():
    decisions, plan, found, _ = planned(real("llama3_8b", 1048576), request(8, force="sp8"))
    assert dict(plan.mesh) == {"sp": 8} and found.peak_bytes <= 74 * GIB
    assert modes_of(decisions) & {"recompute", "spill", "offload", "selective"}
    assert found.host_bytes <= H100.host_memory_bytes


def test_16_ranks_and_8_key_value_heads_have_a_plan_whose_attention_uses_all_ranks():
    _, plan, found, _ = planned(real("llama3_8b", 131072), request(16, force="sp8,sp2"))
    layer = plan.regions["LlamaDecoderLayer"]
    (attention,) = [c for c in layer.clusters if c.cluster.nodes[0].op == PLAIN]
    assert all(attention.strategy.splits), attention.strategy.splits
    assert found.peak_bytes <= H100.usable_bytes


def test_one_80_gb_gpu_at_128k_says_that_weights_and_optimizer_state_are_too_large():
    with pytest.raises(
        UserError, match=r"weights and optimizer state alone take 89\.7 GiB; what would fit: --plan_ngpus \d+ or devices of"
    ):
        solve(real("llama3_8b", 131072), request(1))


def test_slow_links_and_one_sequence_still_prefer_splitting_long_sequences():
    _, plan, _, _ = planned(real("llama3_1b", 32768), request(2))
    assert dict(plan.mesh) == {"sp": 2}


def test_an_impossible_request_is_one_sentence_with_the_cure():
    regions = real("llama3_8b", 1048576)
    with pytest.raises(UserError) as caught:
        solve(regions, request(1, H100.with_memory_gib(24), zero=3, offload=False, recompute=True))
    text = str(caught.value)
    assert text.startswith("no plan fits: the leanest one needs ") and "\n" not in text
    assert "leaves 22.4 GiB after its margin" in text and "GiB short" in text
    assert "what would fit: devices of " in text and "no shorter --seq_len helps" in text


def test_the_number_of_ranks_that_a_refusal_names_does_fit():
    regions, hardware = tiny("llama", 3), with_usable_bytes(H100, 200 * 1024)
    with pytest.raises(UserError, match=r"GiB short; .* what would fit: --plan_ngpus \d+ or devices of") as caught:
        solve(regions, request(1, hardware))
    ranks = int(re.search(r"--plan_ngpus (\d+)", str(caught.value))[1])
    _, _, found, _ = planned(regions, request(ranks, hardware, zero=3, force=f"tp{ranks}"))  # one of them does; which is best takes longer
    assert found.peak_bytes <= hardware.usable_bytes

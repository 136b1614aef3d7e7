"""`plan.json`: every field of the contract, figures that add up, and decisions that come back as they were."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import tiny

from seqloom.cost.hardware import load_hardware
from seqloom.cost.mfu import mfu
from seqloom.errors import UserError
from seqloom.plan.document import decisions_document, layout_text, parse_decisions, parse_layout, plan_document
from seqloom.plan.evaluate import GIB, evaluate
from seqloom.plan.modes import KEEP, OFFLOAD, RECOMPUTE, SELECTIVE, TILES, Mode
from seqloom.plan.placement import B, P, R, S
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.request import Request
from seqloom.plan.solver import Decisions, solve
from seqloom.plan.space import Axis
from seqloom.plan.storage import Storage

H100 = load_hardware("h100-80gb")
KINDS = ("keep", "selective", "recompute", "spill", "offload")
TIMINGS = {"capture": 1.0, "plan": 2.0, "emit": 0.5}


@functools.cache
def document(
    family: str = "llama", force: str | None = "sp2", ranks: int = 2, accumulation: int = 1, recompute: bool | None = None
) -> dict:
    regions = tiny(family, 2)
    asked = Request(ranks, 1, accumulation, H100, 2, force=force, recompute=recompute)
    decisions, report = solve(regions, asked)
    plan = realize(regions, decisions, Machine(H100, decisions.axes, 1))
    return plan_document(plan, evaluate(plan), report, TIMINGS)


CASES = [("llama", "sp2", 2), ("gpt2", "tp2", 2), ("gemma2", None, 2), ("qwen3", "sp2,tp2", 4), ("llama", None, 1)]


@pytest.mark.parametrize(("family", "force", "ranks"), CASES)
def test_the_document_has_every_field_of_the_contract(family, force, ranks):
    found = document(family, force, ranks)
    assert {"mesh", "hardware", "seq_len", "step_time_s", "tokens_per_s_per_gpu", "mfu_causal", "mfu_full"} <= set(found)
    assert {"peak_memory_gib", "comm_bytes", "blocks", "segments", "solver", "timings"} <= set(found)
    assert {"storage", "host_memory_gib", "alternatives", "binding", "timeline", "memory_timeline", "decisions"} <= set(found)
    assert set(found["solver"]) >= {"status", "gap", "seconds", "variables", "programs"}
    assert found["timings"] == TIMINGS
    assert found["hardware"] == "h100-80gb" and found["seq_len"] == 16 and found["micro_batch_size"] == 2
    for rows in found["segments"].values():
        for counts in rows.values():
            assert set(counts) == {*KINDS, "tiles", "kept"} and sum(counts[kind] for kind in KINDS) in (1, 2)
            assert counts["tiles"] in (1, *TILES) and bool(counts["kept"]) == (counts["selective"] > 0)


@pytest.mark.parametrize(("family", "force", "ranks"), CASES)
def test_every_operator_of_the_model_has_its_row(family, force, ranks):
    found = document(family, force, ranks)
    for key, region in tiny(family, 2).parts.items():
        rows = [row for row in found["blocks"][key or "model"] if "operator" in row]
        assert [op for row in rows for op in row["ops"]] == [node.op for part in region.parts for node in part.nodes]
        for row, part in zip(rows, region.parts, strict=True):
            assert set(row["strategy"]) == set(found["mesh"])
            assert set(row["placements"]) == {*part.inputs, *part.outputs}
            assert all(len(parse_layout(text)) == len(found["mesh"]) for text in row["placements"].values())
            assert row["forward_s"] > 0 and row["backward_s"] >= 0
            assert set(row) >= {"constants", "segment", "runner_up"}
        for row in found["blocks"][key or "model"]:
            assert "operator" in row or {"reshard", "from", "to", "forward_s", "backward_s"} == set(row)


@pytest.mark.parametrize(("family", "force", "ranks"), CASES)
def test_the_document_is_json_and_its_figures_add_up(family, force, ranks):
    found = document(family, force, ranks)
    assert json.loads(json.dumps(found)) == found
    memory = dict(found["peak_memory_gib"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert found["step_time_s"] == pytest.approx(sum(found["time_s"].values()))
    assert found["tokens_per_s_per_gpu"] == pytest.approx(32 / found["step_time_s"] / ranks)
    assert 0 < found["mfu_causal"] < found["mfu_full"] < 1
    assert all(count > 0 for count in found["comm_bytes"].values())
    assert found["memory_limit_gib"] == H100.usable_bytes / GIB


def test_sums_over_rows_are_the_step():
    """Every second of the step is in a row, in parameters or in the optimizer."""
    found = document("llama", "sp2", 2, recompute=False)
    rows = [(2 if key != "model" else 1, row) for key, region in found["blocks"].items() for row in region]
    time = found["time_s"]
    assert sum(n * r["forward_s"] for n, r in rows if "operator" in r) == pytest.approx(time["forward"])
    assert sum(n * r["backward_s"] for n, r in rows if "operator" in r) == pytest.approx(time["backward"])
    assert sum(n * (r["forward_s"] + r["backward_s"]) for n, r in rows if "reshard" in r) == pytest.approx(time["reshard"])


def test_accumulation_repeats_the_micro_batch_and_not_the_optimizer():
    one, four = document(accumulation=1, recompute=False), document(accumulation=4, recompute=False)
    assert four["time_s"]["forward"] == pytest.approx(4 * one["time_s"]["forward"])
    assert four["time_s"]["optimizer"] <= one["time_s"]["optimizer"] * (1 + 1e-9)
    assert four["grad_accumulation_steps"] == 4 and one["time_s"]["reshard"] > 0
    assert four["time_s"]["reshard"] == pytest.approx(4 * one["time_s"]["reshard"])


def test_mfu_counts_the_models_flops():
    found = document("llama", "sp2", 2)
    region = tiny("llama", 2)
    weights = sum(v.numel for n, v in region.graph.parameters().items() if "norm" not in n and "embed" not in n)
    full = 2.0 * weights * 32 + 4.0 * 2 * 32 * 16**2 * 2  # 2 layers, 4 heads of 8, 2 sequences of 16 tokens
    expected = mfu(full, 1, found["step_time_s"], 2, H100.peak_flops["bfloat16"])
    assert found["mfu_full"] == pytest.approx(expected, rel=0.01)


# --- round trips ---------------------------------------------------------------------------------------------------------------------

placements = st.one_of(st.sampled_from([R, B, P]), st.integers(0, 12).map(S))
layouts = st.lists(placements, max_size=3).map(tuple)
names = st.text("abcl_/*123", min_size=1, max_size=12)
constants = st.dictionaries(names, st.integers(1, 65536), max_size=2).map(lambda found: tuple(found.items()))
modes = st.one_of(
    st.sampled_from([KEEP, SELECTIVE, RECOMPUTE, OFFLOAD]), st.builds(Mode, st.sampled_from(["recompute", "spill"]), st.sampled_from(TILES))
)
counts = st.lists(st.tuples(modes, st.integers(1, 126)), max_size=4).map(tuple)


@given(layouts)
def test_layouts_are_read_back(layout):
    assert parse_layout(layout_text(layout)) == layout


@given(
    st.builds(
        Decisions,
        axes=st.lists(st.builds(Axis, st.integers(2, 8), st.sampled_from(["sum", "split"])), max_size=2).map(tuple),
        dp=st.integers(1, 64),
        storage=st.builds(
            Storage, st.sampled_from([0, 1, 2, 3]), st.sampled_from([2, 4]), st.integers(1, 8), st.sets(st.integers(-1, 2)).map(tuple)
        ),
        splits=st.dictionaries(names, st.lists(st.lists(st.sampled_from(["", "b", "*1"]), max_size=2).map(tuple), max_size=3).map(tuple)),
        constants=st.dictionaries(names, st.lists(constants, max_size=3).map(tuple)),
        modes=st.dictionaries(names, st.lists(counts, max_size=3).map(tuple)),
        slots=st.dictionaries(names, layouts),
    )
)
def test_decisions_are_read_back_through_json(decisions):
    assert parse_decisions(json.loads(json.dumps(decisions_document(decisions)))) == decisions


@pytest.mark.parametrize(("family", "force", "ranks"), CASES)
def test_the_decisions_of_a_document_make_the_same_plan(family, force, ranks):
    found = document(family, force, ranks)
    decisions = parse_decisions(json.loads(json.dumps(found))["decisions"])
    plan = realize(tiny(family, 2), decisions, Machine(H100, decisions.axes, 1))
    assert evaluate(plan).step_s == found["step_time_s"]
    assert dict(plan.mesh) == found["mesh"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("slots"),
        lambda d: d.update(axes=[{"size": 2}]),
        lambda d: d.update(storage={"zero": 3}),
        lambda d: d.pop("constants"),
        lambda d: d.update(modes={"Block": [["keep", 2]]}),
        lambda d: d.update(slots={"x": "Q"}),
        lambda d: d.update(splits=7),
        lambda d: d.update(slots=["x"]),
    ],
)
def test_damaged_decisions_are_one_sentence(damage):
    broken = json.loads(json.dumps(document()["decisions"]))
    damage(broken)
    with pytest.raises(UserError, match="plan.json .*: compile again") as caught:
        parse_decisions(broken)
    assert "\n" not in str(caught.value)

"""The search space: every strategy is a legal layout of its cluster, axes keep their roles, and a forced axis does what its name says."""

from __future__ import annotations

import itertools
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import tiny

from seqloom.capture.documents import PLAIN
from seqloom.cost.hardware import load_hardware
from seqloom.errors import UserError
from seqloom.plan.clusters import Cluster
from seqloom.plan.placement import B, P, S, divides
from seqloom.plan.plan import Plan, realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import Region
from seqloom.plan.request import Request
from seqloom.plan.solver import solve
from seqloom.plan.space import Axis, parse_force, strategies

H100 = load_hardware("h100-80gb")
FAMILIES = ["llama", "llama_tied", "qwen3", "gpt2", "gemma2"]


# --- strategies --------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.builds(Axis, st.sampled_from([2, 3, 4, 8]), st.sampled_from(["sum", "split"])), min_size=0, max_size=2),
    st.integers(0, 10**6),
)
def test_every_strategy_is_a_legal_layout(family, axes, pick):
    regions = tiny(family, 2)
    sizes = tuple(axis.size for axis in axes)
    parts = [(region, part) for region in regions.parts.values() for part in region.parts]
    region, part = parts[pick % len(parts)]
    graph = region.graph
    found = strategies(graph, part, region.labels, axes)
    assert len({s.splits for s in found}) == len(found)
    for strategy in found:
        assert set(strategy.layouts) == set(part.values)
        for name, layout in strategy.layouts.items():
            value = graph.values[name]
            assert divides(value.shape, layout, sizes)
            for axis, placement, split in zip(axes, layout, strategy.splits, strict=True):
                if axis.role == "sum" and value.kind == "parameter":
                    assert placement == B, "on a sum axis every gradient is a sum"
                if placement == P:
                    assert name in part.outputs, "partial sums are made, never asked for"
                if not split:
                    assert placement.kind == "R"
                if placement == B:
                    assert value.requires_grad
        assert strategy.label() == "/".join(s or "-" for s in strategy.splits)


@pytest.mark.parametrize("family", FAMILIES)
def test_strategies_of_a_mesh_are_the_products_over_its_axes(family):
    """What two axes may do together is what each may do alone, less what does not divide."""
    for region in tiny(family, 2).parts.values():
        for part in region.parts:
            one = [s.splits[0] for s in strategies(region.graph, part, region.labels, (Axis(2, "split"),))]
            two = {s.splits for s in strategies(region.graph, part, region.labels, (Axis(2, "split"), Axis(2, "split")))}
            nested = {option.name: option.after for option in part.classes if option.after}
            plain = {pair for pair in two if not nested.keys() & set(pair)}
            assert plain <= set(itertools.product(one, one))
            assert all(pair[1] in nested and pair[0] in nested[pair[1]] for pair in two - plain), "a nested class only behind its outer one"
            assert {pair for pair in itertools.product(one, one) if pair[0] != pair[1]} <= two


def attention_of(family: str) -> tuple[Region, Cluster]:
    (region,) = [region for key, region in tiny(family, 2).parts.items() if key]
    (attention,) = [part for part in region.parts if part.nodes[0].op == PLAIN]
    return region, attention


def test_a_dimension_is_not_cut_finer_than_its_name_allows():
    """Two key/value heads: attention may be split by them in two, not in four, on one axis or on two."""
    region, attention = attention_of("llama")

    def heads(*sizes: int) -> int:
        found = strategies(region.graph, attention, region.labels, tuple(Axis(n, "sum") for n in sizes))
        letters = [[region.labels[n][p.dim] for n, lay in s.layouts.items() for p in lay if p.kind == "S"] for s in found]
        return sum(all(letter in ("h", "k") for letter in found) and len(found) == 4 * len(sizes) for found in letters)

    assert heads(2) == 1 and heads(4) == 0 and heads(2, 2) == 0


@pytest.mark.parametrize(
    ("sizes", "allowed"),
    [((2,), False), ((4,), False), ((2, 2), True), ((2, 4), False), ((2, 2, 2), True), ((4, 2), False)],
)
def test_query_heads_of_one_key_value_head_are_split_only_where_these_are_split_down_to_one(sizes, allowed):
    """4 query and 2 key/value heads: `k` on an axis of 2, then `g`, the two query heads of each, on another of 2 inside it."""
    region, attention = attention_of("llama")
    found = strategies(region.graph, attention, region.labels, tuple(Axis(n, "sum") for n in sizes))
    inner = [s for s in found if "g" in s.splits]
    assert bool(inner) == allowed
    query, key, value = attention.nodes[0].inputs
    for strategy in inner:
        outer, place = strategy.splits.index("k"), strategy.splits.index("g")
        assert outer < place and sizes[outer] == 2 and sizes[place] == 2
        assert strategy.layouts[query][place] == S(1) == strategy.layouts[attention.outputs[0]][place]
        assert strategy.layouts[key][place] == strategy.layouts[value][place] == B, "both ranks use the same key/value head"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3), st.sampled_from(["llama", "qwen3", "gpt2"]))
def test_a_nested_split_never_comes_before_its_outer_one(sizes, family):
    """On any mesh: wherever `g` is split, the sizes of the axes before it that split `k` multiply to the number of key/value heads."""
    region, attention = attention_of(family)
    kv_heads = region.graph.values[attention.nodes[0].inputs[1]].shape[1]
    after = {option.name: option.after for option in attention.classes if option.after}
    for strategy in strategies(region.graph, attention, region.labels, tuple(Axis(n, "sum") for n in sizes)):
        for place, split in enumerate(strategy.splits):
            if split in after:
                before = prod(n for n, s in zip(sizes[:place], strategy.splits, strict=False) if s in after[split])
                assert before == kv_heads


# --- words ---------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["dp", "sp", "cp", "tp", "tp_plain", "tp_sp"]), st.integers(1, 64)), min_size=1, max_size=3))
def test_force_texts_are_read_back(parts):
    assert parse_force(",".join(f"{kind}{size}" for kind, size in parts)) == parts
    assert parse_force("x".join(f"{kind}{size}" for kind, size in parts)) == parts


@given(st.text(alphabet="cdstp_x,0123456789 -", max_size=8))
def test_any_other_force_text_is_one_sentence(text):
    try:
        found = parse_force(text)
    except UserError as error:
        assert "--force" in str(error) and "such as sp2,tp2" in str(error) and "\n" not in str(error)
    else:
        assert found and all(size >= 1 for _, size in found)


# --- forced axes -----------------------------------------------------------------------------------------------------------------


def forced(family: str, force: str, ranks: int = 2) -> Plan:
    regions = tiny(family, 2)
    decisions, _ = solve(regions, Request(ranks, 1, 1, H100, 2, force=force, zero=3))
    return realize(regions, decisions, Machine(H100, decisions.axes, 1))


def letters(region: Region, layouts, names, axis: int = 0) -> set[str]:
    """What an axis splits of some values: letters, "R", "B" or "P"."""
    found = set()
    for name in names:
        placement = layouts[name][axis]
        found.add(region.labels[name][placement.dim] if placement.kind == "S" else placement.kind)
    return found


def rows(plan: Plan, axis: int = 0):
    """(region key, cluster, what its weights do, what its outputs do) of every cluster."""
    for key, planned in plan.regions.items():
        graph = planned.region.graph
        for cluster in planned.clusters:
            weights = [n for n in cluster.cluster.inputs if graph.values[n].kind == "parameter"]
            layouts = cluster.strategy.layouts
            yield (
                key,
                cluster.cluster,
                {layouts[n][axis].kind for n in weights},
                letters(planned.region, layouts, cluster.cluster.outputs, axis),
            )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_forced_dp_splits_the_batch_everywhere(family):
    plan = forced(family, "dp2")
    for _, cluster, weights, outputs in rows(plan):
        assert weights <= {"B"}
        if cluster.nodes[-1].op != "aten.sum.default":
            assert outputs <= {"b", "R"} and ("b" in outputs or not any("b" in o.name for o in cluster.classes) or weights == set())
    assert not [r for region in plan.regions.values() for c in region.clusters for r in c.reshards if r.forward_s]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(("force", "ranks", "attention"), [("sp2", 2, {"h", "k"}), ("sp16", 16, {"l"}), ("cp2", 2, {"l"})])
def test_forced_sp_and_cp_split_the_sequence_of_every_linear(family, force, ranks, attention):
    """Attention is split by heads under `sp` (by query positions where no heads divide), by query positions under `cp`."""
    seen = 0
    for _, cluster, weights, outputs in rows(forced(family, force, ranks)):
        assert weights <= {"B"}
        if cluster.nodes[0].op == PLAIN:
            assert outputs and outputs <= attention
            seen += 1
        elif weights:
            assert outputs == {"l"}, cluster.name
    assert seen


def test_forced_cp_gathers_keys_and_values_and_no_queries():
    """Each rank's queries stay; its attention is told where they start and reads all keys and values."""
    planned = forced("llama", "cp2").regions["LlamaDecoderLayer"]
    (attention,) = [c for c in planned.clusters if c.cluster.nodes[0].op == PLAIN]
    query, key, value = attention.cluster.nodes[0].inputs
    assert attention.strategy.layouts[query] == (S(2),)
    assert attention.strategy.layouts[key] == attention.strategy.layouts[value] == (B,), "every rank's use adds to their gradients"
    assert {r.value for r in attention.reshards} == {key, value}
    (start,) = [c.start for c in attention.cluster.classes if c.name == attention.strategy.splits[0]]
    assert start == "query_start"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("force", ["tp2", "tp_sp2", "tp_plain2"])
def test_forced_tp_splits_the_weight_of_every_block_linear(family, force):
    norms: set[str] = set()  # what the norms over the whole hidden size give; Qwen's norms inside a head go with the heads
    for key, cluster, weights, outputs in rows(forced(family, force)):
        assert "b" not in outputs
        if key and cluster.heavy and weights and "weight" in " ".join(cluster.inputs):
            assert "S" in weights, cluster.name
        elif key and weights and any("rsqrt" in node.op or "layer_norm" in node.op for node in cluster.nodes) and not outputs & {"h", "k"}:
            norms |= outputs
    if force == "tp_sp2":
        assert norms == {"l"}
    elif force == "tp_plain2":
        assert norms == {"R"}


def test_forced_tp_follows_megatron():
    """Columns then rows: q, k, v, gate and up split their outputs, o and down their inputs; attention splits heads."""
    plan = forced("llama", "tp_plain2")
    planned = plan.regions["LlamaDecoderLayer"]
    found = {c.cluster.name: c.strategy.splits for c in planned.clusters if c.cluster.heavy}
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert found[name] == ("o",), name
    for name in ("o_proj", "down_proj"):
        assert found[name] == ("i",), name


def test_forced_axes_combine():
    plan = forced("llama", "sp2,tp2", 4)
    assert dict(plan.mesh) == {"sp": 2, "tp": 2}
    for key, cluster, weights, outputs in rows(plan, axis=0):
        if weights:
            assert weights == {"B"} and outputs == {"l"}, (key, cluster.name)
    for key, cluster, weights, _ in rows(plan, axis=1):
        if key and cluster.heavy and weights:
            assert weights == {"S"}

"""Clusters: a partition of the nodes in an order that runs, whose split classes agree with every node, and that loses no plan."""

from __future__ import annotations

import random
from math import prod

import pytest
from plan_samples import Sketch, slow_toy, tiny
from test_plan_problem import random_graph

from seqloom.graph import Graph
from seqloom.plan import clusters as module
from seqloom.plan import problem as problem_module
from seqloom.plan.clusters import HEAVY, Cluster, DimClass, clusters, is_heavy
from seqloom.plan.price import Machine, Price
from seqloom.plan.price import price as true_price
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import build_regions
from seqloom.plan.request import Request
from seqloom.plan.space import Axis

FAST = ["llama", "llama_tied", "qwen3", "gpt2", "gemma2", "phi3", "gpt_neox"]


def graphs() -> list:
    """(label, graph) of captured tiny models and of random graphs, outer graphs and blocks."""
    found = [(f"{family}:{key or 'outer'}", region.graph) for family in FAST for key, region in tiny(family, 2).parts.items()]
    for seed in range(40):
        graph = random_graph(random.Random(seed))
        found += [(f"random{seed}", graph), *((f"random{seed}:{name}", block) for name, block in graph.blocks.items())]
    return found


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, Graph, tuple[Cluster, ...]]]:
    return [(label, graph, clusters(graph)) for label, graph in graphs()]


def test_every_node_is_in_exactly_one_cluster(pairs):
    for label, graph, parts in pairs:
        inside = [node.outputs for part in parts for node in part.nodes]
        assert sorted(inside) == sorted(node.outputs for node in graph.nodes if not node.is_block), label


def test_clusters_run_in_their_order(pairs):
    """Each cluster's inputs are there when it runs, its nodes' inputs too, and block calls run as soon as theirs are: no circle."""
    for label, graph, parts in pairs:
        ready = {name for name, value in graph.values.items() if value.kind != "activation"}
        calls = [node for node in graph.nodes if node.is_block]
        for part in parts:
            for call in calls:
                if set(call.inputs) <= ready:
                    ready.update(call.outputs)
            assert set(part.inputs) <= ready, (label, part.name)
            for node in part.nodes:
                assert set(node.inputs) <= ready, (label, part.name)
                ready.update(node.outputs)


def test_borders_are_exactly_what_crosses(pairs):
    for label, graph, parts in pairs:
        for part in parts:
            made = {out for node in part.nodes for out in node.outputs}
            read = {name for node in part.nodes for name in node.inputs}
            elsewhere = {n for other in parts if other is not part for n in other.inputs} | set(graph.outputs)
            elsewhere |= {n for node in graph.nodes if node.is_block for n in node.inputs}
            assert set(part.inputs) == read - made, label
            assert set(part.outputs) == made & elsewhere, label
            assert len(set(part.values)) == len(part.values) == len(read | made), label


def test_costly_nodes_stand_alone_and_light_ones_stay_in_their_module(pairs):
    for label, _, parts in pairs:
        for part in parts:
            if any(is_heavy(node) for node in part.nodes):
                assert len(part.nodes) == 1 and part.heavy, label
            assert len({node.module for node in part.nodes}) == 1, label


def test_classes_agree_with_every_node(pairs):
    """A class splits, in each node, all dimensions that one name of its annotation leads; its sizes are of those names."""
    for label, graph, parts in pairs:
        for part in parts:
            names = [option.name for option in part.classes]
            assert len(set(names)) == len(names), (label, part.name, "a strategy names its class")
            for option in part.classes:
                sizes = set()
                for node in part.nodes:
                    mine = {(n, option.dims[n]) for n in (*node.inputs, *node.outputs) if n in option.dims}
                    touched = [s for s in _splits_of(node, option) if _dims(node, s) & mine]
                    assert mine == set().union(*(_dims(node, s) for s in touched)), (label, part.name, option.name)
                    assert len(touched) <= 1, (label, part.name, option.name, "two names of one node cannot be split together")
                    sizes.update(s.size for s in touched)
                    for split in touched:
                        whole = {n for n, d in zip(node.outputs, split.output_dims, strict=True) if d is None}
                        assert whole == (set(option.reduced) if split.reduced else set()), (label, part.name)
                assert tuple(sorted(sizes)) == option.sizes
                assert not option.reduced or len(part.nodes) == 1
                assert all(0 <= dim < len(graph.values[name].shape) for name, dim in option.dims.items())


def _splits_of(node, option: DimClass):
    """Splits of a node that a class could be: a class that lies behind others is one of the nested splits, by its name."""
    return [s for s in node.bound.splits(nested=True) if s.after == option.after and (not option.after or s.name == option.name)]


def _dims(node, split) -> set[tuple[str, int]]:
    found = {(n, d) for n, d in zip(node.inputs, split.input_dims, strict=True) if d is not None}
    return found | {(n, d) for n, d in zip(node.outputs, split.output_dims, strict=True) if d is not None}


def test_a_class_leaves_no_dimension_of_its_names_unsplit(pairs):
    """Inside a cluster a value that one node splits is split for all its nodes: nothing is resharded between them."""
    for label, _, parts in pairs:
        for part in parts:
            for option in part.classes:
                for node in part.nodes:
                    for name in (*node.inputs, *node.outputs):
                        if name in option.dims:
                            assert any((name, option.dims[name]) in _dims(node, s) for s in _splits_of(node, option)), (label, part.name)


@pytest.mark.parametrize("family", FAST)
def test_a_decoder_layer_is_few_clusters(family):
    for key, region in tiny(family, 2).parts.items():
        if key:
            assert len(region.parts) <= (20 if family == "llama" else 45), [part.name for part in region.parts]
            assert sum(part.heavy for part in region.parts) >= 5
            assert all(node.op not in HEAVY for part in region.parts if not part.heavy for node in part.nodes)


def test_a_node_that_would_close_a_circle_stays_out():
    """silu -> linear -> add(silu, linear): add may not join silu, because linear runs between them."""
    sketch = Sketch("Block")
    x = sketch.input("x", (2, 4, 8), grad=True)
    first = sketch.op("aten.silu.default", x, module="m")
    wide = sketch.linear(first, 8, "m.linear")
    graph = sketch.graph(sketch.op("aten.add.Tensor", first, wide, module="m"))
    assert [[node.op for node in part.nodes] for part in clusters(graph)] == [
        ["aten.silu.default"],
        ["aten.linear.default"],
        ["aten.add.Tensor"],
    ]


# --- clustering loses nothing ----------------------------------------------------------------------------------------------------


def free_light_work(graph, cluster, strategy, machine, *tiling) -> Price:
    """Prices by which a chain costs the same whole and in pieces: only costly operators and reshards count."""
    found = true_price(graph, cluster, strategy, machine, *tiling)
    return found if cluster.heavy else Price(0.0, 0.0, {}, 0)


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_with_clusters_is_the_optimum_with_single_nodes(seed, monkeypatch):
    rng = random.Random(seed)
    graph = random_graph(rng)
    axes = rng.choice([(Axis(2, "sum"),), (Axis(2, "split"),), (Axis(2, "sum"), Axis(2, "split"))])
    machine = Machine(slow_toy(rng.choice([0.03, 1.0])), axes, 1)
    asked = Request(prod(machine.sizes), 1, 1, machine.hardware, 2, recompute=False, offload=False)
    monkeypatch.setattr(problem_module, "price", free_light_work)

    def optimum() -> float:
        problem = build_problem(build_regions(graph), machine, asked)
        return problem.program.solve(relaxed=False, time_limit=60, gap=1e-7).objective if problem.feasible else float("inf")

    joined = optimum()
    monkeypatch.setattr(module, "_joinable", lambda *_: None)
    assert joined == pytest.approx(optimum(), rel=1e-4, abs=1e-6)

"""The IR: what it answers about itself, and that its verifier accepts exactly the graphs that make sense."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqloom.annotation import Annotation
from seqloom.graph import Graph, GraphError, Node, Ref, Value, map_refs, refs, verify

SHAPE = (2, 6, 4)


def value(name: str, shape: tuple[int, ...] = SHAPE, kind: str = "activation", fqn: str | None = None, dtype=torch.float32) -> Value:
    return Value(name, shape, dtype, kind, fqn)


def pointwise(inputs: tuple[str, ...], output: str, shape: tuple[int, ...] = SHAPE) -> Node:
    text = f"{', '.join(['b l d'] * len(inputs))} -> b l d"
    bound = Annotation.parse(text).bind([shape] * len(inputs))
    return Node("aten.add.Tensor", tuple(Ref(name) for name in inputs), (), (output,), bound)


def make(values: list[Value], nodes: list[Node], inputs=("x",), outputs=("y",), **extra) -> Graph:
    return Graph("test", {v.name: v for v in values}, tuple(nodes), tuple(inputs), tuple(outputs), **extra)


def simple() -> Graph:
    values = [value("x", kind="input"), value("w", kind="parameter", fqn="layer.weight"), value("h"), value("y")]
    return make(values, [pointwise(("x", "w"), "h"), pointwise(("h", "h"), "y")])


def with_blocks() -> Graph:
    block = make(
        [value("a", kind="input"), value("w", kind="parameter", fqn="mlp.weight"), value("b", kind="buffer", fqn="scale"), value("z")],
        [pointwise(("a", "w", "b"), "z")],
        inputs=("a",),
        outputs=("z",),
    ).replace(name="Layer")
    values = [value("x", kind="input"), value("w", kind="parameter", fqn="norm.weight"), value("h1"), value("h2"), value("y")]
    calls = [
        Node("block:Layer", (Ref("x"),), (), ("h1",), None, "layers.0", "Layer"),
        Node("block:Layer", (Ref("h1"),), (), ("h2",), None, "layers.1", "Layer"),
    ]
    return make(values, [*calls, pointwise(("h2", "w"), "y")], blocks={"Layer": block})


def change(graph: Graph, index: int, **changes) -> Graph:
    nodes = list(graph.nodes)
    nodes[index] = dataclasses.replace(nodes[index], **changes)
    return graph.replace(nodes=tuple(nodes))


def change_value(graph: Graph, name: str, **changes) -> Graph:
    return graph.replace(values={**graph.values, name: dataclasses.replace(graph.values[name], **changes)})


# --- what a graph says about itself ----------------------------------------------------------------------------------------------


def test_value_counts_elements_and_bytes():
    assert value("x").numel == 48
    assert value("x", dtype=torch.bfloat16).nbytes == 96
    assert value("s", shape=()).numel == 1
    assert value("e", shape=(3, 0)).nbytes == 0


def test_refs_are_found_in_nests_and_keywords_in_order():
    node = Node("op", (Ref("a"), (Ref("b"), 3, (Ref("a"),)), None), (("k", Ref("c")), ("n", 1)), ("o",), None)
    assert node.inputs == ("a", "b", "a", "c")
    assert list(refs((1, "text", None))) == []


@given(
    st.recursive(
        st.one_of(st.integers(), st.none(), st.text(max_size=3), st.builds(Ref, st.text("abc", min_size=1))), st.tuples, max_leaves=8
    )
)
def test_map_refs_changes_refs_only(tree):
    assert map_refs(tree, lambda ref: ref) == tree
    renamed = map_refs(tree, lambda ref: Ref(ref.name + "_"))
    assert list(refs(renamed)) == [name + "_" for name in refs(tree)]
    assert map_refs(renamed, lambda ref: Ref(ref.name[:-1])) == tree


def test_producers_and_consumers():
    graph = simple()
    assert graph.producers() == {"h": graph.nodes[0], "y": graph.nodes[1]}
    assert graph.consumers() == {"x": [graph.nodes[0]], "w": [graph.nodes[0]], "h": [graph.nodes[1]], "y": []}
    assert [v.name for v in graph.of_kind("parameter")] == ["w"]


def test_state_is_listed_over_block_calls():
    graph = with_blocks()
    assert list(graph.parameters()) == ["norm.weight", "layers.0.mlp.weight", "layers.1.mlp.weight"]
    assert list(graph.buffers()) == ["layers.0.scale", "layers.1.scale"]
    assert graph.nodes[0].is_block
    assert graph.nodes[0].block == "Layer"
    assert not graph.nodes[2].is_block


def test_replace_leaves_the_original():
    graph = simple()
    other = graph.replace(name="other")
    assert (graph.name, other.name) == ("test", "other")
    assert other.nodes is graph.nodes


# --- the verifier ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [simple(), with_blocks()], ids=["simple", "blocks"])
def test_verify_accepts(graph):
    assert verify(graph) is None


def _swap(graph: Graph) -> Graph:
    return graph.replace(nodes=tuple(reversed(graph.nodes)))


def _inner(graph: Graph, **changes) -> Graph:
    return graph.replace(blocks={"Layer": graph.blocks["Layer"].replace(**changes)})


BROKEN = {
    "stored under another key": (lambda: simple().replace(values={**simple().values, "k": value("q")}), "value q is stored under k"),
    "no state-dict key": (lambda: change_value(simple(), "w", fqn=None), "w has no state-dict key"),
    "used before definition": (lambda: _swap(simple()), "uses h before its definition"),
    "unknown value": (lambda: change(simple(), 1, args=(Ref("h"), Ref("nowhere"))), "uses nowhere before"),
    "no shape": (lambda: change(simple(), 1, outputs=("ghost",)), "defines ghost, which has no shape"),
    "defined twice": (lambda: change(simple(), 1, outputs=("h",)), "h is defined twice"),
    "defines an input": (lambda: change(simple(), 1, outputs=("x",)), "x is defined twice"),
    "no annotation": (lambda: change(simple(), 0, bound=None), "has no annotation"),
    "too few inputs": (lambda: change(simple(), 1, args=(Ref("h"),)), "has 1 inputs, its annotation 2"),
    "too many outputs": (
        lambda: change(change_value(simple(), "y"), 1, outputs=("y", "z")).replace(values={**simple().values, "z": value("z")}),
        "has 2 outputs, its annotation 1",
    ),
    "input shape": (lambda: change_value(simple(), "x", shape=(2, 6, 5)), r"expects \(2, 6, 4\) for x \(2, 6, 5\)"),
    "output rank": (lambda: change_value(simple(), "y", shape=(2, 24)), "for y"),
    "output missing": (lambda: simple().replace(outputs=("nothing",)), "output nothing is never defined"),
    "unknown block": (lambda: change(with_blocks(), 0, op="block:Other"), "no block Other"),
    "call with too many values": (lambda: change(with_blocks(), 0, args=(Ref("x"), Ref("x"))), "passes 2 values for 1"),
    "call with another dtype": (lambda: change_value(with_blocks(), "x", dtype=torch.bfloat16), "passes x"),
    "call with another shape": (lambda: change_value(with_blocks(), "h1", shape=(2, 6, 8)), "passes h1"),
    "call with another output": (lambda: _inner(with_blocks(), outputs=("z", "a")), "passes 1 values for 2"),
    "broken block": (lambda: _inner(with_blocks(), nodes=()), "output z is never defined"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verify_refuses(name):
    build, message = BROKEN[name]
    with pytest.raises(GraphError, match=message):
        verify(build())


def test_an_unsplit_argument_has_no_shape_to_check():
    bound = Annotation.parse("b l d, ? -> b l d").bind([SHAPE, None])
    graph = change(simple(), 0, bound=bound)
    assert verify(change_value(graph, "w", shape=(99,))) is None


@st.composite
def random_graphs(draw):
    """A chain of additions over earlier values, in a valid order."""
    count = draw(st.integers(1, 8))
    names = ["x", *(f"v{i}" for i in range(count))]
    nodes = []
    for i in range(count):
        inputs = draw(st.lists(st.sampled_from(names[: i + 1]), min_size=1, max_size=3))
        nodes.append(pointwise(tuple(inputs), names[i + 1]))
    return make([value("x", kind="input"), *map(value, names[1:])], nodes, outputs=(names[-1],))


@given(random_graphs(), st.randoms())
def test_verify_accepts_exactly_the_topological_orders(graph, random):
    assert verify(graph) is None
    nodes = list(graph.nodes)
    random.shuffle(nodes)
    known, valid = {"x"}, True
    for node in nodes:
        valid = valid and known.issuperset(node.inputs)
        known.update(node.outputs)
    if valid:
        verify(graph.replace(nodes=tuple(nodes)))
    else:
        with pytest.raises(GraphError, match="before its definition"):
            verify(graph.replace(nodes=tuple(nodes)))

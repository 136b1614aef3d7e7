"""Block discovery and naming: pieces are found by structure, and the graph still computes the same."""

from __future__ import annotations

import dataclasses
import keyword

import pytest
import torch
from graph_interpreter import run_graph
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.capture.blocks import _block_names, find_blocks, relative_path
from seqloom.capture.names import rename
from seqloom.graph import Graph, GraphError, Node, Ref, Value, verify

D = 4
SHAPE = (2, 3, D)
CLASSES = {"": "Model", "layers": "ModuleList", **{f"layers.{i}": "Layer" for i in range(12)}}


class Builder:
    """Writes flat graphs the way the tracer does."""

    def __init__(self):
        self.values = {"x": Value("x", SHAPE, torch.float64, "input"), "scale": Value("scale", SHAPE, torch.float64, "input")}
        self.nodes: list[Node] = []

    def parameter(self, fqn: str, shape=(D, D)) -> str:
        name = fqn.replace(".", "_")
        self.values[name] = Value(name, shape, torch.float64, "parameter", fqn, requires_grad=True)
        return name

    def op(self, op: str, *args, module: str = "", shape=SHAPE) -> str:
        name = f"n{len(self.nodes)}"
        grad = any(self.values[a].requires_grad for a in args if isinstance(a, str))
        self.values[name] = Value(name, shape, torch.float64, requires_grad=grad)
        refs = tuple(Ref(a) if isinstance(a, str) else a for a in args)
        self.nodes.append(Node(op, refs, (), (name,), None, module, "Layer"))
        return name

    def layer(self, i: int, x: str, kind: str = "plain") -> str:
        """x + f(x @ w) * scale; the kinds differ in one operator, one constant, the wiring, or the parameter's name."""
        at = f"layers.{i}"
        weight = self.parameter(f"{at}.proj.{'kernel' if kind == 'renamed' else 'weight'}")
        h = self.op("aten.linear.default", x, weight, module=f"{at}.proj")
        h = self.op("aten.relu.default" if kind == "relu" else "aten.tanh.default", h, module=f"{at}.act")
        h = self.op("aten.mul.Tensor", h, "scale", module=at)
        h = self.op("aten.mul.Tensor", h, 0.5 if kind == "constant" else 0.25, module=at)
        return self.op("aten.add.Tensor", *((h, x) if kind == "wiring" else (x, h)), module=at)

    def graph(self, output: str) -> Graph:
        """The graph whose scalar output is the sum of `output`."""
        total = self.op("aten.sum.default", output, shape=())
        return Graph("Model", self.values, tuple(self.nodes), ("x", "scale"), (total,))


KINDS = ("plain", "relu", "constant", "wiring", "renamed")


def stack(kinds) -> Graph:
    b, h = Builder(), "x"
    h = b.op("aten.linear.default", h, b.parameter("embed.weight"), module="embed")
    for i, kind in enumerate(kinds):
        h = b.layer(i, h, kind)
    return b.graph(h)


def run(graph: Graph) -> dict[str, torch.Tensor]:
    """Loss and gradients by parameter key."""
    generator = torch.Generator().manual_seed(0)

    def random(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"x": random(SHAPE), "scale": random(SHAPE)}
    state = {key: random(v.shape).requires_grad_() for key, v in sorted(graph.parameters().items())}
    (loss,) = run_graph(graph, inputs, state)
    loss.backward()
    return {"loss": loss.detach(), **{key: tensor.grad for key, tensor in state.items()}}


def calls(graph: Graph) -> list[str]:
    return [node.block for node in graph.nodes if node.is_block]


def assert_defined_in_order(graph: Graph) -> None:
    """`verify` but for annotations, which these graphs do not have."""
    with pytest.raises(GraphError, match="has no annotation"):
        verify(graph)
    for g in (graph, *graph.blocks.values()):
        known = {v.name for v in g.values.values() if v.kind != "activation"}
        for node in g.nodes:
            assert known.issuperset(node.inputs)
            assert known.isdisjoint(node.outputs)
            known.update(node.outputs)
        assert known.issuperset(g.outputs)
        assert known == set(g.values)


def test_identical_layers_become_one_block():
    graph = find_blocks(stack(["plain"] * 5), CLASSES)
    assert calls(graph) == ["Layer"] * 5
    assert list(graph.blocks) == ["Layer"]
    assert [node.module for node in graph.nodes if node.is_block] == [f"layers.{i}" for i in range(5)]
    assert [v.fqn for v in graph.blocks["Layer"].of_kind("parameter")] == ["proj.weight"]
    assert [v.fqn for v in graph.of_kind("parameter")] == ["embed.weight"]
    assert [node.module for node in graph.blocks["Layer"].nodes] == ["proj", "act", "", "", ""]
    assert_defined_in_order(graph)


@pytest.mark.parametrize("other", KINDS[1:])
def test_layers_of_one_class_that_differ_are_different_blocks(other):
    graph = find_blocks(stack(["plain", other, "plain", other]), CLASSES)
    assert calls(graph) == ["Layer1", "Layer2", "Layer1", "Layer2"]
    assert_defined_in_order(graph)


def test_layers_of_other_shapes_are_different_blocks():
    b = Builder()
    h = b.layer(0, "x")
    h = b.op("aten.sum.dim_IntList", h, (1,), True, shape=(2, 1, D))
    b.values["scale1"] = Value("scale1", (2, 1, D), torch.float64, "input")
    at = "layers.1"
    h = b.op("aten.linear.default", h, b.parameter(f"{at}.proj.weight"), module=f"{at}.proj", shape=(2, 1, D))
    graph = find_blocks(b.graph(h), CLASSES)
    assert len(graph.blocks) == 2


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
def test_blocks_and_names_keep_the_function(kinds):
    flat = stack(kinds)
    graph = find_blocks(flat, CLASSES)
    assert len(graph.blocks) == len(set(kinds))
    assert [sorted(set(kinds), key=kinds.index)[list(graph.blocks).index(name)] for name in calls(graph)] == kinds
    assert graph.parameters().keys() == flat.parameters().keys()
    named = rename(graph)
    assert_defined_in_order(named)
    expected = run(flat)
    for result in (run(graph), run(named)):
        assert result.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(result[key], tensor), key


def test_the_stream_is_the_first_input_in_every_call():
    """In `scale * x` the other input is used first, yet the carried one leads."""
    b, h = Builder(), "x"
    for i in range(3):
        h = b.op("aten.mul.Tensor", "scale", h, module=f"layers.{i}")
    graph = find_blocks(b.graph(h), CLASSES)
    assert [node.inputs for node in graph.nodes if node.is_block] == [("x", "scale"), ("n0", "scale"), ("n1", "scale")]
    named = rename(graph)
    assert named.blocks["Layer"].inputs == ("hidden_states", "scale")


def test_a_single_layer_leads_with_the_input_that_has_a_gradient():
    b = Builder()
    h = b.op("aten.linear.default", "x", b.parameter("embed.weight"), module="embed")
    graph = find_blocks(b.graph(b.op("aten.mul.Tensor", "scale", h, module="layers.0")), CLASSES)
    assert graph.nodes[1].inputs == (h, "scale")


def test_a_layer_without_inputs_or_with_several_outputs():
    b = Builder()
    one = b.op("aten.tanh.default", "x", module="layers.0")
    two = b.op("aten.relu.default", "x", module="layers.0")
    graph = find_blocks(b.graph(b.op("aten.add.Tensor", one, two)), CLASSES)
    assert graph.nodes[0].outputs == (one, two)
    assert len(graph.blocks["Layer"].outputs) == 2
    assert_defined_in_order(rename(graph))


def test_only_elements_of_module_lists_are_candidates():
    sequential = {**CLASSES, "layers": "Sequential"}
    graph = find_blocks(stack(["plain", "plain"]), sequential)
    assert graph.blocks == {}
    assert graph == stack(["plain", "plain"])


def test_the_outermost_list_counts():
    b, h = Builder(), "x"
    for i in range(2):
        for j in range(3):
            h = b.op("aten.tanh.default", h, module=f"layers.{i}.experts.{j}")
    graph = find_blocks(b.graph(h), {**CLASSES, "layers.0.experts": "ModuleList", "layers.1.experts": "ModuleList"})
    assert calls(graph) == ["Layer", "Layer"]
    assert len(graph.blocks["Layer"].nodes) == 3


def test_a_layer_whose_nodes_do_not_stand_together_stays():
    b = Builder()
    h = b.op("aten.tanh.default", "x", module="layers.0")
    h = b.op("aten.tanh.default", h)
    h = b.op("aten.tanh.default", h, module="layers.0")
    h = b.op("aten.tanh.default", h, module="layers.1")
    graph = find_blocks(b.graph(h), CLASSES)
    assert [node.module for node in graph.nodes if node.is_block] == ["layers.1"]


def test_a_parameter_of_another_layer_comes_in_as_an_input():
    """The second layer uses the weight of the first: the first keeps it in the outer graph, the second takes it as an input."""
    b = Builder()
    weight = b.parameter("layers.0.proj.weight")
    h = b.op("aten.linear.default", "x", weight, module="layers.0.proj")
    h = b.op("aten.linear.default", h, weight, module="layers.1.proj")
    graph = find_blocks(b.graph(h), CLASSES)
    assert [node.module for node in graph.nodes if node.is_block] == ["layers.1"]
    assert weight in graph.nodes[1].inputs
    block = graph.blocks["Layer"]
    assert [block.values[name].kind for name in block.inputs] == ["input", "input"]
    assert graph.parameters().keys() == {"layers.0.proj.weight"}
    assert run(graph)["loss"] == run(b.graph(h))["loss"]


def test_unused_parameters_go_with_their_layer():
    b = Builder()
    h = b.layer(0, "x")
    b.parameter("layers.0.unused")
    graph = find_blocks(b.graph(h), CLASSES)
    assert [v.fqn for v in graph.blocks["Layer"].of_kind("parameter")] == ["proj.weight", "unused"]
    b = Builder()
    first, last = b.layer(0, "x"), None
    b.parameter("layers.1.unused")
    last = b.layer(1, first)
    assert len(find_blocks(b.graph(last), CLASSES).blocks) == 2


def test_requires_grad_of_inputs_is_part_of_the_structure():
    graph = find_blocks(stack(["plain"]).replace(), CLASSES)
    assert graph.blocks["Layer"].values[graph.blocks["Layer"].inputs[0]].requires_grad


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["A", "B"], ["A", "B"]),
        (["A", "B", "A"], ["A1", "B", "A2"]),
        (["A1", "A", "A"], ["A1", "A1_", "A2"]),
        ([], []),
    ],
)
def test_block_names_are_unique(found, expected):
    assert _block_names(found) == expected


@pytest.mark.parametrize(
    ("path", "prefix", "expected"),
    [
        ("layers.1", "layers.1", ""),
        ("layers.1.mlp", "layers.1", "mlp"),
        ("layers.10", "layers.1", None),
        ("layers.10.mlp", "layers.1", None),
        ("norm", "layers.1", None),
        ("norm", "", "norm"),
    ],
)
def test_relative_path(path, prefix, expected):
    assert relative_path(path, prefix) == expected


# --- names -----------------------------------------------------------------------------------------------------------------------


def test_names_say_where_a_value_comes_from():
    graph = rename(find_blocks(stack(["plain", "plain"]), CLASSES))
    assert list(graph.values) == ["x", "scale", "embed_weight", "embed", "hidden_states", "hidden_states_1", "loss"]
    block = graph.blocks["Layer"]
    assert list(block.values) == ["hidden_states", "scale", "proj_weight", "proj", "act", "mul", "mul_1", "hidden_states_1"]


def test_views_are_named_after_what_they_show_and_casts_after_their_dtype():
    b = Builder()
    h = b.op("aten.linear.default", "x", b.parameter("q_proj.weight"), module="q_proj")
    h = b.op("aten.reshape.default", h, (2, 12), shape=(2, 12))
    h = b.op("aten.transpose.int", h, 0, 1, shape=(12, 2))
    b.values["wide"] = dataclasses.replace(b.values[h], name="wide", dtype=torch.float32)
    b.nodes.append(Node("aten.to.dtype", (Ref(h), torch.float32), (), ("wide",), None))
    h = b.op("aten.pow.Tensor_Scalar", "wide", 2, shape=(12, 2))
    h = b.op("aten.sum.default", h, shape=())
    graph = rename(b.graph(b.op("aten.abs.default", h, shape=())))
    made = [out for node in graph.nodes for out in node.outputs]
    assert made == ["q_proj", "q_proj_reshape", "q_proj_transpose", "q_proj_fp32", "power", "total", "losses", "loss"]


def test_names_are_identifiers_that_shadow_nothing():
    b, h = Builder(), "x"
    for module in ("model.3", "model.lambda", "model.input", "model.torch", "model.self", "model.input"):
        h = b.op("aten.tanh.default", h, module=module)
    for op in ("aten.pow.Tensor_Scalar", "aten.sum.default", "aten.max.other", "aten._softmax.default", "aten.abs.default"):
        h = b.op(op, h)
    graph = rename(b.graph(h))
    made = [out for node in graph.nodes for out in node.outputs]
    assert len(set(made)) == len(made)
    for name in made:
        assert name.isidentifier()
        assert not keyword.iskeyword(name)
        assert name not in dir(__builtins__) and name not in ("torch", "self")


def test_outputs_of_one_operator_are_numbered():
    b = Builder()
    h = b.op("aten.linear.default", "x", b.parameter("c_attn.weight"), module="c_attn")
    for name in ("p0", "p1"):
        b.values[name] = Value(name, (2, 3, 2), torch.float64, requires_grad=True)
    b.nodes.append(Node("aten.split.Tensor", (Ref(h), 2, -1), (), ("p0", "p1"), None))
    graph = rename(b.graph(b.op("aten.mul.Tensor", "p0", "p1", shape=(2, 3, 2))))
    assert graph.nodes[1].outputs == ("c_attn_split_0", "c_attn_split_1")

"""The spelling of operators: what is written computes what the operator computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from seqloom.emit.expressions import ATOM, PRODUCT, SUM, Context, Expression, constant, spell
from seqloom.graph import Graph, Node, Ref, Value


def evaluate(op: str, args: tuple, tensors: dict[str, torch.Tensor], outputs: int = 1):
    """Spell one node over named tensors, evaluate the text, and evaluate the operator itself."""
    namespace, name, overload = op.split(".")
    packet = getattr(getattr(torch.ops, namespace), name)
    real = [
        tensors[a.name] if isinstance(a, Ref) else [tensors[x.name] if isinstance(x, Ref) else x for x in a] if isinstance(a, tuple) else a
        for a in args
    ]
    expected = getattr(packet, overload)(*real)
    results = list(expected) if isinstance(expected, (list, tuple)) else [expected]
    names = tuple(f"out{i}" for i in range(len(results)))
    values = {n: Value(n, tuple(t.shape), t.dtype) for n, t in {**tensors, **dict(zip(names, results, strict=True))}.items()}
    node = Node(op, args, (), names, None)
    context = Context(Graph("g", values, (node,), tuple(tensors), names), {n: v.shape for n, v in values.items()})
    text = spell(node, {n: Expression(n) for n in tensors}, context).text
    found = eval(text, {"torch": torch, "F": F, **tensors})
    return text, (list(found) if isinstance(found, (list, tuple)) else [found]), results


X = torch.arange(48, dtype=torch.float64).reshape(2, 4, 6) / 7 - 3
Y = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(2, 4, 6) + 0.1
W = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)
IDS = torch.tensor([[0, 3], [4, 1]])
x, y, w, ids = Ref("x"), Ref("y"), Ref("w"), Ref("ids")

CASES = [
    ("aten.add.Tensor", (x, y), "x + y"),
    ("aten.add.Tensor", (x, 1e-6), "x + 1e-06"),
    ("aten.sub.Tensor", (x, y), "x - y"),
    ("aten.mul.Tensor", (x, 2), "x * 2"),
    ("aten.div.Tensor", (x, y), "x / y"),
    ("aten.neg.default", (x,), "-x"),
    ("aten.pow.Tensor_Scalar", (x, 3.0), "x.pow(3.0)"),
    ("aten.tanh.default", (x,), "x.tanh()"),
    ("aten.mean.dim", (x, (-1,), True), "x.mean(-1, keepdim=True)"),
    ("aten.mean.dim", (x, (1,)), "x.mean(1)"),
    ("aten.sum.dim_IntList", (x, (1,), True), "x.sum(1, keepdim=True)"),
    ("aten.sum.default", (x,), "x.sum()"),
    ("aten.transpose.int", (x, 1, 2), "x.transpose(1, 2)"),
    ("aten.unsqueeze.default", (x, 1), "x.unsqueeze(1)"),
    ("aten.slice.Tensor", (x, 2, 0, 3), "x[..., :3]"),
    ("aten.slice.Tensor", (x, -1, 3, 6), "x[..., 3:]"),
    ("aten.slice.Tensor", (x, 1, 1, 3), "x[:, 1:3]"),
    ("aten.slice.Tensor", (x, 0, 1, 9223372036854775807), "x[1:]"),
    ("aten.cat.default", ((x, y), -1), "torch.cat((x, y), dim=-1)"),
    ("aten.reshape.default", (x, (2, 4, 2, 3)), "x.unflatten(2, (-1, 3))"),
    ("aten.reshape.default", (x, (2, 24)), "x.flatten(1)"),
    ("aten.reshape.default", (x, (8, 6)), "x.flatten(0, 1)"),
    ("aten.reshape.default", (x, (6, 8)), "x.reshape(6, 8)"),
    ("aten.split.Tensor", (x, 2, 2), "x.split(2, dim=2)"),
    ("aten.linear.default", (x, w), "F.linear(x, w)"),
    ("aten.embedding.default", (w, ids), "F.embedding(ids, w)"),
    ("aten.silu.default", (x,), "F.silu(x)"),
    ("aten.to.dtype", (x, torch.float32), "x.float()"),
    ("aten.to.dtype", (x, torch.bfloat16), "x.to(torch.bfloat16)"),
    ("aten.layer_norm.default", (x, (6,), None, None, 1e-5, False), "F.layer_norm(x, (6,), None, None, 1e-05)"),
    ("aten.erf.default", (x,), "torch.ops.aten.erf.default(x)"),
]


@pytest.mark.parametrize(("op", "args", "text"), CASES, ids=[f"{op}-{text}" for op, _, text in CASES])
def test_spelling(op, args, text):
    tensors = {"x": X, "y": Y, "w": W, "ids": IDS}
    written, found, expected = evaluate(op, args, tensors)
    assert written == text
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def test_parentheses_stand_where_they_must():
    assert Expression("a + b", SUM).at(PRODUCT) == "(a + b)"
    assert Expression("a * b", PRODUCT).at(SUM) == "a * b"
    assert Expression("-a", 2).at(ATOM) == "(-a)"


def test_constants():
    assert constant((1,)) == "(1,)"
    assert constant((1, 2.5, None)) == "(1, 2.5, None)"
    assert constant(torch.bfloat16) == "torch.bfloat16"
    assert constant("tanh") == "'tanh'"


def test_subtraction_and_division_bind_to_the_left():
    values = {n: Value(n, (2,), torch.float64) for n in ("a", "b", "out")}
    graph = Graph("g", values, (), ("a", "b"), ("out",))
    context = Context(graph, dict.fromkeys(values, (2,)))
    inner = {"a": Expression("a"), "b": Expression("c - d", SUM)}
    node = Node("aten.sub.Tensor", (Ref("a"), Ref("b")), (), ("out",), None)
    assert spell(node, inner, context).text == "a - (c - d)"
    node = Node("aten.div.Tensor", (Ref("a"), Ref("b")), (), ("out",), None)
    assert spell(node, {"a": Expression("a"), "b": Expression("c * d", PRODUCT)}, context).text == "a / (c * d)"


def test_a_rank_with_one_head_splits_the_dimension_that_holds_the_heads():
    """8 heads over 8 ranks: locally 128 -> (1, 128) could as well be a new dimension of one beside the sequence."""
    values = {"x": Value("x", (1, 64, 1024), torch.float32), "out": Value("out", (1, 64, 8, 128), torch.float32)}
    node = Node("aten.reshape.default", (Ref("x"), (1, 64, 8, 128)), (), ("out",), None)
    context = Context(Graph("g", values, (node,), ("x",), ("out",)), {"x": (1, 64, 128), "out": (1, 64, 1, 128)})
    assert spell(node, {"x": Expression("x")}, context).text == "x.unflatten(2, (-1, 128))"

"""Operators as Python source, the way a person writes them.

In: a node, the source of its arguments, local shapes. Out: an `Expression`: text and how tightly it binds, so that `a * (b + c)` gets its
parentheses and nothing else does. Operators without a spelling of their own are written as `torch.ops.aten...` calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from seqloom.graph import Graph, Node, Ref

ATOM, UNARY, PRODUCT, SUM = 3, 2, 1, 0


@dataclass(frozen=True)
class Expression:
    """Python source; `binding` is the precedence of its outermost operator."""

    text: str
    binding: int = ATOM

    def at(self, binding: int) -> str:
        """The text, in parentheses where it would not bind tightly enough."""
        return self.text if self.binding >= binding else f"({self.text})"


@dataclass(frozen=True)
class Context:
    """What spelling a node may need beyond its arguments.

    `shapes` are local shapes; `operators` the names under which registered functions are imported ("module:function" -> name).
    """

    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]
    operators: Mapping[str, str] = field(default_factory=dict)


class Source(str):
    """A constant argument that is written as it is: an expression of the emitted program."""

    def __repr__(self) -> str:
        return str(self)


def constant(value: Any) -> str:
    """Source of a constant argument."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, (tuple, list)):
        inner = ", ".join(constant(item) for item in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return repr(value)


def spell(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    """Source of one node; `arguments` has an expression for every tensor input."""
    if node.op in _SPELLINGS:
        found = _SPELLINGS[node.op](node, arguments, context)
        if found is not None:
            return found
    name = context.operators.get(node.op, node.op.partition(":")[2]) if ":" in node.op else f"torch.ops.{node.op}"
    parts = [_argument(item, arguments) for item in node.args]
    parts += [f"{key}={_argument(item, arguments)}" for key, item in node.kwargs]
    return Expression(f"{name}({', '.join(parts)})")


def _argument(item: Any, arguments: Mapping[str, Expression]) -> str:
    if isinstance(item, Ref):
        return arguments[item.name].text
    if isinstance(item, tuple) and any(isinstance(x, Ref) for x in item):
        inner = ", ".join(_argument(x, arguments) for x in item)
        return f"({inner},)" if len(item) == 1 else f"({inner})"
    return constant(item)


Spelling = Callable[[Node, Mapping[str, Expression], Context], "Expression | None"]


def _operand(item: Any, arguments: Mapping[str, Expression], binding: int) -> str:
    return arguments[item.name].at(binding) if isinstance(item, Ref) else constant(item)


def _infix(symbol: str, binding: int, tight_right: bool = False) -> Spelling:
    def spelled(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression | None:
        if node.kwargs or len(node.args) != 2:
            return None
        left, right = (_operand(item, arguments, binding + (tight_right and i)) for i, item in enumerate(node.args))
        return Expression(f"{left} {symbol} {right}", binding)

    return spelled


def _method(name: str, *, keywords: Sequence[str] = ()) -> Spelling:
    """`x.name(arg, ...)`; arguments beyond the first are positional unless named in `keywords` (by position from the second on)."""

    def spelled(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
        owner = arguments[node.args[0].name].at(ATOM)
        rest = [_argument(item, arguments) for item in node.args[1:]]
        rest = [f"{keywords[i]}={text}" if i < len(keywords) and keywords[i] else text for i, text in enumerate(rest)]
        rest += [f"{key}={_argument(item, arguments)}" for key, item in node.kwargs]
        return Expression(f"{owner}.{name}({', '.join(rest)})")

    return spelled


def _call(name: str) -> Spelling:
    def spelled(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
        parts = [_argument(item, arguments) for item in node.args]
        parts += [f"{key}={_argument(item, arguments)}" for key, item in node.kwargs]
        return Expression(f"{name}({', '.join(parts)})")

    return spelled


def _first(count: int, name: str) -> Spelling:
    """A call with the first `count` arguments only."""
    return lambda node, arguments, context: _call(name)(dataclasses.replace(node, args=node.args[:count]), arguments, context)


def _negative(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    return Expression(f"-{arguments[node.args[0].name].at(ATOM)}", UNARY)


def _embedding(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    weight, ids = (arguments[item.name].text for item in node.args[:2])
    return Expression(f"F.embedding({ids}, {weight})")


def _mean(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression | None:
    owner, dims, *keep = node.args
    if not isinstance(dims, tuple) or len(dims) != 1 or node.kwargs:
        return None
    name = node.op.split(".")[1]
    suffix = ", keepdim=True" if keep and keep[0] else ""
    return Expression(f"{arguments[owner.name].at(ATOM)}.{name}({dims[0]}{suffix})")


def _to(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    owner = arguments[node.args[0].name].at(ATOM)
    dtype = context.graph.values[node.outputs[0]].dtype
    return Expression(f"{owner}.float()" if dtype == torch.float32 else f"{owner}.to({dtype})")


def _slice(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression | None:
    owner = context.graph.values[node.inputs[0]]
    dim, start, stop, *step = (*node.args[1:], *(() if len(node.args) > 3 else (None,) * (4 - len(node.args))))
    rank = len(owner.shape)
    dim = (dim or 0) % rank
    if step and step[0] not in (None, 1):
        return None
    first = "" if not start else str(start)
    last = "" if stop is None or stop >= owner.shape[dim] else str(stop)
    index = f"..., {first}:{last}" if dim == rank - 1 and rank > 1 else ", ".join([":"] * dim + [f"{first}:{last}"])
    return Expression(f"{arguments[node.inputs[0]].at(ATOM)}[{index}]")


def _cat(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    dim = node.args[1] if len(node.args) > 1 else 0
    return Expression(f"torch.cat({_argument(node.args[0], arguments)}, dim={dim})")


def _reshape(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    """`flatten` or `unflatten` where the change is just that (then no size of this rank is written down), else `reshape`."""
    owner = arguments[node.inputs[0]].at(ATOM)
    values, local = context.graph.values, context.shapes[node.outputs[0]]
    before, after = values[node.inputs[0]].shape, values[node.outputs[0]].shape  # global: a rank's own sizes may fit several ways
    for dim in range(max(len(before), 1)):
        if len(after) == len(before) + 1 and before[:dim] == after[:dim] and before[dim + 1 :] == after[dim + 2 :]:
            return Expression(f"{owner}.unflatten({dim}, (-1, {local[dim + 1]}))")
        if len(before) == len(after) + 1 and before[:dim] == after[:dim] and before[dim + 2 :] == after[dim + 1 :]:
            return Expression(f"{owner}.flatten({dim}, {dim + 1})" if dim + 2 < len(before) else f"{owner}.flatten({dim})")
    return Expression(f"{owner}.reshape({', '.join(map(str, local))})")


def _expand(node: Node, arguments: Mapping[str, Expression], context: Context) -> Expression:
    return Expression(f"{arguments[node.inputs[0]].at(ATOM)}.expand({', '.join(map(str, context.shapes[node.outputs[0]]))})")


_SPELLINGS: dict[str, Spelling] = {
    "aten.add.Tensor": _infix("+", SUM),
    "aten.add.Scalar": _infix("+", SUM),
    "aten.sub.Tensor": _infix("-", SUM, tight_right=True),
    "aten.mul.Tensor": _infix("*", PRODUCT),
    "aten.mul.Scalar": _infix("*", PRODUCT),
    "aten.div.Tensor": _infix("/", PRODUCT, tight_right=True),
    "aten.matmul.default": _infix("@", PRODUCT, tight_right=True),
    "aten.mm.default": _infix("@", PRODUCT, tight_right=True),
    "aten.neg.default": _negative,
    "aten.pow.Tensor_Scalar": _method("pow"),
    "aten.rsqrt.default": _method("rsqrt"),
    "aten.sqrt.default": _method("sqrt"),
    "aten.exp.default": _method("exp"),
    "aten.cos.default": _method("cos"),
    "aten.sin.default": _method("sin"),
    "aten.tanh.default": _method("tanh"),
    "aten.sigmoid.default": _method("sigmoid"),
    "aten.transpose.int": _method("transpose"),
    "aten.permute.default": _method("permute"),
    "aten.unsqueeze.default": _method("unsqueeze"),
    "aten.squeeze.dim": _method("squeeze"),
    "aten.sum.default": _method("sum"),
    "aten.split.Tensor": _method("split", keywords=("", "dim")),
    "aten.split_with_sizes.default": _method("split", keywords=("", "dim")),
    "aten.mean.dim": _mean,
    "aten.sum.dim_IntList": _mean,
    "aten.to.dtype": _to,
    "aten.slice.Tensor": _slice,
    "aten.cat.default": _cat,
    "aten.reshape.default": _reshape,
    "aten.view.default": _reshape,
    "aten.expand.default": _expand,
    "aten.linear.default": _call("F.linear"),
    "aten.embedding.default": _embedding,
    "aten.silu.default": _call("F.silu"),
    "aten.gelu.default": _call("F.gelu"),
    "aten.relu.default": _call("F.relu"),
    "aten.layer_norm.default": _first(5, "F.layer_norm"),  # the sixth argument only chooses a kernel
    "aten.rms_norm.default": _call("F.rms_norm"),
}

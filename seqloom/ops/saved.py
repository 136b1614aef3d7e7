"""What autograd keeps between forward and backward, for the planner's memory model.

In: an operator call. Out: which of its tensors stay alive, as eager PyTorch keeps them. Views keep nothing of their own but share the
storage of their input (`is_view`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seqloom.graph import Ref, Value
from seqloom.ops.call import Call, Kept, base_name
from seqloom.ops.registry import RegisteredOp, resolve
from seqloom.ops.rules import RULES, arguments_of, is_registered_name, rule


def saved_for_backward(
    op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Value] | None = None
) -> tuple[Kept, ...]:
    """Tensors that backward needs: ("input", i) the i-th tensor input of the node, ("output", j) its j-th output, ("like_input", i) a new
    tensor of the size of that input.

    With `values` the gradients decide as in eager mode: `x * table` keeps only the table when no gradient flows to it. Without, a
    gradient is taken to flow everywhere. Raises `UserError` for an operator without a rule.
    """
    call = Call(op, tuple(args), dict(kwargs), {}, {name: value.requires_grad for name, value in (values or {}).items()})
    if not any(call.grad(tensor) for tensor in call.tensors):
        return ()
    if is_registered_name(op):
        return _registered(resolve(op), call)
    return tuple(rule(op).saved(call))


def is_view(op: str) -> bool:
    """Whether the outputs of an operator alias its first input. (`reshape` copies where the strides force it to.)"""
    return base_name(op) in RULES and RULES[base_name(op)].view


def _registered(entry: RegisteredOp, call: Call) -> tuple[Kept, ...]:
    order = [name for name, value in _in_node_order(entry, call).items() if isinstance(value, Ref)]
    if entry.saved is None:
        return tuple(("input", i) for i in range(len(order)))
    kept: list[Kept] = [("input", i) for i, name in enumerate(order) if name in entry.saved]
    return tuple(kept + [("output", j) for j in range(len(entry.annotation.outputs)) if "output" in entry.saved])


def _in_node_order(entry: RegisteredOp, call: Call) -> dict[str, Any]:
    """Arguments by name, positional ones first and keywords as written: the order of a node's inputs."""
    arguments = arguments_of(entry, call.args, call.kwargs)
    positional = list(entry.signature.parameters)[: len(call.args)]
    return {name: arguments[name] for name in (*positional, *call.kwargs)}

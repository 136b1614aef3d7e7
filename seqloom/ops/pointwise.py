"""Rules of element-by-element operators: every dimension may be split; a dimension of size 1 that is broadcast is the constant 1."""

from __future__ import annotations

import torch

from seqloom.errors import UserError
from seqloom.ops.call import Call, Kept, Rule, Saved, Text, keeps_factors, keeps_inputs, keeps_nothing, keeps_output, names, write


def pointwise(call: Call) -> Text:
    """All tensor inputs broadcast together: `[b, 1, l] * [l]` is `a 1 c, c -> a 1 c`."""
    shapes = [call.shape_of(tensor) for tensor in call.tensors]
    output = torch.broadcast_shapes(*shapes)
    words = names(len(output))
    inputs = []
    for shape in shapes:
        skip = len(output) - len(shape)
        inputs.append([words[skip + i] if size == output[skip + i] else "1" for i, size in enumerate(shape)])
    return write(inputs, [words])


def _first_only(call: Call) -> Text:
    """The first tensor element by element; the others only lend their dtype."""
    words = names(len(call.shape(0)))
    return write([words, *[None] * (len(call.tensors) - 1)], [words])


def _no_dropout(call: Call) -> Text:
    if call.arg(2, "train", True) and call.arg(1, "p", 0.5) > 0:
        raise UserError(f"operator '{call.op}' drops activations at random (p={call.arg(1, 'p', 0.5)}): set the model's dropout to 0")
    return pointwise(call)


def _div_saved(call: Call) -> list[Kept]:
    tensors = call.tensors
    if len(tensors) < 2:
        return []
    return [("input", 0)] * call.grad(tensors[1]) + [("input", 1)]


def _pow_saved(call: Call) -> list[Kept]:
    if call.overload == "Tensor_Scalar":
        return [("input", 0)]
    return [*keeps_inputs()(call), ("output", 0)]


def _rules(saved: Saved, *ops: str) -> dict[str, Rule]:
    return {f"aten.{op}": Rule(pointwise, saved) for op in ops}


RULES: dict[str, Rule] = {
    **_rules(keeps_nothing, "add", "sub", "rsub", "neg", "alias", "clone", "contiguous", "detach", "to", "_to_copy"),
    **_rules(keeps_nothing, "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "sign", "floor", "ceil", "round", "floor_divide"),
    **_rules(keeps_nothing, "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not"),
    **_rules(keeps_nothing, "zeros_like", "ones_like", "full_like", "lift_fresh_copy"),
    **_rules(keeps_factors, "mul"),
    **_rules(keeps_output, "rsqrt", "sqrt", "exp", "tanh", "sigmoid", "relu", "reciprocal"),
    **_rules(keeps_inputs(0), "silu", "gelu", "log", "log1p", "cos", "sin", "abs", "square", "erf", "softplus", "log_sigmoid"),
    **_rules(keeps_inputs(0), "clamp", "clamp_min", "clamp_max", "leaky_relu", "where"),
    **_rules(keeps_inputs(1), "masked_fill"),
    **_rules(keeps_inputs(), "maximum", "minimum"),
    **_rules(_div_saved, "div", "true_divide"),
    **_rules(_pow_saved, "pow"),
    "aten.type_as": Rule(_first_only, keeps_nothing),
    "aten.dropout": Rule(_no_dropout, keeps_nothing),
}

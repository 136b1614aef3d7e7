"""Rules of operators that look along a dimension: sums, means, softmax, norms, losses.

Only a plain sum may leave a partial result. A mean divides by the size it sees, a maximum is not a sum, a softmax needs the whole row:
their dimensions are frozen.
"""

from __future__ import annotations

from seqloom.errors import UserError
from seqloom.ops.call import (
    Annotate,
    Call,
    Kept,
    Rule,
    Saved,
    Text,
    axes,
    axis,
    keeps_inputs,
    keeps_nothing,
    keeps_output,
    names,
    replaced,
    write,
)

_REDUCTIONS = ("none", "mean", "sum")
_KEEPDIM_AT = {"aten.var": 3}


def _reduce(mark: str, results: int = 1) -> Annotate:
    def annotate(call: Call) -> Text:
        words = names(len(call.shape()))
        over = axes(call.arg(1, "dim"), len(words))
        keep = bool(call.arg(_KEEPDIM_AT.get(call.base, 2), "keepdim", False))
        output = ["1" if i in over else word for i, word in enumerate(words) if keep or i not in over]
        return write([[word + mark if i in over else word for i, word in enumerate(words)]], [output] * results)

    return annotate


def _extreme(call: Call) -> Text:
    """`max` of everything, along a dimension (values and indices), or of two tensors."""
    if call.overload == "other":
        raise UserError(f"operator '{call.op}' has no rule: use torch.maximum or torch.minimum for two tensors")
    return _reduce("^", 1 if call.overload == "default" else 2)(call)


def _along(call: Call) -> Text:
    """Output shaped like the input, every element of the row needed."""
    words = names(len(call.shape()))
    dim = axis(call.arg(1, "dim"), len(words))
    marked = replaced(words, dim, words[dim] + "^")
    return write([marked], [marked])


def _reordered(call: Call) -> Text:
    """`flip` and `roll`: the dimensions they move along are frozen, all of them for a roll of the flattened tensor."""
    words = names(len(call.shape()))
    over = axes(call.arg(2 if call.base == "aten.roll" else 1, "dims"), len(words))
    marked = [word + "^" if i in over else word for i, word in enumerate(words)]
    return write([marked], [marked])


def _normalized(call: Call) -> Text:
    """`layer_norm` and `rms_norm`: the trailing `normalized_shape` is frozen; weight and bias have that shape."""
    words, count = names(len(call.shape())), len(call.arg(1, "normalized_shape"))
    marked = [word if i < len(words) - count else word + "^" for i, word in enumerate(words)]
    return write([marked, *[marked[-count:]] * (len(call.tensors) - 1)], [marked])


def _class_loss(call: Call) -> Text:
    """`cross_entropy_loss` and `nll_loss_nd`: classes are frozen; a sum over positions may be partial, a mean may not."""
    words = names(len(call.shape()))
    at = 1 if len(words) > 1 else 0
    reduction = _REDUCTIONS[call.arg(3, "reduction", 1)]
    mark = {"none": "", "sum": "+", "mean": "^"}[reduction]
    logits = [word + ("^" if i == at else mark) for i, word in enumerate(words)]
    positions = [word for i, word in enumerate(logits) if i != at]
    if len(call.shape(1)) == len(words):
        raise UserError(f"operator '{call.op}' with class probabilities as targets has no rule: give it class indices")
    if len(call.tensors) > 2:
        raise UserError(f"operator '{call.op}' with class weights has no rule: weight the per-token losses instead")
    return write([logits, positions], [positions if reduction == "none" else []])


def _class_loss_saved(call: Call) -> list[Kept]:
    # Cross entropy keeps its log-probabilities, a tensor of their own.
    return [("input" if call.base == "aten.nll_loss_nd" else "like_input", 0), ("input", 1)]


def _rules(annotate: Annotate, saved: Saved, *ops: str) -> dict[str, Rule]:
    return {f"aten.{op}": Rule(annotate, saved) for op in ops}


RULES: dict[str, Rule] = {
    **_rules(_reduce("+"), keeps_nothing, "sum"),
    **_rules(_reduce("^"), keeps_nothing, "mean", "argmax", "argmin", "any", "all"),
    **_rules(_reduce("^"), keeps_inputs(0), "var"),
    **_rules(_reduce("^"), lambda call: [("input", 0), ("output", 0)], "amax", "amin", "logsumexp"),
    **_rules(_extreme, lambda call: [("output", 1)] if call.overload == "dim" else [("input", 0), ("output", 0)], "max", "min"),
    **_rules(_along, keeps_output, "softmax", "log_softmax", "_softmax", "_log_softmax"),
    **_rules(_along, keeps_nothing, "cumsum"),
    **_rules(_reordered, keeps_nothing, "flip", "roll"),
    **_rules(_normalized, keeps_inputs(), "layer_norm", "rms_norm"),
    **_rules(_class_loss, _class_loss_saved, "cross_entropy_loss", "nll_loss_nd"),
}

"""Rules of contractions. The contracted dimension is summed over (`+`), unless a bias is added to the sum: then it is frozen."""

from __future__ import annotations

import torch

from seqloom.errors import UserError
from seqloom.ops.call import Call, Kept, Rule, Text, keeps_factors, names, write

CONTRACTIONS = ("aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.einsum")


def _linear(call: Call) -> Text:
    if len(call.tensors) == 3:
        return Text("* i^, o i^, o -> * o", {})  # a split contraction would add the bias once per piece
    return Text("* i+, o i+ -> * o", {})


def _addmm(call: Call) -> Text:
    bias, target = call.shape(0), (call.shape(1)[0], call.shape(2)[1])
    words = [name if size == full else "1" for name, size, full in zip("mn"[-len(bias) :], bias, target[-len(bias) :], strict=True)]
    return write([words if bias else [], ["m", "k^"], ["k^", "n"]], [["m", "n"]])


def _matmul(call: Call) -> Text:
    """`torch.matmul` for any ranks: leading dimensions broadcast, vectors count as one row or column."""
    left, right = call.shape(0), call.shape(1)
    batch = torch.broadcast_shapes(left[:-2], right[:-2])
    words = names(len(batch))

    def leading(shape: tuple[int, ...]) -> list[str]:
        own, skip = shape[:-2], len(batch) - len(shape[:-2])
        return [words[skip + i] if size == batch[skip + i] else "1" for i, size in enumerate(own)]

    rows, columns = ["y"] * (len(left) > 1), ["z"] * (len(right) > 1)
    return write([[*leading(left), *rows, "x+"], [*leading(right), "x+", *columns]], [[*words, *rows, *columns]])


def _einsum(call: Call) -> Text:
    """The equation is the annotation; names that are not in the output are summed over."""
    equation = call.args[0].replace(" ", "")
    if "->" not in equation or "." in equation:
        raise UserError(f"einsum equation '{call.args[0]}' cannot be captured: write the output after '->' and no '...'")
    sides = equation.split("->")
    marked = [[name if name in sides[1] else f"{name}+" for name in operand] for operand in sides[0].split(",")]
    return write(marked, [list(sides[1])])


def _addmm_saved(call: Call) -> list[Kept]:
    factors = call.tensors[1:]
    return [("input", i + 1) for i in (0, 1) if call.grad(factors[1 - i])]


RULES: dict[str, Rule] = {
    "aten.linear": Rule(_linear, keeps_factors),
    "aten.mm": Rule(lambda call: Text("m k+, k+ n -> m n", {}), keeps_factors),
    "aten.bmm": Rule(lambda call: Text("b m k+, b k+ n -> b m n", {}), keeps_factors),
    "aten.matmul": Rule(_matmul, keeps_factors),
    "aten.addmm": Rule(_addmm, _addmm_saved),
    "aten.einsum": Rule(_einsum, keeps_factors),
}

"""Rules of operators that cut, join, look up or make tensors. A dimension that is cut or joined changes its size: it is a constant."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from seqloom.graph import Ref
from seqloom.ops.call import Annotate, Call, Rule, Saved, Text, axis, keeps_inputs, keeps_nothing, names, replaced, write


def _embedding(call: Call) -> Text:
    """`weight[n, d], indices[*] -> [*, d]`; scaling gradients by frequency would need the counts of all indices."""
    return Text("n^ d, *^ -> *^ d" if call.arg(3, "scale_grad_by_freq", False) else "n^ d, * -> * d", {})


def _cat(call: Call) -> Text:
    shapes = [call.shape_of(tensor) for tensor in call.args[0]]
    words, dim = names(len(shapes[0])), axis(call.arg(1, "dim", 0), len(shapes[0]))
    inputs = [replaced(words, dim, str(shape[dim])) for shape in shapes]
    return write(inputs, [replaced(words, dim, str(sum(shape[dim] for shape in shapes)))])


def _stack(call: Call) -> Text:
    words = names(len(call.shape_of(call.args[0][0])))
    dim = axis(call.arg(1, "dim", 0), len(words) + 1)
    return write([words] * len(call.args[0]), [[*words[:dim], str(len(call.args[0])), *words[dim:]]])


def _pieces(call: Call, dim: int, sizes: Sequence[int]) -> Text:
    """The dimension cut into pieces of these sizes, one output each; left as it is where the one piece is the whole."""
    shape, words = call.shape(), names(len(call.shape()))
    if list(sizes) == [shape[dim]]:
        return write([words], [words])
    return write([replaced(words, dim, str(shape[dim]))], [replaced(words, dim, str(size)) for size in sizes])


def _slice(call: Call) -> Text:
    dim = axis(call.arg(1, "dim", 0), len(call.shape()))
    kept = range(call.shape()[dim])[slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))]
    return _pieces(call, dim, [len(kept)])


def _narrow(call: Call) -> Text:
    return _pieces(call, axis(call.arg(1, "dim"), len(call.shape())), [call.arg(3, "length")])


def _split(call: Call) -> Text:
    dim = axis(call.arg(2, "dim", 0), len(call.shape()))
    size, sizes = call.shape()[dim], call.arg(1, "split_size")
    if isinstance(sizes, int):
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)]
    return _pieces(call, dim, sizes)


def _chunk(call: Call) -> Text:
    dim = axis(call.arg(2, "dim", 0), len(call.shape()))
    size = call.shape()[dim]
    step = ceil(size / call.arg(1, "chunks"))
    return _pieces(call, dim, [min(step, size - start) for start in range(0, size, step)])


def _select(call: Call) -> Text:
    words = names(len(call.shape()))
    dim = axis(call.arg(1, "dim"), len(words))
    return write([replaced(words, dim, str(call.shape()[dim]))], [replaced(words, dim)])


def _unbind(call: Call) -> Text:
    words = names(len(call.shape()))
    dim = axis(call.arg(1, "dim", 0), len(words))
    size = call.shape()[dim]
    return write([replaced(words, dim, str(size))], [replaced(words, dim)] * size)


def _index_select(call: Call) -> Text:
    words = names(len(call.shape()))
    dim = axis(call.arg(1, "dim"), len(words))
    return write([replaced(words, dim, "n^"), ["k"]], [replaced(words, dim, "k")])


def _gather(call: Call) -> Text:
    """`input.gather(dim, index)`: the dimension looked along is frozen in the input; where index is smaller, both are constants."""
    source, index = call.shape(0), call.shape(2)
    dim, words = axis(call.arg(1, "dim"), len(source)), names(len(source))
    same = [i != dim and source[i] == index[i] for i in range(len(source))]
    sides = [[word if same[i] else str(shape[i]) for i, word in enumerate(words)] for shape in (source, index)]
    sides[1] = replaced(sides[1], dim, words[dim]) if source else []
    return write(sides, [sides[1]])


def _diff(call: Call) -> Text:
    """Differences along a dimension, with what is put before and after it."""
    rank = len(call.shape())
    dim, words = axis(call.arg(2, "dim", -1), rank), names(rank)
    lengths = [call.shape_of(tensor)[dim] for tensor in call.tensors]
    return write([replaced(words, dim, str(size)) for size in lengths], [replaced(words, dim, str(sum(lengths) - call.arg(1, "n", 1)))])


def _triangle(call: Call) -> Text:
    words = names(len(call.shape()))
    marked = [*words[:-2], words[-2] + "^", words[-1] + "^"]
    return write([marked], [marked])


def _one_hot(call: Call) -> Text:
    words = names(len(call.shape()))
    return write([words], [[*words, str(call.arg(1, "num_classes"))]])


def _arange(call: Call) -> Text:
    bounds: tuple[Any, ...] = tuple(value for value in call.args if not isinstance(value, Ref))
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    return write([], [[str(ceil((end - start) / step))]])


def _made(call: Call) -> Text:
    """A tensor made from nothing but its sizes."""
    return write([], [[str(size) for size in call.arg(0, "size", ())]])


def _made_like(call: Call) -> Text:
    """A new tensor that takes only dtype and device from the first."""
    return write([None], [[str(size) for size in call.arg(1, "size")]])


def _scalar(call: Call) -> Text:
    return write([], [[]])


def _rules(annotate: Annotate, *ops: str, saved: Saved = keeps_nothing, view: bool = False) -> dict[str, Rule]:
    return {f"aten.{op}": Rule(annotate, saved, view) for op in ops}


RULES: dict[str, Rule] = {
    **_rules(_embedding, "embedding", saved=keeps_inputs(1)),
    **_rules(_cat, "cat", "concat"),
    **_rules(_stack, "stack"),
    **_rules(_slice, "slice", view=True),
    **_rules(_narrow, "narrow", view=True),
    **_rules(_split, "split", "split_with_sizes", view=True),
    **_rules(_chunk, "chunk", view=True),
    **_rules(_select, "select", view=True),
    **_rules(_unbind, "unbind", view=True),
    **_rules(_index_select, "index_select", saved=keeps_inputs(1)),
    **_rules(_gather, "gather", saved=keeps_inputs()),
    **_rules(_diff, "diff"),
    **_rules(_triangle, "tril", "triu"),
    **_rules(_one_hot, "one_hot"),
    **_rules(_arange, "arange"),
    **_rules(_made, "zeros", "ones", "full", "empty"),
    **_rules(_made_like, "new_zeros", "new_ones", "new_full", "new_empty"),
    **_rules(_scalar, "scalar_tensor"),
}

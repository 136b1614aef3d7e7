"""Rules of operators that move or rename dimensions: views, permutations, broadcasts.

A reshape is an annotation like any other: input and output sizes are cut into common factors, so that `[1, 128, 64] -> [1, 128, 4, 16]`
is `1 a (b c) -> 1 a b c`, and a split of the 64 by at most 4 is a split of the heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod
from typing import Any

from seqloom.ops.call import Annotate, Call, Rule, Shape, Text, Word, axes, axis, base_name, keeps_nothing, names, replaced, write

_SIZED = {"aten.view": "size", "aten.reshape": "shape", "aten._unsafe_view": "size", "aten.expand": "size"}


def reshape_text(source: Shape, target: Shape) -> Text:
    """Annotation of a reshape: see the module. Where factors do not nest, only the common leading factor can be split."""
    sizes: dict[Word, int] = {}
    ins: list[Word] = []
    outs: list[Word] = []
    if 0 in source:
        return write([[str(size) for size in source]], [[str(size) for size in target]])
    for left, right in _segments(source, target):
        new_ins, new_outs = _segment_words(left, right, sizes)
        ins += new_ins
        outs += new_outs
    return write([ins], [outs], sizes)


def _segments(source: Shape, target: Shape) -> Iterator[tuple[Shape, Shape]]:
    """The shortest runs of dimensions, left to right, that hold the same elements; sizes 1 stand alone where they can."""
    i = j = 0
    while i < len(source) or j < len(target):
        if i < len(source) and source[i] == 1:
            yield (1,), ()
            i += 1
        elif j < len(target) and target[j] == 1:
            yield (), (1,)
            j += 1
        else:
            left, right = i + 1, j + 1
            while prod(source[i:left]) != prod(target[j:right]):
                if prod(source[i:left]) < prod(target[j:right]):
                    left += 1
                else:
                    right += 1
            yield source[i:left], target[j:right]
            i, j = left, right


def _segment_words(left: Shape, right: Shape, sizes: dict[Word, int]) -> tuple[list[Word], list[Word]]:
    """Words of one run of dimensions; new names go into `sizes`."""

    def name(size: int) -> Word:
        if size == 1:
            return "1"
        word = names(len(sizes) + 1)[-1]
        sizes[word] = size
        return word

    def group(words: Sequence[Word]) -> Word:
        parts = [word for word in words if word != "1"]
        return parts[0] if len(parts) == 1 else f"({' '.join(parts)})"

    if not left or not right:
        return ["1"] * len(left), ["1"] * len(right)
    if len(left) == 1:
        words = [name(size) for size in right]
        return [group(words)], words
    if len(right) == 1:
        words = [name(size) for size in left]
        return words, [group(words)]
    common = gcd(left[0], right[0])
    shared = name(common)
    sides = [[f"({shared} {side[0] // common})", *map(str, side[1:])] for side in (left, right)]
    return sides[0], sides[1]


def resolve_sizes(source: Shape, sizes: Sequence[int]) -> Shape:
    """Target sizes with -1 replaced by what is left."""
    known = prod(size for size in sizes if size != -1)
    return tuple(prod(source) // known if size == -1 else size for size in sizes)


def with_output_shape(op: str, args: tuple[Any, ...], kwargs: dict[str, Any], shape: Shape) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call whose output has another shape (a rank's own): only views and
    expand carry sizes, others are unchanged."""
    base = base_name(op)
    if base == "aten.unflatten":
        dim, parts = axis(args[1], len(shape) - len(args[2]) + 1), len(args[2])
        return replaced(args, 2, tuple(shape[dim : dim + parts])), kwargs
    name = _SIZED.get(base)
    if name is None:
        return args, kwargs
    if name in kwargs:
        return args, {**kwargs, name: tuple(shape)}
    return replaced(args, 1, tuple(shape)), kwargs


def _view(call: Call) -> Text:
    sizes = call.arg(1, _SIZED[call.base])
    return reshape_text(call.shape(), resolve_sizes(call.shape(), sizes))


def _flatten(call: Call) -> Text:
    shape = call.shape()
    first, last = axis(call.arg(1, "start_dim", 0), len(shape)), axis(call.arg(2, "end_dim", -1), len(shape))
    return reshape_text(shape, (*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :]))


def _unflatten(call: Call) -> Text:
    shape = call.shape()
    dim = axis(call.arg(1, "dim"), len(shape))
    return reshape_text(shape, (*shape[:dim], *resolve_sizes((shape[dim],), call.arg(2, "sizes")), *shape[dim + 1 :]))


def _expand(call: Call) -> Text:
    """A dimension that grows from 1 is new in the output: each rank can make its own part of it."""
    shape, sizes = call.shape(), call.arg(1, "size")
    added = len(sizes) - len(shape)
    words, new = names(len(sizes)), {}
    inputs = list(words[added:])
    for i, size in enumerate(sizes):
        if i < added or (size not in (-1, shape[i - added]) and shape[i - added] == 1):
            new[words[i]] = size
            if i >= added:
                inputs[i - added] = "1"
    return write([inputs], [words], new)


def _permuted(order: Sequence[int], rank: int) -> Text:
    words = names(rank)
    return write([words], [[words[axis(dim, rank)] for dim in order]])


def _permute(call: Call) -> Text:
    return _permuted(call.arg(1, "dims"), len(call.shape()))


def _transpose(call: Call) -> Text:
    rank = len(call.shape())
    a, b = axis(call.arg(1, "dim0"), rank), axis(call.arg(2, "dim1"), rank)
    order = list(range(rank))
    order[a], order[b] = b, a
    return _permuted(order, rank)


def _t(call: Call) -> Text:
    rank = len(call.shape())
    return _permuted([*range(rank - 2), *range(rank - 1, max(rank - 3, -1), -1)], rank)


def _unsqueeze(call: Call) -> Text:
    words = names(len(call.shape()))
    dim = axis(call.arg(1, "dim"), len(words) + 1)
    return write([words], [[*words[:dim], "1", *words[dim:]]])


def _squeeze(call: Call) -> Text:
    """Dimensions of size 1 go. A larger one that is named too is frozen: a piece of it could have size 1."""
    shape, words = call.shape(), names(len(call.shape()))
    over = axes(call.arg(1, "dim"), len(shape))
    marked = [word if i not in over else "1" if shape[i] == 1 else word + "^" for i, word in enumerate(words)]
    return write([marked], [[word for word in marked if word != "1"]])


def _repeat_interleave(call: Call) -> Text:
    """Each element `repeats` times in a row: `a -> (a 2)`, so the dimension may be split."""
    words, repeats = names(len(call.shape())), call.arg(1, "repeats")
    dim = axis(call.arg(2, "dim"), len(words))
    return write([words], [replaced(words, dim, f"({words[dim]} {repeats})")])


def _repeat(call: Call) -> Text:
    """The whole dimension `repeats` times: pieces of it would lie interleaved, so a repeated dimension is frozen."""
    shape, repeats = call.shape(), call.arg(1, "repeats")
    added = len(repeats) - len(shape)
    words = names(len(shape))
    inputs = [word if repeats[added + i] == 1 else str(shape[i]) for i, word in enumerate(words)]
    grown = [word if repeats[added + i] == 1 else str(shape[i] * repeats[added + i]) for i, word in enumerate(words)]
    return write([inputs], [[*map(str, repeats[:added]), *grown]])


def _rules(annotate: Annotate, *ops: str, view: bool = True) -> dict[str, Rule]:
    return {f"aten.{op}": Rule(annotate, keeps_nothing, view) for op in ops}


RULES: dict[str, Rule] = {
    **_rules(_view, "view", "reshape", "_unsafe_view"),
    **_rules(_flatten, "flatten"),
    **_rules(_unflatten, "unflatten"),
    **_rules(_expand, "expand"),
    **_rules(_permute, "permute"),
    **_rules(_transpose, "transpose", "swapaxes"),
    **_rules(_t, "t", "mT"),
    **_rules(_unsqueeze, "unsqueeze"),
    **_rules(_squeeze, "squeeze"),
    **_rules(_repeat_interleave, "repeat_interleave", view=False),
    **_rules(_repeat, "repeat", view=False),
}

"""One operator call as the rules see it, and the small vocabulary in which they write annotations.

A rule is a function from a `Call` (arguments and shapes) to a `Text`: an annotation in the language of `seqloom.annotation`. The `Rule`
also says what autograd keeps for the backward pass and whether the output is a view of the first input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, Literal

from seqloom.graph import Ref

Shape = tuple[int, ...]
Word = str
Kept = tuple[Literal["input", "output", "like_input"], int]


@dataclass(frozen=True)
class Call:
    """Arguments of one operator; tensors are `Ref`s with their shapes in `shapes` and, in `needs_grad`, whether a gradient flows there."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    needs_grad: Mapping[str, bool]

    @property
    def base(self) -> str:
        """The operator without its overload: `aten.add` of `aten.add.Tensor`."""
        return base_name(self.op)

    @property
    def overload(self) -> str:
        """`Tensor` of `aten.add.Tensor`."""
        return self.op.rpartition(".")[2]

    @property
    def tensors(self) -> list[Ref]:
        """Tensor arguments in order: positional ones, then keywords."""
        return list(_refs((self.args, tuple(self.kwargs.values()))))

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def shape(self, index: int = 0) -> Shape:
        """Shape of a positional tensor argument."""
        return self.shapes[self.args[index].name]

    def shape_of(self, tensor: Ref) -> Shape:
        """Shape of a tensor argument."""
        return self.shapes[tensor.name]

    def grad(self, tensor: Ref) -> bool:
        """Whether a gradient flows to a tensor argument (assumed where nothing is known)."""
        return self.needs_grad.get(tensor.name, True)


@dataclass(frozen=True)
class Text:
    """An annotation and the sizes of names that do not follow from the input shapes."""

    text: str
    sizes: Mapping[str, int]


Annotate = Callable[[Call], Text]
Saved = Callable[[Call], list[Kept]]


@dataclass(frozen=True)
class Rule:
    """What the compiler knows about an operator: its annotation, what backward keeps, whether the output aliases input 0."""

    annotate: Annotate
    saved: Saved
    view: bool = False


def base_name(op: str) -> str:
    """`aten.add` of `aten.add.Tensor`."""
    return op.rpartition(".")[0]


def write(inputs: Sequence[Sequence[Word] | None], outputs: Sequence[Sequence[Word]], sizes: Mapping[str, int] | None = None) -> Text:
    """An annotation from words per dimension; None is `?`."""
    sides = (", ".join("?" if words is None else " ".join(words) or "()" for words in side) for side in (inputs, outputs))
    return Text(" -> ".join(sides), sizes or {})


def names(count: int) -> list[Word]:
    """`a b c ...`: one name per dimension."""
    return list(ascii_lowercase[:count])


def axis(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim + rank if dim < 0 else dim


def axes(dims: int | Sequence[int] | None, rank: int) -> set[int]:
    """Dimensions counted from the front; None or nothing means all."""
    if isinstance(dims, int):
        dims = [dims]
    return {axis(dim, rank) for dim in dims} if dims else set(range(rank))


def replaced(words: Sequence[Word], index: int, *new: Word) -> list[Word]:
    """The words with the one at `index` replaced by others, or by none."""
    return [*words[:index], *new, *words[index + 1 :]]


def _refs(tree: Any) -> Iterator[Ref]:
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _refs(item)


# --- what backward keeps ---------------------------------------------------------------------------------------------------------


def keeps_nothing(call: Call) -> list[Kept]:
    """Backward needs shapes only."""
    return []


def keeps_inputs(*indices: int) -> Saved:
    """Backward needs these tensor inputs (those that exist); all of them when none is named."""

    def saved(call: Call) -> list[Kept]:
        count = len(call.tensors)
        return [("input", i) for i in (indices or range(count)) if i < count]

    return saved


def keeps_output(call: Call) -> list[Kept]:
    """Backward needs the result."""
    return [("output", 0)]


def keeps_factors(call: Call) -> list[Kept]:
    """A product of two tensors keeps each one for the gradient of the other; a product with a number keeps nothing."""
    tensors = call.tensors
    if len(tensors) < 2:
        return []
    return [("input", i) for i in (0, 1) if call.grad(tensors[1 - i])]

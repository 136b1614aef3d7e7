"""The annotation language: which dimensions an operator has, and which of them may be split.

Role in the pipeline: `ops` writes one annotation per operator, `capture` binds it to the shapes of a node (`Bound`), and `plan` turns
every `Split` of a bound annotation into a strategy. In: a text such as `* i+, o i+ -> * o`. Out: shapes, and the dimensions that a
name leads in each tensor.

Grammar: `inputs -> outputs`; shapes are separated by `,`, dimensions by spaces.

| text | meaning |
|---|---|
| `a` | a dimension that may be split |
| `a+` | a dimension the operator sums over: splitting it leaves a partial sum in every output |
| `a^` | a dimension that may not be split |
| `(h d)` | one dimension made of several: only its first name of size other than 1 may be split, the others are frozen everywhere |
| `4` | a dimension of that size, never split |
| `*` | any number of leading dimensions, the same everywhere (named `*0`, `*1`, ... once bound); takes a mark like a name |
| `?` | an input that is not split, tensor or not |
| `()`, or nothing | a scalar: `a+ -> ()` and `a+ ->` are the same; but nothing at all left of the arrow means no inputs |

A name behind the first one of its groups can still be split where the names in front of it are split down to size 1 already: then it is the
first of what is left. `Bound.splits(nested=True)` gives these splits too, each with the names it comes `after`.

A name has one mark everywhere. A name without a mark stands in every output (or the operator would owe a sum: `+`, or a freeze: `^`).

Everything a user can get wrong raises `AnnotationError`, a `UserError`, whose message ends with the text and a caret under the spot:
a malformed text, two marks for one name, `+` in an output, shapes that do not fit, sizes that contradict each other, and sizes that
follow from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from seqloom.grammar import AnnotationError, Dim, Dims, all_dims, frozen_by_groups, parse

__all__ = ["Annotation", "AnnotationError", "Bound", "Split"]

Shape = Sequence[int]


@dataclass(frozen=True)
class Split:
    """One way to cut an operator: `name` into at most `size` pieces.

    `input_dims[i]` / `output_dims[j]` is the dimension that the name lies in in that tensor, None where the tensor does not have it.
    With `reduced` every output becomes a partial sum. The names in `after` must be split down to size 1 by outer mesh axes before this
    one may be split: they stand in front of it in its groups.
    """

    name: str
    size: int
    input_dims: tuple[int | None, ...]
    output_dims: tuple[int | None, ...]
    reduced: bool
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bound:
    """An annotation with every size known.

    Per tensor a tuple of dimensions, each a tuple of names (constants are named by their digits), None for `?`. `named_sizes` are
    (name, size) pairs in order of appearance; `frozen` names may not be split, `reduced` names are summed over. `nested` pairs those frozen
    names that may be split after others with these others.
    """

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    named_sizes: tuple[tuple[str, int], ...]
    frozen: frozenset[str] = frozenset()
    reduced: frozenset[str] = frozenset()
    nested: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Size of every name."""
        return dict(self.named_sizes)

    def size(self, dim: Dim) -> int:
        """Size of a dimension: the product of its names; a constant's name is its own value."""
        return prod(self.sizes[name] if name in self.sizes else int(name) for name in dim)

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Sizes of all dimensions of one tensor."""
        return tuple(self.size(dim) for dim in dims)

    def splits(self, nested: bool = False) -> tuple[Split, ...]:
        """One `Split` per name that may be split and is larger than 1, in order of appearance.

        With `nested` also those that may be split only `after` others.
        """
        return self._splits if nested else self._free_splits

    @cached_property
    def _free_splits(self) -> tuple[Split, ...]:
        return tuple(split for split in self._splits if not split.after)

    @cached_property
    def _splits(self) -> tuple[Split, ...]:
        after = dict(self.nested)
        return tuple(
            Split(
                name,
                size,
                tuple(None if dims is None else _index(dims, name) for dims in self.inputs),
                tuple(_index(dims, name) for dims in self.outputs),
                name in self.reduced,
                after.get(name, ()),
            )
            for name, size in self.named_sizes
            if size > 1 and (name not in self.frozen or name in after)
        )


@dataclass(frozen=True)
class Annotation:
    """A parsed annotation; two are equal when their normal forms are. Make one with `Annotation.parse`.

    `inputs` and `outputs` are like those of `Bound` with `*` as one dimension; `marks` is the mark of every name after the group rule.
    The other fields remember the text as it was written: `bind` needs the written marks where a group's first name has size 1.
    """

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    marks: tuple[tuple[str, str], ...]
    written: tuple[tuple[str, str], ...] = field(compare=False, repr=False)
    text: str = field(compare=False, repr=False)
    places: tuple[tuple[int, ...], ...] = field(compare=False, repr=False)

    @staticmethod
    def parse(text: str) -> Annotation:
        """Read an annotation. Raises `AnnotationError` with a caret under what is malformed or contradicts itself."""
        parsed = parse(text)
        return Annotation(parsed.inputs, parsed.outputs, parsed.marks, parsed.written, parsed.text, parsed.places)

    def __str__(self) -> str:
        """The normal form: marks as the group rule leaves them, one space between words, `()` for a scalar."""
        marks = dict(self.marks)
        sides = [[_shape_text(dims, marks) for dims in side] for side in (self.inputs, self.outputs)]
        return " -> ".join(", ".join(side) for side in sides).strip()

    def splittable(self) -> list[tuple[int, int]]:
        """`(input_index, dim_index)` of the first place of each name that may be split; `*` counts as one dimension."""
        marks, found = dict(self.marks), {}
        for i, dims in enumerate(self.inputs):
            for j, dim in enumerate(dims or ()):
                for name in dim:
                    if marks.get(name, "^") != "^":
                        found.setdefault(name, (i, j))
        return list(found.values())

    def infer(self, input_shapes: Sequence[Shape | None], **sizes: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the outputs from the shapes of the inputs (None for `?`) and sizes by name. Raises as `bind` does."""
        bound = self.bind(input_shapes, **sizes)
        return tuple(bound.shape(dims) for dims in bound.outputs)

    def bind(self, input_shapes: Sequence[Shape | None], output_shapes: Sequence[Shape] | None = None, **sizes: int) -> Bound:
        """Give every name its size: from the shapes, from the other names of a group, or from a keyword.

        `input_shapes` has one shape per input, None where the input is `?`. Raises `AnnotationError` for a wrong number of tensors or
        dimensions, for sizes that contradict each other (naming both and where), and for a size that follows from nothing.
        """
        return _Binder(self, input_shapes, output_shapes, sizes).bound()


def _index(dims: Dims, name: str) -> int | None:
    return next((i for i, dim in enumerate(dims) if name in dim), None)


def _nested(dims: Sequence[Dim], sizes: Mapping[str, int], free: set[str], candidates: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which candidates may be split after others: name -> the names in front of it, the same in every group where it is not the first.

    A constant in front is never split, nor is a name that waits for itself, so what stands behind these stays frozen.
    """
    fronts = {name: {_front(dim, name, sizes) for dim in dims if name in dim} - {()} for name in candidates}
    waiting = {name: next(iter(front)) for name, front in fronts.items() if len(front) == 1}
    found: dict[str, tuple[str, ...]] = {}
    while True:
        ready = {name: after for name, after in waiting.items() if name not in found and free.union(found).issuperset(after)}
        if not ready:
            return found
        found.update(ready)


def _front(dim: Dim, name: str, sizes: Mapping[str, int]) -> Dim:
    """Names of size other than 1 in front of a name in its dimension."""
    return tuple(other for other in dim[: dim.index(name)] if (int(other) if other.isdigit() else sizes[other]) != 1)


def _shape_text(dims: Dims | None, marks: Mapping[str, str]) -> str:
    if dims is None:
        return "?"
    words = [[name + marks.get(name, "") for name in dim] for dim in dims]
    return " ".join(word[0] if len(word) == 1 else f"({' '.join(word)})" for word in words) or "()"


# --- binding ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Equation:
    """The product of `names` is `size`, because of the tensor and dimension described by `where`; `at` is its place in the text."""

    names: Dim
    size: int
    where: str
    at: int


class _Binder:
    """Solves the equations that shapes and keywords give for the names of one annotation."""

    def __init__(
        self, note: Annotation, inputs: Sequence[Shape | None], outputs: Sequence[Shape] | None, keywords: Mapping[str, int]
    ) -> None:
        self.note, self.keywords = note, dict(keywords)
        self._check_count("input", note.inputs, inputs)
        shapes: list[Shape | None] = list(inputs)
        if outputs is not None:
            self._check_count("output", note.outputs, outputs)
        shapes += outputs if outputs is not None else [None] * len(note.outputs)
        tensors = [f"input {i}" for i in range(len(note.inputs))] + [f"output {i}" for i in range(len(note.outputs))]
        self.shapes, self.tensors = shapes, tensors
        self.stars: int | None = None
        self.star_tensor = ""
        self.dims = [self._expand(i, dims) for i, dims in enumerate((*note.inputs, *note.outputs))]
        self.sizes: dict[str, int] = {}
        self.origin: dict[str, str] = {}

    def bound(self) -> Bound:
        """Solve, check, and apply the group rule with the sizes known."""
        count = len(self.note.inputs)
        names = dict.fromkeys(name for dims in self.dims for dim in dims or () for name in dim if not name.isdigit())
        self._take_keywords(names)
        self._solve(list(self._equations()))
        for name in names:
            if name not in self.sizes:
                raise self._error(f"the size of '{name}' follows from nothing: pass it as {name}=", self._place_of(name))
        written = {name: dict(self.note.written).get(name[0] if name[0] == "*" else name, "") for name in names}
        outputs = tuple(dims or () for dims in self.dims[count:])
        fixed = {name for name in names if written[name] == "^"}
        # A name that the group rule freed because the one before it has size 1 was not checked when the text was parsed.
        fixed |= {name for name in names if written[name] == "" and any(_index(dims, name) is None for dims in outputs)}
        fixed |= {name for name in names if any(sum(dim.count(name) for dim in dims or ()) > 1 for dims in self.dims)}
        frozen = fixed | frozen_by_groups(all_dims([self.dims]), self.sizes)
        nested = _nested(list(all_dims([self.dims])), self.sizes, set(names) - frozen, [n for n in names if n in frozen - fixed])
        reduced = frozenset(name for name in names if written[name] == "+" and (name not in frozen or name in nested))
        sizes = tuple((n, self.sizes[n]) for n in names)
        return Bound(tuple(self.dims[:count]), outputs, sizes, frozenset(frozen), reduced, tuple(nested.items()))

    def _check_count(self, kind: str, dims: Sequence[object], shapes: Sequence[object]) -> None:
        if len(dims) != len(shapes):
            at = 0 if kind == "input" else self.note.text.index("->") + 2
            raise self._error(f"the annotation has {len(dims)} {kind}s, not {len(shapes)}", at)

    def _expand(self, tensor: int, dims: Dims | None) -> Dims | None:
        """Replace `*` by one name per leading dimension and check the number of dimensions."""
        if dims is None:
            return None
        shape, starred = self.shapes[tensor], bool(dims) and dims[0] == ("*",)
        if shape is None and tensor < len(self.note.inputs):
            raise self._tensor_error(tensor, "is not a tensor, but only '?' may stand for such an argument")
        if shape is not None and starred and len(shape) < len(dims) - 1:
            raise self._tensor_error(tensor, f"has {len(shape)} dimensions {tuple(shape)}, but the annotation at least {len(dims) - 1}")
        if shape is not None and starred:
            leading = len(shape) - len(dims) + 1
            if self.stars is None:
                self.stars, self.star_tensor = leading, self.tensors[tensor]
            if leading != self.stars:
                raise self._tensor_error(tensor, f"has {leading} dimensions for '*', but {self.star_tensor} has {self.stars}")
        full = tuple((f"*{i}",) for i in range(self.stars or 0)) + dims[1:] if starred else dims
        if shape is not None and len(full) != len(shape):
            raise self._tensor_error(tensor, f"has {len(shape)} dimensions {tuple(shape)}, but the annotation has {len(full)} for it")
        return full

    def _equations(self) -> Iterator[_Equation]:
        for i, (dims, shape) in enumerate(zip(self.dims, self.shapes, strict=True)):
            if dims is not None and shape is not None:
                for j, (dim, size) in enumerate(zip(dims, shape, strict=True)):
                    yield _Equation(dim, int(size), f"{self.tensors[i]}, dimension {j}", self._at(i, j))

    def _take_keywords(self, names: Mapping[str, None]) -> None:
        for name, size in self.keywords.items():
            if name not in names:
                raise self._error(f"the annotation has no name '{name}' to take the size {size}", 0)
            self.sizes[name], self.origin[name] = size, "the keyword"

    def _solve(self, equations: list[_Equation]) -> None:
        """Use each equation once it has at most one unknown, until none is left that helps."""
        waiting = equations
        while waiting:
            later = [equation for equation in waiting if not self._use(equation)]
            if len(later) == len(waiting):
                return
            waiting = later

    def _use(self, equation: _Equation) -> bool:
        unknown = [name for name in equation.names if not name.isdigit() and name not in self.sizes]
        if len(unknown) > 1:
            return False
        known = prod(int(name) if name.isdigit() else self.sizes[name] for name in equation.names if name not in unknown)
        if not unknown:
            if known != equation.size:
                raise self._contradiction(equation)
        elif known == 0 or equation.size % known:
            problem = f"{equation.where} has size {equation.size}, which {known} does not divide, so '{unknown[0]}' has no size"
            raise self._error(problem, equation.at)
        else:
            self.sizes[unknown[0]], self.origin[unknown[0]] = equation.size // known, equation.where
        return True

    def _contradiction(self, equation: _Equation) -> AnnotationError:
        names = [name for name in equation.names if not name.isdigit()]
        if len(equation.names) == 1 and names:
            name = names[0]
            problem = f"'{name}' is {self.sizes[name]} in {self.origin[name]}, but {equation.size} in {equation.where}"
        else:
            parts = " * ".join(n if n.isdigit() else f"{n}={self.sizes[n]} (from {self.origin[n]})" for n in equation.names)
            problem = f"{equation.where} has size {equation.size}, but the annotation makes it {parts}"
        return self._error(problem, equation.at)

    def _at(self, tensor: int, dim: int) -> int:
        """Place of a dimension in the text; all dimensions of one `*` share its place."""
        places = self.note.places[tensor]
        dims = (*self.note.inputs, *self.note.outputs)[tensor]
        if dims and dims[0] == ("*",):
            dim = max(0, dim - (self.stars or 0) + 1)
        return places[dim] if dim < len(places) else 0

    def _place_of(self, name: str) -> int:
        for tensor, dims in enumerate(self.dims):
            for j, dim in enumerate(dims or ()):
                if name in dim:
                    return self._at(tensor, j)
        return 0

    def _tensor_error(self, tensor: int, problem: str) -> AnnotationError:
        places = self.note.places[tensor]
        return self._error(f"{self.tensors[tensor]} {problem}", places[0] if places else 0)

    def _error(self, problem: str, at: int) -> AnnotationError:
        return AnnotationError(problem, self.note.text, at)

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
| nothing, or `()` | a scalar; nothing at all left of the arrow means no inputs, so a lone scalar input is written `()` |

A name has one mark everywhere. A name without a mark stands in every output (or the operator would owe a sum: `+`, or a freeze: `^`).

Everything a user can get wrong raises `AnnotationError`, a `UserError`, whose message ends with the text and a caret under the spot:
a malformed text, two marks for one name, `+` in an output, shapes that do not fit, sizes that contradict each other, and sizes that
follow from nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from seqloom.errors import UserError

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]
Shape = Sequence[int]

_ATOM = re.compile(r"([A-Za-z_][A-Za-z0-9_]*|\d+|\*)([+^]?)")


class AnnotationError(UserError):
    """An annotation that is malformed or does not fit the shapes; `text` is the annotation, `position` the index under the caret."""

    def __init__(self, problem: str, text: str, position: int) -> None:
        super().__init__(f"{problem}\n  {text}\n  {' ' * position}^")
        self.problem, self.text, self.position = problem, text, position


@dataclass(frozen=True)
class Split:
    """One way to cut an operator: `name` into at most `size` pieces.

    `input_dims[i]` / `output_dims[j]` is the dimension that the name leads in that tensor, None where the tensor does not have it.
    With `reduced` every output becomes a partial sum.
    """

    name: str
    size: int
    input_dims: tuple[int | None, ...]
    output_dims: tuple[int | None, ...]
    reduced: bool


@dataclass(frozen=True)
class Bound:
    """An annotation with every size known.

    Per tensor a tuple of dimensions, each a tuple of names (constants are named by their digits), None for `?`. `named_sizes` are
    (name, size) pairs in order of appearance; `frozen` names may not be split, `reduced` names are summed over.
    """

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    named_sizes: tuple[tuple[str, int], ...]
    frozen: frozenset[str] = frozenset()
    reduced: frozenset[str] = frozenset()

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

    def splits(self) -> tuple[Split, ...]:
        """One `Split` per name that may be split and is larger than 1, in order of appearance."""
        return self._splits

    @cached_property
    def _splits(self) -> tuple[Split, ...]:
        return tuple(
            Split(
                name,
                size,
                tuple(None if dims is None else _index(dims, name) for dims in self.inputs),
                tuple(_index(dims, name) for dims in self.outputs),
                name in self.reduced,
            )
            for name, size in self.named_sizes
            if size > 1 and name not in self.frozen
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
        return _parse(text)

    def __str__(self) -> str:
        """The normal form: marks as the group rule leaves them, one space between words."""
        marks = dict(self.marks)
        sides = [[_shape_text(dims, marks) for dims in side] for side in (self.inputs, self.outputs)]
        if sides[0] == [""]:
            sides[0] = ["()"]
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


def _shape_text(dims: Dims | None, marks: Mapping[str, str]) -> str:
    if dims is None:
        return "?"
    words = [[name + marks.get(name, "") for name in dim] for dim in dims]
    return " ".join(word[0] if len(word) == 1 else f"({' '.join(word)})" for word in words)


# --- parsing ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Atom:
    name: str
    mark: str
    at: int


_AtomShape = tuple[tuple[_Atom, ...], ...]


def _parse(raw: str) -> Annotation:
    text = re.sub(r"\s", " ", raw)  # one character for one, so that the caret stands right on one line
    arrow = text.find("->")
    if arrow < 0:
        raise AnnotationError("the annotation has no '->' between its inputs and its outputs", text, len(text))
    second = text.find("->", arrow + 2)
    if second >= 0:
        raise AnnotationError("the annotation has a second '->': write one, between inputs and outputs", text, second)
    inputs = [] if not text[:arrow].strip() else [_parse_shape(text, *span) for span in _pieces(text, 0, arrow)]
    outputs = [_parse_shape(text, *span) for span in _pieces(text, arrow + 2, len(text))]
    for shape, (start, _) in zip(outputs, _pieces(text, arrow + 2, len(text)), strict=True):
        if shape is None:
            raise AnnotationError("an output cannot be '?': its shape must be known", text, text.index("?", start))
    written = _written_marks(text, [*inputs, *outputs])
    _check_outputs(text, inputs, outputs, written)
    names = [
        [None if shape is None else tuple(tuple(a.name for a in dim) for dim in shape) for shape in side] for side in (inputs, outputs)
    ]
    frozen = _frozen_by_groups(_all_dims(names), {})
    marks = {name: "^" if name in frozen else mark for name, mark in written.items()}
    _check_splits(text, inputs, outputs, marks)
    places = tuple(tuple(dim[0].at for dim in shape or ()) for shape in (*inputs, *outputs))
    return Annotation(tuple(names[0]), tuple(names[1]), tuple(marks.items()), tuple(written.items()), text, places)


def _names(shape: _AtomShape | None) -> Dims | None:
    return None if shape is None else tuple(tuple(atom.name for atom in dim) for dim in shape)


def _all_dims(sides: Iterable[Iterable[Dims | None]]) -> Iterator[Dim]:
    for side in sides:
        for dims in side:
            yield from dims or ()


def _pieces(text: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    while True:
        comma = text.find(",", start, stop)
        yield start, comma if comma >= 0 else stop
        if comma < 0:
            return
        start = comma + 1


def _parse_shape(text: str, start: int, stop: int) -> _AtomShape | None:
    if text[start:stop].strip() == "?":
        return None
    if text[start:stop].strip() == "()":
        return ()
    dims: list[tuple[_Atom, ...]] = []
    group: list[_Atom] | None = None
    opened, at = start, start
    while at < stop:
        char = text[at]
        if char == "(":
            if group is not None:
                raise AnnotationError("a group cannot hold another group", text, at)
            group, opened = [], at
        elif char == ")":
            if not group:
                raise AnnotationError("')' closes nothing" if group is None else "the group is empty: name its parts", text, at)
            dims.append(tuple(group))
            group = None
        elif char != " ":
            atom = _parse_atom(text, at, stop)
            if atom.name == "*" and (dims or group is not None):
                raise AnnotationError("'*' stands for leading dimensions: it must come first in its shape, outside groups", text, at)
            if group is None:
                dims.append((atom,))
            else:
                group.append(atom)
            at = _ATOM.match(text, at).end() - 1
        at += 1
    if group is not None:
        raise AnnotationError("the group is never closed: add ')'", text, opened)
    return tuple(dims)


def _parse_atom(text: str, at: int, stop: int) -> _Atom:
    match = _ATOM.match(text, at, stop)
    if match is None:
        problem = "'?' must be the whole shape" if text[at] == "?" else f"'{text[at]}' is not a name, a number, '*', '?' or a group"
        raise AnnotationError(problem, text, at)
    name, mark = match.groups()
    after = text[match.end() : match.end() + 1] if match.end() < stop else ""
    if name.isdigit() and mark:
        raise AnnotationError(f"the number {name} takes no mark: it is never split", text, match.end() - 1)
    if after and after not in " ()":
        raise AnnotationError(f"'{after}' cannot follow '{match.group()}': separate dimensions by a space", text, match.end())
    return _Atom(str(int(name)) if name.isdigit() else name, mark, at)


def _written_marks(text: str, shapes: Sequence[_AtomShape | None]) -> dict[str, str]:
    """Mark of each name, in order of appearance. An unmarked later part of a group is frozen by the rule: it agrees with `^` elsewhere."""
    marks: dict[str, str] = {}
    implied: set[str] = set()
    for shape in shapes:
        for dim in shape or ():
            leader = next((i for i, atom in enumerate(dim) if atom.name != "1"), 0)
            for i, atom in enumerate(dim):
                if atom.name.isdigit():
                    continue
                free = i > leader and not atom.mark
                first = marks.setdefault(atom.name, atom.mark)
                if first == "" and atom.mark == "^" and atom.name in implied:
                    marks[atom.name] = "^"
                elif atom.mark != first and not (free and first == "^"):
                    this, that = (f"'{atom.name}{mark}'" for mark in (atom.mark, first))
                    raise AnnotationError(f"{this} is written {that} before: a name has one mark everywhere", text, atom.at)
                if not free and not atom.mark:
                    implied.discard(atom.name)
                elif free and first == "":
                    implied.add(atom.name)
    return marks


def _check_outputs(text: str, inputs: Sequence[_AtomShape | None], outputs: Sequence[_AtomShape], written: Mapping[str, str]) -> None:
    for shape in outputs:
        for atom in (atom for dim in shape for atom in dim):
            if written.get(atom.name) == "+":
                raise AnnotationError(f"'{atom.name}' is summed over ('+'), so no output has it", text, atom.at)
    given = {atom.name for shape in inputs for dim in shape or () for atom in dim}
    star = next((atom for shape in outputs for dim in shape for atom in dim if atom.name == "*"), None)
    if star and "*" not in given:
        raise AnnotationError("'*' stands in an output but in no input, so its dimensions follow from nothing", text, star.at)


def _check_splits(text: str, inputs: Sequence[_AtomShape | None], outputs: Sequence[_AtomShape], marks: Mapping[str, str]) -> None:
    held = [{atom.name for dim in shape for atom in dim} for shape in outputs]
    for shape in (*inputs, *outputs):
        seen: set[str] = set()
        for atom in (atom for dim in shape or () for atom in dim):
            mark = marks.get(atom.name, "^")
            if atom.name in seen and mark != "^":
                raise AnnotationError(
                    f"'{atom.name}' stands twice in one shape, so it cannot be split: write '{atom.name}^'", text, atom.at
                )
            seen.add(atom.name)
            if mark == "" and any(atom.name not in names for names in held):
                problem = f"'{atom.name}' is missing in an output: write '{atom.name}+' if it is summed over, else '{atom.name}^'"
                raise AnnotationError(problem, text, atom.at)


def _frozen_by_groups(dims: Iterable[Dim], sizes: Mapping[str, int]) -> set[str]:
    """Names that come after the first name of size other than 1 in a group; an unknown size counts as not 1."""
    frozen: set[str] = set()
    for dim in dims:
        large = [name for name in dim if (int(name) if name.isdigit() else sizes.get(name)) != 1]
        frozen.update(name for name in large[1:] if not name.isdigit())
    return frozen


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
        frozen = {name for name in names if written[name] == "^"} | _frozen_by_groups(_all_dims([self.dims]), self.sizes)
        # A name that the group rule freed because the one before it has size 1 was not checked when the text was parsed.
        frozen |= {name for name in names if written[name] == "" and any(_index(dims, name) is None for dims in outputs)}
        frozen |= {name for name in names if any(sum(dim.count(name) for dim in dims or ()) > 1 for dims in self.dims)}
        reduced = frozenset(name for name in names if written[name] == "+" and name not in frozen)
        return Bound(tuple(self.dims[:count]), outputs, tuple((n, self.sizes[n]) for n in names), frozenset(frozen), reduced)

    def _check_count(self, kind: str, dims: Sequence[object], shapes: Sequence[object]) -> None:
        if len(dims) != len(shapes):
            at = 0 if kind == "input" else self.note.text.index("->") + 2
            raise self._error(f"the annotation has {len(dims)} {kind}s, but {len(shapes)} were given", at)

    def _expand(self, tensor: int, dims: Dims | None) -> Dims | None:
        """Replace `*` by one name per leading dimension and check the number of dimensions."""
        if dims is None:
            return None
        shape, starred = self.shapes[tensor], bool(dims) and dims[0] == ("*",)
        is_input = tensor < len(self.note.inputs)
        if shape is None and is_input:
            raise self._error(f"{self.tensors[tensor]} is not a tensor, but only '?' may stand for such an argument", self._at(tensor, 0))
        if starred and shape is not None:
            leading = len(shape) - len(dims) + 1
            if self.stars is None:
                self.stars, self.star_tensor = leading, self.tensors[tensor]
            if leading != self.stars and leading >= 0:
                raise self._error(
                    f"'*' is {leading} dimensions in {self.tensors[tensor]} but {self.stars} in {self.star_tensor}", self._at(tensor, 0)
                )
        full = dims if not starred else tuple((f"*{i}",) for i in range(self.stars or 0)) + dims[1:]
        if shape is not None and len(full) != len(shape):
            problem = f"{self.tensors[tensor]} has {len(shape)} dimensions {tuple(shape)}, but the annotation has {len(full)} for it"
            raise self._error(problem, self._at(tensor, 0))
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

    def _error(self, problem: str, at: int) -> AnnotationError:
        return AnnotationError(problem, self.note.text, at)

"""The grammar of annotations: from text to names, marks and places; every mistake in the text gets a caret.

Role: the lower half of `seqloom.annotation`, whose docstring describes the language. In: a text. Out: `Parsed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from seqloom.errors import UserError

Dim = tuple[str, ...]
Dims = tuple[Dim, ...]

_ATOM = re.compile(r"([A-Za-z_][A-Za-z0-9_]*|\d+|\*)([+^]?)")


class AnnotationError(UserError):
    """An annotation that is malformed or does not fit the shapes; `text` is the annotation, `position` the index under the caret."""

    def __init__(self, problem: str, text: str, position: int) -> None:
        super().__init__(f"{problem}\n  {text}\n  {' ' * position}^")
        self.problem, self.text, self.position = problem, text, position


@dataclass(frozen=True)
class Parsed:
    """A text taken apart: `marks` after the group rule, `written` as they stand; `places[t][d]` is where dimension d of tensor t begins."""

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    marks: tuple[tuple[str, str], ...]
    written: tuple[tuple[str, str], ...]
    text: str
    places: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Atom:
    name: str
    mark: str
    at: int


_AtomShape = tuple[tuple[_Atom, ...], ...]


def parse(raw: str) -> Parsed:
    """Read an annotation. Raises `AnnotationError` with a caret under what is malformed or contradicts itself."""
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
    names = [[_names(shape) for shape in side] for side in (inputs, outputs)]
    frozen = frozen_by_groups(all_dims(names), {})
    marks = {name: "^" if name in frozen else mark for name, mark in written.items()}
    _check_splits(text, inputs, outputs, marks)
    places = tuple(tuple(_begin(text, dim) for dim in shape or ()) for shape in (*inputs, *outputs))
    return Parsed(tuple(names[0]), tuple(names[1]), tuple(marks.items()), tuple(written.items()), text, places)


def _begin(text: str, dim: tuple[_Atom, ...]) -> int:
    """Place of a dimension: of its name, or of the parenthesis before its names."""
    before = text[: dim[0].at].rstrip()
    return len(before) - 1 if before.endswith("(") else dim[0].at


def _names(shape: _AtomShape | None) -> Dims | None:
    return None if shape is None else tuple(tuple(atom.name for atom in dim) for dim in shape)


def all_dims(sides: Iterable[Iterable[Dims | None]]) -> Iterator[Dim]:
    """Every dimension of every tensor."""
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


def frozen_by_groups(dims: Iterable[Dim], sizes: Mapping[str, int]) -> set[str]:
    """Names that come after the first name of size other than 1 in a group; an unknown size counts as not 1."""
    frozen: set[str] = set()
    for dim in dims:
        large = [name for name in dim if (int(name) if name.isdigit() else sizes.get(name)) != 1]
        frozen.update(name for name in large[1:] if not name.isdigit())
    return frozen

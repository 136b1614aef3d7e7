"""The annotation language: parsing and carets, normal form, group rule, inference, bound splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.annotation import Annotation, AnnotationError, Bound, Split
from seqloom.errors import UserError

LINEAR = "* i+, o i+ -> * o"
LOSS = "b l d^, n^ d^, b l -> b l"
ATTENTION = "b (k g) l^ e^, b k m^ e^, b k m^ e^ -> b (k g) l^ e^"


# --- parsing and normal form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (LINEAR, LINEAR),
        (LOSS, LOSS),
        ("  b   l d^,n^ d^ ,b l->b l ", LOSS),
        ("b\tl\n-> b l", "b l -> b l"),
        (ATTENTION, "b (k g^) l^ e^, b k m^ e^, b k m^ e^ -> b (k g^) l^ e^"),
        ("(h d) -> h d", "(h d^) -> h d^"),
        ("h d, (h d) -> h d", "h d^, (h d^) -> h d^"),
        ("(1 h d) -> h d", "(1 h d^) -> h d^"),
        ("(1 1 h) -> h", "(1 1 h) -> h"),
        ("(2 d) -> d", "(2 d^) -> d^"),
        ("(h d) -> h d^", "(h d^) -> h d^"),
        ("d^, (h d) -> h d^", "d^, (h d^) -> h d^"),
        ("(h d) (d e) -> h d e", "(h d^) (d^ e^) -> h d^ e^"),
        ("(h d+) -> h", "(h d^) -> h"),
        ("(a) 07 -> (a)", "a 7 -> a"),
        ("?, a -> a", "?, a -> a"),
        ("a+ b+ ->", "a+ b+ -> ()"),
        ("a+ b+ -> ()", "a+ b+ -> ()"),
        ("() -> ", "() -> ()"),
        ("-> 8", "-> 8"),
        ("a, -> a", "a, () -> a"),
        (", a -> a, a", "(), a -> a, a"),
        ("*+ ->", "*+ -> ()"),
        ("*^ a -> *^ a", "*^ a -> *^ a"),
        ("* -> *", "* -> *"),
    ],
)
def test_normal_form(text, normal):
    annotation = Annotation.parse(text)
    assert str(annotation) == normal
    assert Annotation.parse(normal) == annotation
    assert str(Annotation.parse(normal)) == normal


@pytest.mark.parametrize(
    ("text", "caret", "word"),
    [
        ("", 0, "no '->'"),
        ("a b", 3, "no '->'"),
        ("a -> a -> a", 7, "second '->'"),
        ("a -> a, ?", 8, "output cannot be '?'"),
        ("a b -> a b ?", 11, "whole shape"),
        ("a b^, c b -> a c", 8, "'b' is written 'b^' before"),
        ("a b+, c b -> a c", 8, "'b' is written 'b+' before"),
        ("a b, c b+ -> a c b", 7, "'b+' is written 'b' before"),
        ("* a, *^ -> * a", 5, "'*^' is written '*' before"),
        ("a (h d), d -> a h d^", 18, "'d^' is written 'd' before"),
        ("(h d), d+ -> h", 7, "one mark everywhere"),
        ("a+ b -> a+ b", 8, "summed over"),
        ("a b+ -> (a b+)", 11, "summed over"),
        ("a b -> a", 2, "missing in an output"),
        ("a b -> a b, a", 2, "missing in an output"),
        ("* a -> a", 0, "missing in an output"),
        ("a a -> a", 2, "stands twice"),
        ("a -> * a", 5, "in no input"),
        ("a * -> a", 2, "must come first"),
        ("(a *) -> a", 3, "must come first"),
        ("(a b -> a b", 0, "never closed"),
        ("c (a b, d -> a b", 2, "never closed"),
        ("a) -> a", 1, "closes nothing"),
        ("a ( ) -> a", 4, "empty"),
        ("a (b (c d)) -> a", 5, "cannot hold another group"),
        ("a ? -> a", 2, "whole shape"),
        ("a $ -> a", 2, "'$' is not a name"),
        ("a^+ -> a", 2, "cannot follow"),
        ("a2+ b-c -> b", 5, "cannot follow"),
        ("4^ a -> a", 1, "takes no mark"),
        ("2d -> a", 1, "cannot follow"),
        ("^a -> a", 0, "is not a name"),
    ],
)
def test_malformed_text_shows_the_caret(text, caret, word):
    with pytest.raises(AnnotationError) as caught:
        Annotation.parse(text)
    error = caught.value
    assert isinstance(error, UserError)
    assert word in error.problem
    assert error.position == caret
    problem, shown, under = str(error).split("\n")
    assert problem == error.problem
    assert shown == "  " + text
    assert under == " " * (2 + caret) + "^"


def test_caret_stays_on_one_line():
    with pytest.raises(AnnotationError) as caught:
        Annotation.parse("a\nb$ -> a")
    assert str(caught.value).split("\n")[1:] == ["  a b$ -> a", "     ^"]


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (LOSS, [(0, 0), (0, 1)]),
        (LINEAR, [(0, 0), (0, 1), (1, 0)]),
        (ATTENTION, [(0, 0), (0, 1)]),
        ("?, a^ b -> a^ b", [(1, 1)]),
        ("a 4, 1 b -> a b", [(0, 0), (1, 1)]),
        ("(h d) d -> h d", [(0, 0)]),
        ("n^ d, * -> * d", [(0, 1), (1, 0)]),
        ("-> n", []),
    ],
)
def test_splittable(text, places):
    assert Annotation.parse(text).splittable() == places


# --- shapes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shapes", "sizes", "outputs"),
    [
        (LINEAR, [(2, 3, 4), (5, 4)], {}, ((2, 3, 5),)),
        (LINEAR, [(4,), (5, 4)], {}, ((5,),)),
        (LOSS, [(2, 6, 8), (11, 8), (2, 6)], {}, ((2, 6),)),
        (ATTENTION, [(2, 12, 6, 8), (2, 4, 7, 8), (2, 4, 7, 8)], {}, ((2, 12, 6, 8),)),
        ("a (h d), h -> a h d", [(2, 12), (3,)], {}, ((2, 3, 4),)),
        ("a (h d) -> a h d", [(2, 12)], {"h": 3}, ((2, 3, 4),)),
        ("a (h d) -> a h d", [(2, 12)], {"d": 3}, ((2, 4, 3),)),
        ("(a b c), (b c), c -> a b c", [(24,), (6,), (2,)], {}, ((4, 3, 2),)),
        ("a (2 d) -> a d, a d", [(3, 8)], {}, ((3, 4), (3, 4))),
        ("a 1 c -> a n c", [(2, 1, 3)], {"n": 7}, ((2, 7, 3),)),
        ("?, a -> a", [None, (3,)], {}, ((3,),)),
        ("?, a -> a", [(9, 9), (3,)], {}, ((3,),)),
        ("a+ b+ ->", [(3, 4)], {}, ((),)),
        ("() -> ", [()], {}, ((),)),
        ("-> n^ 3", [], {"n": 2}, ((2, 3),)),
        ("* a, * b -> * (a b)", [(5, 6, 2), (5, 6, 3)], {}, ((5, 6, 6),)),
    ],
)
def test_infer(text, shapes, sizes, outputs):
    assert Annotation.parse(text).infer(shapes, **sizes) == outputs


@pytest.mark.parametrize(
    ("text", "shapes", "sizes", "caret", "words"),
    [
        (LINEAR, [(2, 4), (5, 6)], {}, 8, ("'i' is 4 in input 0, dimension 1", "but 6 in input 1, dimension 1")),
        (LINEAR, [(2, 3, 4), (5, 6)], {}, 8, ("'i' is 4 in input 0, dimension 2",)),
        ("* a, * b -> * a b", [(2, 3), (4, 5)], {}, 5, ("'*0' is 2 in input 0", "but 4 in input 1")),
        ("* a, * b -> * a b", [(2, 3), (4,)], {}, 5, ("input 1 has 0 dimensions for '*', but input 0 has 1",)),
        ("a b -> a b", [(2, 3, 4)], {}, 0, ("input 0 has 3 dimensions (2, 3, 4), but the annotation has 2",)),
        ("* a b -> * a b", [(3,)], {}, 0, ("input 0 has 1 dimensions (3,), but the annotation at least 2",)),
        ("a, b -> a b", [(2,)], {}, 0, ("2 inputs, not 1",)),
        ("a, b -> a b", [(2,), None], {}, 3, ("input 1 is not a tensor",)),
        ("a (h d) -> a h d", [(2, 12)], {}, 2, ("'h' follows from nothing", "h=")),
        ("a (h d) -> a h d", [(2, 12)], {"h": 5}, 2, ("size 12", "5 does not divide")),
        ("a (h d), h, d -> a h d", [(2, 12), (3,), (5,)], {}, 2, ("size 12", "h=3", "d=5", "input 1, dimension 0")),
        ("a 4 -> a", [(2, 5)], {}, 2, ("size 5", "makes it 4")),
        ("a b -> a b", [(2, 3)], {"b": 4}, 2, ("'b' is 4 in the keyword", "3 in input 0, dimension 1")),
        ("a b -> a b", [(2, 3)], {"c": 4}, 0, ("no name 'c'",)),
        ("a -> a n", [(2,)], {}, 7, ("'n' follows from nothing",)),
    ],
)
def test_shapes_that_do_not_fit(text, shapes, sizes, caret, words):
    with pytest.raises(AnnotationError) as caught:
        Annotation.parse(text).infer(shapes, **sizes)
    for word in words:
        assert word in caught.value.problem
    assert caught.value.position == caret


def test_output_shapes_give_sizes_and_are_checked():
    annotation = Annotation.parse("a (h d) -> a h d")
    assert annotation.bind([(2, 12)], [(2, 3, 4)]).sizes == {"a": 2, "h": 3, "d": 4}
    with pytest.raises(AnnotationError, match="'a' is 2 in input 0, dimension 0, but 9 in output 0, dimension 0"):
        annotation.bind([(2, 12)], [(9, 3, 4)])
    with pytest.raises(AnnotationError, match="1 outputs, not 2") as caught:
        annotation.bind([(2, 12)], [(2, 3, 4), (1,)])
    assert caught.value.position == 10


# --- bound annotations -------------------------------------------------------------------------------------------------------


def test_bound_of_linear():
    bound = Annotation.parse(LINEAR).bind([(2, 3, 4), (5, 4)])
    assert bound.inputs == ((("*0",), ("*1",), ("i",)), (("o",), ("i",)))
    assert bound.outputs == ((("*0",), ("*1",), ("o",)),)
    assert bound.splits() == (
        Split("*0", 2, (0, None), (0,), False),
        Split("*1", 3, (1, None), (1,), False),
        Split("i", 4, (2, 1), (None,), True),
        Split("o", 5, (None, 0), (2,), False),
    )


def test_bound_sizes_of_groups_and_constants():
    bound = Annotation.parse("a^ (2 d), ? -> a^ d, 7").bind([(3, 8), None])
    assert bound.inputs == ((("a",), ("2", "d")), None)
    assert [bound.size(dim) for dim in bound.inputs[0]] == [3, 8]
    assert bound.shape(bound.outputs[1]) == (7,)
    assert bound.splits() == ()


@pytest.mark.parametrize(
    ("key_heads", "name", "input_dims"),
    [(2, "k", (1, 1, 1)), (1, "g", (1, None, None))],
)
def test_group_rule_follows_the_sizes(key_heads, name, input_dims):
    """With one key/value head the queries split by group and every piece uses the whole key."""
    bound = Annotation.parse(ATTENTION).bind([(1, 8, 6, 4), (1, key_heads, 6, 4), (1, key_heads, 6, 4)])
    (split,) = bound.splits()
    assert (split.name, split.input_dims, split.output_dims) == (name, input_dims, (1,))


def test_group_rule_respects_explicit_marks_and_outputs():
    assert Annotation.parse("(h d^) -> h d^").bind([(4,)], h=1).splits() == ()
    assert Annotation.parse("(h d) -> h").bind([(4,)], h=1).splits() == ()  # `d` would be summed, but nothing says so
    (split,) = Annotation.parse("(h d+) -> h").bind([(4,)], h=1).splits()
    assert split == Split("d", 4, (0,), (None,), True)
    assert Annotation.parse("(h d+) -> h").bind([(8,)], h=2).splits() == (Split("h", 2, (0,), (0,), False),)
    assert Annotation.parse("(1 h d) -> h d").bind([(6,)], h=2).splits() == (Split("h", 2, (0,), (0,), False),)


def test_size_one_is_never_split():
    assert [s.name for s in Annotation.parse("a b -> a b").bind([(1, 3)]).splits()] == ["b"]


def test_bounds_are_data():
    first, second = (Annotation.parse(LINEAR).bind([(2, 4), (5, 4)]) for _ in range(2))
    assert first == second and hash(first) == hash(second)
    assert first != Annotation.parse(LINEAR).bind([(2, 4), (6, 4)])
    direct = Bound(((("a",),),), ((("a",),),), (("a", 4),))
    assert direct == Annotation.parse("a -> a").bind([(4,)])
    assert direct.splits() == (Split("a", 4, (0,), (0,), False),)
    with pytest.raises(AttributeError):
        direct.inputs = ()


# --- properties --------------------------------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d", "e", "f"]


@st.composite
def einsums(draw):
    """An annotation that is an einsum: names, their sizes, operands and an output, `+` on what is summed."""
    sizes = {name: draw(st.integers(1, 4)) for name in NAMES}
    operands = draw(st.lists(st.lists(st.sampled_from(NAMES), max_size=3, unique=True), min_size=1, max_size=3))
    used = list(dict.fromkeys(name for operand in operands for name in operand))
    output = draw(st.permutations([name for name in used if draw(st.booleans())]))
    marks = {name: draw(st.sampled_from(["", "^"])) if name in output else draw(st.sampled_from(["+", "^"])) for name in used}
    words = [" ".join(name + marks[name] for name in operand) or "()" for operand in (*operands, output)]
    text = ", ".join(words[:-1]) + " -> " + words[-1]
    return text, sizes, operands, list(output), marks


@settings(deadline=None)
@given(einsums())
def test_infer_agrees_with_einsum(case):
    text, sizes, operands, output, marks = case
    annotation = Annotation.parse(text)
    assert Annotation.parse(str(annotation)) == annotation
    shapes = [tuple(sizes[name] for name in operand) for operand in operands]
    equation = ",".join("".join(operand) for operand in operands) + "->" + "".join(output)
    result = np.einsum(equation, *(np.ones(shape) for shape in shapes))
    assert annotation.infer(shapes) == (result.shape,)
    for split in annotation.bind(shapes).splits():
        assert marks[split.name] != "^" and split.size == sizes[split.name] > 1
        assert split.reduced == (marks[split.name] == "+") == (split.output_dims == (None,))


@st.composite
def shapes_of_words(draw, names):
    words = []
    for name in draw(st.lists(st.sampled_from(names), max_size=4, unique=True)):
        if words and draw(st.integers(0, 3)) == 0 and not words[-1].startswith("("):
            words[-1] = f"({words[-1]} {name})"
        elif draw(st.integers(0, 5)) == 0:
            words.append(f"({draw(st.sampled_from(['1', '2']))} {name})")
        else:
            words.append(name)
    return " ".join(words) or "()"


@settings(deadline=None)
@given(shapes_of_words(NAMES), st.dictionaries(st.sampled_from(NAMES), st.integers(1, 4)))
def test_groups_bind_and_split_as_data_does(shape, sizes):
    """Splitting a dimension in pieces by a name, and regrouping, is what slicing the ungrouped array along that name gives."""
    names = [name for name in NAMES if name in shape.split() or f"({name}" in shape or f"{name})" in shape]
    flat = " ".join(names)
    sizes = {name: sizes.get(name, 2) for name in names}
    annotation = Annotation.parse(f"{shape} -> {flat} 2 2")
    assert Annotation.parse(str(annotation)) == annotation
    words = [word.strip("()").split() for word in _dims(shape)]
    grouped = tuple(int(np.prod([sizes.get(n) or int(n) for n in word])) for word in words)
    bound = annotation.bind([grouped], **sizes)
    assert bound.shape(bound.inputs[0]) == grouped
    assert bound.sizes == {name: sizes[name] for name in bound.sizes}
    leaders = {next((n for n in word if n != "1" and sizes.get(n) != 1), None) for word in words}
    for split in bound.splits():
        assert split.name in leaders
        assert split.name in bound.inputs[0][split.input_dims[0]]
        assert split.name in bound.outputs[0][split.output_dims[0]]
        array = np.arange(int(np.prod(grouped))).reshape(grouped)
        order = [n for word in words for n in word]
        taken = array.take(range(grouped[split.input_dims[0]] // split.size), axis=split.input_dims[0])
        full = array.reshape([sizes.get(n) or int(n) for n in order])
        assert (full.take([0], axis=order.index(split.name)).ravel() == taken.ravel()).all()


def _dims(shape):
    words, depth = [""], 0
    for char in shape:
        depth += (char == "(") - (char == ")")
        if char == " " and depth == 0:
            words.append("")
        else:
            words[-1] += char
    return [word for word in words if word not in ("", "()")]


@settings(deadline=None)
@given(st.text(alphabet="ab ()*?^+-,>12$", max_size=24))
def test_any_text_parses_or_shows_a_caret(text):
    try:
        annotation = Annotation.parse(text)
    except AnnotationError as error:
        assert 0 <= error.position <= len(text)
    else:
        assert Annotation.parse(str(annotation)) == annotation


# --- names behind the first of a group ---------------------------------------------------------------------------------------


def nested(text, shapes, **sizes):
    """The splits that wait for others: name -> (size, places in, places out, reduced, after)."""
    found = Annotation.parse(text).bind(shapes, **sizes).splits(nested=True)
    return {s.name: (s.size, s.input_dims, s.output_dims, s.reduced, s.after) for s in found if s.after}


@pytest.mark.parametrize(
    ("text", "shapes", "sizes", "expected"),
    [
        (ATTENTION, [(1, 8, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)], {}, {"g": (4, (1, None, None), (1,), False, ("k",))}),
        (ATTENTION, [(1, 8, 6, 4), (1, 1, 6, 4), (1, 1, 6, 4)], {}, {}),  # the first one has size 1: nothing to wait for
        (ATTENTION, [(1, 2, 6, 4), (1, 2, 6, 4), (1, 2, 6, 4)], {}, {}),
        ("(h d) -> h d", [(6,)], {"h": 2}, {"d": (3, (0,), (1,), False, ("h",))}),
        ("h d, (h d) -> h d", [(2, 3), (6,)], {}, {"d": (3, (1, 0), (1,), False, ("h",))}),
        ("(a b c) -> a b c", [(30,)], {"a": 2, "b": 3}, {"b": (3, (0,), (1,), False, ("a",)), "c": (5, (0,), (2,), False, ("a", "b"))}),
        ("(a b c) -> a b c", [(10,)], {"a": 2, "b": 1}, {"c": (5, (0,), (2,), False, ("a",))}),
        ("(1 h d) -> h d", [(6,)], {"h": 2}, {"d": (3, (0,), (1,), False, ("h",))}),
        ("(h d+) -> h", [(6,)], {"h": 2}, {"d": (3, (0,), (None,), True, ("h",))}),
        ("(h+ d) -> d", [(6,)], {"h": 2}, {"d": (3, (0,), (0,), False, ("h",))}),
        ("(h d), d x -> h d x", [(6,), (3, 4)], {}, {"d": (3, (0, 0), (1,), False, ("h",))}),
        (
            "(h d), (d x) -> h d x",
            [(6,), (12,)],
            {"h": 2},
            {"d": (3, (0, 0), (1,), False, ("h",)), "x": (4, (None, 0), (2,), False, ("d",))},
        ),
        ("(h d^) -> h d^", [(6,)], {"h": 2}, {}),  # marked
        ("(h^ d) -> h^ d", [(6,)], {"h": 2}, {}),  # waits for one that is never split
        ("(2 d) -> d", [(6,)], {}, {}),
        ("(h d) -> h", [(6,)], {"h": 2}, {}),  # missing in an output
        ("(h d), (d h) -> h d", [(6,), (6,)], {"h": 2}, {}),  # each waits for the other
        ("(h d), (e d) -> h e d", [(6,), (12,)], {"h": 2}, {}),  # behind different names
        ("(h d) (d e) -> h d e", [(6, 12)], {"h": 2}, {}),  # twice in one tensor, and `e` waits for it
    ],
)
def test_names_behind_others(text, shapes, sizes, expected):
    assert nested(text, shapes, **sizes) == expected


def test_nested_splits_are_given_only_when_asked_for():
    bound = Annotation.parse(ATTENTION).bind([(2, 8, 6, 4), (2, 2, 6, 4), (2, 2, 6, 4)])
    assert [s.name for s in bound.splits()] == ["b", "k"]
    assert [s.name for s in bound.splits(nested=True)] == ["b", "k", "g"]
    assert tuple(s for s in bound.splits(nested=True) if not s.after) == bound.splits()
    assert "g" in bound.frozen


def positions(flat, names, sizes, fixed):
    """Elements of a tensor whose dimension groups are flattened to names, in which every name in `fixed` has that index."""
    array = np.arange(int(np.prod([sizes[n] for n in flat], initial=1))).reshape([sizes[n] for n in flat])
    for name, index in fixed.items():
        if name in flat:
            array = array.take([index], axis=flat.index(name))
    return array.ravel()


@settings(deadline=None)
@given(
    st.permutations(NAMES[:4]),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
    st.lists(st.sampled_from([1, 2, 2, 3]), min_size=4, max_size=4),
)
def test_nested_pieces_are_contiguous(order, widths, sizes):
    """Slicing the grouped dimension along the names of `after`, then along the name, takes the elements that have these indices."""
    sizes, groups, at = dict(zip(NAMES[:4], sizes, strict=True)), [], 0
    for width in widths:
        groups, at = [*groups, list(order[at : at + width])], at + width
    groups = [group for group in groups if group]
    annotation = Annotation.parse(" ".join(f"({' '.join(group)})" for group in groups) + " -> " + " ".join(NAMES[:4]))
    bound = annotation.bind([tuple(int(np.prod([sizes[n] for n in group])) for group in groups)], **sizes)
    splits = {split.name: split for split in bound.splits(nested=True)}
    assert set(splits) == {name for name in NAMES[:4] if sizes[name] > 1}  # everything is reached in some order
    for split in splits.values():
        piece = np.arange(int(np.prod(bound.shape(bound.inputs[0])))).reshape(bound.shape(bound.inputs[0]))
        for name in (*split.after, split.name):
            piece = np.split(piece, sizes[name], axis=splits[name].input_dims[0])[-1]
        fixed = {name: sizes[name] - 1 for name in (*split.after, split.name)}
        assert (piece.ravel() == positions(list(order), order, sizes, fixed)).all()

"""Splits to the last piece, two dimensions at once, and one dimension over two mesh axes: for every rule and every operator of ours."""

import itertools

import pytest
import torch
from op_samples import SAMPLES, sample, t
from piecewise import assemble, assert_same, down_to, leaves, results, runner

from chunk_linear_cross_entropy import chunk_linear_cross_entropy
from custom_ops.swiglu import swiglu
from seqloom.annotation import Annotation
from seqloom.ops.attention import attention
from seqloom.ops.registry import registered
from seqloom.ops.rules import bind

torch.set_num_threads(1)
SPLIT = [call for call in SAMPLES if bind(call.op, call.args, call.kwargs, call.values).splits()]
NESTED = [call for call in SPLIT if any(s.after for s in bind(call.op, call.args, call.kwargs, call.values).splits(nested=True))]


@pytest.mark.parametrize("call", SPLIT, ids=repr)
def test_every_split_goes_down_to_single_elements(call):
    """A piece of size 1 is where operators change their minds about a dimension."""
    bound = bind(call.op, call.args, call.kwargs, call.values)
    for split in bound.splits():
        assert_same(runner(call), bound, lambda: leaves(call), [(split, split.size)])


@pytest.mark.parametrize("call", SPLIT, ids=repr)
def test_two_dimensions_split_at_once(call):
    bound = bind(call.op, call.args, call.kwargs, call.values)
    even = [split for split in bound.splits() if split.size % 2 == 0]
    for first, second in itertools.permutations(even, 2):
        assert_same(runner(call), bound, lambda: leaves(call), [(first, 2), (second, 2)])


@pytest.mark.parametrize("call", SPLIT, ids=repr)
def test_one_dimension_split_over_two_axes(call):
    """The earlier axis is the outer one, and together they are one split of four."""
    bound = bind(call.op, call.args, call.kwargs, call.values)
    for split in bound.splits():
        if split.size % 4 == 0:
            assert_same(runner(call), bound, lambda: leaves(call), [(split, 2), (split, 2)])


@pytest.mark.parametrize("call", NESTED, ids=repr)
def test_names_behind_others_split_once_these_are_split(call):
    """Alone, and with a further name split inside it."""
    bound = bind(call.op, call.args, call.kwargs, call.values)
    splits = bound.splits(nested=True)
    for split in (s for s in splits if s.after):
        cuts = down_to(splits, split, split.size)
        assert_same(runner(call), bound, lambda: leaves(call), cuts)
        used = [cut[0] for cut in cuts]
        for other in (s for s in bound.splits() if s not in used and s.size % 2 == 0):
            assert_same(runner(call), bound, lambda: leaves(call), [*cuts, (other, 2)])


def test_samples_have_names_behind_others():
    assert len(NESTED) >= 3


def model_calls():
    """Operators of ours with inputs: (function of tensors, annotation, inputs)."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator)  # noqa: E731
    labels = torch.randint(0, 11, (2, 12), generator=generator)
    labels[0, 3] = -100
    loss = lambda h, w, y: chunk_linear_cross_entropy(h, w, y, -100, 5)  # noqa: E731
    yield "loss", loss, chunk_linear_cross_entropy, [rand(2, 12, 6), rand(11, 6), labels]
    yield "swiglu", swiglu, swiglu, [rand(2, 4, 6), rand(2, 4, 6)]
    for heads, key_heads in ((8, 4), (4, 4), (4, 1)):
        for options in ({}, {"window": 3}, {"softcap": 2.0}, {"causal": False}):
            tensors = [rand(2, heads, 6, 8), rand(2, key_heads, 6, 8), rand(2, key_heads, 6, 8)]
            run = lambda q, k, v, options=options, **start: attention(q, k, v, 0.3, **options, **start)  # noqa: E731
            yield f"attention-{heads}-{key_heads}-{options}", run, attention, tensors


@pytest.mark.parametrize(("function", "operator", "tensors"), [c[1:] for c in model_calls()], ids=[c[0] for c in model_calls()])
def test_operators_of_ours(function, operator, tensors):
    bound = registered(operator).annotation.bind([tuple(x.shape) for x in tensors])
    starts = registered(operator).starts

    def run(inputs, shapes, offsets):
        return [function(*inputs, **{keyword: offsets.get(name, 0) for name, keyword in starts.items()})]

    make = lambda: [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]  # noqa: E731
    splits = bound.splits()
    assert len(splits) >= 2
    for split in bound.splits(nested=True):
        cuts = down_to(bound.splits(nested=True), split, split.size)
        assert_same(run, bound, make, cuts)
        assert_same(run, bound, make, [*cuts, *((s, 2) for s in splits if s.name == "l" != split.name)])
        if split.size % 4 == 0:
            assert_same(run, bound, make, [*cuts[:-1], (split, 2), (split, 2)])
    for first, second in itertools.permutations(splits, 2):
        assert_same(run, bound, make, [(first, 2), (second, 2)])


# --- a layer in pieces: annotations of neighbours agree with each other -----------------------------------------------------------


def attention_layer(x, wq, wk, wv, wo):
    """Projections, heads apart, attention, heads together, projection, as calls with bound annotations."""
    query, key, value = (torch.nn.functional.linear(x, w).view(*x.shape[:2], -1, 8).transpose(1, 2) for w in (wq, wk, wv))
    mixed = attention(query, key, value, 0.3)
    return torch.nn.functional.linear(mixed.transpose(1, 2).flatten(2), wo)


def test_a_head_split_runs_through_a_layer():
    """Tensor parallelism by annotations alone: the split of the projections' outputs is that of the view, of the heads, of the sum."""
    projection = bind(*_node(sample("linear.default", t(1, 6, 16), t(32, 16))))
    apart = bind(*_node(sample("view.default", t(1, 6, 32), [1, 6, 4, 8])))
    heads_last = bind(*_node(sample("transpose.int", t(1, 6, 4, 8), 1, 2)))
    core = Annotation.parse(str(registered(attention).annotation)).bind([(1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)])
    together = bind(*_node(sample("flatten.using_ints", t(1, 6, 4, 8), 2)))
    output = bind(*_node(sample("linear.default", t(1, 6, 32), t(16, 32))))

    def leads(bound, dim):
        """The split that cuts input 0 along `dim`."""
        return next(split for split in bound.splits() if split.input_dims[0] == dim)

    assert next(split for split in projection.splits() if split.output_dims == (2,)).input_dims == (None, 0)
    assert (leads(apart, 2).size, leads(apart, 2).output_dims) == (4, (2,))
    assert leads(heads_last, 2).output_dims == (1,)
    assert (leads(core, 1).size, leads(core, 1).output_dims) == (2, (1,))
    assert (leads(together, 2).size, leads(together, 2).output_dims) == (4, (2,))
    assert leads(output, 2).reduced

    x, wq, wk, wv, wo = (t(1, 6, 16), t(32, 16), t(16, 16), t(16, 16) + 1, t(16, 32))
    layer = Annotation.parse("b l^ d^, (h+ f) d^, (h+ e) d^, (h+ e) d^, o (h+ f) -> b l^ o")
    bound = layer.bind([x.shape, wq.shape, wk.shape, wv.shape, wo.shape], h=2)
    make = lambda: [w.clone().requires_grad_() for w in (x, wq, wk, wv, wo)]  # noqa: E731
    split = next(split for split in bound.splits() if split.name == "h")
    assert split.reduced and split.input_dims == (None, 0, 0, 0, 1)
    assert_same(lambda inputs, shapes, offsets: [attention_layer(*inputs)], bound, make, [(split, 2)])


def _node(call):
    return call.op, call.args, call.kwargs, call.values


def test_assemble_finds_a_lie():
    """The checker of this file is no rubber stamp."""
    bound = Annotation.parse("a b -> a b").bind([(4, 6)])
    x = t(4, 6).requires_grad_()
    run = lambda inputs, shapes, offsets: [inputs[0].softmax(-1)]  # noqa: E731
    rows, columns = bound.splits()
    whole = results(run([x], [], {}), [x])
    for split, same in ((rows, True), (columns, False)):
        pieced = results(assemble(run, bound, [x], [(split, 2)]), [x])
        assert all(torch.allclose(a, b) for a, b in zip(pieced, whole, strict=True)) == same

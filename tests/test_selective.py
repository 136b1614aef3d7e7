"""Selective recomputation: the named matrix products run once, the others twice, and the gradients are those of a plain call."""

import itertools
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from seqloom.runtime.selective import MATMULS, keep_matmuls


class Counted(TorchDispatchMode):
    """Counts matrix products by their (rows, columns) and the calls of every operator."""

    def __init__(self):
        super().__init__()
        self.products, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        if func in MATMULS:
            self.products[tuple(out.shape[-2:])] += 1
        return out


WIDTHS = (3, 5, 7, 11, 13)  # each product of the segment has its own number of columns


class Chain(nn.Module):
    """A segment of four products; a bias on every other one, so that `mm` and `addmm` are both met."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        pairs = itertools.pairwise(WIDTHS)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=i % 2 == 0, dtype=torch.float64) for i, (a, b) in enumerate(pairs))

    def segment(self, x):
        for layer in self.layers:
            x = layer(F.silu(x))
        return x


def forwards(products):
    """How often the product of each layer ran: its result has its layer's columns and the 2 * 4 rows of the input."""
    return [products[8, columns] for columns in WIDTHS[1:]]


def run(module, **options):
    """Products in the forward and in the backward, by layer, and the gradients."""
    x = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    module.zero_grad()
    with Counted() as forward:
        y = checkpoint(module.segment, x, use_reentrant=False, **options) if options else module.segment(x)
    with Counted() as backward:
        y.square().sum().backward()
    return forwards(forward.products), backward, [x.grad, *(p.grad for p in module.parameters())]


@settings(deadline=None, max_examples=20)
@given(kept=st.sets(st.integers(0, 5)))
def test_kept_products_are_not_recomputed_and_all_others_are(kept):
    module = Chain()
    _, plain, expected = run(module)
    forward, backward, gradients = run(module, context_fn=keep_matmuls(*kept))
    assert forward == [1, 1, 1, 1]
    again = [b - p for b, p in zip(forwards(backward.products), forwards(plain.products), strict=True)]
    # Early stop: nothing after the last product is saved in the segment, so that it is never run again, kept or not.
    assert again == [0 if i in kept else 1 for i in range(3)] + [0]
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_without_indices_it_is_plain_recomputation():
    module = Chain()
    _, all_again, _ = run(module, preserve_rng_state=False)
    _, none_kept, _ = run(module, context_fn=keep_matmuls())
    assert all_again.products == none_kept.products


def test_one_context_function_serves_every_call():
    """Counting starts anew with each call of the checkpoint, also where forwards and backwards of several calls interleave."""
    module, context_fn = Chain(), keep_matmuls(1)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    outputs = [checkpoint(module.segment, x * scale, use_reentrant=False, context_fn=context_fn) for scale in (1.0, 2.0, 3.0)]
    with Counted() as backward:
        for output in (outputs[1], outputs[0], outputs[2]):
            output.sum().backward()
    expected = torch.autograd.grad(sum(module.segment(x * scale).sum() for scale in (1.0, 2.0, 3.0)), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)
    # Three backwards; the gradient of each layer's input and the recomputed product of the layer before have the same shape.
    assert forwards(backward.products) == [3 + 3, 3 + 0, 3 + 3, 0 + 0]


@pytest.mark.parametrize(
    ("product", "operator"),
    [
        (lambda a, b: a @ b, torch.ops.aten.bmm.default),
        (lambda a, b: torch.einsum("hij,hjk->hik", a, b), torch.ops.aten.bmm.default),
        (lambda a, b: torch.baddbmm(a.new_zeros(()), a, b), torch.ops.aten.baddbmm.default),
        (lambda a, b: F.linear(a, b[0].T), torch.ops.aten.mm.default),
        (lambda a, b: F.linear(a, b[0].T, a.new_zeros(6)), torch.ops.aten.addmm.default),
    ],
    ids=["matmul", "einsum", "baddbmm", "linear", "linear with bias"],
)
def test_every_way_to_write_a_product_counts(product, operator):
    a, b = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 6, 6, requires_grad=True)

    def segment(a, b):
        return product(F.silu(product(a, b)), b).sigmoid()

    def calls(*kept):
        out = checkpoint(segment, a, b, use_reentrant=False, context_fn=keep_matmuls(*kept))
        with Counted() as backward:
            out.sum().backward()
        return backward.calls[operator]

    assert calls() - calls(0) == calls() - calls(1) == 1
    assert calls() - calls(0, 1) == 2


def test_shapes_and_kept_bytes_on_fake_tensors():
    with FakeTensorMode():
        module = Chain()
        x = torch.empty(2, 4, 3, dtype=torch.float64, requires_grad=True)
        with Counted() as seen:
            checkpoint(module.segment, x, use_reentrant=False, context_fn=keep_matmuls(0, 2)).sum().backward()
        assert forwards(seen.products) == [1 + 1, 2 + 1, 1 + 1, 1]
        assert x.grad.shape == x.shape


def test_compiled_as_one_graph():
    """The compiled segment keeps what it was told to: the products in the backward's graph say so."""
    module = Chain()
    _, _, expected = run(module)
    graphs, products = [], []

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep_graph, bw_compiler=keep_graph, partition_fn=min_cut_rematerialization_partition)
    for kept in ((), (1,), (0, 1, 2)):
        torch._dynamo.reset()
        graphs.clear()

        def block(x, kept=kept):
            return checkpoint(module.segment, x, use_reentrant=False, context_fn=keep_matmuls(*kept)) * 2

        x = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        module.zero_grad()
        (torch.compile(block, backend=backend, fullgraph=True)(x) / 2).square().sum().backward()
        gradients = [x.grad, *(p.grad for p in module.parameters())]
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(gradients, expected, strict=True))
        products.append(sum(node.target in MATMULS for node in graphs[-1].graph.nodes))
    assert products[0] - products[1] == 1
    assert products[0] - products[2] == 3

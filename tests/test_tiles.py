"""Recomputation in tiles: the same values and gradients as one call, and the memory of one tile in the backward."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from seqloom.errors import UserError
from seqloom.runtime.live_bytes import LiveBytes
from seqloom.runtime.tiles import checkpoint_tiles


class MLP(nn.Module):
    """A gated MLP, the segment that is tiled in practice."""

    def __init__(self, width=4, inner=6, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (nn.Linear(width, inner, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False, dtype=dtype)

    def segment(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def two(self, x, scale, y):
        """Two arguments along different dimensions, one passed whole, two outputs along different dimensions."""
        hidden = self.segment(x) * scale
        return hidden, (hidden + y.transpose(0, 1)).transpose(0, 1).sigmoid()


def gradients(module, outputs, inputs):
    weights = [torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(7)) for out in outputs]
    return torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), [*inputs, *module.parameters()])


@settings(deadline=None, max_examples=25)
@given(length=st.integers(1, 9), batch=st.integers(1, 3), data=st.data())
def test_equals_one_call(length, batch, data):
    tiles = data.draw(st.integers(1, length))
    module = MLP()
    x = torch.randn(batch, length, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(length, batch, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    plain = module.two(x, scale, y)
    tiled = checkpoint_tiles(module.two, x, scale, y, tiles=tiles, in_dims=(1, None, 0), out_dims=(-2, 0))
    assert isinstance(tiled, tuple)
    for one, two in zip(plain, tiled, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)
    inputs = (x, scale, y)
    for one, two in zip(gradients(module, plain, inputs), gradients(module, tiled, inputs), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("length", "tiles"), [(8, 4), (7, 4), (9, 4), (5, 5), (3, 1)])
def test_the_lengths_differ_by_one_at_most_and_keep_the_order(length, tiles):
    seen = []

    def segment(x):
        seen.append(x.shape[1])
        return x * 2

    x = torch.arange(2.0 * length).view(2, length)
    out = checkpoint_tiles(segment, x, tiles=tiles, in_dims=(1,), out_dims=(1,))
    assert torch.equal(out, x * 2)
    assert len(seen) == tiles and sum(seen) == length and max(seen) - min(seen) <= 1 and seen == sorted(seen, reverse=True)


def test_a_sequence_shorter_than_the_tiles_is_cut_into_single_positions():
    seen = []
    x = torch.arange(8.0).view(2, 4)
    out = checkpoint_tiles(lambda x: seen.append(x.shape) or x + 1, x, tiles=16, in_dims=(1,), out_dims=(1,))
    assert torch.equal(out, x + 1) and seen == [(2, 1)] * 4


def test_arguments_that_are_no_tensors_are_passed_on():
    x = torch.ones(2, 4)

    def segment(x, factor, nothing):
        assert nothing is None
        return x * factor

    out = checkpoint_tiles(segment, x, 3, None, tiles=2, in_dims=(1, None, None), out_dims=(1,))
    assert torch.equal(out, x * 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiles": 2, "in_dims": (1, 1), "out_dims": (1,)}, r"1 arguments and in_dims \(1, 1\)"),
        ({"tiles": 2, "in_dims": (None,), "out_dims": (1,)}, r"1 arguments and in_dims \(None,\)"),
        ({"tiles": 2, "in_dims": (1,), "out_dims": (1, 1)}, "2 out_dims for 1 outputs"),
    ],
)
def test_what_does_not_fit_is_said(options, words):
    with pytest.raises(UserError, match=words):
        checkpoint_tiles(torch.sin, torch.ones(2, 4), **options)


WIDTH, INNER, LENGTH = 8, 512, 4096
WIDE = LENGTH * INNER * 4  # bytes of one wide activation, fp32; the segment makes several of them


def _peaks(tiles):
    """Bytes alive after the forward, and at most in forward and backward, above weights and input, on fake tensors."""
    with FakeTensorMode(), LiveBytes() as live:
        module = MLP(WIDTH, INNER, torch.float32)
        x = torch.empty(1, LENGTH, WIDTH, requires_grad=True)
        before = live.alive
        y = checkpoint_tiles(module.segment, x, tiles=tiles, in_dims=(1,), out_dims=(1,)) if tiles else module.segment(x)
        after, forward = live.alive - before, live.peak - before
        y.backward(torch.empty_like(y))
        return after, forward, live.peak - before


def test_memory_is_that_of_one_tile():
    kept, _, plain = _peaks(0)
    assert kept >= 4 * WIDE  # gate, its silu, up, their product
    peaks = {tiles: _peaks(tiles) for tiles in (1, 2, 4, 16)}
    narrow = LENGTH * WIDTH * 4
    for tiles, (after, forward, both) in peaks.items():
        assert after <= 2 * narrow, "only the output outlives the forward"
        assert forward <= 4 * WIDE / tiles + 3 * narrow
        # One tile, and inputs, outputs, gradients of the weights and of the tiles done so far.
        assert both <= 1.01 * plain / tiles + 6 * narrow + 6 * INNER * WIDTH * 4, tiles
    assert peaks[16][2] < plain / 10
    for fewer, more in itertools.pairwise((1, 2, 4, 16)):
        assert peaks[more][2] < peaks[fewer][2]


def test_without_gradients_it_is_a_loop_over_tiles():
    module = MLP()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    with torch.no_grad():
        out = checkpoint_tiles(module.segment, x, tiles=3, in_dims=(1,), out_dims=(1,))
    assert not out.requires_grad
    torch.testing.assert_close(out, module.segment(x), rtol=1e-12, atol=1e-12)


def test_compiled_as_one_graph():
    module = MLP()
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)

    def block(x):
        return x + checkpoint_tiles(module.segment, x, tiles=4, in_dims=(1,), out_dims=(1,))

    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    for one, two in zip(gradients(module, (compiled,), (x,)), gradients(module, (block(x),), (x,)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)

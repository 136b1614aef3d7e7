"""Offload: bit-equal gradients, activations gone from the device between forward and backward, nothing left behind."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from seqloom.runtime import offload as offload_module
from seqloom.runtime.live_bytes import LiveBytes
from seqloom.runtime.offload import MINIMUM, offload

WIDTH, INNER, ROWS = 64, 256, 4096
NARROW, WIDE = ROWS * WIDTH * 4, ROWS * INNER * 4  # 1 MiB and 4 MiB: what a block keeps


class Copies(TorchDispatchMode):
    """The bytes of every copy to the host, in order."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.seqloom.to_host.default:
            self.sizes.append(args[0].nbytes)
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    def __init__(self, offloads=True):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.offloads = offloads

    def segment(self, x):
        return self.down(F.silu(self.up(x)))

    def forward(self, x):
        return x + (offload(self.segment, x) if self.offloads else self.segment(x))


def stack(count, offloads=True):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(offloads) for _ in range(count)))


def rows():
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(model, inputs):
    for x in inputs:
        model(x).square().sum().backward()
    return [*(x.grad for x in inputs), *(p.grad for p in model.parameters())]


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_are_equal_to_the_bit_and_each_activation_is_copied_once(micro_batches):
    expected = gradients(stack(3, False), [rows() for _ in range(micro_batches)])
    with Copies() as copies:
        found = gradients(stack(3), [rows() for _ in range(micro_batches)])
    assert same(found, expected)
    # Input, the projection before and after its activation function; the weights, of 64 KiB, are small, and checked to stay below.
    assert sorted(copies.sizes) == sorted([NARROW, WIDE, WIDE] * 3 * micro_batches)


OPS = ("sin", "exp", "mul", "softmax", "halves", "transposed", "expanded", "product", "norm")


@settings(deadline=None, max_examples=15)
@given(
    ops=st.lists(
        st.sampled_from(["sin", "exp", "mul", "softmax", "halves", "transposed", "expanded", "product", "norm"]), min_size=1, max_size=6
    ),
    minimum=st.sampled_from([0, 64, 10**6]),
    calls=st.integers(1, 3),
)
def test_any_operators_views_and_saved_results(ops, minimum, calls):
    def segment(x, weight):
        steps = {
            "sin": lambda x: x.sin(),
            "exp": lambda x: x.exp().tanh(),  # saves its results
            "mul": lambda x: x * x,
            "softmax": lambda x: x.softmax(-1),
            "halves": lambda x: torch.cat([half.sin() * half for half in x.chunk(2, -1)], -1),
            "transposed": lambda x: (x.transpose(0, 1) * x.transpose(0, 1).contiguous().cos()).transpose(0, 1),
            "expanded": lambda x: x * x[:1].expand(6, 4),
            "product": lambda x: x @ weight,
            "norm": lambda x: F.layer_norm(x, (4,), weight[0]),
        }
        for op in ops:
            x = steps[op](x)
        return x

    def run(call):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4).requires_grad_()
        weight = nn.Parameter(torch.linspace(-0.5, 0.5, 16, dtype=torch.float64).view(4, 4))
        y = x
        for _ in range(calls):
            y = call(segment, y, weight)
        y.sin().sum().backward()
        return [x.grad] + ([] if weight.grad is None else [weight.grad])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload_module, "MINIMUM", minimum)
        assert same(run(offload), run(lambda segment, *args: segment(*args)))


def test_views_of_one_storage_are_one_copy():
    def segment(x):
        joined = x * 2
        left, right = joined.chunk(2, -1)
        return (left.sin() * right.cos()).sum() + joined.t().exp().sum() + joined.view(-1).square().sum()

    x = torch.randn(2048, 512, requires_grad=True)
    segment(x).backward()
    expected, x.grad = x.grad, None
    with Copies() as copies:
        result = offload(segment, x)
        # Of `joined` one copy, whole; then what sin, cos and exp made: the two factors and a result.
        assert sorted(copies.sizes) == [x.nbytes // 2, x.nbytes // 2, x.nbytes, x.nbytes]
        result.backward()
    assert torch.equal(x.grad, expected)


def test_what_two_neighbours_keep_is_one_copy():
    def segment(x):
        return x.sin()

    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with Copies() as copies:
        (offload(segment, x) * offload(segment, x)).sum().backward()
    assert copies.sizes == [NARROW]
    assert torch.equal(x.grad, 2 * x.detach().sin() * x.detach().cos())


READS = {
    "as it is": lambda x, weight: x @ weight,
    "transposed": lambda x, weight: x @ weight.t(),
    "linear": F.linear,
    "a part": lambda x, weight: x @ weight.chunk(2)[1].t(),
    "reshaped": lambda x, weight: x * weight.view(-1, 512)[:, :512].sin(),
}


@pytest.mark.parametrize("read", READS)
def test_parameters_and_their_views_stay(read):
    grads = []
    for call in (lambda f, *args: f(*args), offload):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(512, 512))
        assert weight.nbytes >= MINIMUM
        x = torch.randn(1, 512, requires_grad=True)
        with Copies() as copies:
            call(lambda x, weight=weight: READS[read](x, weight).sum(), x).backward()
        grads += [(x.grad, weight.grad)]
        # The sine is an activation as large as the weight; nothing else is large here.
        assert copies.sizes == ([weight.nbytes] if read == "reshaped" and call is offload else [])
    assert same(*grads)


def _peaks(count, offloads):
    """LiveBytes after the forward and after all, with the device's peak above weights and input."""
    with FakeTensorMode(), LiveBytes() as live:
        model = stack(count, offloads)
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        before = live.alive
        loss = model(x).sum()
        kept, host = live.alive - before, live.host_alive
        loss.backward()
        del loss
        gc.collect()
        return kept, host, live.peak - before, live.alive - before, live.host_alive


def test_device_memory_does_not_grow_with_the_number_of_calls():
    per_call = 2 * WIDE + NARROW
    for count in (2, 4, 8):
        kept, host, peak, left, host_left = _peaks(count, True)
        assert kept <= per_call + 2 * NARROW, "between forward and backward only the last call's activations are on the device"
        assert host == count * per_call
        assert peak <= 2 * per_call + 3 * WIDE + 4 * NARROW, "two calls' activations, and what a block works with"
        gradients_only = NARROW + count * (2 * WIDTH * INNER + WIDTH + INNER) * 4
        assert (left, host_left) == (gradients_only, 0)
    kept, host, *_ = _peaks(8, False)
    assert kept >= 8 * per_call - NARROW and host == 0  # the first input was there before


def test_shapes_of_gradients_on_fake_tensors():
    with FakeTensorMode():
        model = stack(2)
        x = torch.empty(ROWS, WIDTH, requires_grad=True)
        model(x).sum().backward()
        assert x.grad.shape == x.shape and all(p.grad.shape == p.shape for p in model.parameters())


def test_the_call_before_is_fetched_while_one_runs_backward(monkeypatch):
    """The order of events: which call's storages arrive when which call's first activation is used."""
    events, calls = [], []
    fetch, begin, init = offload_module._Copy.fetch, offload_module._Call.begin_backward, offload_module._Call.__init__

    def numbered(call):
        init(call)
        calls.append(call)

    def fetched(copy):
        if copy.device is None:
            events.append(("fetch", calls.index(copy.call)))
        fetch(copy)

    def began(call):
        if not call.returning:
            events.append(("backward", calls.index(call)))
        begin(call)

    monkeypatch.setattr(offload_module._Call, "__init__", numbered)
    monkeypatch.setattr(offload_module._Copy, "fetch", fetched)
    monkeypatch.setattr(offload_module._Call, "begin_backward", began)
    stack(4)(rows()).sum().backward()
    # The last call never left the device. Every other one has arrived, three storages each, before its own backward begins.
    expected = []
    for call in (3, 2, 1):
        expected += [("backward", call)] + [("fetch", call - 1)] * 3
    assert events == [*expected, ("backward", 0)]


def test_nothing_is_kept_when_backward_is_never_called():
    with LiveBytes() as live:
        model, x = stack(3), rows()
        before = live.alive
        y = model(x)
        assert live.host_alive == 3 * (2 * WIDE + NARROW)
        output = weakref.ref(y)
        del y
        assert output() is None, "no circle keeps the graph"
        assert (live.alive, live.host_alive) == (before, 0)
        assert offload_module._Call.latest() is None


def test_nothing_is_kept_after_backward_and_after_an_error():
    with LiveBytes() as live:
        model, x = stack(2), rows()
        before = live.alive
        model(x).sum().backward()
        assert live.host_alive == 0
        with pytest.raises(ZeroDivisionError):
            offload(lambda x: x.sin() / (1 // 0), x)
        gc.collect()
        assert live.host_alive == 0
        model.zero_grad()
        x.grad = None
        assert live.alive == before


def test_a_part_of_the_graph_and_a_retained_graph():
    expected = gradients(stack(2, False), [rows()])
    model, x = stack(2), rows()
    middle = model[0](x)
    loss = model[1](middle).square().sum()
    seen = torch.autograd.grad(loss, [middle], retain_graph=True)
    assert same(torch.autograd.grad(loss, [middle], retain_graph=True), seen)
    assert same(torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True), expected)
    loss.backward()
    assert same([x.grad, *(p.grad for p in model.parameters())], expected)


def test_without_gradients_it_is_a_plain_call():
    model = stack(2)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, Copies() as copies:
            out = model(rows())
        assert copies.sizes == [] and not out.requires_grad
    assert torch.equal(out, stack(2, False)(rows()))


@pytest.mark.parametrize("inner", ["nested", "checkpoint inside", "inside checkpoint"])
def test_together_with_itself_and_with_recomputation(inner):
    def run(plain):
        model, x = stack(2, False), rows()
        first, second = model
        middle = offload if not plain else lambda f, *args: f(*args)

        def segment(x):
            y = middle(first.segment, x) if inner == "nested" else first.segment(x)
            y = checkpoint(second.segment, y, use_reentrant=False) if inner == "checkpoint inside" and not plain else second.segment(y)
            return y.sin() * x

        if inner == "inside checkpoint" and not plain:
            out = checkpoint(lambda x: offload(segment, x), x, use_reentrant=False)
        else:
            out = middle(segment, x)
        out.sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    assert same(run(False), run(True))


def test_an_activation_changed_in_place_between_two_uses():
    """A storage that is saved, changed and saved again is two copies: each use gets what it saw. (Plain autograd would refuse.)"""

    def segment(x):
        y = x.clone()
        one = y * y.detach().clone()  # saves y as it is now, for the gradient of the clone: none. The product keeps the clone
        y.mul_(2)
        return one + y.sin()

    x = rows()
    segment(x).sum().backward()
    expected, x.grad = x.grad, None
    offload(segment, x).sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool])
def test_dtypes_and_strides_come_back(dtype):
    x = torch.randn(1024, 1024, dtype=torch.float32 if dtype == torch.bool else dtype).t().requires_grad_()

    def segment(x):
        return x.masked_fill(x > 0, 0.0) if dtype == torch.bool else x.sigmoid() * x[:, ::2].repeat(1, 2)

    grads = []
    for call in (lambda f, *args: f(*args), offload):
        with Copies() as copies:
            grads += torch.autograd.grad(call(segment, x).sum(), x)
    assert copies.sizes
    assert torch.equal(*grads) and grads[0].dtype == x.dtype


def test_compiled_with_a_break_around_it():
    """`torch.compile` cannot trace hooks on saved tensors: the block compiles in pieces, with the same gradients and copies."""
    expected = gradients(stack(2, False), [rows()])
    torch._dynamo.reset()
    model = stack(2)
    for block in model:
        block.compile(backend="aot_eager")
    with Copies() as copies:
        found = gradients(model, [rows()])
    assert same(found, expected)
    assert NARROW in copies.sizes and WIDE in copies.sizes


def test_the_operator_copies_and_knows_its_shape():
    torch.library.opcheck(torch.ops.seqloom.to_host.default, (torch.randn(3, 2),))
    x = torch.randn(4)
    copy = torch.ops.seqloom.to_host(x)
    assert torch.equal(copy, x) and copy.data_ptr() != x.data_ptr() and copy.device.type == "cpu"

"""The second example of a user's operator: SwiGLU that keeps two tensors."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from custom_ops.swiglu import swiglu
from seqloom.graph import Ref, Value
from seqloom.ops.check import check_op
from seqloom.ops.registry import capturing, resolve
from seqloom.ops.rules import bind
from seqloom.ops.saved import saved_for_backward

torch.set_num_threads(1)


def plain(gate, up):
    return F.silu(gate) * up


def make(*shape, dtype=torch.float64):
    return (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_equals_silu_times_up(shape):
    gate, up = make(*shape)
    weights = torch.randn(shape, dtype=torch.float64)
    expected, found = plain(gate, up), swiglu(gate, up)
    assert torch.equal(found, expected)
    grads = [torch.autograd.grad(x, (gate, up), weights) for x in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, tuple(make(3, 4)))


def test_extreme_gates_have_finite_gradients():
    gate = torch.tensor([-1e4, -50.0, 0.0, 50.0, 1e4], requires_grad=True)
    up = torch.ones(5, requires_grad=True)
    swiglu(gate, up).sum().backward()
    assert gate.grad.isfinite().all() and up.grad.isfinite().all()
    assert gate.grad.tolist()[::2] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    gate, up = make(8, 16, dtype=dtype)
    result = swiglu(gate, up)
    result.sum().backward()
    assert result.dtype == gate.grad.dtype == up.grad.dtype == dtype
    assert torch.equal(result, plain(gate, up))


def kept_by(function, *args):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.untyped_storage().data_ptr()) or x, lambda x: x):
        function(*args)
    return set(kept)


def test_keeps_its_two_inputs_only():
    gate, up = make(4, 6)
    inputs = {x.untyped_storage().data_ptr() for x in (gate, up)}
    assert kept_by(swiglu, gate, up) == inputs
    assert len(kept_by(plain, gate, up)) == 3
    name = "custom_ops.swiglu:swiglu"
    assert saved_for_backward(name, (Ref("gate"), Ref("up")), {}) == (("input", 0), ("input", 1))


def test_registered_and_true():
    assert str(resolve("custom_ops.swiglu:swiglu").annotation) == "* f, * f -> * f"
    report = check_op("custom_ops.swiglu:swiglu")
    assert report.ok and [split.name for split in report.splits] == ["*0", "*1", "f"]
    values = {name: Value(name, (2, 3, 4), torch.float32) for name in ("gate", "up")}
    bound = bind("custom_ops.swiglu:swiglu", (Ref("gate"), Ref("up")), {}, values)
    assert bound.shape(bound.outputs[0]) == (2, 3, 4)


def test_in_a_module_captured_compiled_checkpointed_and_fake():
    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(*s, bias=False) for s in ((4, 6), (4, 6), (6, 4)))

        def forward(self, x):
            return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

    mlp, x = MLP(), torch.randn(2, 3, 4)
    expected = mlp(x)
    assert torch.allclose(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(checkpoint(mlp, x, use_reentrant=False), expected)
    with capturing():
        program = torch.export.export(mlp.to("meta"), (x.to("meta"),), strict=False)
    assert [str(node.target) for node in program.graph.nodes].count("seqloom.call.default") == 1
    with FakeTensorMode():
        gate, up = torch.empty(2, 4, requires_grad=True), torch.empty(2, 4)
        swiglu(gate, up).sum().backward()
        assert gate.grad.shape == (2, 4)


def test_the_package_imports_no_operator_of_the_user():
    code = "import sys, seqloom.ops.check, seqloom.ops.attention; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    found = subprocess.run([sys.executable, "-c", code, "custom_ops", "chunk_linear_cross_entropy"], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr

"""One or more calls of every PyTorch operator that has a rule, with real tensors in the places of arguments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqloom.graph import Ref, Value


@dataclass(frozen=True)
class Sample:
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: dict[str, Tensor]

    @property
    def values(self) -> dict[str, Value]:
        return {name: Value(name, tuple(x.shape), x.dtype, requires_grad=x.is_floating_point()) for name, x in self.inputs.items()}

    def run(self, tensors: dict[str, Tensor] | None = None):
        packet, overload = self.op.removeprefix("aten.").split(".")
        tensors = tensors or self.inputs
        put = lambda tree: _map(tree, Ref, lambda ref: tensors[ref.name])  # noqa: E731
        outputs = getattr(getattr(torch.ops.aten, packet), overload)(*put(self.args), **{k: put(v) for k, v in self.kwargs.items()})
        return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]

    def __repr__(self):
        shapes = ", ".join(str(tuple(x.shape)) for x in self.inputs.values())
        return f"{self.op}[{shapes}]{_map(self.args, Ref, lambda ref: ref.name)}"


def sample(op: str, *args: Any, **kwargs: Any) -> Sample:
    inputs: dict[str, Tensor] = {}

    def place(tensor: Tensor) -> Ref:
        inputs[f"x{len(inputs)}"] = tensor
        return Ref(f"x{len(inputs) - 1}")

    args = tuple(_map(list(args), Tensor, place))
    return Sample(f"aten.{op}", args, {k: _map(v, Tensor, place) for k, v in kwargs.items()}, inputs)


def _map(tree, kind, fn):
    if isinstance(tree, kind):
        return fn(tree)
    if isinstance(tree, (tuple, list)):
        return tuple(_map(item, kind, fn) for item in tree)
    return tree


def t(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def i(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(high))


def b(*shape: int) -> Tensor:
    return t(*shape) > 0


UNARY = [
    *("neg", "alias", "clone", "detach", "contiguous", "lift_fresh_copy", "zeros_like", "ones_like"),
    *("sign", "floor", "ceil", "round", "isnan", "isinf", "abs", "square", "reciprocal", "rsqrt", "sqrt", "exp", "log", "log1p"),
    *("cos", "sin", "tanh", "sigmoid", "log_sigmoid", "relu", "silu", "gelu", "erf", "softplus"),
]
COMPARISONS = ["eq", "ne", "lt", "le", "gt", "ge"]

SAMPLES = [
    *(sample(f"{op}.default", t(4, 6)) for op in UNARY),
    sample("leaky_relu.default", t(4, 6), 0.1),
    sample("full_like.default", t(4, 6), 3.0),
    sample("gelu.default", t(4, 6), approximate="tanh"),
    sample("add.Tensor", t(4, 6), t(4, 6)),
    sample("add.Tensor", t(4, 1, 6), t(2, 1)),
    sample("add.Tensor", t(4, 6), 1.0),
    sample("add.Tensor", t(4, 6), t()),
    sample("sub.Tensor", t(4, 6), t(6)),
    sample("rsub.Scalar", t(4, 6), 1.0),
    sample("mul.Tensor", t(4, 6), t(6)),
    sample("mul.Tensor", t(1, 6), t(4, 1)),
    sample("mul.Tensor", t(4, 6), 2.0),
    sample("mul.Scalar", t(4, 6), 2.0),
    sample("div.Tensor", t(4, 6), t(4, 1)),
    sample("div.Tensor", t(4, 6), 2.0),
    sample("true_divide.Tensor", t(4, 6), t(6)),
    sample("floor_divide.default", i(9, 4, 6), 2),
    sample("pow.Tensor_Scalar", t(4, 6), 2),
    sample("pow.Tensor_Tensor", t(4, 6).abs(), t(6)),
    sample("pow.Scalar", 2.0, t(4, 6)),
    sample("maximum.default", t(4, 6), t(6)),
    sample("minimum.default", t(4, 6), t(6)),
    sample("where.self", b(4, 6), t(4, 6), t(6)),
    sample("where.ScalarOther", b(4, 6), t(4, 6), 0.0),
    sample("masked_fill.Scalar", t(4, 6), b(1, 6), 2.0),
    sample("clamp.default", t(4, 6), -0.5, 0.5),
    sample("clamp_min.default", t(4, 6), 0.0),
    sample("clamp_max.default", t(4, 6), 0.0),
    *(sample(f"{op}.Scalar", t(4, 6), 0.1) for op in COMPARISONS),
    *(sample(f"{op}.Tensor", t(4, 6), t(6)) for op in COMPARISONS),
    *(sample(f"{op}.default", b(4, 6), b(6)) for op in ("logical_and", "logical_or", "logical_xor")),
    sample("logical_not.default", b(4, 6)),
    sample("bitwise_and.Tensor", b(4, 6), b(6)),
    sample("bitwise_or.Tensor", b(4, 6), b(6)),
    sample("bitwise_not.default", b(4, 6)),
    sample("to.dtype", t(4, 6), torch.float64),
    sample("to.dtype", i(3, 4, 6), torch.float64),
    sample("_to_copy.default", t(4, 6), dtype=torch.float64),
    sample("type_as.default", t(4, 6), t(3, 5)),
    sample("dropout.default", t(4, 6), 0.0, True),
    sample("dropout.default", t(4, 6), 0.1, False),
    # views
    sample("view.default", t(2, 8, 12), [2, 8, -1, 3]),
    sample("view.default", t(1, 8, 12), [1, -1, 4, 3]),
    sample("view.default", t(2, 8, 12), [16, 12]),
    sample("view.default", t(6, 4), [4, 6]),
    sample("view.default", t(4, 1, 6), [4, 6, 1, 1]),
    sample("view.default", t(4, 6), [2, 2, 2, 3]),
    sample("view.default", t(1, 1), [1]),
    sample("reshape.default", t(2, 8, 4, 3), [2, 8, -1]),
    sample("reshape.default", t(4, 6).t(), [24]),
    sample("_unsafe_view.default", t(8, 12), [2, 4, 12]),
    sample("flatten.using_ints", t(2, 4, 6), 1, 2),
    sample("flatten.using_ints", t(2, 4, 6)),
    sample("unflatten.int", t(2, 12), -1, [4, -1]),
    sample("unflatten.int", t(2, 12, 4), -2, [4, 3]),
    sample("unflatten.int", t(12, 4), 0, [-1, 3]),
    sample("expand.default", t(4, 1, 6), [2, -1, 8, 6]),
    sample("expand.default", t(4, 1, 6), [4, 1, 6]),
    sample("expand.default", t(6), [4, 6]),
    sample("permute.default", t(2, 4, 6), [2, 0, -2]),
    sample("transpose.int", t(2, 4, 6), 1, -1),
    sample("swapaxes.default", t(2, 4, 6), 0, 1),
    sample("t.default", t(4, 6)),
    sample("t.default", t(4)),
    sample("mT.default", t(2, 4, 6)),
    sample("unsqueeze.default", t(4, 6), -1),
    sample("unsqueeze.default", t(4, 6), 1),
    sample("squeeze.dim", t(4, 1, 6), 1),
    sample("squeeze.dim", t(4, 2, 6), 1),
    sample("squeeze.default", t(1, 4, 1)),
    sample("repeat_interleave.self_int", t(2, 4, 6), 3, 1),
    sample("repeat.default", t(4, 6), [2, 3, 1]),
    # contractions
    sample("linear.default", t(2, 4, 6), t(8, 6)),
    sample("linear.default", t(2, 4, 6), t(8, 6), t(8)),
    sample("linear.default", t(6), t(8, 6)),
    sample("mm.default", t(4, 6), t(6, 8)),
    sample("bmm.default", t(2, 4, 6), t(2, 6, 8)),
    sample("addmm.default", t(8), t(4, 6), t(6, 8)),
    sample("addmm.default", t(4, 1), t(4, 6), t(6, 8)),
    sample("matmul.default", t(2, 4, 6), t(6, 8)),
    sample("matmul.default", t(2, 1, 4, 6), t(4, 6, 8)),
    sample("matmul.default", t(6), t(6, 8)),
    sample("matmul.default", t(4, 6), t(6)),
    sample("matmul.default", t(6), t(6)),
    sample("einsum.default", "bij,bjk->bik", [t(2, 4, 6), t(2, 6, 8)]),
    sample("einsum.default", "b i, i -> b", [t(2, 4), t(4)]),
    sample("einsum.default", "ij,k->ik", [t(4, 6), t(2)]),
    # along a dimension
    sample("sum.default", t(4, 6)),
    sample("sum.dim_IntList", t(4, 6), [-1]),
    sample("sum.dim_IntList", t(4, 6), [0], True),
    sample("sum.dim_IntList", i(5, 4, 6), [0, 1]),
    sample("mean.default", t(4, 6)),
    sample("mean.dim", t(4, 6), [-1], True),
    sample("mean.dim", t(4, 6), [0]),
    sample("var.correction", t(4, 6), [1], correction=0, keepdim=True),
    sample("amax.default", t(4, 6), [-1]),
    sample("amin.default", t(4, 6), [-1], True),
    sample("logsumexp.default", t(4, 6), [-1]),
    sample("max.dim", t(4, 6), 1),
    sample("max.default", t(4, 6)),
    sample("min.dim", t(4, 6), 0, True),
    sample("argmax.default", t(4, 6), -1),
    sample("argmax.default", t(4, 6)),
    sample("argmin.default", t(4, 6), 0, True),
    sample("any.dim", b(4, 6), 1),
    sample("any.default", b(4, 6)),
    sample("all.dim", b(4, 6), 0, True),
    sample("softmax.int", t(4, 6), -1),
    sample("log_softmax.int", t(4, 6), 0),
    sample("_softmax.default", t(4, 6), 1, False),
    sample("_log_softmax.default", t(4, 6), 1, False),
    sample("cumsum.default", t(4, 6), -1),
    sample("flip.default", t(4, 6), [1]),
    sample("roll.default", t(4, 6), [2], [1]),
    sample("roll.default", t(4, 6), [2]),
    sample("layer_norm.default", t(2, 4, 6), [6], t(6), t(6)),
    sample("layer_norm.default", t(2, 4, 6), [4, 6]),
    sample("rms_norm.default", t(2, 4, 6), [6], t(6)),
    sample("rms_norm.default", t(2, 4, 6), [6]),
    sample("cross_entropy_loss.default", t(4, 6), i(6, 4), None, 0),
    sample("cross_entropy_loss.default", t(4, 6, 2), i(6, 4, 2), None, 0),
    sample("cross_entropy_loss.default", t(4, 6), i(6, 4), None, 2),
    sample("cross_entropy_loss.default", t(4, 6), i(6, 4)),
    sample("cross_entropy_loss.default", t(6), i(6), None, 2),
    sample("nll_loss_nd.default", t(4, 6), i(6, 4), None, 0),
    # cut, join, look up, make
    sample("embedding.default", t(10, 6), i(10, 2, 4)),
    sample("embedding.default", t(10, 6), i(10, 4), 0, False, False),
    sample("embedding.default", t(10, 6), i(10, 4), -1, True, False),
    sample("cat.default", [t(4, 6), t(4, 2)], -1),
    sample("concat.default", [t(4, 6), t(2, 6)]),
    sample("stack.default", [t(4, 6), t(4, 6)], 1),
    sample("slice.Tensor", t(4, 6), 1, 2, 9223372036854775807),
    sample("slice.Tensor", t(4, 6), 1, 0, -2),
    sample("slice.Tensor", t(4, 6), 0, 0, 9223372036854775807),
    sample("narrow.default", t(4, 6), 1, 2, 3),
    sample("split.Tensor", t(4, 6), 4, 1),
    sample("split.Tensor", t(4, 6), 6, 1),
    sample("split_with_sizes.default", t(4, 6), [1, 5], -1),
    sample("chunk.default", t(4, 6), 4, 1),
    sample("select.int", t(4, 6), 1, -1),
    sample("unbind.int", t(2, 6)),
    sample("index_select.default", t(4, 6), 1, i(6, 8)),
    sample("gather.default", t(4, 6), 1, i(6, 4, 2)),
    sample("gather.default", t(4, 6), 1, i(6, 2, 2)),
    sample("diff.default", i(9, 2, 6), 1, -1, i(9, 2, 1)),
    sample("diff.default", t(4, 6)),
    sample("tril.default", t(2, 4, 4)),
    sample("triu.default", t(2, 4, 4), 1),
    sample("one_hot.default", i(5, 4, 6), 5),
    sample("arange.default", 6),
    sample("arange.start", 2, 7),
    sample("arange.start_step", 0, 7, 2),
    sample("zeros.default", [4, 6]),
    sample("ones.default", [4, 6]),
    sample("full.default", [4, 6], 2.0),
    sample("empty.memory_format", [4, 6]),
    sample("new_zeros.default", t(4, 6), [2, 3]),
    sample("new_ones.default", t(4, 6), [2, 3]),
    sample("new_full.default", t(4, 6), [2, 3], 1.0),
    sample("new_empty.default", t(4, 6), [2, 3]),
    sample("scalar_tensor.default", 2.0),
]

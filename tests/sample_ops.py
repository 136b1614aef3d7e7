"""Registered operators for the tests of register_op and check-op: true ones, and ones whose annotation lies."""

import torch
from torch import Tensor

from seqloom.ops import register_op


@register_op("* d^, d^ -> * d^", flops=lambda sizes: 3 * sizes["d"] * sizes["power"], saved=("x", "output"))
def scaled(x: Tensor, scale: Tensor, power: int = 2, options: tuple = ()) -> Tensor:
    return x**power * scale


@register_op("b l^, b n^ -> b l^ n^, b l^", dtype=torch.float32)
def two_outputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return (x[:, :, None] * y[:, None]).float(), x.float()


@register_op("b l -> b l copies^")
def repeated(x: Tensor, copies: int = 3) -> Tensor:
    return x[..., None].expand(*x.shape, copies).clone()


@register_op("b d, ? -> b d", dtype=lambda dtypes: torch.float64)
def with_table(x: Tensor, table: Tensor | None = None) -> Tensor:
    return x.double() if table is None else x.double() + table.sum()


@register_op("n d -> n d")
def softmax_lie(x: Tensor) -> Tensor:
    return x.softmax(-1)


@register_op("a k+, k+ b, b -> a b")
def biased_lie(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x @ w + bias


@register_op("a b -> a b")
def gradient_lie(x: Tensor) -> Tensor:
    return _Centered.apply(x)


class _Centered(torch.autograd.Function):
    """Right in the forward pass; the gradient mixes rows."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean(0, keepdim=True)


@register_op("(h d) -> h d")
def heads_by_guess(x: Tensor) -> Tensor:
    return x.reshape(4, -1)


@register_op("a b -> b a")
def shape_lie(x: Tensor) -> Tensor:
    return x


@register_op("a -> a", dtype=torch.float32)
def dtype_lie(x: Tensor) -> Tensor:
    return x


@register_op("b (k g), b k -> b (k g)")
def grouped(x: Tensor, y: Tensor) -> Tensor:
    return x * y.repeat_interleave(x.shape[1] // y.shape[1], 1)


@register_op("b (k g), b k -> b (k g)")
def grouped_lie(x: Tensor, y: Tensor) -> Tensor:
    """Wrong only where there is one key head: then the groups may be split, but the sum needs all of them."""
    return x * y.repeat_interleave(x.shape[1] // y.shape[1], 1) + x.sum(1, keepdim=True) * (y.shape[1] == 1)


@register_op("a b, n^ b -> a b")
def looked_up(indices: Tensor, weight: Tensor) -> Tensor:
    return weight[indices, torch.arange(weight.shape[1])]


@register_op("a -> a")
def logarithm(x: Tensor) -> Tensor:
    return x.log()


@register_op("a -> a")
def failing(x: Tensor, mode: str) -> Tensor:
    raise RuntimeError(f"mode {mode} is not there")


@register_op(
    "b l, m^ -> b l",
    starts={"l": "first"},
    choices={"rows": (1, 2, 5)},
    flops=lambda sizes: sizes["b"] * sizes["l"] * (1 + sizes["first"]),
    side=lambda sizes: min(sizes["rows"], sizes["l"]),
)
def shifted(x: Tensor, table: Tensor, first: int = 0, rows: int = 2) -> Tensor:
    """Row i of the whole reads entry i of the table, `rows` at a time."""
    own = table[first : first + x.shape[1]]
    return torch.cat([x[:, i : i + rows] * own[i : i + rows] for i in range(0, x.shape[1], rows)], 1)


@register_op("b l, m^ -> b l", starts={"l": "first"})
def shifted_lie(x: Tensor, table: Tensor, first: int = 0) -> Tensor:
    """Is told where its piece starts and does not listen."""
    return x * table[: x.shape[1]]


@register_op("a -> a", choices={"rows": (1, 2)})
def choices_lie(x: Tensor, rows: int = 1) -> Tensor:
    """The constant that is said to change nothing doubles the gradient."""
    return x * rows - (rows - 1) * x.detach()


@register_op("a -> a", choices={"rows": (2, 3)})
def choices_fail(x: Tensor, rows: int = 1) -> Tensor:
    if x.shape[0] % rows:
        raise ValueError(f"{rows} rows do not divide {x.shape[0]}")
    return x.view(-1, rows).reshape(-1)


@register_op("b n^ m^ -> b n^ m^")
def square(x: Tensor) -> Tensor:
    return x + x.transpose(1, 2)


@register_op("(a b c), a, a b -> (a b c)")
def three_in_one(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Scales each element by the entries of its `a` and of its `a b`."""
    return (x.view(*z.shape, -1) * y[:, None, None] * z[:, :, None]).flatten()


@register_op("(a b c), a, a b -> (a b c)")
def three_lie(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Wrong only where `a` and `b` are split to single elements: the sum needs all of `c`."""
    return three_in_one(x, y, z) + x.sum() * (z.numel() == 1)


def plain(x: Tensor) -> Tensor:
    return x

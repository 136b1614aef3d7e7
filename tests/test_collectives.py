"""Every reshard keeps the global tensor, and its backward keeps the global gradient, under the meaning of the four placements."""

import itertools

import pytest
import torch
import torch.distributed as dist
from procs import run_ranks
from torch.utils.checkpoint import checkpoint

from seqloom.runtime import collectives as c
from seqloom.runtime.mesh import axis_group, build_mesh

SHAPE = (4, 8, 12)
TABLE = [  # from, to, function of (x, from dim, to dim, group)
    ("S", "R", lambda x, i, j, g: c.all_gather(x, i, g)),
    ("S", "B", lambda x, i, j, g: c.all_gather(x, i, g, partial_grad=True)),
    ("S", "S", lambda x, i, j, g: c.all_to_all(x, j, i, g)),
    ("P", "R", lambda x, i, j, g: c.all_reduce(x, g)),
    ("P", "B", lambda x, i, j, g: c.all_reduce(x, g, partial_grad=True)),
    ("P", "S", lambda x, i, j, g: c.reduce_scatter(x, j, g)),
    ("R", "S", lambda x, i, j, g: c.shard(x, j, g)),
    ("B", "S", lambda x, i, j, g: c.shard(x, j, g, partial_grad=True)),
    ("R", "B", lambda x, i, j, g: c.sum_grad(x, g)),
    ("B", "R", lambda x, i, j, g: c.share_grad(x, g)),
]
GRADIENT = {"S": "S", "R": "R", "B": "P", "P": "R"}  # how the gradient of each placement lies, in the words for tensors


def _lay(whole, placement, dim, group, generator):
    """This rank's piece of `whole`. Parts of a sum are random."""
    n, rank = group.size(), group.rank()
    if placement == "S":
        return whole.chunk(n, dim)[rank].clone()
    if placement in "RB":
        return whole.clone()
    parts = torch.randn(n - 1, *whole.shape, dtype=whole.dtype, generator=generator)
    return (whole - parts.sum(0)) if rank == 0 else parts[rank - 1]


def _joined(piece, placement, dim, group):
    """The global tensor from the pieces of all ranks, by plain `torch.distributed`."""
    pieces = [torch.empty_like(piece) for _ in range(group.size())]
    dist.all_gather(pieces, piece.contiguous(), group=group)
    if placement == "S":
        return torch.cat(pieces, dim)
    if placement == "P":
        return torch.stack(pieces).sum(0)
    for other in pieces:
        assert torch.equal(other, piece)
    return piece


def _strided(x):
    """The same values, not contiguous in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _check_row(row, i, j, group, dtype, tolerance, seed):
    before, after, function = row
    generator = torch.Generator().manual_seed(seed)
    whole, gradient = (torch.randn(SHAPE, dtype=dtype, generator=generator) for _ in range(2))
    x = _strided(_lay(whole, before, i, group, generator)).requires_grad_()
    y = function(x, i, j, group)
    assert y.dtype == dtype and (group.size() == 1 or y.is_contiguous() or {before, after} == {"R", "B"})
    torch.testing.assert_close(_joined(y.detach(), after, j, group), whole, rtol=0, atol=tolerance)
    y.backward(_strided(_lay(gradient, GRADIENT[after], j, group, generator)))
    torch.testing.assert_close(_joined(x.grad, GRADIENT[before], i, group), gradient, rtol=0, atol=tolerance)


def _whole_table(rank, world_size):
    group = dist.group.WORLD
    for seed, (row, i, j) in enumerate(itertools.product(TABLE, range(3), range(3))):
        if row[:2] != ("S", "S") or i != j:
            _check_row(row, i, j, group, torch.float64, 1e-12, seed)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.15)):
        for row in TABLE:
            _check_row(row, 1, -1, group, dtype, tolerance, 0)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_row_of_the_table(world_size):
    run_ranks(_whole_table, world_size)


def _packed(rank, world_size):
    """Each tensor and its gradient are those of an all-to-all of its own."""
    group, generator = dist.group.WORLD, torch.Generator().manual_seed(rank)
    for i, j in ((1, 2), (2, 1), (0, 2), (3, 1)):
        shapes = [[3 * world_size if dim == i else 2 * world_size for dim in range(4)] for _ in range(3)]
        for count, shape in zip((4, 1, 2), shapes, strict=True):
            shape[j] = count * world_size
        tensors = [_strided(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in shapes]
        alone, together = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
        expected = [c.all_to_all(x, j, i, group) for x in alone]
        found = c.packed_all_to_all(*together, split_dim=j, concat_dim=i - 4, group=group)
        gradients = [_strided(torch.randn(x.shape, dtype=torch.float64, generator=generator)) for x in expected]
        torch.autograd.backward(expected, gradients)
        torch.autograd.backward(found, gradients)
        for a, b in zip([*expected, *(x.grad for x in alone)], [*found, *(x.grad for x in together)], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_packed_tensors_travel_as_alone(world_size):
    run_ranks(_packed, world_size)


def _axes(rank, world_size):
    mesh = build_mesh({"sp": 2, "tp": 2}, 1, "cpu")
    assert [axis_group(mesh, "dp").size(), axis_group(mesh, "sp").rank(), axis_group(mesh, "tp").rank()] == [1, rank // 2, rank % 2]
    both = axis_group(mesh, "sp", "tp")
    assert (both.size(), both.rank()) == (4, rank)
    assert axis_group(mesh, "tp", "sp") is both and axis_group(mesh, "sp", "tp") is both
    for group in (both, axis_group(mesh, "sp"), axis_group(mesh, "tp")):
        for row in TABLE:
            _check_row(row, 1, 2, group, torch.float64, 1e-12, 7)
    # One move over both axes is the two moves one after the other, the inner axis first when leaving a dimension.
    whole = torch.arange(64.0).view(4, 4, 4)
    piece = whole.chunk(4, 0)[rank]
    two_steps = c.all_gather(c.all_gather(piece, 0, axis_group(mesh, "tp")), 0, axis_group(mesh, "sp"))
    assert torch.equal(two_steps, whole) and torch.equal(c.all_gather(piece, 0, both), whole)


def test_groups_of_one_axis_and_of_two():
    run_ranks(_axes, 4)


class _Layer(torch.nn.Module):
    """Sequence-split input, a column-split and a row-split product, attention-like all-to-all in between."""

    def __init__(self, group):
        super().__init__()
        self.group = group
        generator = torch.Generator().manual_seed(0)
        self.up = torch.nn.Parameter(torch.randn(6, 8, generator=generator, dtype=torch.float64))
        self.down = torch.nn.Parameter(torch.randn(8, 6, generator=generator, dtype=torch.float64))

    def forward(self, x):
        x = c.all_gather(x, 1, self.group, partial_grad=True)
        y = torch.tanh(c.sum_grad(x, self.group) @ c.shard(self.up, 1, self.group))
        y = c.reduce_scatter(y @ c.shard(self.down, 0, self.group), 1, self.group)
        y = torch.sin(
            torch.cat(c.packed_all_to_all(y, 2 * y, split_dim=2, concat_dim=1, group=self.group), 2)[..., : y.size(2) // self.group.size()]
        )
        y = c.all_to_all(y, 1, 2, self.group)
        return c.all_reduce(c.share_grad(y, self.group).sum(), self.group)


def _gradients(function, layer, rank):
    layer.zero_grad()
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    loss = function(x)
    loss.backward()
    return [loss.detach(), x.grad, layer.up.grad, layer.down.grad]


def _compiled(rank, world_size):
    layer = _Layer(dist.group.WORLD)
    expected = _gradients(layer, layer, rank)
    torch._dynamo.reset()
    functions = {
        "checkpoint": lambda x: checkpoint(layer, x, use_reentrant=False),
        "compile": torch.compile(layer, backend="aot_eager", fullgraph=True),
        "compiled checkpoint": torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), backend="aot_eager", fullgraph=True),
    }
    for name, function in functions.items():
        for got, wanted in zip(_gradients(function, layer, rank), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12, msg=name)


def test_checkpoint_and_compile_give_the_same():
    run_ranks(_compiled, 2)


def _fake(rank, world_size):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    mesh = build_mesh({"sp": 2, "tp": 4}, 1, "cpu")
    group = axis_group(mesh, "sp", "tp")
    with FakeTensorMode():
        x = torch.empty(2, 1 << 17, 4096, requires_grad=True)
        shapes = [tuple(function(x, 1, 2, group).shape) for _, _, function in TABLE]
        sum(function(x, 1, 2, group).sum() for _, _, function in TABLE).backward()
        return shapes, tuple(x.grad.shape)


def test_shapes_on_fake_tensors_with_fake_ranks():
    shapes, grad = run_ranks(_fake, 1)[0]
    length, width = 1 << 17, 4096
    same, gathered, split = (2, length, width), (2, 8 * length, width), (2, length, width // 8)
    assert shapes == [gathered, gathered, (2, 8 * length, width // 8), same, same, split, split, split, same, same]
    assert grad == same


def test_a_dimension_that_does_not_divide_is_an_error():
    with pytest.raises(AssertionError, match="multiply up to the size of dim 1"):
        run_ranks(_uneven, 2)


def _uneven(rank, world_size):
    c.shard(torch.zeros(2, 3), 1, dist.group.WORLD)

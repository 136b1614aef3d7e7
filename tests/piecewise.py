"""Run an operator in pieces along several dimensions at once and put the results together, all differentiable.

An independent statement of what a `Split` promises: cut the inputs that have the name, run, concatenate the outputs that have it, add up
the outputs of a reduced one. Autograd through the cuts and joins then gives the gradients a plan would compute.
"""

import dataclasses

import torch

from seqloom.ops.views import with_output_shape


def local(bound, name, pieces):
    """The annotation of one piece."""
    return dataclasses.replace(bound, named_sizes=tuple((n, s // pieces if n == name else s) for n, s in bound.named_sizes))


def assemble(run, bound, inputs, cuts, offsets=None):
    """`run(inputs, output_shapes, offsets)` in pieces: `cuts` is a list of (split, pieces), outer to inner.

    `offsets` says by name where the piece starts, in elements of the whole dimension.
    """
    offsets = offsets or {}
    if not cuts:
        shapes = [bound.shape(dims) for dims in bound.outputs]
        outputs = run(inputs, shapes, offsets)
        assert [tuple(x.shape) for x in outputs] == shapes
        return outputs
    (split, pieces), inner = cuts[0], cuts[1:]
    below = local(bound, split.name, pieces)
    parts = []
    for index in range(pieces):
        cut = [x if dim is None else x.chunk(pieces, dim)[index] for x, dim in zip(inputs, split.input_dims, strict=True)]
        start = offsets.get(split.name, 0) + index * below.sizes[split.name]
        parts.append(assemble(run, below, cut, inner, {**offsets, split.name: start}))
    return [
        sum(part[j] for part in parts) if dim is None else torch.cat([part[j] for part in parts], dim)
        for j, dim in enumerate(split.output_dims)
    ]


def runner(call):
    """How to run a sample on other tensors, with sizes in its arguments changed to a piece's."""

    def run(inputs, shapes, offsets):
        args, kwargs = with_output_shape(call.op, call.args, call.kwargs, shapes[0])
        return dataclasses.replace(call, args=tuple(args), kwargs=kwargs).run(dict(zip(call.inputs, inputs, strict=True)))

    return run


def down_to(splits, split, pieces):
    """Cuts that end in `split`, with the names it comes after cut to single elements first."""
    by_name = {s.name: s for s in splits}
    before = []
    for name in split.after:
        before += [cut for cut in down_to(splits, by_name[name], by_name[name].size) if cut not in before]
    return [*before, (split, pieces)]


def leaves(call):
    """Fresh inputs of a sample that require grad; positive where the operator needs that."""
    finite = all(x.isfinite().all() for x in call.run() if x.is_floating_point())
    values = [x if finite or not x.is_floating_point() else x.abs() + 0.5 for x in call.inputs.values()]
    return [x.detach().clone().requires_grad_(x.is_floating_point()) for x in values]


def results(outputs, inputs):
    """Outputs, then the gradients of a fixed weighting of them."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in outputs]
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True) if x.requires_grad)
    wanted = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(total, wanted, materialize_grads=True) if isinstance(total, torch.Tensor) and wanted else ()
    return [*(x.detach() for x in outputs), *grads]


def assert_same(run, bound, make_inputs, cuts):
    """Whole and assembled agree in outputs and gradients."""
    inputs = make_inputs()
    whole = results(run(inputs, [bound.shape(dims) for dims in bound.outputs], {}), inputs)
    pieced = results(assemble(run, bound, inputs, cuts), inputs)
    torch.testing.assert_close(pieced, whole, rtol=1e-10, atol=1e-11)

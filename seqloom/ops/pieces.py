"""One operator whole against the same operator in pieces: the comparison behind check-op.

In: a way to run the operator, its bound annotation and whole inputs. Out: a `Report`. What collectives would do is done by hand: outputs
are concatenated, or summed for `+` names; gradients of split inputs are concatenated, gradients of unsplit inputs summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seqloom.annotation import Bound, Split
from seqloom.errors import UserError

PIECES = 2
TOLERANCE = 1e-9

Offsets = Mapping[str, int]
Run = Callable[[Sequence[Tensor], Sequence[tuple[int, ...]], Offsets], Sequence[Tensor]]


class OperatorFailure(UserError):
    """The operator itself fails on whole inputs."""


@dataclass(frozen=True)
class SplitReport:
    """One name: where it leads (`"hidden_states[1]"`, ...), the largest relative difference found, and the lies (empty when true)."""

    name: str
    places: tuple[str, ...]
    error: float
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """Result for one operator: `sizes` it ran with, one entry per split, and problems of the operator run whole."""

    op: str
    annotation: str
    sizes: tuple[tuple[str, int], ...]
    splits: tuple[SplitReport, ...]
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything the annotation says holds."""
        return not self.problems and all(not split.problems for split in self.splits)


@dataclass(frozen=True)
class _Result:
    outputs: list[Tensor]
    gradients: list[Tensor | None]


def compare(op: str, annotation: str, bound: Bound, run: Run, inputs: Sequence[Tensor], names: Sequence[str]) -> Report:
    """Run whole and split along every name that may be split.

    `run` takes the tensor inputs, the shapes its outputs should have, and where the piece starts in the split dimension by name ({} for
    the whole); `names` are those of the inputs, for the report. Raises `OperatorFailure` where the operator fails on whole inputs,
    `UserError` where a size cannot be cut.
    """
    shapes = [bound.shape(dims) for dims in bound.outputs]
    report = Report(op, annotation, bound.named_sizes, ())
    try:
        outputs = run(inputs, shapes, {})
        if any(x.is_floating_point() and not x.isfinite().all() for x in outputs):  # a logarithm or a root: stay above zero
            inputs = [x.abs() + 0.5 if x.is_floating_point() else x for x in inputs]
            outputs = run(inputs, shapes, {})
    except Exception as error:
        sizes = " ".join(f"{name}={size}" for name, size in bound.named_sizes)
        raise OperatorFailure(f"operator '{op}' fails on whole inputs of sizes {sizes}: {error}") from error
    found = [tuple(output.shape) for output in outputs]
    if found != shapes:
        return replace(report, problems=(f"the outputs have shapes {found}, but the annotation says {shapes}",))
    weights = _weights(outputs)
    whole = _forward_backward(run, inputs, weights, shapes, {})
    return replace(report, splits=tuple(_check_split(bound, split, run, inputs, weights, whole, names) for split in bound.splits()))


def _check_split(
    bound: Bound, split: Split, run: Run, inputs: Sequence[Tensor], weights: Sequence[Tensor], whole: _Result, names: Sequence[str]
) -> SplitReport:
    if split.size % PIECES:
        raise UserError(f"the size {split.name}={split.size} cannot be cut in {PIECES}: give an even one with --sizes {split.name}=...")
    places = [f"{name}[{dim}]" for name, dim in zip(names, split.input_dims, strict=True) if dim is not None]
    places += [f"output {j}[{dim}]" for j, dim in enumerate(split.output_dims) if dim is not None]
    local = replace(bound, named_sizes=tuple((n, s // PIECES if n == split.name else s) for n, s in bound.named_sizes))
    shapes = [local.shape(dims) for dims in bound.outputs]
    pieces: list[_Result] = []
    for index in range(PIECES):
        cut_inputs = [_cut(x, dim, index) for x, dim in zip(inputs, split.input_dims, strict=True)]
        cut_weights = [_cut(x, dim, index) for x, dim in zip(weights, split.output_dims, strict=True)]
        try:
            pieces.append(_forward_backward(run, cut_inputs, cut_weights, shapes, {split.name: index * split.size // PIECES}))
        except Exception as error:
            return SplitReport(split.name, tuple(places), float("inf"), (f"the operator fails on a piece: {error}",))
    error, problems = _differences(_comparisons(split, whole, pieces, names))
    return SplitReport(split.name, tuple(places), error, problems)


def differences(first: Run, second: Run, inputs: Sequence[Tensor], names: Sequence[str]) -> tuple[str, ...]:
    """How two ways to run one operator on the same whole inputs differ in outputs and gradients; nothing where they agree."""
    outputs = first(inputs, (), {})
    weights, shapes = _weights(outputs), [tuple(x.shape) for x in outputs]
    whole, other = (_forward_backward(run, inputs, weights, shapes, {}) for run in (first, second))
    same = Split("", 1, (0,) * len(inputs), (0,) * len(outputs), False)
    return _differences(_comparisons(same, whole, [other], names))[1]


def _weights(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random weights whose sum over the outputs is what gradients are taken of."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x.dtype) for x in outputs]


def _differences(comparisons: Iterable[tuple[str, Tensor, Tensor]]) -> tuple[float, tuple[str, ...]]:
    """The largest relative difference, and a sentence for each one that is too large."""
    error, problems = 0.0, []
    for what, mine, its in comparisons:
        distance = _distance(mine, its)
        error = max(error, distance)
        if not distance <= TOLERANCE:
            problems.append(f"{what} differs by {distance:.1e}")
    return error, tuple(problems)


def _comparisons(split: Split, whole: _Result, pieces: Sequence[_Result], names: Sequence[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    for j, (expected, dim) in enumerate(zip(whole.outputs, split.output_dims, strict=True)):
        yield f"output {j}", expected, _join([piece.outputs[j] for piece in pieces], dim)
    for i, (gradient, dim) in enumerate(zip(whole.gradients, split.input_dims, strict=True)):
        if gradient is not None:
            yield f"the gradient of {names[i]}", gradient, _join([piece.gradients[i] for piece in pieces], dim)


def _forward_backward(
    run: Run, inputs: Sequence[Tensor], weights: Sequence[Tensor], shapes: Sequence[tuple[int, ...]], offsets: Offsets
) -> _Result:
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = list(run(leaves, shapes, offsets))
    for output, weight in zip(outputs, weights, strict=True):
        if output.shape != weight.shape:
            raise ValueError(f"its output has shape {tuple(output.shape)} where {tuple(weight.shape)} is due")
    total = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True) if x.requires_grad)
    wanted = [x for x in leaves if x.requires_grad]
    if isinstance(total, Tensor) and wanted:
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True))
        return _Result([x.detach() for x in outputs], [next(found) if x.requires_grad else None for x in leaves])
    return _Result([x.detach() for x in outputs], [None] * len(leaves))


def _cut(x: Tensor, dim: int | None, index: int) -> Tensor:
    return x if dim is None else x.chunk(PIECES, dim)[index]


def _join(pieces: Sequence[Tensor], dim: int | None) -> Tensor:
    return torch.stack(list(pieces)).sum(0).to(pieces[0].dtype) if dim is None else torch.cat(list(pieces), dim)


def _distance(expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest value; infinite for other shapes."""
    if expected.shape != found.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    expected, found = expected.double(), found.double()
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1.0))

"""check-op: does an annotation tell the truth?

An operator runs whole and, for every name its annotation lets a plan split, in pieces; forward and backward, in fp64. A piece is told
where it starts if `starts=` says so, and every value that `choices=` allows must compute the same. In: a registered function (`check_op`),
whose inputs are made up from its annotation, or one call of a PyTorch operator (`check_rule`). Out: a `Report` that names each dimension
for which the annotation lies and what differs. No processes and no device are needed: pieces run one after another (`seqloom.ops.pieces`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqloom.annotation import Annotation, Bound
from seqloom.errors import UserError
from seqloom.graph import Ref, Value, map_refs
from seqloom.ops.pieces import Offsets, OperatorFailure, Report, Run, SplitReport, compare, differences
from seqloom.ops.registry import RegisteredOp, resolve
from seqloom.ops.rules import bind
from seqloom.ops.views import with_output_shape

INTEGER_NAMES = ("labels", "targets", "input_ids", "token_ids", "position_ids", "ids", "indices", "index")
_STAND_INS = {"int": 1, "float": 1.0, "bool": False}


def check_op(
    target: str,
    *,
    sizes: Mapping[str, int] | None = None,
    args: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Report:
    """Check a registered function "module:function" on small random inputs made from its annotation.

    `sizes` by name: by default 4, 6, 8, ..., and one size for all frozen names where the function wants that. `args` for parameters
    beyond the annotation: those without a default get 1, 1.0 or False by their type hint. `dtypes` by parameter ("int64", "bool"):
    inputs are fp64, but int64, small and not negative, for parameters annotated `LongTensor` or named as in `INTEGER_NAMES`. A name that
    leads a group is also given the size 1, which frees the name after it. Raises `UserError` for what is missing or unknown, and where
    the function fails on whole inputs.
    """
    entry = resolve(target)
    sizes, args, dtypes = dict(sizes or {}), dict(args or {}), dict(dtypes or {})
    _check_names(entry, sizes, args, dtypes)
    args = {**_stand_ins(entry), **args}
    given = {**entry.sizes_from(args), **sizes}
    try:
        reports = [_check_once(entry, chosen, args, dtypes, seed) for chosen in _size_choices(entry, given)]
    except OperatorFailure as failure:
        alike = {name: 4 for name, mark in entry.annotation.marks if mark == "^" and name in _names(entry.annotation)}
        try:
            reports = [_check_once(entry, chosen, args, dtypes, seed) for chosen in _size_choices(entry, {**alike, **given})]
        except OperatorFailure:
            raise failure from None
    splits: dict[str, SplitReport] = {}
    for split in (split for report in reports for split in report.splits):
        if split.name not in splits or split.problems:
            splits[split.name] = split
    problems = dict.fromkeys(problem for report in reports for problem in report.problems)
    return replace(reports[0], splits=tuple(splits.values()), problems=tuple(problems))


def check_rule(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Report:
    """Check the built-in rule of a PyTorch operator on one call, whose `Ref`s name fp64 or integer `inputs`."""
    values = {name: Value(name, tuple(tensor.shape), tensor.dtype) for name, tensor in inputs.items()}
    bound = bind(op, args, kwargs, values)
    packet, overload = op.removeprefix("aten.").rsplit(".", 1)
    operator = getattr(getattr(torch.ops.aten, packet), overload)
    refs: list[Ref] = []
    map_refs((args, tuple(kwargs.values())), refs.append)
    order = [ref.name for ref in refs]

    def run(tensors: Sequence[Tensor], output_shapes: Sequence[tuple[int, ...]], offsets: Offsets) -> Sequence[Tensor]:
        places = iter(tensors)
        given = map_refs(args, lambda _: next(places))
        given_kwargs = {name: map_refs(value, lambda _: next(places)) for name, value in kwargs.items()}
        given, given_kwargs = with_output_shape(op, given, given_kwargs, output_shapes[0])
        return _as_sequence(operator(*given, **given_kwargs))

    names = [f"input {i}" for i in range(len(order))]
    return compare(op, "", bound, run, [inputs[name] for name in order], names)


def format_report(report: Report) -> str:
    """The report as text, one line per dimension."""
    lines = [report.op]
    if report.annotation:
        lines.append(f"  annotation  {report.annotation}")
    lines.append("  sizes       " + " ".join(f"{name}={size}" for name, size in report.sizes))
    lines += [f"  WRONG       {problem}" for problem in report.problems]
    for split in report.splits:
        verdict = "WRONG" if split.problems else "ok"
        lines.append(f"  {split.name:<10}  {verdict:<5}  {', '.join(split.places)}  (largest difference {split.error:.1e})")
        lines += [f"              {problem}" for problem in split.problems]
    lies = [split.name for split in report.splits if split.problems]
    if lies:
        lines.append(f"the annotation lies about {', '.join(lies)}: freeze it with '^', or mark it '+' where the operator sums over it")
    elif report.ok:
        lines.append(f"the annotation is true: {len(report.splits)} dimensions may be split")
    return "\n".join(lines)


# --- inputs made from an annotation ----------------------------------------------------------------------------------------------


def _check_names(entry: RegisteredOp, sizes: Mapping[str, int], args: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
    parameters = entry.signature.parameters
    for name in (*args, *dtypes):
        if name not in parameters:
            raise UserError(f"operator '{entry.name}' has no parameter '{name}': it takes {', '.join(parameters)}")
    known = _names(entry.annotation)
    for name, size in sizes.items():
        if name not in known:
            raise UserError(f"the annotation of '{entry.name}' has no dimension '{name}': it has {', '.join(known)}")
        if size < 1:
            raise UserError(f"the size {name}={size} is not possible: give 1 or more")
    for name, dtype in dtypes.items():
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"the dtype {name}={dtype} is not one of PyTorch's: write int64, bool or float64")


def _names(annotation: Annotation) -> list[str]:
    """Names of an annotation, with two dimensions for `*`."""
    return [part for name, _ in annotation.marks for part in (("*0", "*1") if name == "*" else (name,))]


def _size_choices(entry: RegisteredOp, given: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Even, distinct sizes; then, for each name that another follows in a group, the same with it and all in front of it 1."""
    annotation = entry.annotation
    plain = {name: given.get(name, 4 + 2 * i) for i, name in enumerate(_names(annotation))}
    yield plain
    groups = [dim for dims in (*annotation.inputs, *annotation.outputs) for dim in dims or () if len(dim) > 1]
    for ones in dict.fromkeys(dim[:i] for dim in groups for i in range(1, len(dim))):
        ones = [name for name in ones if name in plain]
        if ones and not given.keys() & ones:
            yield {**plain, **dict.fromkeys(ones, 1)}


def _check_once(entry: RegisteredOp, sizes: Mapping[str, int], args: Mapping[str, Any], dtypes: Mapping[str, str], seed: int) -> Report:
    tensors = _make_inputs(entry, sizes, args, dtypes, seed)
    constants = _constants(entry, tensors, args)
    shapes = [tuple(tensors[name].shape) if name in tensors else None for name in _annotated(entry)]
    outer = {name: size for name, size in sizes.items() if not name.startswith("*")}
    whole = entry.annotation.bind(shapes, **outer)
    kept = [i for i, name in enumerate(_annotated(entry)) if name in tensors]
    bound = replace(whole, inputs=tuple(whole.inputs[i] for i in kept))

    def run_with(changes: Mapping[str, Any]) -> Run:
        def run(pieces: Sequence[Tensor], output_shapes: Sequence[tuple[int, ...]], offsets: Offsets) -> Sequence[Tensor]:
            starts = {parameter: constants.get(parameter, 0) + offsets.get(name, 0) for name, parameter in entry.starts.items()}
            return _as_sequence(entry.function(**dict(zip(tensors, pieces, strict=True)), **{**constants, **starts, **changes}))

        return run

    run, inputs = run_with({}), list(tensors.values())
    report = compare(entry.name, str(entry.annotation), bound, run, inputs, list(tensors))
    problems = [*_dtype_problems(entry, run, inputs), *_choice_problems(entry, run_with, inputs, list(tensors))]
    return replace(report, problems=(*report.problems, *problems))


def _annotated(entry: RegisteredOp) -> list[str]:
    return list(entry.signature.parameters)[: len(entry.annotation.inputs)]


def _make_inputs(
    entry: RegisteredOp, sizes: Mapping[str, int], args: Mapping[str, Any], dtypes: Mapping[str, str], seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    smallest = min((size for size in sizes.values() if size > 1), default=2)
    inputs: dict[str, Tensor] = {}
    for name, dims in zip(_annotated(entry), entry.annotation.inputs, strict=True):
        if dims is None or name in args:
            continue
        words = [part for dim in dims for part in ((("*0",), ("*1",)) if dim == ("*",) else (dim,))]
        shape = Bound((), (), tuple(sizes.items())).shape(tuple(words))
        dtype = getattr(torch, dtypes.get(name, _default_dtype(entry, name)))
        if dtype.is_floating_point:
            inputs[name] = torch.randn(shape, dtype=torch.float64, generator=generator)
        else:
            inputs[name] = torch.randint(0, smallest, shape, generator=generator).to(dtype)
    return inputs


def _default_dtype(entry: RegisteredOp, name: str) -> str:
    hint = entry.signature.parameters[name].annotation
    return "int64" if name in INTEGER_NAMES or "LongTensor" in str(hint) else "float64"


def _stand_ins(entry: RegisteredOp) -> dict[str, Any]:
    """Values by type hint for the parameters beyond the annotation that have no default."""
    beyond = list(entry.signature.parameters.items())[len(entry.annotation.inputs) :]
    hints = {name: str(getattr(spec.annotation, "__name__", spec.annotation)) for name, spec in beyond if spec.default is spec.empty}
    return {name: _STAND_INS[hint] for name, hint in hints.items() if hint in _STAND_INS}


def _constants(entry: RegisteredOp, tensors: Mapping[str, Tensor], args: Mapping[str, Any]) -> dict[str, Any]:
    for name, parameter in entry.signature.parameters.items():
        if name not in tensors and name not in args and parameter.default is parameter.empty:
            raise UserError(f"operator '{entry.name}' needs a value for '{name}': pass --args {name}=...")
    return dict(args)


def _dtype_problems(entry: RegisteredOp, run: Run, tensors: Sequence[Tensor]) -> list[str]:
    said = entry.output_dtype([tensor.dtype for tensor in tensors])
    found = [output.dtype for output in run(tensors, (), {})]
    return [f"output {j} has dtype {dtype}, but dtype= says {said}" for j, dtype in enumerate(found) if dtype != said]


def _choice_problems(
    entry: RegisteredOp, run_with: Callable[[Mapping[str, Any]], Run], inputs: Sequence[Tensor], names: Sequence[str]
) -> Iterator[str]:
    """Every choice of a constant must compute what the constant in use computes."""
    for parameter, values in entry.choices.items():
        for value in values:
            try:
                found = differences(run_with({}), run_with({parameter: value}), inputs, names)
            except Exception as error:
                found = (f"the operator fails: {error}",)
            yield from (f"with {parameter}={value}, which choices= allows, {problem}" for problem in found)


def _as_sequence(outputs: Any) -> Sequence[Tensor]:
    return outputs if isinstance(outputs, (tuple, list)) else (outputs,)

"""Registered operators: plain Python functions that capture keeps as one node.

Role in the pipeline: a user decorates a function with `register_op`. Everywhere else it stays that function, so autograd flows through
it and emitted code imports it. Inside `capturing()` (around `torch.export`) a call becomes one opaque node
`seqloom::call(tensors, op, arguments)`, whose output shapes follow from the annotation; `decode_call` turns that node's arguments back
into the call. In: functions with annotations. Out: `RegisteredOp` entries, found again by name with `resolve`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqloom.annotation import Annotation
from seqloom.errors import UserError

CALL = "seqloom::call"
_ENTRY = "__seqloom_op__"
_CONSTANTS = (bool, int, float, str, type(None))

DtypeRule = torch.dtype | Callable[[Sequence[torch.dtype]], torch.dtype] | None
SizeHint = Callable[[Mapping[str, int]], int]


@dataclass(frozen=True)
class RegisteredOp:
    """One registered function and what the planner may know about it.

    `name` is "module:function". `dtype` of the outputs: None for that of the first floating-point input, a dtype, or a function of the
    input dtypes. `flops` (forward), `comm` (bytes moved inside the operator), `workspace` (bytes of temporaries at their largest) and
    `side` (smallest dimension of its matrix products, for the rate they achieve) are functions of the sizes by name and the constants by
    parameter name. `saved` names the parameters kept for backward, and "output" for the outputs; None counts every tensor input as kept.
    `starts` maps a dimension to the parameter that says where its piece starts, in elements of the unsplit dimension: such a dimension
    may be split only when the function is told. `choices` maps a constant parameter to values that all compute the same, so that the
    planner may choose. `context_parallel` is the dimension that the operator itself splits over a process group. `source_digest` is the
    sha256 of the defining file.
    """

    name: str
    function: Callable[..., Any]
    annotation: Annotation
    dtype: DtypeRule
    flops: SizeHint | None
    saved: tuple[str, ...] | None
    comm: SizeHint | None
    workspace: SizeHint | None
    side: SizeHint | None
    starts: Mapping[str, str]
    choices: Mapping[str, tuple[Any, ...]]
    context_parallel: str | None
    source_digest: str

    @property
    def signature(self) -> inspect.Signature:
        """Signature of the plain function; the annotation's inputs pair with its parameters in order."""
        return inspect.signature(self.function)

    def sizes_from(self, arguments: Mapping[str, Any]) -> dict[str, int]:
        """Sizes given by constant arguments that carry the name of a dimension, defaults included."""
        defaults = {name: p.default for name, p in self.signature.parameters.items() if p.default is not p.empty}
        known = {**defaults, **arguments}
        return {name: known[name] for name, _ in self.annotation.marks if isinstance(known.get(name), int)}

    def output_dtype(self, dtypes: Sequence[torch.dtype]) -> torch.dtype:
        """Dtype of every output from the dtypes of the tensor inputs."""
        if isinstance(self.dtype, torch.dtype):
            return self.dtype
        if self.dtype is not None:
            return self.dtype(dtypes)
        return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0] if dtypes else torch.get_default_dtype())


def register_op(
    annotation: str,
    *,
    name: str | None = None,
    dtype: DtypeRule = None,
    flops: SizeHint | None = None,
    saved: Sequence[str] | None = None,
    comm: SizeHint | None = None,
    workspace: SizeHint | None = None,
    side: SizeHint | None = None,
    starts: Mapping[str, str] | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
    context_parallel: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function of tensors so that capture keeps it as one operator; its own behaviour does not change.

    The annotation has one entry per leading parameter; parameters beyond are constants (numbers, strings, None, tuples of them).
    `name` defaults to "module:function" and must lead back to the decorated function. See `RegisteredOp` for the other hints.
    Raises `UserError` for a malformed annotation, one that has more entries than the function has parameters, or a hint that
    names what the annotation or the function does not have.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        entry = RegisteredOp(
            name=name or f"{function.__module__}:{function.__qualname__}",
            function=function,
            annotation=Annotation.parse(annotation),
            dtype=dtype,
            flops=flops,
            saved=None if saved is None else tuple(saved),
            comm=comm,
            workspace=workspace,
            side=side,
            starts=dict(starts or {}),
            choices={parameter: tuple(values) for parameter, values in (choices or {}).items()},
            context_parallel=context_parallel,
            source_digest=_source_digest(function),
        )
        _check_entry(entry)

        @functools.wraps(function)
        def operator(*args: Any, **kwargs: Any) -> Any:
            # Compiled regions never capture, and Dynamo drops this branch without looking at the context variable.
            if torch.compiler.is_dynamo_compiling() or not _CAPTURING.get():
                return function(*args, **kwargs)
            return _call(entry, args, kwargs)

        setattr(operator, _ENTRY, entry)
        return operator

    return decorate


def registered(function: Callable[..., Any]) -> RegisteredOp | None:
    """The entry of a decorated function, None for any other."""
    return getattr(function, _ENTRY, None)


def resolve(name: str) -> RegisteredOp:
    """The entry of "module:function", importing the module. Raises `UserError` saying which part is missing and what to do."""
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UserError(f"'{name}' does not name an operator: write it as module:function")
    try:
        found: Any = _import(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"operator '{name}' cannot be used: its module {module_name} imports {error.name}, which is missing") from error
        raise UserError(f"operator '{name}': there is no module {module_name}; run from its folder or add that to PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"operator '{name}' cannot be used: importing {module_name} fails with {type(error).__name__}: {error}") from error
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise UserError(f"operator '{name}': module {module_name} has no function {path}; correct the name or define it there")
    entry = registered(found)
    if entry is None:
        raise UserError(f"'{name}' is not a registered operator: decorate it with @register_op and its annotation")
    return entry


def _import(name: str) -> ModuleType:
    """A module, also one of the working directory, which Python does not search for `python somewhere/train.py`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        here = str(Path.cwd())
        if "" in sys.path or here in sys.path:
            raise
        sys.path.insert(0, here)
        importlib.invalidate_caches()
        return importlib.import_module(name)


def choices_of(op: str) -> Mapping[str, tuple[Any, ...]]:
    """Constants of an operator that the planner may choose: parameter -> values that all compute the same; {} for PyTorch's operators."""
    return resolve(op).choices if ":" in op else {}


# --- capture ---------------------------------------------------------------------------------------------------------------------

_CAPTURING: ContextVar[bool] = ContextVar("seqloom_capturing", default=False)


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, a call of a registered function becomes one node `seqloom::call` instead of running."""
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


def is_call(target: Any) -> bool:
    """Whether an exported node's target is the call of a registered function."""
    return target is torch.ops.seqloom.call.default


def decode_call(args: Sequence[Any]) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """`(tensors, op, arguments)` of a `seqloom::call` node -> (op name, args, kwargs) with the tensors, of any type, in their places.

    Parameters paired with the annotation are positional, those beyond it are keywords.
    """
    tensors, name, arguments = args
    call = json.loads(arguments)
    values = {**{k: _tuples(v) for k, v in call["constants"].items()}, **dict(zip(call["tensors"], tensors, strict=True))}
    entry = resolve(name)
    positional: list[Any] = []
    for i, (parameter, spec) in enumerate(entry.signature.parameters.items()):
        if parameter not in values or (i >= len(entry.annotation.inputs) and spec.kind is not spec.POSITIONAL_ONLY):
            break
        positional.append(values.pop(parameter))
    return name, tuple(positional), values


def _call(entry: RegisteredOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if entry.name.startswith("__main__:"):
        raise UserError(f"operator '{entry.name}' is defined in the script being run: move it to a module that emitted code can import")
    bound = entry.signature.bind(*args, **kwargs).arguments
    annotated = list(entry.signature.parameters)[: len(entry.annotation.inputs)]
    tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in bound.items() if name not in tensors}
    for name in tensors:
        if name not in annotated:
            raise UserError(f"operator '{entry.name}' got a tensor as '{name}', which its annotation does not describe: add it there")
    for name, value in constants.items():
        if not _is_constant(value):
            kind = type(value).__name__
            raise UserError(
                f"operator '{entry.name}' got a {kind} as '{name}': only tensors, numbers, strings, None and tuples of them can be kept"
            )
    arguments = json.dumps({"tensors": list(tensors), "constants": constants})
    outputs = torch.ops.seqloom.call(list(tensors.values()), entry.name, arguments)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def input_shapes(entry: RegisteredOp, arguments: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    """Shapes for the annotation's inputs from arguments by name: None for `?` and for arguments that have no `shape`."""
    names = list(entry.signature.parameters)[: len(entry.annotation.inputs)]
    given = [(arguments.get(name), dims) for name, dims in zip(names, entry.annotation.inputs, strict=True)]
    return [None if dims is None or not hasattr(value, "shape") else tuple(value.shape) for value, dims in given]


def _fake_call(tensors: Sequence[Tensor], op: str, arguments: str) -> list[Tensor]:
    entry, call = resolve(op), json.loads(arguments)
    values = {**call["constants"], **dict(zip(call["tensors"], tensors, strict=True))}
    shapes = entry.annotation.infer(input_shapes(entry, values), **entry.sizes_from(call["constants"]))
    dtype = entry.output_dtype([tensor.dtype for tensor in tensors])
    device = tensors[0].device if tensors else torch.device("meta")
    return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("seqloom::call stands for an operator in a captured graph: its backward never runs")


torch.library.define(CALL, "(Tensor[] tensors, str op, str arguments) -> Tensor[]")
torch.library.register_fake(CALL, _fake_call)
# Without an autograd formula the outputs of the opaque node would not require grad.
torch.library.register_autograd(CALL, _no_backward)


# --- checks ----------------------------------------------------------------------------------------------------------------------


def _check_entry(entry: RegisteredOp) -> None:
    parameters = entry.signature.parameters
    for parameter in parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise UserError(f"operator '{entry.name}' takes '{parameter}': write its parameters out, one by one, to register it")
    if len(entry.annotation.inputs) > len(parameters):
        count = len(entry.annotation.inputs)
        raise UserError(f"operator '{entry.name}' has {len(parameters)} parameters but its annotation {count} inputs: remove some")
    for name in entry.saved or ():
        if name != "output" and name not in parameters:
            raise UserError(f"operator '{entry.name}': saved= names '{name}', which is neither a parameter nor 'output'")
    if entry.context_parallel is not None and entry.context_parallel not in dict(entry.annotation.marks):
        raise UserError(f"operator '{entry.name}': context_parallel='{entry.context_parallel}' is not a name in its annotation")
    _check_starts(entry)
    _check_choices(entry)


def _check_starts(entry: RegisteredOp) -> None:
    """A start belongs to a name that may be split and stands alone, and goes to an int parameter that counts from 0."""
    marks, extra = dict(entry.annotation.marks), _constant_parameters(entry)
    for name, parameter in entry.starts.items():
        where = f"operator '{entry.name}': starts= gives dimension '{name}'"
        if marks.get(name, "^") != "":
            reason = "is not a name in its annotation" if name not in marks else "may not be split or is summed over"
            raise UserError(f"{where}, which {reason}: name a dimension without a mark")
        if any(name in dim and len(dim) > 1 for dims in (*entry.annotation.inputs, *entry.annotation.outputs) for dim in dims or ()):
            raise UserError(f"{where}, which is part of a group: its piece has no single start, so leave it out")
        if parameter not in extra or extra[parameter].default != 0:
            raise UserError(
                f"{where} the start '{parameter}': write it as a parameter '{parameter}: int = 0' beyond the annotation's inputs"
            )


def _check_choices(entry: RegisteredOp) -> None:
    """Choices are at least one value of a constant parameter that is neither a size nor a start."""
    extra = _constant_parameters(entry)
    for parameter, values in entry.choices.items():
        where = f"operator '{entry.name}': choices= names '{parameter}'"
        if parameter not in extra:
            raise UserError(f"{where}, which is not a parameter beyond the annotation's inputs: name a constant of the function")
        if parameter in dict(entry.annotation.marks) or parameter in entry.starts.values():
            raise UserError(f"{where}, which gives a size or a start and so changes the result: leave it out")
        if not values or not all(_is_constant(value) for value in values):
            raise UserError(f"{where} with the values {values}: give one or more numbers, strings, None or tuples of them")


def _constant_parameters(entry: RegisteredOp) -> dict[str, inspect.Parameter]:
    """Parameters beyond those that the annotation describes."""
    return dict(list(entry.signature.parameters.items())[len(entry.annotation.inputs) :])


def _source_digest(function: Callable[..., Any]) -> str:
    """sha256 of the defining file; of the byte code for a function typed at a prompt."""
    try:
        with open(inspect.getsourcefile(function) or "", "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (OSError, TypeError):
        return hashlib.sha256(function.__code__.co_code).hexdigest()


def _is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_constant(item) for item in value)
    return isinstance(value, _CONSTANTS)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

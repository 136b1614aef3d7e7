"""The rule table: which annotation every operator has, given its arguments and shapes.

Role in the pipeline: `capture` calls `bind` for every node. In: an operator's name and arguments. Out: its `Bound` annotation, or a
`UserError` that names the operator and how to register it: nothing is replicated silently. The rules themselves stand by family in
`pointwise`, `views`, `matmul`, `reductions` and `indexing`; registered functions bring their own annotation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from seqloom.annotation import Annotation, AnnotationError, Bound
from seqloom.errors import UserError
from seqloom.graph import Ref, Value
from seqloom.ops import indexing, matmul, pointwise, reductions, views
from seqloom.ops.call import Call, Rule, base_name
from seqloom.ops.registry import RegisteredOp, input_shapes, resolve

RULES: Mapping[str, Rule] = {**pointwise.RULES, **views.RULES, **matmul.RULES, **reductions.RULES, **indexing.RULES}


def is_registered_name(op: str) -> bool:
    """Whether an operator is a registered function ("module:function") rather than one of PyTorch's."""
    return ":" in op


def rule(op: str, module: str = "") -> Rule:
    """The rule of a PyTorch operator such as `aten.linear.default`. Raises `UserError` where there is none."""
    found = RULES.get(base_name(op))
    if found is None:
        where = f" (in module '{module}')" if module else ""
        raise UserError(
            f"operator '{op}'{where} has no annotation rule: put it inside a function decorated with "
            f"@seqloom.ops.register_op, or add a rule for '{base_name(op)}' to seqloom/ops"
        )
    return found


def make_call(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Value]) -> Call:
    """The call of a node whose `Ref`s are found in `values`."""
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    return Call(op, tuple(args), dict(kwargs), shapes, {name: value.requires_grad for name, value in values.items()})


def bind(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Value], module: str = "") -> Bound:
    """Dimensions of a node's tensor inputs (flattened args, then kwargs) and outputs.

    `args` and `kwargs` hold `Ref`s to `values`, constants, and tuples of both. Raises `UserError` for an operator without a rule
    (`module` says where it occurred) and for arguments that do not fit its annotation.
    """
    if is_registered_name(op):
        return _bind_registered(resolve(op), args, kwargs, values)
    found = rule(op, module)
    call = make_call(op, args, kwargs, {ref.name: values[ref.name] for ref in _tensors(op, args, kwargs)})
    text = found.annotate(call)
    shapes = [call.shape_of(tensor) for tensor in call.tensors]
    return Annotation.parse(text.text).bind(shapes, **text.sizes)


def context_of(op: str) -> str | None:
    """The dimension that a registered operator itself splits over a process group; None for all others."""
    return resolve(op).context_parallel if is_registered_name(op) else None


def starts_of(op: str) -> Mapping[str, str]:
    """Dimensions that may be split only when the operator is told where its piece starts: name -> the keyword that says it."""
    return resolve(op).starts if is_registered_name(op) else {}


def arguments_of(entry: RegisteredOp, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a registered function by parameter name. Raises `UserError` where they do not fit its signature."""
    try:
        return dict(entry.signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise UserError(f"operator '{entry.name}' is called with arguments that do not fit its signature: {error}") from error


def _bind_registered(entry: RegisteredOp, args: tuple[Any, ...], kwargs: Mapping[str, Any], values: Mapping[str, Value]) -> Bound:
    arguments = arguments_of(entry, args, kwargs)
    tensors = {name: values[value.name] for name, value in arguments.items() if isinstance(value, Ref)}
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    try:
        bound = entry.annotation.bind(input_shapes(entry, tensors), **entry.sizes_from(constants))
    except AnnotationError as error:
        raise AnnotationError(f"operator '{entry.name}': {error.problem}", error.text, error.position) from error
    places = {name: i for i, name in enumerate(entry.signature.parameters)}
    beyond = next((name for name in tensors if places[name] >= len(bound.inputs)), None)
    if beyond is not None:
        raise UserError(f"operator '{entry.name}' got a tensor as '{beyond}', which its annotation does not describe: add an entry for it")
    # Nodes list positional tensors before keywords, and entries of arguments that are not tensors have no place among them.
    order = [places[name] for name in (*list(places)[: len(args)], *kwargs) if name in tensors]
    return replace(bound, inputs=tuple(bound.inputs[i] for i in order))


def _tensors(op: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Ref]:
    return Call(op, tuple(args), dict(kwargs), {}, {}).tensors

"""torch.export of a model into a flat `Graph`: PyTorch's own operators, one node each, before any clean-up.

In: a causal language model on meta. Out: a graph with inputs `input_ids` and `position_ids` `[b, l]` and output logits `[b, l, n]`,
whose nodes have no annotation yet. Submodules that `torch.export` makes for `no_grad` and `autocast` regions are inlined.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from seqloom.capture.hf import attention_operator, tied_keys
from seqloom.errors import UserError
from seqloom.graph import Graph, Node, Ref, Value, map_refs, refs
from seqloom.ops import registry

DETACH = "aten.detach.default"
# The trace runs on meta; where a tensor lives, and how, is chosen when the program runs.
_DEVICE_WORDS = frozenset(("device", "layout", "pin_memory", "memory_format", "non_blocking"))


class _Logits(nn.Module):
    """The model as a function of tensors only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Logits `[b, l, n]` of all positions."""
        return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits


def trace(model: nn.Module, batch_size: int, seq_len: int) -> Graph:
    """Export `model` (on meta) for inputs of `[batch_size, seq_len]`.

    Raises `UserError` where the model cannot be exported or uses what a pure graph cannot express (operators that write to their
    inputs, autocast regions that are on).
    """
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device="meta")
    name = type(model).__name__
    try:
        with attention_operator(), registry.capturing():
            program = torch.export.export(_Logits(model), (ids, ids.clone()), strict=False)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"torch.export cannot trace {name} ({reason}): give it a forward that torch.export accepts.") from error
    return _to_graph(program, model)


def _to_graph(program: torch.export.ExportedProgram, model: nn.Module) -> Graph:
    builder = _Builder(requires_grad={key for key, p in model.state_dict(keep_vars=True).items() if p.requires_grad})
    tied = tied_keys(model)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    env: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            env[node] = builder.add_input(node.name, node.meta["val"], spec.kind.name, (spec.target or "").removeprefix("model."), tied)
    logits = builder.run(program.graph, program.graph_module, env)[0]
    inputs = tuple(value.name for value in builder.values.values() if value.kind == "input")
    return Graph(type(model).__name__, builder.values, tuple(builder.nodes), inputs, tuple(refs(logits)))


@dataclass
class _Builder:
    """Collects values and nodes while the fx graph is walked; `requires_grad` holds the state-dict keys of trained parameters."""

    requires_grad: set[str]
    values: dict[str, Value] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def add_input(self, name: str, val: Tensor, kind: str, key: str, tied: Mapping[str, str]) -> Ref:
        """A placeholder: an input, or a parameter or buffer under its canonical key."""
        if kind == "USER_INPUT":
            return self.add_value(Value(name, tuple(val.shape), val.dtype, "input"))
        if kind not in ("PARAMETER", "BUFFER"):
            raise UserError(f"the model makes a tensor constant in its forward ({key or name}); register it as a buffer.")
        key = tied.get(key, key)
        trained = key in self.requires_grad
        return self.add_value(Value(key.replace(".", "_"), tuple(val.shape), val.dtype, kind.lower(), key, trained))

    def add_value(self, value: Value) -> Ref:
        """Store a value, under another name if its own is taken by a different one; tied parameters come here once per alias."""
        known = self.values.get(value.name)
        if known is not None and (known.fqn is None or known.fqn != value.fqn):
            return self.add_value(Value(**{**vars(value), "name": f"{value.name}_"}))
        self.values[value.name] = value
        return Ref(value.name)

    def run(self, graph: fx.Graph, owner: fx.GraphModule, env: dict[fx.Node, Any]) -> tuple[Any, ...]:
        """Walk `graph`, whose placeholders are in `env`, and return what it returns: Refs, or tuples of them."""
        for node in graph.nodes:
            if node.op == "call_function":
                env[node] = self.call(node, owner, env)
            elif node.op == "output":
                return tuple(_lookup(node.args[0], env))
        raise AssertionError("an fx graph ends in an output node")

    def call(self, node: fx.Node, owner: fx.GraphModule, env: dict[fx.Node, Any]) -> Any:
        """One call: a projection of a tuple, a region to inline, or an operator."""
        if node.target is operator.getitem:
            return env[node.args[0]][node.args[1]]
        region = _region(node)
        if region is not None:
            grad_enabled, body, body_args = region
            subgraph = getattr(owner, body.target)
            inner = [n for n in subgraph.graph.nodes if n.op == "placeholder"]
            given = [env[arg] if grad_enabled else self.detach(env[arg], node) for arg in body_args]
            return self.run(subgraph.graph, subgraph, dict(zip(inner, given, strict=True)))
        return self.operator(node, env)

    def operator(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """One operator: a node, unless it returns no tensor (then it is a check that has done its work)."""
        results = [val for val in _flat(node.meta.get("val")) if isinstance(val, Tensor)]
        if not results:
            return None
        op, args, kwargs = _decode(node)
        kwargs = {key: value for key, value in kwargs.items() if key not in _DEVICE_WORDS}
        path, cls = _module(node)
        several = isinstance(node.meta["val"], (tuple, list))
        args, kwargs = _lookup(args, env), tuple((key, _lookup(value, env)) for key, value in kwargs.items())
        grad = op != DETACH and any(self.values[name].requires_grad for name in refs((args, kwargs)))
        made = []
        for i, val in enumerate(results):
            name = f"{node.name}_{i}" if several else node.name
            made.append(self.add_value(Value(name, tuple(val.shape), val.dtype, requires_grad=grad and val.is_floating_point())))
        self.nodes.append(Node(op, args, kwargs, tuple(ref.name for ref in made), None, path, cls))
        return tuple(made) if several else made[0]

    def detach(self, tree: Any, node: fx.Node) -> Any:
        """The argument of a no_grad region: cut from the gradient where it has one."""

        def cut(ref: Ref) -> Ref:
            value = self.values[ref.name]
            if not value.requires_grad:
                return ref
            made = self.add_value(Value(f"{ref.name}_detached", value.shape, value.dtype))
            self.nodes.append(Node(DETACH, (ref,), (), (made.name,), None, *_module(node)))
            return made

        return map_refs(tree, cut)


def _region(node: fx.Node) -> tuple[bool, fx.Node, tuple[Any, ...]] | None:
    """(gradients enabled, submodule, its arguments) of a call that wraps a region of the forward."""
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        enabled, body, *args = node.args
        return bool(enabled), body, tuple(args)
    if name == "wrap_with_autocast":
        _, _, enabled, _, body, *args = node.args
        if enabled:
            raise UserError(f"{_module(node)[1]} turns autocast on inside its forward, which cannot be split; cast explicitly instead.")
        return True, body, tuple(args)
    return None


def _decode(node: fx.Node) -> tuple[str, tuple[Any, ...], Mapping[str, Any]]:
    """Name and arguments of an operator: `aten.add.Tensor`, or `module:function` of a registered one."""
    if registry.is_call(node.target):
        return registry.decode_call(node.args)
    where = _module(node)[0] or "the model"
    if not isinstance(node.target, torch._ops.OpOverload):
        raise UserError(f"{where} calls {node.target}, which is no PyTorch operator: put it inside a function decorated with @register_op.")
    if node.target._schema.is_mutable:
        raise UserError(f"{where} writes in place with {node.target}: use the form that returns a new tensor.")
    return str(node.target), node.args, node.kwargs


def _module(node: fx.Node) -> tuple[str, str]:
    """Path and class name of the innermost module that ran this node; the model itself has the path ``."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "", ""
    path, cls = stack[-1]
    class_name = cls if isinstance(cls, str) else cls.__qualname__
    return path.partition(".")[2], class_name.rpartition(".")[2]


def _lookup(tree: Any, env: Mapping[fx.Node, Any]) -> Any:
    """Arguments of fx as arguments of a `Node`: fx nodes become Refs, lists become tuples."""
    if isinstance(tree, fx.Node):
        return env[tree]
    if isinstance(tree, (tuple, list)):
        return tuple(_lookup(item, env) for item in tree)
    return tree


def _flat(tree: Any) -> Iterable[Any]:
    if isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _flat(item)
    else:
        yield tree

"""A stretch of clusters as Python statements: reshards, operators, and what lies where.

In: planned clusters in order and the variables at hand. Out: source lines. A value used once inside its cluster is written into the
expression that uses it; a cluster that is a whole module of the original (a norm, an activation) becomes a function, written once
(`Functions`). Every statement ends with its placement and the predicted milliseconds, forward + backward: `# [b, l@sp, d] 0.09 + 0.18 ms`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from seqloom.emit.expressions import Context, Expression, Source, spell
from seqloom.graph import Graph, Node
from seqloom.ops.rules import context_of
from seqloom.plan.context import context_axes
from seqloom.plan.placement import Layout, Move, local_shape
from seqloom.plan.plan import Plan, PlannedCluster, PlannedRegion, Reshard
from seqloom.plan.price import local_sizes

INLINE_WIDTH = 72


@dataclass
class Functions:
    """What the program's methods call: functions that stand for whole modules of the original, written once however often they are
    called (`sources`), and registered functions under the names that they are imported by (`operators`).
    """

    sources: dict[str, str] = field(default_factory=dict)
    operators: Mapping[str, str] = field(default_factory=dict)

    def add(self, base: str, source: str) -> str:
        """Name of the function with this source (`{name}` in it stands for the name), a new one if it was not there."""
        name, count = base, 1
        while self.sources.setdefault(name, source.replace("{name}", name)) != source.replace("{name}", name):
            count += 1
            name = f"{base}_{count}"
        return name


@dataclass
class Scope:
    """What a method under construction knows: `variables[(value, layout)]` is the Python variable that holds a value in a layout."""

    plan: Plan
    planned: PlannedRegion
    functions: Functions
    variables: dict[tuple[str, Layout], str] = field(default_factory=dict)
    groups: dict[tuple[str, ...], None] = field(default_factory=dict)
    collectives: dict[str, None] = field(default_factory=dict)
    operators: dict[str, None] = field(default_factory=dict)
    ranks: dict[tuple[str, ...], None] = field(default_factory=dict)
    uses_local: bool = False

    @property
    def graph(self) -> Graph:
        """The region's graph."""
        return self.planned.region.graph


def operator_names(graph: Graph) -> dict[str, str]:
    """Names to import registered functions by: their own, with the module's in front where a value or another function has that name."""
    graphs = [graph, *graph.blocks.values()]
    taken = {name for part in graphs for name in part.values}
    found: dict[str, str] = {}
    for op in sorted({node.op for part in graphs for node in part.nodes if ":" in node.op and not node.is_block}):
        module, _, name = op.partition(":")
        own = name if name not in taken else f"{module.replace('.', '_')}_{name}"
        taken.add(own)
        found[op] = own
    return found


def placement_text(scope: Scope, name: str, layout: Layout) -> str:
    """`[b, l@sp, d]`; a partial sum is marked `sum@tp`."""
    axes = scope.plan.axis_names
    split: dict[int, list[str]] = {}
    for axis, placement in zip(axes, layout, strict=True):
        if placement.kind == "S":
            split.setdefault(placement.dim, []).append(axis)
    letters = [
        f"{letter}@{'·'.join(split[dim])}" if dim in split else letter for dim, letter in enumerate(scope.planned.region.labels[name])
    ]
    partial = [axis for axis, placement in zip(axes, layout, strict=True) if placement.kind == "P"]
    return f"[{', '.join(letters)}]" + (f" sum@{'·'.join(partial)}" if partial else "")


def milliseconds(forward: float, backward: float) -> str:
    """`0.09 + 0.18 ms`; nothing where it would not be seen."""
    if forward + backward < 1e-5:
        return ""
    return f"{forward * 1e3:.2f} + {backward * 1e3:.2f} ms"


def parameter(scope: Scope, name: str, layout: Layout) -> str:
    """Source that reads a parameter or buffer; through `local` where the plan has axes that split weights."""
    value = scope.graph.values[name]
    text = "self." + re.sub(r"[.](\d+)(?=[.])", r"[\1]", str(value.fqn))
    split_axes = [i for i, axis in enumerate(scope.plan.machine.axes) if axis.role == "split"]
    if value.kind == "buffer" or not split_axes:
        return text
    scope.uses_local = True
    partial = tuple(scope.plan.axis_names[i] for i in split_axes if layout[i].kind == "B")
    return f"local({text}, partial_grad={partial!r})" if partial else f"local({text})"


def statements(scope: Scope, clusters: Sequence[PlannedCluster], leaving: Sequence[Reshard], returned: Sequence[str]) -> list[str]:
    """Source lines that run the clusters and bring the values that leave the block into place."""
    lines: list[str] = []
    for index, planned in enumerate(clusters):
        for together in _in_packs(scope, planned.reshards):
            kept = [_needed_later(scope, reshard, clusters[index:], returned) for reshard in together]
            lines += _pack_lines(scope, together, kept) if len(together) > 1 else reshard_lines(scope, together[0], kept[0])
        lines += _cluster_lines(scope, planned)
    for reshard in leaving:
        lines += reshard_lines(scope, reshard, False)
    return lines


def _needed_later(scope: Scope, reshard: Reshard, rest: Sequence[PlannedCluster], returned: Sequence[str]) -> bool:
    """Whether the value is still needed in the layout that it had before."""
    key = (reshard.value, reshard.src)
    again = any((name, layout) == key for c in rest for name, layout in c.strategy.layouts.items() if name in c.cluster.inputs)
    other = any((r.value, r.src) == key and r != reshard for c in rest for r in c.reshards)
    return again or other or reshard.value in returned


def reshard_lines(scope: Scope, reshard: Reshard, keep_original: bool) -> list[str]:
    """One line per collective; the variable keeps its name when nothing needs the value as it was."""
    source = scope.variables[reshard.value, reshard.src]
    target = _fresh(scope, f"{source}_{_suffix(reshard.dst)}") if keep_original else source
    lines = []
    current = source
    for index, move in enumerate(reshard.moves):
        cost = milliseconds(reshard.forward_s, reshard.backward_s) if index == len(reshard.moves) - 1 else ""
        lines.append(
            f"{target} = {_collective(scope, move, current)}  # {placement_text(scope, reshard.value, move.layout)} {cost}".rstrip()
        )
        current = target
    scope.variables[reshard.value, reshard.dst] = target
    return lines


def _in_packs(scope: Scope, reshards: Sequence[Reshard]) -> list[list[Reshard]]:
    """The reshards in front of a cluster; all-to-alls that follow each other and can travel in one collective stand together."""
    packs: list[list[Reshard]] = []
    for reshard in reshards:
        if packs and _packable(scope, packs[-1][-1], reshard):
            packs[-1].append(reshard)
        else:
            packs.append([reshard])
    return packs


def _packable(scope: Scope, first: Reshard, second: Reshard) -> bool:
    """Whether both are one all-to-all of the same dimensions over the same axes, of tensors that differ in the dimension it splits only."""
    if len(first.moves) != 1 or len(second.moves) != 1 or first.value == second.value:
        return False
    (one,), (other,) = first.moves, second.moves
    if (one.src, one.dst, one.axes) != (other.src, other.dst, other.axes) or (one.src.kind, one.dst.kind) != ("S", "S"):
        return False
    kinds = []
    for reshard in (first, second):
        value = scope.graph.values[reshard.value]
        shape = list(local_shape(value.shape, reshard.src, scope.plan.machine.sizes))
        del shape[one.dst.dim]
        kinds.append((value.dtype, one.dst.dim, shape))
    return kinds[0] == kinds[1]


def _pack_lines(scope: Scope, together: Sequence[Reshard], kept: Sequence[bool]) -> list[str]:
    """One line for several all-to-alls."""
    sources = [scope.variables[reshard.value, reshard.src] for reshard in together]
    targets = []
    for reshard, source, keep in zip(together, sources, kept, strict=True):
        targets.append(_fresh(scope, f"{source}_{_suffix(reshard.dst)}") if keep else source)
        scope.variables[reshard.value, reshard.dst] = targets[-1]
    call = _collective(scope, together[0].moves[0], ", ".join(sources), packed=True)
    placed = dict.fromkeys(placement_text(scope, reshard.value, reshard.dst) for reshard in together)
    cost = milliseconds(sum(reshard.forward_s for reshard in together), sum(reshard.backward_s for reshard in together))
    return [f"{', '.join(targets)} = {call}  # {', '.join(placed)} {cost}".rstrip()]


def _suffix(layout: Layout) -> str:
    return "split" if any(p.kind == "S" for p in layout) else "whole"


def _fresh(scope: Scope, name: str) -> str:
    taken = set(scope.variables.values()) | set(scope.graph.values)
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _collective(scope: Scope, move: Move, variable: str, packed: bool = False) -> str:
    axes = tuple(scope.plan.axis_names[a] for a in move.axes)
    scope.groups[axes] = None
    group = f"self.{group_name(axes)}"
    src, dst = move.src, move.dst
    partial = ", partial_grad=True" if "B" in (src.kind, dst.kind) else ""
    name, arguments = {
        ("S", "S"): ("all_to_all", f"split_dim={dst.dim}, concat_dim={src.dim}, group={group}"),
        ("S", "R"): ("all_gather", f"dim={src.dim}, group={group}"),
        ("S", "B"): ("all_gather", f"dim={src.dim}, group={group}{partial}"),
        ("P", "R"): ("all_reduce", f"group={group}"),
        ("P", "B"): ("all_reduce", f"group={group}{partial}"),
        ("P", "S"): ("reduce_scatter", f"dim={dst.dim}, group={group}"),
        ("R", "S"): ("shard", f"dim={dst.dim}, group={group}"),
        ("B", "S"): ("shard", f"dim={dst.dim}, group={group}{partial}"),
        ("R", "B"): ("sum_grad", f"group={group}"),
        ("B", "R"): ("share_grad", f"group={group}"),
    }[src.kind, dst.kind]
    name = f"packed_{name}" if packed else name
    scope.collectives[name] = None
    return f"{name}({variable}, {arguments})"


def group_name(axes: Sequence[str]) -> str:
    """Attribute that holds the process group of some axes."""
    return "_".join(axes)


def _cluster_lines(scope: Scope, planned: PlannedCluster) -> list[str]:
    cluster, layouts = planned.cluster, planned.strategy.layouts
    arguments = {name: Expression(_read(scope, name, layouts[name])) for name in cluster.inputs}
    for name in cluster.outputs:
        scope.variables[name, layouts[name]] = name
    for node in cluster.nodes:
        if ":" in node.op:
            scope.operators[node.op] = None
    placed = dict.fromkeys(placement_text(scope, n, layouts[n]) for n in cluster.outputs)
    comment = f"# {', '.join(placed)} {milliseconds(planned.price.forward_s, planned.price.backward_s)}".rstrip()
    if _is_whole_module(scope, planned):
        return [f"{', '.join(cluster.outputs)} = {_function_call(scope, planned, arguments)}  {comment}"]
    lines = _assignments(scope, planned, arguments, scope.graph)
    return [*lines[:-1], f"{lines[-1]}  {comment}"]


def _read(scope: Scope, name: str, layout: Layout) -> str:
    if scope.graph.values[name].kind in ("parameter", "buffer"):
        return parameter(scope, name, layout)
    return scope.variables[name, layout]


def _assignments(scope: Scope, planned: PlannedCluster, arguments: dict[str, Expression], graph: Graph) -> list[str]:
    """`name = expression` per node, with values that are used once written into their use."""
    cluster = planned.cluster
    sizes = scope.plan.machine.sizes
    shapes = {n: local_shape(graph.values[n].shape, planned.strategy.layouts[n], sizes) for n in cluster.values}
    context = Context(graph, shapes, scope.functions.operators)
    uses = [name for node in cluster.nodes for name in node.inputs]
    lines = []
    for node in cluster.nodes:
        expression = spell(_given_its_group(scope, planned, _told_its_start(scope, planned, node)), arguments, context)
        name = node.outputs[0]
        inline = len(node.outputs) == 1 and uses.count(name) == 1 and name not in cluster.outputs and len(expression.text) <= INLINE_WIDTH
        if inline:
            arguments[name] = expression
            continue
        lines.append(f"{', '.join(node.outputs)} = {expression.text}")
        arguments.update({out: Expression(out) for out in node.outputs})
    return lines


def _told_its_start(scope: Scope, planned: PlannedCluster, node: Node) -> Node:
    """The node with the place of its piece, where a function is split along a dimension that asks for it."""
    for option in planned.cluster.classes:
        axes = tuple(axis for axis, split in zip(scope.plan.axis_names, planned.strategy.splits, strict=True) if split == option.name)
        if option.start and axes:
            scope.ranks[axes] = None
            length = local_sizes(planned.cluster, planned.strategy, scope.plan.machine.sizes)[option.name]
            node = replace(node, kwargs=(*node.kwargs, (option.start, Source(f"self.{group_name(axes)}_rank * {length}"))))
    return node


def _given_its_group(scope: Scope, planned: PlannedCluster, node: Node) -> Node:
    """The node with the group over which its function splits the sequence itself, and without what only the planner reads."""
    if ":" not in node.op or context_of(node.op) is None:
        return node
    kwargs = [(name, value) for name, value in node.kwargs if name not in ("documents", "windows")]
    axes = tuple(scope.plan.axis_names[axis] for axis in context_axes(planned.cluster, planned.strategy.splits))
    if axes:
        scope.groups[axes] = None
        kwargs.append(("group", Source(f"self.{group_name(axes)}")))
    return replace(node, kwargs=tuple(kwargs))


def _is_whole_module(scope: Scope, planned: PlannedCluster) -> bool:
    """Whether the cluster is all that one module of the original does, and more than a line of it."""
    nodes = planned.cluster.nodes
    module = nodes[0].module
    owners = [part for part in scope.planned.region.parts if any(n.module == module for n in part.nodes)]
    return bool(module) and len(nodes) > 3 and len(owners) == 1 and all(n.module == module for n in nodes)


def _function_call(scope: Scope, planned: PlannedCluster, arguments: Mapping[str, Expression]) -> str:
    cluster = planned.cluster
    ordered = sorted(cluster.inputs, key=lambda n: scope.graph.values[n].kind in ("parameter", "buffer"))
    names = _local_names(scope.graph, cluster.nodes, ordered)
    inside = {n: Expression(names[n]) for n in ordered}
    renamed = _assignments(scope, planned, inside, scope.graph)
    body = [_rename(line, names) for line in renamed]
    result = ", ".join(names[n] for n in cluster.outputs)
    if len(cluster.outputs) == 1 and body[-1].startswith(f"{result} = "):
        body[-1] = f"return {body[-1].removeprefix(f'{result} = ')}"
    else:
        body.append(f"return {result}")
    returns = "Tensor" if len(cluster.outputs) == 1 else f"tuple[{', '.join(['Tensor'] * len(cluster.outputs))}]"
    title = cluster.nodes[0].module_class
    head = f"def {{name}}({', '.join(f'{names[n]}: Tensor' for n in ordered)}) -> {returns}:"
    source = "\n    ".join([head, f'"""{title}."""', *body])
    function = scope.functions.add(snake_case(title), source)
    return f"{function}({', '.join(arguments[n].text for n in ordered)})"


def _local_names(graph: Graph, nodes: Sequence[Node], inputs: Sequence[str]) -> dict[str, str]:
    """Names inside a function, the same for every module of the same class: no counters, parameters by their last name."""
    names: dict[str, str] = {}
    for name in (*inputs, *(out for node in nodes for out in node.outputs)):
        value = graph.values[name]
        base = str(value.fqn).rsplit(".", 1)[-1] if value.kind in ("parameter", "buffer") else re.sub(r"_\d+$", "", name)
        if value.kind not in ("parameter", "buffer") and name in inputs and value.requires_grad:
            base = "hidden_states" if "hidden_states" not in names.values() else base
        candidate, count = base, 1
        while candidate in names.values():
            count += 1
            candidate = f"{base}_{count}"
        names[name] = candidate
    return names


def _rename(line: str, names: Mapping[str, str]) -> str:
    """Replace whole identifiers that are value names (not attributes or keywords of calls)."""
    return re.sub(r"(?<![\w.])([A-Za-z_]\w*)", lambda match: names.get(match[1], match[1]), line)


def snake_case(name: str) -> str:
    """LlamaRMSNorm -> llama_rms_norm."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()

"""A block as a class, and the loop over blocks: the shape of the emitted program.

In: a planned region. Out: the source of one `nn.Module` per distinct block, whose segments are methods, and the pieces of the model's own
class. How a segment is called shows its mode (`seqloom/emit/segments.py`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from seqloom.emit.segments import block_title, method_name, mixed, mode_lines, with_modes
from seqloom.emit.statements import Functions, Scope, group_name, placement_text, reshard_lines, statements
from seqloom.emit.tidy import fit, tidy, with_return
from seqloom.graph import Node
from seqloom.plan.placement import Layout
from seqloom.plan.plan import Plan, PlannedRegion, PlannedSegment

WIDTH, DOCSTRING_WIDTH = 138, 128


@dataclass(frozen=True)
class Loop:
    """Calls of blocks that follow each other: `prefixes` are their module paths, `carried` the position of the input that is passed on."""

    calls: tuple[Node, ...]
    container: str
    carried: int


def block_source(plan: Plan, name: str, functions: Functions, used: Scope) -> str:
    """Source of the class of one distinct block; imports it needs are noted in `used`."""
    planned = plan.regions[name]
    scope = Scope(plan, planned, functions)
    methods = [_method(scope, segment, method_name(planned, segment)) for segment in planned.segments]
    forward = _forward(planned)
    for field in ("collectives", "operators"):
        getattr(used, field).update(getattr(scope, field))
    used.uses_local |= scope.uses_local
    title = _docstring(block_title(planned))
    init = _init(planned, scope)
    return "\n\n".join([f"class {name}(nn.Module):\n    {title}", init, forward, *methods])


def _docstring(text: str) -> str:
    """A class docstring, of as many lines as it takes."""
    lines = textwrap.wrap(text, DOCSTRING_WIDTH)
    return f'"""{text}"""' if len(lines) == 1 else '"""' + "\n    ".join(lines) + '\n    """'


def _init(planned: PlannedRegion, scope: Scope) -> str:
    layer = ", layer: int" if mixed(planned) else ""
    lines = [f"    def __init__(self, mesh: DeviceMesh{layer}) -> None:", "        super().__init__()"]
    lines += [f"        {line}" for line in (*declarations(planned), *group_lines(scope), *mode_lines(planned))]
    return "\n".join(lines)


def declarations(planned: PlannedRegion) -> list[str]:
    """`declare(...)` of the region's parameters with their global shapes, and of its buffers."""
    lines = []
    parameters = planned.region.graph.of_kind("parameter")
    if parameters:
        lines += ["declare(self, {", *(f'    "{v.fqn}": {v.shape},' for v in parameters), "})"]
    buffers = planned.region.graph.of_kind("buffer")
    if buffers:
        lines += ["declare_buffers(self, {", *(f'    "{v.fqn}": ({v.shape}, {v.dtype}),' for v in buffers), "})"]
    return lines


def group_lines(scope: Scope) -> list[str]:
    """One process group per set of axes that the class communicates over, and this rank's place among those that split positions."""
    groups = [f"self.{group_name(axes)} = axis_group(mesh, {', '.join(repr(a) for a in axes)})" for axes in scope.groups]
    ranks = [f"self.{group_name(axes)}_rank = axis_rank(mesh, {', '.join(repr(a) for a in axes)})" for axes in scope.ranks]
    return [*groups, *ranks]


def _method(scope: Scope, segment: PlannedSegment, name: str) -> str:
    scope.variables = {(n, scope.planned.layouts[n]): n for n in segment.segment.inputs}
    scope.variables |= {(n, scope.planned.layouts[n]): n for n in scope.graph.inputs if n in segment.segment.inputs}
    outputs = segment.segment.outputs
    lines = statements(scope, segment.clusters, segment.leaving, [o for o in outputs if o not in [r.value for r in segment.leaving]])
    arguments, lines = tidy(segment.segment.inputs, lines, [_variable(scope, segment, n) for n in outputs])
    head = f"    def {name}(self{''.join(f', {n}: Tensor' for n in arguments)}) -> {_tensors(len(outputs))}:"
    placed = [placement_text(scope, n, scope.planned.layouts[n]) for n in segment.segment.inputs]
    title = ", ".join(f"{n} {text}" for n, text in zip(arguments, placed, strict=True))
    return "\n".join([head, f'        """{title}."""', *fit(lines, 8, WIDTH)])


def _variable(scope: Scope, segment: PlannedSegment, name: str) -> str:
    leaving = [r for r in segment.leaving if r.value == name]
    return scope.variables[name, leaving[0].dst if leaving else scope.planned.layouts[name]]


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"


def _forward(planned: PlannedRegion) -> str:
    graph = planned.region.graph
    lines = []
    for segment in planned.segments:
        call = f"self.{method_name(planned, segment)}({', '.join(segment.segment.inputs)})"
        lines.append(f"{', '.join(segment.segment.outputs)} = {call}")
    arguments, lines = tidy(graph.inputs, lines, graph.outputs)
    head = f"    def forward(self, {', '.join(f'{n}: Tensor' for n in arguments)}) -> {_tensors(len(graph.outputs))}:"
    return "\n".join([head, *fit(with_modes(planned, lines), 8, WIDTH)])


def loops(plan: Plan) -> list[Loop]:
    """The block calls of the model, grouped into loops over a module list where each call feeds the next."""
    found: list[Loop] = []
    for call in (node for node in plan.outer.region.graph.nodes if node.is_block):
        container = re.sub(r"[.]\d+$", "", call.module)
        if found and found[-1].container == container:
            previous = found[-1].calls[-1]
            carried = [i for i, n in enumerate(call.inputs) if n in previous.outputs]
            same = [n for i, n in enumerate(call.inputs) if i not in carried] == [
                n for i, n in enumerate(previous.inputs) if i not in carried
            ]
            if len(carried) == 1 and same and len(call.outputs) == 1 and (len(found[-1].calls) == 1 or found[-1].carried == carried[0]):
                found[-1] = Loop((*found[-1].calls, call), container, carried[0])
                continue
        found.append(Loop((call,), container, 0))
    return found


def model_source(plan: Plan, name: str, functions: Functions, used: Scope) -> str:
    """Source of the model's own class: embedding, loop over blocks, head and loss."""
    scope = Scope(plan, plan.outer, functions)
    scope.variables = {(n, plan.outer.layouts[n]): n for n in plan.outer.region.graph.inputs}
    body = _model_body(plan, scope)
    for field in ("collectives", "operators"):
        getattr(used, field).update(getattr(scope, field))
    used.uses_local |= scope.uses_local
    lines = [f"class {name}(nn.Module):", '    """The model; returns this rank\'s sum of the per-token losses."""', ""]
    lines += ["    def __init__(self, mesh: DeviceMesh) -> None:", "        super().__init__()"]
    lines += [f"        {line}" for line in (*declarations(plan.outer), *_containers(plan), *group_lines(scope))]
    arguments = ", ".join(f"{n}: Tensor" for n in plan.outer.region.graph.inputs)
    lines += ["", f"    def forward(self, {arguments}) -> Tensor:", *fit(body, 8, WIDTH)]
    return "\n".join(lines)


def _containers(plan: Plan) -> list[str]:
    lines = []
    declared = {str(v.fqn).split(".")[0] for v in plan.outer.region.graph.of_kind("parameter")}
    by_container: dict[str, list[str]] = {}
    for call in (node for node in plan.outer.region.graph.nodes if node.is_block):
        by_container.setdefault(re.sub(r"[.]\d+$", "", call.module), []).append(call.block)
    for container, blocks in by_container.items():
        root = container.split(".")[0]
        if "." in container and root not in declared:
            lines.append(f"self.{root} = nn.Module()")
            declared.add(root)
        if len(set(blocks)) == 1:
            layer = "layer" if mixed(plan.regions[blocks[0]]) else "_"
            made = f"{blocks[0]}(mesh{', layer' if layer == 'layer' else ''})"
            lines.append(f"self.{container} = nn.ModuleList({made} for {layer} in range({len(blocks)}))")
        else:
            made = [f"{b}(mesh, {blocks[:i].count(b)})" if mixed(plan.regions[b]) else f"{b}(mesh)" for i, b in enumerate(blocks)]
            lines.append(f"self.{container} = nn.ModuleList([{', '.join(made)}])")
    return lines


def _model_body(plan: Plan, scope: Scope) -> list[str]:
    """Clusters before, loops, clusters after: whatever is ready runs, clusters first."""
    graph = plan.outer.region.graph
    ready = {n for n, v in graph.values.items() if v.kind != "activation"}
    pending, waiting = list(plan.outer.clusters), loops(plan)
    lines: list[str] = []
    while pending or waiting:
        batch = []
        while True:
            runnable = [c for c in pending if all(n in ready for n in c.cluster.inputs)]
            if not runnable:
                break
            for cluster in runnable:
                pending.remove(cluster)
                batch.append(cluster)
                ready.update(cluster.cluster.outputs)
        later = {n for c in pending for n in c.cluster.inputs} | {n for loop in waiting for call in loop.calls for n in call.inputs}
        lines += statements(scope, batch, (), tuple(later | set(graph.outputs)))
        if waiting:
            loop = waiting.pop(0)
            lines += _loop_lines(plan, scope, loop)
            ready.update(out for call in loop.calls for out in call.outputs)
    result = graph.outputs[0]
    return with_return(lines, [scope.variables[result, plan.outer.layouts[result]]])


def _loop_lines(plan: Plan, scope: Scope, loop: Loop) -> list[str]:
    lines: list[str] = []
    first = loop.calls[0]
    block = plan.regions[first.block]
    arguments = []
    for outer, inner in zip(first.inputs, block.region.graph.inputs, strict=True):
        for reshard in plan.entering.get(outer, ()):
            if (outer, reshard.dst) not in scope.variables:
                lines += reshard_lines(scope, reshard, True)
        arguments.append(scope.variables[outer, block.layouts[inner]])
    carried = block.region.graph.inputs[loop.carried]
    outputs = loop.calls[-1].outputs
    if len(loop.calls) > 1:
        if arguments[loop.carried] != carried:
            lines.append(f"{carried} = {arguments[loop.carried]}")
        call = ", ".join(carried if i == loop.carried else a for i, a in enumerate(arguments))
        lines += [f"for layer in self.{loop.container}:", f"    {carried} = layer({call})  # {_border(scope, plan, outputs[0], block)}"]
        names: Sequence[str] = (carried,)
    else:
        names = outputs
        path = re.sub(r"[.](\d+)$", r"[\1]", first.module)
        lines.append(f"{', '.join(names)} = self.{path}({', '.join(arguments)})  # {_border(scope, plan, outputs[0], block)}")
    for outer, inner, variable in zip(outputs, plan.regions[loop.calls[-1].block].region.graph.outputs, names, strict=True):
        scope.variables[outer, _border_layout(plan, loop.calls[-1], inner)] = variable
    return lines


def _border_layout(plan: Plan, call: Node, inner: str) -> Layout:
    index = plan.regions[call.block].region.graph.outputs.index(inner)
    return plan.outer.layouts[call.outputs[index]]


def _border(scope: Scope, plan: Plan, outer: str, block: PlannedRegion) -> str:
    seconds = [sum(c.price.forward_s for c in block.clusters), sum(c.price.backward_s for c in block.clusters)]
    total = " + ".join(f"{s * 1e3:.1f}" for s in seconds)
    return f"{placement_text(scope, outer, plan.outer.layouts[outer])} {total} ms each"

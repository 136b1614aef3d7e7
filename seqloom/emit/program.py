"""The whole program: header, tables that the runtime reads, functions, block classes, the model's class; formatted with ruff.

In: a plan and what to say about it. Out: the text of `program.py`. The contract with the runtime is in `docs/architecture.md`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from textwrap import fill

from seqloom.capture.documents import MAGI
from seqloom.emit.layers import block_source, model_source
from seqloom.emit.segments import IMPORTS
from seqloom.emit.statements import Functions, Scope, operator_names
from seqloom.errors import UserError
from seqloom.magi.windows import Windows, distinct
from seqloom.plan.context import split_axes
from seqloom.plan.placement import Layout
from seqloom.plan.plan import Plan, PlannedRegion
from seqloom.plan.price import DP

WIDTH = 140


def program_source(plan: Plan, model_class: str, tied: Mapping[str, str], summary: str) -> str:
    """Source of the program. `summary` is a paragraph for the module docstring; `tied` maps aliases to the parameters they share."""
    functions = Functions(operators=operator_names(plan.outer.region.graph))
    used = Scope(plan, plan.outer, functions)
    blocks = [name for name in plan.regions if name]
    classes = [block_source(plan, name, functions, used) for name in blocks]
    model = model_source(plan, model_class, functions, used)
    body = [
        *functions.sources.values(),
        *classes,
        model,
        f"MODEL = {model_class}\nBLOCKS = ({', '.join(blocks)}{',' if len(blocks) == 1 else ''})",
    ]
    text = "\n\n\n".join([_header(plan, summary), _imports(plan, used, "\n\n".join(body)), _tables(plan, tied), *body]) + "\n"
    return format_source(text)


def _header(plan: Plan, summary: str) -> str:
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items()) or "one rank a scale unit"
    notation = (
        "Each line ends with where its result lies and what it is predicted to take: in `[b, l@sp, d] 0.09 + 0.18 ms` the sequence l is "
        "split over the axis sp, the rest is whole on every rank, and forward and backward take 0.09 and 0.18 ms. `sum@tp` marks a partial "
        "sum. b batch, l sequence, d hidden, v vocabulary, h heads, k key/value heads, e head size, f the wide dimension of the MLP."
    )
    paragraphs = [f"Mesh: {mesh}. ZeRO {plan.storage.zero}.", summary, notation]
    wrapped = "\n\n".join(fill(p, WIDTH - 10) for p in paragraphs)
    return f'"""A training program written by seqloom: every rank runs it on its piece of each tensor.\n\n{wrapped}\n"""'


def _imports(plan: Plan, used: Scope, body: str) -> str:
    lines = ["import torch", "from torch import Tensor, nn", "from torch.distributed.device_mesh import DeviceMesh"]
    if "Replicate()" in repr(_placements(plan)) or "Shard(" in repr(_placements(plan)):
        kinds = [kind for kind in ("Replicate", "Shard") if f"{kind}(" in repr(_placements(plan))]
        lines.append(f"from torch.distributed.tensor import {', '.join(kinds)}")
    if "F." in body:
        lines.append("from torch.nn import functional as F")
    if "checkpoint(" in body:
        lines.append("from torch.utils.checkpoint import checkpoint")
    lines.append("")
    by_module: dict[str, list[str]] = {}
    for operator in used.operators:
        module, name = operator.split(":")
        own = used.functions.operators[operator]
        by_module.setdefault(module, []).append(name if own == name else f"{name} as {own}")
    if used.collectives:
        by_module["seqloom.runtime.collectives"] = list(used.collectives)
    for call, (module, name) in IMPORTS.items():
        if re.search(rf"(?<![\w.]){re.escape(call)}", body):
            by_module.setdefault(module, []).append(name)
    names = ["declare", *(["declare_buffers"] if "declare_buffers(" in body else []), *(["local"] if used.uses_local else [])]
    by_module["seqloom.runtime.parameters"] = names
    lines += [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(by_module.items())]
    if "torch." not in body.replace("torch.distributed", ""):
        lines.remove("import torch")
    return "\n".join(lines)


def _tables(plan: Plan, tied: Mapping[str, str]) -> str:
    graph, outer = plan.outer.region.graph, plan.outer
    inputs = {name: _input_axes(plan, outer, name) for name in graph.inputs}
    shapes = {name: graph.values[name].shape for name in graph.inputs}
    loss = outer.layouts[graph.outputs[0]]
    partial = tuple(axis for axis, placement in zip(plan.mesh, loss, strict=True) if placement.kind == "P")
    sums = tuple(name for name, axis in zip(plan.mesh, plan.machine.axes, strict=True) if axis.role == "sum")
    rows = [
        f"MESH = {dict(plan.mesh)!r}  # axes of one scale unit, outer to inner",
        f"INPUTS = {inputs!r}  # per dimension the axis that splits it",
        f"SHAPES = {shapes!r}  # of one micro-batch of one scale unit",
        f"LOSS_PARTIAL = {partial!r}  # axes over which the returned loss is a partial sum",
        f"PLACEMENTS = {{{', '.join(_placement_rows(plan))}}}  # parameters on the axes that split weights",
        f"SUM_GRADS = {sums!r}  # axes, beside dp, whose ranks each hold a part of every gradient",
        f"ZERO = {plan.storage.zero}",
        f"SHARDED = {sharded_axes(plan)!r}  # the axes among these over which storage is sharded; ranks of the others hold copies",
        f"TIED = {dict(tied)!r}  # alias -> the parameter it shares",
        f"FUSED = {plan.machine.hardware.rates.fused}  # whether the plan counts on torch.compile for the blocks",
    ]
    attention = attention_axes(plan)
    if attention is not None:
        rows.append(f"CONTEXT = {attention!r}  # attention stays inside documents: axes that split its batch, and its sequence")
        windows = attention_windows(plan)
        if windows != (None,):
            rows.append(f"WINDOWS = {windows!r}  # sliding windows of its layers, None for layers without")
    return "\n".join(rows)


def attention_windows(plan: Plan) -> Windows:
    """The sliding windows of attention inside documents, each once, None where a layer has none."""
    nodes = (part.cluster.nodes[0] for planned in plan.regions.values() for part in planned.clusters)
    return distinct(dict(node.kwargs).get("window") for node in nodes if node.op == MAGI)


def attention_axes(plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Axes that split the batch and the sequence of attention inside documents; None where there is none.

    Raises `UserError` where two blocks differ: the rows of a batch can be laid out in one way only.
    """
    found = {}
    for planned in plan.regions.values():
        for part in planned.clusters:
            if part.cluster.nodes[0].op == MAGI:
                batch, sequence = (tuple(plan.axis_names[axis] for axis in axes) for axes in split_axes(part.cluster, part.strategy.splits))
                found[batch, sequence] = part.cluster.name
    if len(found) > 1:
        ways = " and ".join(f"over {', '.join((*batch, *sequence)) or 'nothing'} ({name})" for (batch, sequence), name in found.items())
        raise UserError(f"the plan splits attention in two ways, {ways}, and documents can be laid out for one only: use --attention heads")
    return next(iter(found), None)


def sharded_axes(plan: Plan) -> tuple[str, ...]:
    """Names of the axes over which storage is sharded, `dp` included."""
    named = {DP: "dp", **dict(enumerate(plan.axis_names))}
    return tuple(named[axis] for axis in plan.storage.sharded)


def _input_axes(plan: Plan, outer: PlannedRegion, name: str) -> tuple[object, ...]:
    layout = outer.layouts.get(name, ())
    axes: list[object] = []
    for dim in range(len(outer.region.graph.values[name].shape)):
        found = tuple(axis for axis, placement in zip(plan.mesh, layout, strict=False) if placement.kind == "S" and placement.dim == dim)
        axes.append(None if not found else found[0] if len(found) == 1 else found)
    return tuple(axes)


def _placement_rows(plan: Plan) -> list[str]:
    return [f'"{pattern}": {{{", ".join(f"{axis!r}: {p}" for axis, p in row.items())}}}' for pattern, row in _placements(plan).items()]


def _placements(plan: Plan) -> dict[str, dict[str, str]]:
    """State-dict pattern -> axis -> placement, for every parameter when the plan has axes that split weights."""
    split = [i for i, axis in enumerate(plan.machine.axes) if axis.role == "split"]
    found: dict[str, dict[str, str]] = {}
    for key, planned in plan.regions.items():
        for name, layout in planned.parameter_layouts().items():
            row = {plan.axis_names[i]: _tensor_placement(layout, i) for i in split}
            for prefix in _prefixes(plan, key):
                if row:
                    found[f"{prefix}{planned.region.graph.values[name].fqn}"] = row
    return found


def _prefixes(plan: Plan, key: str) -> list[str]:
    """`model.layers.*.` when a block's calls are all of a module list, else one prefix a call."""
    if not key:
        return [""]
    calls = [node for node in plan.outer.region.graph.nodes if node.is_block]
    mine = [node.module for node in calls if node.block == key]
    containers = {module.rsplit(".", 1)[0] for module in mine}
    others = [node.module for node in calls if node.block != key and node.module.rsplit(".", 1)[0] in containers]
    if len(containers) == 1 and not others:
        return [f"{containers.pop()}.*."]
    return [f"{module}." for module in mine]


def _tensor_placement(layout: Layout, axis: int) -> str:
    return f"Shard({layout[axis].dim})" if layout[axis].kind == "S" else "Replicate()"


def format_source(text: str) -> str:
    """The text as `ruff format` lays it out. Raises `UserError` where ruff is not installed."""
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", str(WIDTH), "--stdin-filename", "program.py", "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        if "No module named ruff" in result.stderr:
            raise UserError("the emitted program is formatted with ruff, which is not installed: pip install ruff")
        raise SyntaxError(f"the emitted program does not parse: {result.stderr.strip()}\n{text}")
    return result.stdout

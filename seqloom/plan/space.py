"""The search space: every way to run a cluster on a mesh.

Role in the pipeline: clusters in, strategies out; the solver picks one strategy a cluster. On each mesh axis a cluster either runs whole
on every rank (`R`) or is split along one of its dimension classes; the strategies of a mesh are the products over its axes. A value
that has the split dimension is `S`, a value that lacks it is `B` (each rank's use adds to its gradient), a reduced output is `P`.

An axis has a role. On a `sum` axis every parameter is `B`, so its gradient is summed and its storage may be sharded (data and sequence
parallel, ZeRO). On a `split` axis parameters may be split (tensor parallel); those that are not live there whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from seqloom.errors import UserError
from seqloom.graph import Graph
from seqloom.ops.registry import choices_of, resolve
from seqloom.plan.clusters import Cluster, DimClass
from seqloom.plan.labels import Labels, is_attention
from seqloom.plan.placement import B, Layout, P, Placement, R, S, divides

Role = Literal["sum", "split"]
# Arithmetic on weights alone (Gemma's `1 + weight`): whole on every rank, each rank's use adds to the gradient.
WHOLE = DimClass("whole", (), {})
Constants = tuple[tuple[str, Any], ...]  # arguments of a registered function by name
FORCES = ("dp", "sp", "cp", "tp", "tp_plain", "tp_sp")


@dataclass(frozen=True)
class Axis:
    """One axis of a candidate mesh. `force` restricts the search on it (see `FORCES`)."""

    size: int
    role: Role
    force: str | None = None


@dataclass(frozen=True)
class Strategy:
    """One way to run a cluster: per axis the name of the class that is split, "" for none; the layout of every value of the cluster;
    constant arguments that differ from the captured ones.
    """

    splits: tuple[str, ...]
    layouts: Mapping[str, Layout]
    constants: Constants = ()

    def label(self) -> str:
        """Short text such as `l/h` (axis by axis), `-` where the work is repeated."""
        return "/".join(split or "-" for split in self.splits)


def parse_force(text: str) -> list[tuple[str, int]]:
    """`sp2,tp2` -> [("sp", 2), ("tp", 2)]; outer axis first. Raises `UserError` for anything else."""
    found = []
    for part in text.replace("x", ",").split(","):
        match = re.fullmatch(r"([a-z_]+)(\d+)", part.strip())
        if not match or match[1] not in FORCES or int(match[2]) < 1:
            raise UserError(f"--force {text}: `{part}` is not one of {', '.join(FORCES)} followed by a size, such as sp2,tp2")
        found.append((match[1], int(match[2])))
    return found


def strategies(graph: Graph, cluster: Cluster, labels: Labels, axes: Sequence[Axis]) -> list[Strategy]:
    """All strategies of a cluster on a mesh, in a fixed order; empty when the constraints leave none."""
    per_axis = [list(_options(graph, cluster, labels, axis)) for axis in axes]
    sizes = tuple(axis.size for axis in axes)
    found = []
    for choice in itertools.product(*per_axis):
        layouts = {name: tuple(_placement(graph, name, option) for option in choice) for name in cluster.values}
        even = all(divides(graph.values[name].shape, layout, sizes) for name, layout in layouts.items())
        if even and _sizes_divide(choice, sizes) and _nests(choice, sizes):
            found.append(Strategy(tuple(option.name if option else "" for option in choice), layouts))
    return found


def _sizes_divide(choice: Sequence[DimClass | None], sizes: Sequence[int]) -> bool:
    pieces: dict[str, int] = {}
    for option, size in zip(choice, sizes, strict=True):
        if option is not None:
            pieces[option.name] = pieces.get(option.name, 1) * size
            if any(n % pieces[option.name] for n in option.sizes):
                return False
    return True


def _nests(choice: Sequence[DimClass | None], sizes: Sequence[int]) -> bool:
    """Whether every class that lies behind others is split only where outer axes have split those down to 1."""
    pieces: dict[str, int] = {}
    whole = {option.name: option.sizes for option in choice if option is not None}
    for option, size in zip(choice, sizes, strict=True):
        if option is not None:
            pieces[option.name] = pieces.get(option.name, 1) * size
            if any(whole.get(name) != (pieces.get(name),) for name in option.after):
                return False
    return True


def variants(cluster: Cluster, strategy: Strategy) -> Iterator[Strategy]:
    """A strategy with every combination of the constants that a registered function leaves open (the size of a chunk)."""
    choices = choices_of(cluster.nodes[0].op) if cluster.heavy else {}
    for values in itertools.product(*choices.values()):
        yield replace(strategy, constants=tuple(zip(choices, values, strict=True)))


def with_constants(cluster: Cluster, constants: Constants) -> Cluster:
    """The cluster with constant arguments of its function replaced."""
    if not constants:
        return cluster
    (node,) = cluster.nodes
    order = list(resolve(node.op).signature.parameters)
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in constants:
        if order.index(name) < len(args):
            args[order.index(name)] = value
        else:
            kwargs[name] = value
    return replace(cluster, nodes=(replace(node, args=tuple(args), kwargs=tuple(kwargs.items())),))


def _placement(graph: Graph, name: str, option: DimClass | None) -> Placement:
    value = graph.values[name]
    if option is not None and name in option.dims:
        return S(option.dims[name])
    if option is not None and name in option.reduced:
        return P
    return B if option is not None and value.requires_grad else R


def _options(graph: Graph, cluster: Cluster, labels: Labels, axis: Axis) -> Iterator[DimClass | None]:
    parameters = [name for name in cluster.inputs if graph.values[name].kind == "parameter"]
    trained = [name for name in cluster.inputs if graph.values[name].requires_grad]
    of_weights = bool(parameters) and trained == parameters and not any(graph.values[n].kind == "input" for n in cluster.inputs)
    for option in (None, *([WHOLE] if of_weights else []), *cluster.classes):
        whole = option is not None and not any(name in option.dims for name in parameters)
        if axis.role == "sum" and parameters and not whole:
            continue
        if axis.force is None or of_weights or _allowed(graph, cluster, labels, axis, option):
            yield option


def _allowed(graph: Graph, cluster: Cluster, labels: Labels, axis: Axis, option: DimClass | None) -> bool:
    """Whether a forced axis leaves this choice to a cluster; a cluster that cannot do what is asked may do anything.

    `sp` splits attention by heads, and by query positions only where no heads divide.
    """
    force = axis.force
    kinds = {_kind(graph, cluster, labels, candidate) for candidate in cluster.classes}
    kind = _kind(graph, cluster, labels, option)
    linear = cluster.heavy and any(graph.values[name].kind == "parameter" and len(graph.values[name].shape) == 2 for name in cluster.inputs)
    if force == "dp":
        return kind == "b" if "b" in kinds else kind == ""
    if is_attention(cluster.nodes[0].op) and force in ("sp", "cp"):
        heads = [c for c in cluster.classes if _kind(graph, cluster, labels, c) == "other" and all(n % axis.size == 0 for n in c.sizes)]
        return kind == ("other" if force == "sp" and heads else "l")
    if force in ("sp", "cp"):
        if "l" in kinds:
            return kind == "l" if linear or not cluster.heavy and _has_parameter(graph, cluster) else kind != "b"
        return kind in ("other", "l") if kinds - {"b", "l"} else True
    if "weight" in kinds and linear and not cluster.nodes[0].op.startswith("aten.embedding"):
        return kind == "weight"
    if force != "tp" and not cluster.heavy and _has_parameter(graph, cluster):
        # A norm of the residual stream has no other choice; a bias or a norm of heads may stay split between two matmuls.
        return kind in ("l" if force == "tp_sp" else "", "weight", "other")
    return kind != "b"


def _has_parameter(graph: Graph, cluster: Cluster) -> bool:
    return any(graph.values[name].kind == "parameter" for name in cluster.inputs)


def _kind(graph: Graph, cluster: Cluster, labels: Labels, option: DimClass | None) -> str:
    """What a class splits: the batch `b`, the sequence `l`, a `weight`, something `other`, or nothing."""
    if option is None:
        return ""
    letters = {labels[name][dim] for name, dim in option.dims.items() if graph.values[name].kind not in ("parameter", "buffer")}
    for letter in ("b", "l"):
        if letter in letters:
            return letter
    return "weight" if any(graph.values[name].kind == "parameter" for name in option.dims) else "other"

"""Groups of nodes that run under one strategy, and the dimensions along which such a group may be split.

Role in the pipeline: between the graph and the search space. Cheap nodes (pointwise, views, normalization) join the node that feeds
them as long as they stay in one module, so that a decoder layer of 60 nodes is planned as about 20 clusters with no loss: a reshard
in the middle of such a chain is never cheaper than one at its ends. Costly nodes (matrix products, attention, embedding, registered
functions) stand alone.

In: a `Graph` without block calls (a block, or the outer graph, whose block calls are skipped). Out: `Cluster`s in execution order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from seqloom.graph import Graph, Node
from seqloom.ops.rules import context_of, starts_of
from seqloom.ops.saved import is_view, saved_for_backward

HEAVY = frozenset(
    f"aten.{name}"
    for name in ("linear.default", "matmul.default", "mm.default", "bmm.default", "embedding.default", "cross_entropy_loss.default")
)

Item = tuple[str, int]  # a dimension of a value


@dataclass(frozen=True)
class DimClass:
    """Dimensions that are split together: `dims[value]` is the dimension of each value of the cluster that has it.

    `sizes` are the numbers of pieces that a split must divide; `reduced` are the outputs that become partial sums. `after` names the
    classes that outer mesh axes must have split down to 1 before (query heads of one key/value head: `g` after `k`); `start` the argument
    that tells a registered function where its piece begins; `context` marks the dimension that such a function itself splits over a group.
    """

    name: str
    sizes: tuple[int, ...]
    dims: Mapping[str, int]
    reduced: frozenset[str] = frozenset()
    after: tuple[str, ...] = ()
    start: str | None = None
    context: bool = False


@dataclass(frozen=True)
class Cluster:
    """Nodes under one strategy. `inputs` come from outside (parameters and buffers too), `outputs` are used outside. `saved` are the
    values that autograd keeps, views as what they look into, with the operator's output for a tensor of its own that only has the size.
    """

    name: str
    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    classes: tuple[DimClass, ...]
    saved: tuple[tuple[str, str], ...] = ()

    @property
    def heavy(self) -> bool:
        """Whether this is a single costly node."""
        return is_heavy(self.nodes[0])

    @cached_property
    def looks_into(self) -> str | None:
        """The input whose storage a cluster made of views shares; None for other clusters."""
        return self.inputs[0] if all(is_view(node.op) for node in self.nodes) and len(self.inputs) == 1 else None

    @cached_property
    def values(self) -> tuple[str, ...]:
        """Every value that the cluster reads or makes, inputs first."""
        return tuple(dict.fromkeys((*self.inputs, *(out for node in self.nodes for out in node.outputs))))


def is_heavy(node: Node) -> bool:
    """Whether a node is planned on its own."""
    return node.op in HEAVY or not node.op.startswith("aten.")


def clusters(graph: Graph) -> tuple[Cluster, ...]:
    """Clusters of a graph's nodes (block calls left out), in an order in which they can run."""
    groups = _group(graph)
    used_outside = set(graph.outputs)
    for node in graph.nodes:
        if node.is_block:
            used_outside.update(node.inputs)
    made_by = {out: index for index, group in enumerate(groups) for node in group for out in node.outputs}
    for index, group in enumerate(groups):
        used_outside.update(name for node in group for name in node.inputs if made_by.get(name, index) != index)
    built = [_cluster(graph, group, used_outside) for group in groups]
    return tuple(_in_order(graph, built))


def _group(graph: Graph) -> list[list[Node]]:
    """Lists of nodes; a light node joins the light group that feeds it unless that would make a circle between groups."""
    groups: list[list[Node]] = []
    home: dict[str, int] = {}
    for node in graph.nodes:
        if node.is_block:
            continue
        target = _joinable(graph, groups, home, node)
        if target is None:
            target = len(groups)
            groups.append([])
        groups[target].append(node)
        home.update(dict.fromkeys(node.outputs, target))
    return groups


def _joinable(graph: Graph, groups: list[list[Node]], home: Mapping[str, int], node: Node) -> int | None:
    if is_heavy(node):
        return None
    candidates = {
        home[name]
        for name in node.inputs
        if name in home and graph.values[name].requires_grad == graph.values[node.outputs[0]].requires_grad
    }
    candidates = {c for c in candidates if not is_heavy(groups[c][0]) and groups[c][0].module == node.module}
    if len(candidates) != 1:
        return None
    (target,) = candidates
    others = {home[name] for name in node.inputs if name in home} - {target}
    return None if any(_depends(graph, groups, home, other, target) for other in others) else target


def _depends(graph: Graph, groups: list[list[Node]], home: Mapping[str, int], start: int, goal: int) -> bool:
    """Whether group `start` needs a result of group `goal`, directly or through others (block calls included)."""
    producers = graph.producers()
    seen: set[str] = set()
    todo = [name for node in groups[start] for name in node.inputs]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if home.get(name) == goal:
            return True
        if name in home:
            todo.extend(n for node in groups[home[name]] for n in node.inputs)
        elif name in producers:
            todo.extend(producers[name].inputs)
    return False


def _cluster(graph: Graph, nodes: list[Node], used_outside: set[str]) -> Cluster:
    made = {out for node in nodes for out in node.outputs}
    inputs = tuple(dict.fromkeys(name for node in nodes for name in node.inputs if name not in made))
    outputs = tuple(out for node in nodes for out in node.outputs if out in used_outside)
    classes = (*_classes(graph, nodes), *_nested_classes(nodes), *_context_classes(nodes))
    return Cluster(nodes[-1].outputs[0], tuple(nodes), inputs, outputs, classes, tuple(_saved(graph, nodes)))


def _saved(graph: Graph, nodes: list[Node]) -> Iterator[tuple[str, str]]:
    base: dict[str, str] = {}
    for node in nodes:
        if is_view(node.op):
            base.update(dict.fromkeys(node.outputs, base.get(node.inputs[0], node.inputs[0])))
        if not any(graph.values[name].requires_grad for name in node.outputs):
            continue
        for side, index in saved_for_backward(node.op, node.args, dict(node.kwargs), graph.values):
            name = (node.outputs if side == "output" else node.inputs)[index]
            if side == "like_input":
                yield name, node.outputs[0]
            elif graph.values[name].kind not in ("parameter", "buffer"):
                yield base.get(name, name), ""


def _nested_classes(nodes: list[Node]) -> Iterator[DimClass]:
    """Classes of a registered function that lie behind others in one dimension, as the query heads of a key/value head do."""
    if len(nodes) == 1 and ":" in nodes[0].op:
        node = nodes[0]
        for split in node.bound.splits(nested=True):
            if split.after and not split.reduced:
                dims = {n: d for n, d in zip(node.inputs, split.input_dims, strict=True) if d is not None}
                dims |= {n: d for n, d in zip(node.outputs, split.output_dims, strict=True) if d is not None}
                yield DimClass(split.name, (split.size,), dims, after=split.after)


def _context_classes(nodes: list[Node]) -> Iterator[DimClass]:
    """The dimension that a registered function splits itself, over a group that it is given."""
    if len(nodes) == 1 and (name := context_of(nodes[0].op)) is not None:
        node = nodes[0]
        sides = [*zip(node.inputs, node.bound.inputs, strict=True), *zip(node.outputs, node.bound.outputs, strict=True)]
        dims = {value: found.index((name,)) for value, found in sides if found is not None and (name,) in found}
        yield DimClass(name, (node.bound.sizes[name],), dims, context=True)


def _classes(graph: Graph, nodes: list[Node]) -> tuple[DimClass, ...]:
    """Join the splits of all nodes wherever they touch the same dimension of the same value; drop what any node forbids."""
    parent: dict[Item, Item] = {}

    def find(item: Item) -> Item:
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    frozen: set[Item] = set()
    facts: list[tuple[Item, int, tuple[str, ...], str]] = []
    for node in nodes:
        free: set[tuple[str, int]] = set()
        for split in node.bound.splits():
            touched = [(n, d) for n, d in zip(node.inputs, split.input_dims, strict=True) if d is not None]
            touched += [(n, d) for n, d in zip(node.outputs, split.output_dims, strict=True) if d is not None]
            free.update(touched)
            for item in touched:
                parent[find(item)] = find(touched[0])
            reduced = tuple(n for n, d in zip(node.outputs, split.output_dims, strict=True) if d is None) if split.reduced else ()
            facts.append((touched[0], split.size, reduced, split.name))
        for name in (*node.inputs, *node.outputs):
            frozen.update((name, d) for d in range(len(graph.values[name].shape)) if (name, d) not in free)
    return _collect(nodes, parent, find, frozen, facts)


def _collect(
    nodes: list[Node],
    parent: Mapping[Item, Item],
    find: Callable[[Item], Item],
    frozen: set[Item],
    facts: list[tuple[Item, int, tuple[str, ...], str]],
) -> tuple[DimClass, ...]:
    members: dict[Item, list[Item]] = {}
    for item in parent:
        members.setdefault(find(item), []).append(item)
    built = []
    for root, items in members.items():
        names = [name for name, _ in items]
        mine = [fact for fact in facts if find(fact[0]) == root]
        reduced = frozenset(name for fact in mine for name in fact[2])
        if frozen & set(items) or len(set(names)) < len(names) or (reduced and len(nodes) > 1):
            continue
        start = starts_of(nodes[0].op).get(mine[0][3]) if len(nodes) == 1 else None
        built.append(DimClass(mine[0][3], tuple(sorted({fact[1] for fact in mine})), dict(items), reduced, start=start))
    return tuple(built)


def _in_order(graph: Graph, built: list[Cluster]) -> list[Cluster]:
    """Stable topological order: the cluster whose first node comes first goes first, once its inputs are there."""
    ready = {name for name, value in graph.values.items() if value.kind != "activation"}
    pending = sorted(built, key=lambda c: graph.nodes.index(c.nodes[0]))
    calls = [node for node in graph.nodes if node.is_block]
    order: list[Cluster] = []
    while pending:
        for call in calls:
            if all(name in ready for name in call.inputs):
                ready.update(call.outputs)
        chosen = next(c for c in pending if all(name in ready for name in c.inputs))
        pending.remove(chosen)
        order.append(chosen)
        ready.update(out for node in chosen.nodes for out in node.outputs)
    return order

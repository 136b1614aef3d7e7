"""What is alive when: the walk through a step, against sums worked out here."""

from __future__ import annotations

import dataclasses

import pytest
from plan_samples import tiny

from seqloom.cost.hardware import load_hardware
from seqloom.plan.liveness import Point, liveness, moved_keys, offloaded_bytes, saved_keys
from seqloom.plan.modes import KEEP, OFFLOAD, Counts
from seqloom.plan.placement import local_numel
from seqloom.plan.plan import Plan, realize
from seqloom.plan.price import Machine, kept_value
from seqloom.plan.request import Request
from seqloom.plan.solver import solve

LAYERS = 3
H100 = load_hardware("h100-80gb")
REGIONS = tiny("llama", LAYERS, 2, 64)
BLOCK = next(key for key in REGIONS.parts if key)


def plan(counts: Counts | None = None, segment: str = "mlp") -> Plan:
    """Two ranks with everything kept, but for one segment where `counts` says how many layers do what."""
    decisions, _ = solve(REGIONS, Request(2, 1, 1, H100, 2, force="sp2", zero=3, recompute=False, offload=False))
    if counts is not None:
        names = [s.name for s in REGIONS.parts[BLOCK].segments]
        modes = [counts if name == segment else old for name, old in zip(names, decisions.modes[BLOCK], strict=True)]
        decisions = dataclasses.replace(decisions, modes={**decisions.modes, BLOCK: tuple(modes)})
    return realize(REGIONS, decisions, Machine(H100, decisions.axes, 1))


def points(found: Plan) -> dict[str, Point]:
    return {point.at: point for point in liveness(found)}


def nbytes(found: Plan, keys) -> float:
    graph = REGIONS.parts[BLOCK].graph
    values = ((kept_value(graph, name), layout) for name, layout in keys)
    return sum(local_numel(value.shape, layout, found.machine.sizes) * value.dtype.itemsize for value, layout in values)


def activations(found: dict[str, Point], at: str) -> float:
    return found[at].parts["activations"]


def test_every_layer_adds_as_much_and_the_backward_takes_it_away() -> None:
    found = points(plan())
    forward = [activations(found, f"forward of {BLOCK} {layer}") for layer in range(LAYERS)]
    backward = [activations(found, f"backward of {BLOCK} {layer}") for layer in range(LAYERS)]
    assert forward[1] - forward[0] == pytest.approx(forward[2] - forward[1]) and forward[1] > forward[0]
    assert backward == pytest.approx(forward)
    assert activations(found, "end of backward") == 0


def test_what_all_layers_are_given_counts_once() -> None:
    """The blocks of Llama share one `cos` and one `sin`: a layer adds what it saves beside them."""
    found = plan()
    block = found.regions[BLOCK]
    given = {(name, block.layouts[name]) for name in block.region.graph.inputs if "cos" in name or "sin" in name}
    saved = set().union(*(saved_keys(block, segment) for segment in block.segments))
    assert len(given) == 2 and given <= saved, "both come as they are used"
    alive = points(found)
    first, second = (activations(alive, f"forward of {BLOCK} {layer}") for layer in (0, 1))
    assert second - first == nbytes(found, saved - given)
    assert first >= nbytes(found, saved)


def test_the_last_offloaded_call_stays_until_the_backward_has_used_it() -> None:
    """Nobody follows it who would let it go, so the loss and the layers behind it see it on the device."""
    kept, some = plan(), plan(((OFFLOAD, 2), (KEEP, 1)))
    segment = next(s for s in some.regions[BLOCK].segments if s.segment.name == "mlp")
    moved = nbytes(some, moved_keys(segment=segment, planned=some.regions[BLOCK], mode=OFFLOAD))
    assert moved == nbytes(some, saved_keys(some.regions[BLOCK], segment)) > 0
    alone = moved - shared(some)  # what other segments keep anyway leaves nothing free
    at = "head and loss"
    assert activations(points(kept), at) - activations(points(some), at) == pytest.approx(2 * alone - moved)
    assert offloaded_bytes(some, some.regions[BLOCK]) == pytest.approx(2 * moved)


def shared(found: Plan) -> float:
    """Bytes that the MLP saves and another segment of its block too."""
    planned = found.regions[BLOCK]
    by_name = {s.segment.name: saved_keys(planned, s) for s in planned.segments}
    others = set().union(*(keys for name, keys in by_name.items() if name != "mlp"))
    return nbytes(found, by_name["mlp"] & others)


def test_where_nothing_moves_nothing_stays() -> None:
    found = plan()
    assert offloaded_bytes(found, found.regions[BLOCK]) == 0
    behind = activations(points(found), "head and loss") - activations(points(found), f"forward of {BLOCK} {LAYERS - 1}")
    everywhere = plan(((OFFLOAD, LAYERS),))
    more = activations(points(everywhere), "head and loss") - activations(points(everywhere), f"forward of {BLOCK} {LAYERS - 1}")
    assert more == pytest.approx(behind), "the last call is there in its own layer too"

"""One micro-batch as it runs in time: forward, backward and its share of the optimizer, on three lanes.

Role in the pipeline: after `evaluate`, for `plan.json`. In: a plan. Out: bars by lane, and the moments of the points of `liveness`. Every
call of a block, and the two ends of the outer graph, is a window in forward and one in backward: compute, then reshards. Beside the
compute run the collectives of parameters and gradients, and the copies to the host. What `evaluate` counts as exposed lengthens the
windows, so that the last one ends when `evaluate` says that a micro-batch ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple

from seqloom.cost.compute import exposed_seconds, host_seconds
from seqloom.plan.evaluate import region_time, replay_seconds
from seqloom.plan.liveness import group_of, offloaded_bytes, parameter_numel
from seqloom.plan.memory import copy_seconds
from seqloom.plan.modes import Mode, mode_of_layer
from seqloom.plan.plan import Plan, PlannedCluster, PlannedRegion, Reshard
from seqloom.plan.regions import OUTER

Lane = Literal["compute", "communication", "host"]
TRAFFIC = {0: ("", "all-reduce"), 3: ("all-gather", "all-gather and reduce-scatter")}
PHASES = ("forward", "backward")


class Event(NamedTuple):
    """A bar on a lane, in seconds from the start of the micro-batch."""

    lane: Lane
    label: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """The bars, those of a lane in the order of time, and when each point of `liveness` is reached, by its name."""

    events: tuple[Event, ...]
    moments: Mapping[str, float]
    end_s: float


class _Work(NamedTuple):
    """What one call does in one phase, in seconds: replay, compute, reshards; parameter traffic and how much of it is exposed; what host
    copies take beside it, and the copies themselves, which run in windows of their own.
    """

    name: str
    again: float
    compute: float
    reshards: float
    traffic: float
    exposed: float
    delay: float
    copies: float


def timeline(plan: Plan) -> Timeline:
    """The bars of one micro-batch; their end is `evaluate(plan).step_s` over the number of micro-batches."""
    forward, backward = (list(_works(plan, phase)) for phase in range(len(PHASES)))
    events: list[Event] = []
    starts, middle = _lay(events, "forward", forward, plan.storage.zero, 0.0)
    moments = {f"forward of {work.name}": end for work, (_, end) in zip(forward, starts, strict=True)} | {"head and loss": middle}
    windows, end = _lay(events, "backward", backward[::-1], plan.storage.zero, middle)
    moments |= {f"backward of {work.name}": start for work, (start, _) in zip(backward[::-1], windows, strict=True)}
    moments["end of backward"] = end
    events += _host(forward, starts, backward[::-1], windows)
    optimizer = sum(planned.region.count * group_of(plan, planned).optimizer_s for planned in plan.regions.values())
    events.append(Event("compute", "optimizer", end, end + optimizer))
    return Timeline(tuple(event for event in events if event.end_s > event.start_s), moments, end + optimizer)


def _lay(events: list[Event], phase: str, works: Sequence[_Work], zero: int, now: float) -> tuple[list[tuple[float, float]], float]:
    """Lay the windows of a phase one after the other; their (start, end), and the end of the last."""
    windows = []
    traffic = TRAFFIC.get(zero, ("all-gather", "reduce-scatter"))[PHASES.index(phase)]
    for work in works:
        start = now
        events.append(Event("communication", f"{traffic} beside {phase} {work.name}", start, start + work.traffic))
        now += work.exposed
        events.append(Event("compute", f"recompute {work.name}", now, now + work.again))
        now += work.again
        events.append(Event("compute", f"{phase} {work.name}", now, now + work.compute))
        now += work.compute + work.delay
        events.append(Event("communication", f"reshards of {phase} {work.name}", now, now + work.reshards))
        now += work.reshards
        windows.append((start, now))
    return windows, now


def _host(
    forward: Sequence[_Work], sent: Sequence[tuple[float, float]], backward: Sequence[_Work], fetched: Sequence[tuple[float, float]]
) -> Iterator[Event]:
    """Copies to the host as soon as a call has run, and back as late as its backward allows, one at a time."""
    free = 0.0
    for work, (_, end) in zip(forward, sent, strict=True):
        if work.copies:
            start = max(free, end)
            free = start + work.copies
            yield Event("host", f"to host: {work.name}", start, free)
    back: list[Event] = []
    needed = float("inf")
    for work, (start, _) in list(zip(backward, fetched, strict=True))[::-1]:
        if work.copies:
            needed = min(needed, start)
            back.append(Event("host", f"from host: {work.name}", needed - work.copies, needed))
            needed -= work.copies
    late = max(0.0, free - back[-1].start_s) if back else 0.0  # the first copy back waits for the last one out
    yield from (event._replace(start_s=event.start_s + late, end_s=event.end_s + late) for event in reversed(back))


def _calls(plan: Plan) -> Iterator[tuple[str, int]]:
    """(region, ordinal) in the order of the forward; the outer graph's two ends are its calls 0 and 1."""
    yield OUTER, 0
    counts: dict[str, int] = {}
    for node in plan.outer.region.graph.nodes:
        if node.is_block:
            yield node.block, counts.setdefault(node.block, 0)
            counts[node.block] += 1
    yield OUTER, 1


def _works(plan: Plan, phase: int) -> Iterator[_Work]:
    """The work of every call in one phase, in the order of the forward; layers that run the same modes do the same."""
    known: dict[tuple[str, tuple[Mode, ...]], _Work] = {}
    for key, ordinal in _calls(plan):
        planned = plan.regions[key]
        if key == OUTER:
            yield from _end(plan, ordinal, phase)
            continue
        modes = tuple(mode_of_layer(segment.modes, ordinal) for segment in planned.segments)
        if (key, modes) not in known:
            known[key, modes] = _block(plan, planned, modes, phase)
        yield known[key, modes]._replace(name=f"{key} {ordinal}")


def _end(plan: Plan, ordinal: int, phase: int) -> Iterator[_Work]:
    """The work at one end of the outer graph, if any."""
    ends = _ends(plan)
    if not ends[ordinal]:
        return
    planned = plan.outer
    carries = ordinal == (1 if ends[1] else 0)  # the outer parameters' traffic hides behind the head
    reshards = [reshard for cluster in ends[ordinal] for reshard in cluster.reshards]
    reshards += chain.from_iterable(plan.entering.values()) if ordinal == 0 else ()
    reshards += [reshard for segment in planned.segments for reshard in segment.leaving] if carries else []
    traffic, exposed = _traffic(plan, planned, phase) if carries else (0.0, 0.0)
    gradients = _gradients(plan, planned) if carries and phase else 0.0
    compute = sum(_seconds(cluster.price, phase) for cluster in ends[ordinal])
    name = ("embedding", "head and loss")[ordinal] if all(ends) else "model"
    yield _Work(name, 0.0, compute, sum(_seconds(r, phase) for r in reshards) + gradients, traffic, exposed, 0.0, 0.0)


def _block(plan: Plan, planned: PlannedRegion, modes: Sequence[Mode], phase: int) -> _Work:
    """The work of a block whose segments run these modes."""
    hardware, count = plan.machine.hardware, planned.region.count
    alone = [replace(segment, modes=((mode, 1),)) for segment, mode in zip(planned.segments, modes, strict=True)]
    again = sum(replay_seconds(plan, planned, segment) for segment in alone) if phase else 0.0
    traffic, exposed = _traffic(plan, planned, phase)
    sent, mine = offloaded_bytes(plan, planned), offloaded_bytes(plan, replace(planned, segments=tuple(alone)))
    late = max(0.0, host_seconds(hardware, sent) - _beside(plan, planned, phase)) * mine / sent if sent else 0.0
    return _Work(
        planned.region.key,
        again,
        sum(_seconds(cluster.price, phase) for cluster in planned.clusters),
        sum(_seconds(reshard, phase) for reshard in _reshards(planned)) + (_gradients(plan, planned) if phase else 0.0),
        traffic / count,
        exposed / count,
        late + copy_seconds(hardware, mine) / 2,
        host_seconds(hardware, mine),
    )


def _seconds(cost: object, phase: int) -> float:
    return getattr(cost, f"{PHASES[phase]}_s")


def _beside(plan: Plan, planned: PlannedRegion, phase: int) -> float:
    """Seconds of compute of all calls of a region in a phase."""
    time = region_time(plan, planned)
    return time["backward"] + time["recompute"] if phase else time["forward"]


def _traffic(plan: Plan, planned: PlannedRegion, phase: int) -> tuple[float, float]:
    """Seconds of the collectives of parameters and gradients of all calls of a region in a phase, and how many of them are exposed."""
    if not parameter_numel(plan, planned):
        return 0.0, 0.0
    seconds = planned.region.count * _seconds(group_of(plan, planned), phase)
    return seconds, exposed_seconds(plan.machine.hardware, seconds, _beside(plan, planned, phase))


def _reshards(planned: PlannedRegion) -> list[Reshard]:
    return [r for segment in planned.segments for r in (*segment.leaving, *(r for c in segment.clusters for r in c.reshards))]


def _gradients(plan: Plan, planned: PlannedRegion) -> float:
    """Seconds of the all-reduces of gradients over `split` axes in one call: what `region_time` counts beside the reshards."""
    reshards = sum(reshard.forward_s + reshard.backward_s for reshard in _reshards(planned))
    return max(0.0, region_time(plan, planned)["reshard"] / planned.region.count - reshards)


def _ends(plan: Plan) -> tuple[list[PlannedCluster], list[PlannedCluster]]:
    """Clusters of the outer graph that run before the blocks, and those that need a block's result."""
    late: set[str] = set()
    for node in plan.outer.region.graph.nodes:
        if node.is_block or any(name in late for name in node.inputs):
            late.update(node.outputs)
    ends: tuple[list[PlannedCluster], list[PlannedCluster]] = ([], [])
    for cluster in plan.outer.clusters:
        ends[any(name in late for name in cluster.cluster.outputs)].append(cluster)
    return ends

"""What the ranks reach together: latency and bandwidth of each collective, on each level of links.

Role in the pipeline: `python -m seqloom profile`, started by torchrun, times collectives of several message sizes and fits the model of
`seqloom.cost.communication` to them: a link's latency per step and bandwidth, and the share of it that each kind of collective reaches.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from seqloom.cost.communication import wire_bytes
from seqloom.cost.hardware import CollectiveKind, Link
from seqloom.cost.measure_clock import Clock

KINDS: tuple[CollectiveKind, ...] = get_args(CollectiveKind)
MESSAGES: Mapping[str, tuple[int, ...]] = {
    "cpu": tuple(2**power for power in (14, 18, 20, 22, 23, 24, 25)),
    "cuda": tuple(2**power for power in (14, 18, 20, 22, 24, 26, 28, 29)),
}
"""Message sizes in bytes, of the whole tensor."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one collective of `nbytes` (as `seqloom.cost.communication` counts them) over `ranks` ranks."""

    kind: CollectiveKind
    nbytes: int
    ranks: int
    seconds: float

    @property
    def steps(self) -> int:
        """How often the latency of a link is paid."""
        return (self.ranks - 1).bit_length() * (2 if self.kind == "all_reduce" else 1)

    @property
    def wire(self) -> int:
        """Bytes that one rank sends."""
        return wire_bytes(self.kind, self.nbytes, self.ranks)


@dataclass(frozen=True)
class Fit:
    """Latency of a step in seconds, bytes per second of each kind, and the median relative error of the model over the timings."""

    latency_s: float
    bandwidth: Mapping[CollectiveKind, float]
    error: float

    def link(self, name: str, ranks_per_group: int) -> Link:
        """The link whose bandwidth the fastest kind reaches."""
        return Link(name, ranks_per_group, self.latency_s, max(self.bandwidth.values()))

    def shares(self) -> dict[CollectiveKind, float]:
        """Kind -> fraction of the link's bandwidth."""
        fastest = max(self.bandwidth.values())
        return {kind: value / fastest for kind, value in self.bandwidth.items()}


def collective_timings(clock: Clock, group: ProcessGroup, sizes: Sequence[int]) -> list[Timing]:
    """Every kind at every message size over the ranks of `group`. All ranks of the job call this together, each with its group."""
    ranks = dist.get_world_size(group)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the names of collectives: these are the ones that every supported PyTorch has
        for nbytes in sizes:
            nbytes -= nbytes % (4 * ranks)
            calls = _collectives(clock, group, nbytes)
            found += [Timing(kind, nbytes, ranks, clock.seconds(call)) for kind, call in calls.items()]
    return found


def _collectives(clock: Clock, group: ProcessGroup, nbytes: int) -> dict[CollectiveKind, Callable[[], object]]:
    whole = torch.randn(nbytes // 4, device=clock.device)
    part = torch.randn(nbytes // 4 // dist.get_world_size(group), device=clock.device)
    out, gathered, shard = (torch.empty_like(x) for x in (whole, whole, part))
    mean = whole.clone()

    def all_reduce() -> None:
        dist.all_reduce(mean, op=dist.ReduceOp.MAX, group=group)  # the same traffic as a sum, and repeating it does not overflow

    return {
        "all_gather": lambda: dist.all_gather_into_tensor(gathered, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard, whole, group=group),
        "all_reduce": all_reduce,
        "all_to_all": lambda: dist.all_to_all_single(out, whole, group=group),
    }


def best(rounds: Sequence[Sequence[Timing]]) -> list[Timing]:
    """The shortest of several timings of the same collectives."""
    return [min(same, key=lambda timing: timing.seconds) for same in zip(*rounds, strict=True)]


def fit(timings: Sequence[Timing]) -> Fit:
    """The alpha-beta model with one latency for all kinds, least squares of the relative errors.

    Each kind is fitted by itself; the latency is the geometric mean of the kinds', and the bandwidths are fitted again under it.
    """
    kinds = {kind: [t for t in timings if t.kind == kind] for kind in KINDS}
    latency = statistics.geometric_mean(_two_terms(group) for group in kinds.values())
    bandwidth = {kind: 1.0 / _inverse_bandwidth(group, latency) for kind, group in kinds.items()}
    errors = [abs(t.steps * latency + t.wire / bandwidth[t.kind] - t.seconds) / t.seconds for t in timings]
    return Fit(latency, bandwidth, statistics.median(errors))


def _two_terms(timings: Sequence[Timing]) -> float:
    """Latency of the fit `seconds = steps * latency + wire / bandwidth`, at least a hundredth of the shortest time."""
    a = torch.tensor([[t.steps / t.seconds, t.wire / t.seconds] for t in timings], dtype=torch.float64)
    scale = a.norm(dim=0)
    solution = torch.linalg.lstsq(a / scale, torch.ones(len(timings), 1, dtype=torch.float64)).solution[:, 0] / scale
    return max(float(solution[0]), 0.01 * min(t.seconds / t.steps for t in timings))


def _inverse_bandwidth(timings: Sequence[Timing], latency: float) -> float:
    """Seconds a byte, given the latency; at least a hundredth of what the largest message alone says."""
    shares = [(t.wire / t.seconds, 1.0 - t.steps * latency / t.seconds) for t in timings]
    least = 0.01 * min(t.seconds / t.wire for t in timings)
    return max(sum(x * y for x, y in shares) / sum(x * x for x, _ in shares), least)

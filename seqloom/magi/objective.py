"""The one objective of dispatch: the predicted step, the largest over ranks of max(compute time, communication time).

Role in the pipeline: `AttentionCost` holds what a cell and a row cost on the described hardware; dispatch compares assignments by
`step_seconds`, exchange cuts its stages so that their predicted times are even.

Counted is one training step of one layer, forward and backward: 4 FLOPs per cell, query head and head dimension forward, 10 backward,
at the achieved rate of the hardware's first attention kernel; and three passes of every row that travels, each of K and V: there in
forward, there again in backward, and the gradients back. The exchange runs beside compute, so the larger of the two counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from seqloom.cost.hardware import Hardware, load_hardware
from seqloom.errors import UserError

DEFAULT_HARDWARE = "h100-80gb"
DTYPES = {2: "bfloat16", 4: "float32", 8: "float64"}  # by bytes of an element
FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # per cell, query head and element of the head dimension
TOLERANCE = 0.01  # predictions that differ by less are one and the same: rates are not known better
PASSES = 3  # of a row's K and V over the wire: forward, again in backward, gradients back


@dataclass(frozen=True)
class Level:
    """One link level: groups of `ranks_per_group` neighbours, seconds per row that crosses it, latency in seconds of a step's passes."""

    ranks_per_group: int
    row_s: float
    latency_s: float


@dataclass(frozen=True)
class AttentionCost:
    """Seconds of attention on one rank: per mask cell (`cell_s`), per launched stage (`launch_s`), and per row on each link level."""

    cell_s: float
    launch_s: float
    levels: tuple[Level, ...]

    def compute_seconds(self, areas: np.ndarray) -> np.ndarray:
        """Seconds of `areas` cells."""
        return self.cell_s * areas

    def exchange_seconds(self, rows: np.ndarray) -> np.ndarray:
        """Seconds per rank, `[ranks]`, of moving `rows[r, p]` rows from rank p to r for all pairs at once.

        Every rank sends and receives at the same time; of both, and of all link levels, the slowest decides.
        """
        seconds = np.zeros(len(rows))
        for level, busiest in self._busiest(rows):
            seconds = np.maximum(seconds, busiest * level.row_s)
        return seconds + self.latency_seconds(rows)

    def latency_seconds(self, rows: np.ndarray) -> np.ndarray:
        """Seconds per rank, `[ranks]`, that an exchange of `rows` costs however few the rows: those of every level it uses."""
        return sum((np.where(busiest > 0, level.latency_s, 0.0) for level, busiest in self._busiest(rows)), np.zeros(len(rows)))

    def cells_per_row(self, num_ranks: int) -> int:
        """How many cells a rank computes while it receives a row over the outermost level that `num_ranks` ranks use; at least 1.

        In these units compute and communication compare in whole numbers, which no rank rounds differently.
        """
        row_s = next(level.row_s for level in self.levels if level.ranks_per_group >= num_ranks)
        return max(1, round(row_s / self.cell_s))

    def _busiest(self, rows: np.ndarray) -> Iterator[tuple[Level, np.ndarray]]:
        """Per link level the rows of each rank that cross it and no outer one, sent or received, whichever are more."""
        ranks, inner = np.arange(len(rows)), np.eye(len(rows), dtype=bool)
        for level in self.levels:
            group = ranks // level.ranks_per_group
            reached = group[:, None] == group
            crossing = np.where(reached & ~inner, rows, 0)
            yield level, np.maximum(crossing.sum(axis=1), crossing.sum(axis=0))
            inner = reached

    def step_seconds(self, areas: np.ndarray, rows: np.ndarray) -> float:
        """The objective: seconds of the slowest rank, `areas` cells per rank `[ranks]` and rows moved `[to, from]`."""
        return float(np.maximum(self.compute_seconds(areas), self.exchange_seconds(rows)).max())


def attention_cost(
    hardware: Hardware | str | None, num_ranks: int, num_heads_q: int, num_heads_kv: int, head_dim: int, dtype_bytes: int
) -> AttentionCost:
    """The cost model of attention with these shapes on `hardware` (a description, its name, or None for `DEFAULT_HARDWARE`).

    Raises `UserError` where the hardware joins fewer ranks, has no peak for the dtype, or the shapes are impossible.
    """
    hardware = hardware if isinstance(hardware, Hardware) else load_hardware(hardware or DEFAULT_HARDWARE)
    dtype = DTYPES.get(dtype_bytes)
    if dtype not in hardware.peak_flops:
        raise UserError(f"hardware `{hardware.name}` gives no peak for elements of {dtype_bytes} bytes: use 2 (bfloat16), 4 or 8")
    if min(num_heads_kv, head_dim) < 1 or num_heads_q % num_heads_kv:
        raise UserError(f"{num_heads_q} query heads do not divide over {num_heads_kv} key/value heads: make the first a multiple")
    if hardware.links[-1].ranks_per_group < num_ranks:
        raise UserError(f"hardware `{hardware.name}` joins {hardware.links[-1].ranks_per_group} ranks, not {num_ranks}: use fewer ranks")
    kernel = next(iter(hardware.rates.by_dtype.get(dtype, hardware.rates).attention.values()))
    per_flop = FORWARD_FLOPS / kernel.forward + BACKWARD_FLOPS / kernel.backward
    achieved, row_bytes = hardware.rates.collectives["all_to_all"], 2 * num_heads_kv * head_dim * dtype_bytes
    levels = tuple(
        Level(link.ranks_per_group, PASSES * row_bytes / (link.bandwidth_bytes_per_s * achieved), PASSES * link.latency_s)
        for link in hardware.links
    )
    cell_s = num_heads_q * head_dim * per_flop / hardware.peak_flops[dtype]
    return AttentionCost(cell_s, 2 * hardware.launch_overhead_s, levels)

"""Context-parallel attention over any mask: one autograd function.

Role: each rank holds some rows of the sequence (`seqloom.magi.dispatch`); queries stay, and exactly the key/value rows that they attend
travel (`seqloom.magi.exchange`). In: local query, key and value, the rank's `Runtime`. Out: local output and log-sum-exp.

Forward: the first stage's rows are sent for, the host's own keys are computed, then stage after stage while the next one travels; results
merge by log-sum-exp. Backward: rows travel again instead of being kept, and the gradients of each stage's keys and values go back while the
next stage is computed. The final log-sum-exp makes the parts of all gradients add up (Liu et al., Ring Attention, arXiv:2310.01889; Dao,
FlashAttention-2, arXiv:2307.08691). With `merged` there is one stage and one kernel call over host and received keys together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqloom.magi.bands import Band
from seqloom.magi.groupcast import Flight, Group, Way, add_rows_, group_cast, group_reduce
from seqloom.magi.kernels import Final, Kernel, determinism, merge_
from seqloom.ops.precision import sum_dtype


@dataclass(frozen=True)
class Stage:
    """One exchange and the bands of local rows x received columns."""

    way: Way
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Runtime:
    """What one rank needs to attend: host bands (local rows x local columns), stages, the kernel; no group where nobody else is.

    `deterministic`: all sums in one order, so that equal tensors give equal bits.
    """

    rows: int
    host: tuple[Band, ...]
    stages: tuple[Stage, ...]
    kernel: Kernel
    group: Group | None
    merged: bool = False
    deterministic: bool = False

    def together(self) -> tuple[Band, ...]:
        """The bands of host and received keys in one buffer, the host's first."""
        return (*self.host, *(band.shifted(0, self.rows) for stage in self.stages for band in stage.bands))


def attend(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, runtime: Runtime, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output `[rows, heads_q, dim]` in the query's dtype and log-sum-exp `[rows, heads_q]` in the precision of sums.

    `sink` `[sinks, heads_q]` adds to the denominator of every row. Its gradient is this rank's part: that of its rows. The log-sum-exp
    carries no gradient.
    """
    return _Attend.apply(query, key, value, sink, runtime, scale, softcap)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        runtime, scale, softcap = options
        output, lse = forward(query, key, value, *options)
        if sink is not None:
            total = torch.logaddexp(lse, sink.to(lse.dtype).logsumexp(0))
            output.mul_((lse - total).exp().unsqueeze(-1))
            lse = total
        output = output.to(query.dtype)
        ctx.options = options
        ctx.save_for_backward(query, key, value, output, lse, *(() if sink is None else (sink,)))
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, *sinks = ctx.saved_tensors
        grad = torch.zeros_like(output) if grad is None else grad  # the others wait for this rank's part of the exchange
        delta = (grad.to(lse.dtype) * output.to(lse.dtype)).sum(-1)
        gradients = backward(grad.contiguous(), query, key, value, output, lse, delta, *ctx.options)
        d_sink = None
        if sinks:
            weights = (sinks[0].to(lse.dtype)[:, None] - lse[None]).exp()  # [sinks, rows, heads]
            d_sink = -(weights * delta[None]).sum(1).to(sinks[0].dtype)
        return *(found.to(x.dtype) for found, x in zip(gradients, (query, key, value), strict=True)), d_sink, None, None, None


def forward(query: Tensor, key: Tensor, value: Tensor, runtime: Runtime, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, both in the precision of sums, without sink; autograd knows nothing of it."""
    with determinism(runtime.deterministic):
        return _forward(query, key, value, runtime, scale, softcap)


def _forward(query: Tensor, key: Tensor, value: Tensor, runtime: Runtime, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    run = runtime.kernel.forward
    pairs = torch.stack((key, value), 1)
    flights = _Ahead(pairs, runtime)
    if runtime.merged:
        keys, values = torch.cat([pairs, *flights.all()]).unbind(1)
        return run(query, keys, values, runtime.together(), scale, softcap)
    output, lse = run(query, key, value, runtime.host, scale, softcap)
    for index, stage in enumerate(runtime.stages):
        received = flights.next(index)
        if stage.bands:
            merge_(output, lse, *run(query, received[:, 0], received[:, 1], stage.bands, scale, softcap))
    return output, lse


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    runtime: Runtime,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value in the precision of sums; `delta` `[rows, heads]` are the row sums of gradient times output."""

    def run(keys: Tensor, values: Tensor, bands: Sequence[Band]) -> tuple[Tensor, Tensor, Tensor]:
        return runtime.kernel.backward(Final(grad, query, keys, values, output, lse, delta), bands, scale, softcap)

    with determinism(runtime.deterministic):
        return _backward(query, key, value, runtime, run)


def _backward(
    query: Tensor, key: Tensor, value: Tensor, runtime: Runtime, run: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    pairs = torch.stack((key, value), 1)
    flights = _Ahead(pairs, runtime)
    if runtime.merged:
        received = flights.all()
        d_query, d_keys, d_values = run(*torch.cat([pairs, *received]).unbind(1), runtime.together())
        d_pairs = torch.stack((d_keys, d_values), 1)
        d_own, *d_received = d_pairs.split([runtime.rows, *(len(part) for part in received)])
        d_own = d_own.clone()
        _return(d_own, [group_reduce(part, s.way, runtime.group) for part, s in zip(d_received, runtime.stages, strict=True)], runtime)
        return d_query, *d_own.unbind(1)
    d_query, *d_host = run(key, value, runtime.host)
    d_own = torch.stack(d_host, 1)
    returning = []
    for index, stage in enumerate(runtime.stages):
        received = flights.next(index)
        d_received = received.new_zeros(received.shape, dtype=sum_dtype(received.dtype))
        if stage.bands:
            d_stage, *d_remote = run(received[:, 0], received[:, 1], stage.bands)
            d_query += d_stage
            d_received = torch.stack(d_remote, 1)
        for flight in returning:
            flight.onward()
        returning.append(group_reduce(d_received, stage.way, runtime.group))
    _return(d_own, returning, runtime)
    return d_query, *d_own.unbind(1)


def _return(d_own: Tensor, returning: Sequence[Flight], runtime: Runtime) -> None:
    """Add what the other ranks found for this rank's keys and values, stage by stage."""
    for flight, stage in zip(returning, runtime.stages, strict=True):
        add_rows_(d_own, flight.wait(), stage.way)


class _Ahead:
    """The exchanges of all stages, each started while the one before is computed."""

    def __init__(self, pairs: Tensor, runtime: Runtime) -> None:
        self._pairs, self._runtime = pairs, runtime
        self._flight = self._start(0)

    def _start(self, index: int) -> Flight | None:
        stages = self._runtime.stages
        return group_cast(self._pairs, stages[index].way, self._runtime.group) if index < len(stages) else None

    def next(self, index: int) -> Tensor:
        """The rows of stage `index`, `[received, 2, heads_kv, dim]`; the next stage sets out."""
        received = self._flight.wait()
        self._flight = self._start(index + 1)
        return received

    def all(self) -> list[Tensor]:
        """The rows of all stages."""
        return [self.next(index) for index in range(len(self._runtime.stages))]

"""Seconds and bytes of collectives: the textbook formulas on one level, the bottleneck over several, and sense properties."""

import dataclasses
import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqloom.cost.communication import AxisSpan, collective_seconds, ranks_per_level, wire_bytes
from seqloom.cost.hardware import CollectiveKind, Hardware, Link, hardware_names, load_hardware
from seqloom.errors import UserError

KINDS = get_args(CollectiveKind)
H100 = load_hardware("h100-80gb")
NVLINK, NETWORK = H100.links
MACHINES = [load_hardware(name) for name in hardware_names()]
machines = st.sampled_from(MACHINES)
kinds = st.sampled_from(KINDS)
spans = st.builds(AxisSpan, st.integers(1, 8), st.integers(1, 8))
messages = st.integers(0, 2**40)


def with_links(hardware: Hardware, bandwidth: float = 1.0, latency: float = 1.0) -> Hardware:
    """The machine with every link's bandwidth and latency multiplied."""
    links = tuple(
        dataclasses.replace(link, bandwidth_bytes_per_s=bandwidth * link.bandwidth_bytes_per_s, latency_s=latency * link.latency_s)
        for link in hardware.links
    )
    return dataclasses.replace(hardware, links=links)


def ring_bytes(kind: str, nbytes: int, size: int) -> int:
    """Bytes one rank sends, counted step by step of the ring (gathers, reductions) or pair by pair (all-to-all)."""
    chunk = nbytes // size
    steps = sum(chunk for _ in range(size - 1))
    return 2 * steps if kind == "all_reduce" else steps


@given(kinds, st.integers(1, 64), st.integers(0, 2**30))
def test_wire_bytes_equal_the_ring(kind, size, chunk):
    assert wire_bytes(kind, chunk * size, size) == ring_bytes(kind, chunk * size, size)


@given(kinds, st.integers(1, 1000), messages, st.integers(0, 2**30))
def test_wire_bytes_are_monotone_and_bounded(kind, size, nbytes, more):
    assert wire_bytes(kind, nbytes + more, size) >= wire_bytes(kind, nbytes, size) >= 0
    assert wire_bytes(kind, nbytes, size) <= (2 if kind == "all_reduce" else 1) * nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_sends_nothing(kind):
    assert wire_bytes(kind, 10**9, 1) == 0
    assert collective_seconds(H100, kind, 10**9, AxisSpan(1, 1)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_node(kind):
    nbytes, passes = 8 * 2**28, 2 if kind == "all_reduce" else 1
    expected = passes * 3 * NVLINK.latency_s + wire_bytes(kind, nbytes, 8) / NVLINK.bandwidth_bytes_per_s
    assert collective_seconds(H100, kind, nbytes, AxisSpan(8, 1)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_per_node_has_the_network_for_all_bytes(kind):
    nbytes, passes = 4 * 2**28, 2 if kind == "all_reduce" else 1
    expected = passes * 2 * NETWORK.latency_s + wire_bytes(kind, nbytes, 4) / NETWORK.bandwidth_bytes_per_s
    assert collective_seconds(H100, kind, nbytes, AxisSpan(4, 8)) == pytest.approx(expected)


def test_gather_over_two_nodes_uses_the_ports_of_all_its_ranks():
    """16 ranks: half of the tensor enters each node through 8 ports, 15/16 of it passes every NVLink; NVLink is the slower here."""
    nbytes = 16 * 2**26
    through_network = nbytes / 2 / 8 / NETWORK.bandwidth_bytes_per_s
    through_nvlink = nbytes * 15 / 16 / NVLINK.bandwidth_bytes_per_s
    assert through_nvlink > through_network
    latency = 3 * NVLINK.latency_s + NETWORK.latency_s
    assert collective_seconds(H100, "all_gather", nbytes, AxisSpan(16, 1)) == pytest.approx(latency + through_nvlink)


def test_all_to_all_over_two_nodes_is_bound_by_the_network():
    nbytes = 16 * 2**26
    latency = 3 * NVLINK.latency_s + NETWORK.latency_s
    expected = latency + nbytes / 2 / NETWORK.bandwidth_bytes_per_s
    assert collective_seconds(H100, "all_to_all", nbytes, AxisSpan(16, 1)) == pytest.approx(expected)


def test_rates_of_each_kind_are_used():
    rates = dataclasses.replace(H100.rates, collectives={kind: 0.5 if kind == "all_gather" else 1.0 for kind in KINDS})
    slow = with_links(dataclasses.replace(H100, rates=rates), latency=0.0)
    fast = with_links(H100, latency=0.0)
    for kind in KINDS:
        factor = 2 if kind == "all_gather" else 1
        base = collective_seconds(fast, kind, 2**30, AxisSpan(8))
        assert collective_seconds(slow, kind, 2**30, AxisSpan(8)) == pytest.approx(factor * base)


@pytest.mark.parametrize(
    ("size", "stride", "counts"),
    [(8, 1, [8, 8]), (2, 4, [2, 2]), (4, 4, [2, 4]), (2, 8, [1, 2]), (16, 1, [8, 16]), (12, 1, [6, 12]), (6, 1, [6, 6]), (3, 16, [1, 3])],
)
def test_ranks_per_level(size, stride, counts):
    assert [ranks for _, ranks in ranks_per_level(H100, AxisSpan(size, stride))] == counts


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_ranks_per_level_counts_the_ranks_of_a_node(log_node, log_size, log_stride):
    """Against the ranks written out, for powers of two."""
    node, size, stride = 2**log_node, 2**log_size, 2**log_stride
    links = (Link("inner", node, 1e-6, 1e9), Link("outer", 2**20, 1e-5, 1e8))
    hardware = dataclasses.replace(H100, links=links)
    ranks = [index * stride for index in range(size)]
    first_node = sum(rank < node for rank in ranks)
    assert [count for _, count in ranks_per_level(hardware, AxisSpan(size, stride))] == [first_node, size]


def test_three_levels():
    links = (Link("a", 2, 1e-6, 1e9), Link("b", 8, 1e-5, 1e8), Link("c", 64, 1e-4, 1e7))
    hardware = dataclasses.replace(H100, links=links)
    assert [ranks for _, ranks in ranks_per_level(hardware, AxisSpan(16, 2))] == [1, 4, 16]
    nbytes = 16 * 10**6
    expected = 2 * 1e-5 + 2 * 1e-4 + nbytes * 12 / 16 / 1e7
    assert collective_seconds(hardware, "all_to_all", nbytes, AxisSpan(16, 2)) == pytest.approx(expected)
    gathered = 2 * 1e-5 + 2 * 1e-4 + max(nbytes * 15 / 16 / 1e8, nbytes * 12 / 16 / 4 / 1e7)
    assert collective_seconds(hardware, "all_gather", nbytes, AxisSpan(16, 2)) == pytest.approx(gathered)


def test_the_machine_has_an_end():
    with pytest.raises(UserError, match="hardware `cpu` joins at most 64 ranks .link `loopback`., and the plan needs 128"):
        collective_seconds(load_hardware("cpu"), "all_gather", 10, AxisSpan(16, 8))


@given(machines, kinds, spans, messages, messages)
def test_monotone_in_bytes(hardware, kind, span, nbytes, more):
    assert collective_seconds(hardware, kind, nbytes + more, span) >= collective_seconds(hardware, kind, nbytes, span)


@given(machines, kinds, spans, messages, st.floats(1, 100))
def test_faster_links_are_never_slower(hardware, kind, span, nbytes, factor):
    base = collective_seconds(hardware, kind, nbytes, span)
    assert collective_seconds(with_links(hardware, bandwidth=factor), kind, nbytes, span) <= base
    assert collective_seconds(with_links(hardware, latency=factor), kind, nbytes, span) >= base


@given(machines, spans, messages)
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(hardware, span, nbytes):
    equal = dataclasses.replace(hardware, rates=dataclasses.replace(hardware.rates, collectives=dict.fromkeys(KINDS, 1.0)))
    parts = sum(collective_seconds(equal, kind, nbytes, span) for kind in ("reduce_scatter", "all_gather"))
    assert collective_seconds(equal, "all_reduce", nbytes, span) == pytest.approx(parts)


@given(kinds, st.integers(1, 8), st.integers(1, 2**35))
def test_never_faster_than_the_wire(kind, size, nbytes):
    """No collective inside a node beats its bytes at the link's rate."""
    seconds = collective_seconds(H100, kind, nbytes, AxisSpan(size))
    assert seconds >= wire_bytes(kind, nbytes, size) / NVLINK.bandwidth_bytes_per_s * (1 - 1e-12)


@given(kinds, st.sampled_from([2, 4, 8]), st.integers(2**20, 2**35))
def test_the_network_is_never_faster_than_nvlink(kind, size, nbytes):
    assert collective_seconds(H100, kind, nbytes, AxisSpan(size, 8)) > collective_seconds(H100, kind, nbytes, AxisSpan(size, 1))


def test_known_communication_of_llama3_8b_at_128k():
    """Per step on 8 GPUs: all-to-all attention moves about 75 ms, ZeRO-3 about 115 ms, tensor parallel about 750 ms."""
    tokens, hidden, kv = 131072, 4096, 1024
    local = 2 * tokens // 8
    ulysses = sum(collective_seconds(H100, "all_to_all", local * width, AxisSpan(8)) for width in (hidden, kv, kv, hidden))
    assert 2 * 32 * ulysses == pytest.approx(0.06, abs=0.02)
    weights = 2 * 8.03e9 / 32
    gathers = 2 * collective_seconds(H100, "all_gather", weights, AxisSpan(8))
    reduction = collective_seconds(H100, "reduce_scatter", weights, AxisSpan(8))
    assert 32 * (gathers + reduction) == pytest.approx(0.115, abs=0.03)
    hidden_states = 2 * tokens * hidden
    tensor_parallel = 32 * 4 * 2 * collective_seconds(H100, "all_gather", hidden_states, AxisSpan(8))
    assert tensor_parallel == pytest.approx(0.75, abs=0.1)


def test_impossible_spans_and_kinds_are_errors_of_the_caller():
    with pytest.raises(ValueError, match="at least one rank"):
        AxisSpan(0, 1)
    with pytest.raises(ValueError, match="at least one rank"):
        AxisSpan(2, 0)
    with pytest.raises(ValueError, match="unknown collective 'broadcast'"):
        collective_seconds(H100, "broadcast", 10, AxisSpan(2))


def test_free_of_bytes_is_free():
    for kind in KINDS:
        assert collective_seconds(H100, kind, 0, AxisSpan(8)) == 0
        assert math.isfinite(collective_seconds(H100, kind, 1, AxisSpan(8)))

"""The timeline of a micro-batch: it takes as long as `evaluate` says, lanes do one thing at a time, moments are those of `liveness`."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from plan_samples import real, slow_toy, tiny, with_usable_bytes

from seqloom.cost.hardware import GIB, load_hardware
from seqloom.plan.evaluate import evaluate
from seqloom.plan.liveness import offloaded_bytes
from seqloom.plan.plan import Plan, realize
from seqloom.plan.price import Machine
from seqloom.plan.request import Request
from seqloom.plan.solver import solve
from seqloom.plan.timeline import Event, Timeline, timeline

H100 = load_hardware("h100-80gb")
TOY = dataclasses.replace(slow_toy(), host_memory_bytes=GIB)
CASES = [  # family, force, ranks, ZeRO, micro-batches, share of the memory that the fastest plan needs
    ("llama", "sp2", 2, 3, 1, 4.0),
    ("llama", "tp2", 2, 3, 4, 4.0),
    ("gpt2", "dp2", 2, 0, 2, 4.0),
    ("qwen3", "sp2,tp2", 4, 2, 3, 4.0),
    ("gemma2", None, 2, 1, 1, 4.0),
    ("llama", None, 2, None, 2, 0.8),
    ("llama", None, 2, None, 2, 0.6),
    ("gpt2", None, 2, 3, 2, 0.5),
    ("llama", None, 1, None, 2, 4.0),
]


def planned(family: str, force: str | None, ranks: int, zero: int | None, accumulation: int, share: float, overlap: float = 1.0) -> Plan:
    return _planned(family, force, ranks, zero, accumulation, share, overlap)


@functools.cache
def _planned(family: str, force: str | None, ranks: int, zero: int | None, accumulation: int, share: float, overlap: float) -> Plan:
    regions, hardware = tiny(family, 3, 2, 256), dataclasses.replace(TOY, rates=dataclasses.replace(TOY.rates, overlap=overlap))
    if share < 1:
        hardware = with_usable_bytes(hardware, share * evaluate(planned(family, force, ranks, zero, accumulation, 4.0)).peak_bytes)
    decisions, _ = solve(regions, Request(ranks, 1, accumulation, hardware, 2, force=force, zero=zero))
    return realize(regions, decisions, Machine(hardware, decisions.axes, 1))


def lane(found: Timeline, name: str) -> list[Event]:
    return [event for event in found.events if event.lane == name]


def total(events: list[Event], *words: str) -> float:
    return sum(event.end_s - event.start_s for event in events if event.label.startswith(words or ("",)))


@pytest.mark.parametrize("overlap", [1.0, 0.4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_takes_as_long_as_a_micro_batch(case, overlap):
    plan = planned(*case, overlap)
    found, evaluation = timeline(plan), evaluate(plan)
    assert found.end_s == pytest.approx(evaluation.step_s / plan.storage.accumulation, rel=1e-9)
    assert max(event.end_s for event in lane(found, "compute")) == found.end_s


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_lanes_hold_the_parts_of_the_step(case):
    plan = planned(*case)
    found, parts = timeline(plan), {k: v / plan.storage.accumulation for k, v in evaluate(plan).time.items()}
    compute = lane(found, "compute")
    for phase, part in (("forward", "forward"), ("backward", "backward"), ("recompute", "recompute"), ("optimizer", "optimizer")):
        assert total(compute, phase) == pytest.approx(parts[part], rel=1e-9, abs=1e-12)
    assert total(lane(found, "communication"), "reshards") == pytest.approx(parts["reshard"], rel=1e-9, abs=1e-12)
    sent = sum(offloaded_bytes(plan, region) for region in plan.regions.values())
    host = plan.machine.hardware.host_link_bandwidth
    assert total(lane(found, "host"), "to host") == pytest.approx(sent / host) == pytest.approx(total(lane(found, "host"), "from host"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compute_and_host_do_one_thing_at_a_time(case):
    found = timeline(planned(*case))
    for name in ("compute", "host"):
        bars = lane(found, name)
        assert all(bar.start_s >= 0 and bar.end_s > bar.start_s for bar in bars)
        assert all(after.start_s >= before.end_s - 1e-9 * found.end_s for before, after in zip(bars, bars[1:], strict=False))


def test_layers_run_forward_and_then_backward():
    labels = [event.label for event in lane(timeline(planned(*CASES[0])), "compute")]
    layers = [f"LlamaDecoderLayer {layer}" for layer in range(3)]
    forward = ["embedding", *layers, "head and loss"]
    assert labels == [*(f"forward {name}" for name in forward), *(f"backward {name}" for name in reversed(forward)), "optimizer"]


def test_what_is_replayed_stands_before_its_backward():
    labels = [event.label for event in lane(timeline(planned("llama", None, 2, None, 2, 0.6)), "compute")]
    replays = [label for label in labels if label.startswith("recompute")]
    assert replays
    assert all(labels[labels.index(label) + 1] == label.replace("recompute", "backward") for label in replays)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_are_those_of_the_points_of_memory(case):
    plan = planned(*case)
    found = timeline(plan)
    points = [point.at for point in evaluate(plan).points]
    assert set(points) <= set(found.moments)
    times = [found.moments[at] for at in points]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= found.end_s


def test_traffic_is_named_for_what_it_is():
    words = {}
    for zero in (0, 1, 2, 3):
        events = lane(timeline(planned("llama", "sp2", 2, zero, 2, 4.0)), "communication")
        words[zero] = {event.label.split(" beside ")[0] for event in events if " beside " in event.label}
    assert words == {
        0: {"all-reduce"},
        1: {"all-gather", "reduce-scatter"},
        2: {"all-gather", "reduce-scatter"},
        3: {"all-gather", "all-gather and reduce-scatter"},
    }


def test_at_full_size_parameters_hide_behind_compute():
    regions = real("llama3_1b", 32768)
    decisions, _ = solve(regions, Request(4, 1, 1, H100, 2, force="sp4", zero=3))
    plan = realize(regions, decisions, Machine(H100, decisions.axes, 1))
    found = timeline(plan)
    assert found.end_s == pytest.approx(evaluate(plan).step_s, rel=1e-9)
    busy = total(lane(found, "compute"))
    assert busy > 0.8 * found.end_s
    assert len(found.events) < 8 * 16 * 2

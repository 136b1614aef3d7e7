"""Bytes that are alive, on fake and on real tensors: births, resizes, deaths, and what each was for."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from seqloom.runtime import offload as _  # noqa: F401  (defines the operator that offloads)
from seqloom.runtime.live_bytes import PARTS, LiveBytes

EVENTS = st.lists(st.tuples(st.sampled_from(["born", "view", "resize", "dead"]), st.integers(0, 5), st.integers(1, 50)), max_size=30)


@pytest.mark.parametrize("fake", [True, False])
def test_tensors_and_resizes(fake):
    live = LiveBytes()
    with FakeTensorMode() if fake else nullcontext(), live, live.resizes():
        a = torch.empty(1000, dtype=torch.float32)
        b = a.view(10, 100)
        assert live.alive == 4000
        a.untyped_storage().resize_(0)
        assert live.alive == 0 and live.peak == 4000
        a.untyped_storage().resize_(8000)
        assert live.alive == 8000
        del a, b
        assert live.alive == 0 and live.peak == 8000
    assert live.parts()["gathered"] == 8000


@settings(max_examples=50, deadline=None)
@given(EVENTS)
def test_against_a_ledger(events):
    """Any sequence of births, views, resizes and deaths; every storage counts once, and the parts add up to the peak."""
    live, ledger, peak = LiveBytes(), {}, 0
    tensors: dict[int, list[torch.Tensor]] = {}
    with FakeTensorMode(), live, live.resizes():
        for what, name, size in events:
            if what == "born":
                tensors[name] = [torch.empty(size)]
                # The old tensor of the name dies after the new one is there.
                peak = max(peak, sum(ledger.values()) + 4 * size)
                ledger[name] = 4 * size
            elif what == "view" and name in tensors and ledger[name]:
                tensors[name].append(tensors[name][0][:1])
            elif what == "resize" and name in tensors:
                tensors[name][0].untyped_storage().resize_(4 * size)
                ledger[name] = 4 * size
            elif what == "dead":
                tensors.pop(name, None)
                ledger.pop(name, None)
            peak = max(peak, sum(ledger.values()))
            assert live.alive == sum(ledger.values())
    assert live.peak == peak
    assert sum(live.parts().values()) == peak


def test_what_a_phase_leaves_behind():
    live = LiveBytes()
    with FakeTensorMode(), live:
        weight = torch.empty(10)
        live.hold([weight], "states")
        live.enter("forward")
        kept = weight + 1
        temporary = kept + 1
        del temporary
        live.enter("backward")
        gradient = kept * 2
        recomputed = kept + gradient
        live.hold([gradient], "gradients")
        assert live.alive == 160
        del kept, recomputed
        live.enter("optimizer")
        moment = torch.zeros_like(weight)
        live.enter("between")
        big = torch.empty(100)
    assert live.peak == live.alive == 40 * 3 + 400
    assert live.parts() == {"states": 80, "gathered": 0, "gradients": 40, "activations": 0, "working": 400}
    del moment, gradient, big


def test_the_peak_is_taken_apart_where_it_was():
    live = LiveBytes()
    with FakeTensorMode(), live:
        live.enter("forward")
        kept = torch.empty(1000)
        live.enter("backward")
        working = torch.empty(10)
        del kept, working
        later = torch.empty(900)
    assert live.parts() == {**dict.fromkeys(PARTS, 0), "activations": 4000, "working": 40}
    del later


def test_what_goes_to_the_host_is_counted_apart():
    live = LiveBytes()
    with FakeTensorMode(), live:
        live.enter("forward")
        kept = torch.empty(1000)
        away = torch.ops.seqloom.to_host(kept)
        del kept
        assert (live.alive, live.host_alive, live.host_peak) == (0, 4000, 4000)
        live.enter("backward")
        back = torch.empty_like(away).copy_(away)
        del away
        assert (live.alive, live.host_alive, live.host_peak) == (4000, 0, 4000)
    assert sum(live.parts().values()) == live.peak
    del back


def test_an_inplace_operator_makes_nothing():
    live = LiveBytes()
    x = torch.zeros(100)
    with live:
        live.hold([x], "states")
        x.add_(1).mul_(2)
        assert live.alive == live.peak == 400
    assert live.parts()["states"] == 400

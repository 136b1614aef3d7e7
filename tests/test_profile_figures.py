"""From measured figures to a hardware file: the fit of links, the matmul table, what a base gives, and that the file loads."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.cost import measure_links, profile
from seqloom.cost.communication import AxisSpan, collective_seconds, ranks_per_level
from seqloom.cost.compute import matmul_fraction
from seqloom.cost.hardware import GIB, Hardware, Link, load_hardware, parse_hardware, to_json
from seqloom.cost.measure_links import KINDS, Timing, fit
from seqloom.cost.profile import Level, Measured, describe, matmul_points
from seqloom.errors import UserError

H100, ANY = load_hardware("h100-80gb"), load_hardware("cpu")
LINK = Link("loopback", 64, 1e-4, 1.28e9)
SHARES = {"all_gather": 0.375, "reduce_scatter": 0.25, "all_reduce": 1.0, "all_to_all": 0.875}
CPU = dataclasses.replace(ANY, links=(LINK,), rates=dataclasses.replace(ANY.rates, collectives=SHARES))
SIZES = (16, 32, 64, 128, 256, 512, 1024)
MESSAGES = (2**12, 2**16, 2**20, 2**25)
rates_of_sizes = st.lists(st.floats(1e9, 1e11), min_size=len(SIZES), max_size=len(SIZES))


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """A job of one rank, as far as descriptions ask."""
    monkeypatch.setattr(profile.dist, "get_world_size", lambda: 1)


def measured(**changes) -> Measured:
    figures = Measured(
        matmul={"float32": {64: 5e10, 1024: 1e11}, "bfloat16": {64: 4e10, 1024: 5e10}},
        attention={"float32": {"flash": (4e10, 5e10)}, "bfloat16": {"flash": (1e10, 2e10)}},
        float64=6e10,
        bandwidth=1.2e10,
        pointwise=6e9,
        launch_s=3.14159e-6,
        host=5e9,
        memory_bytes=8 * GIB,
    )
    return dataclasses.replace(figures, **changes)


def timings_of(hardware: Hardware, ranks: int) -> list[Timing]:
    return [Timing(k, n, ranks, collective_seconds(hardware, k, n, AxisSpan(ranks))) for n in MESSAGES for k in KINDS]


def level(name: str, reach: int, ranks: int, hardware: Hardware = CPU) -> Level:
    timings = timings_of(hardware, ranks)
    return Level(name, reach, timings, fit(timings))


def described(levels=(), base=None, **changes) -> Hardware:
    return describe(torch.device("cpu"), "mine", measured(**changes), levels, base)


# --- links ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_fit_finds_the_link_that_made_the_timings(ranks):
    found = fit(timings_of(CPU, ranks))
    assert found.error < 1e-6
    assert found.latency_s == pytest.approx(CPU.links[0].latency_s)
    link = found.link("again", 64)
    assert link.bandwidth_bytes_per_s == pytest.approx(CPU.links[0].bandwidth_bytes_per_s)
    assert found.shares() == pytest.approx(CPU.rates.collectives)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1e-3), st.floats(1e8, 1e12), st.floats(0.7, 1.4))
def test_the_fit_predicts_noisy_timings(latency, bandwidth, noise):
    true = dataclasses.replace(CPU, links=(dataclasses.replace(CPU.links[0], latency_s=latency, bandwidth_bytes_per_s=bandwidth),))
    timings = [dataclasses.replace(t, seconds=t.seconds * (noise if i % 2 else 1.0)) for i, t in enumerate(timings_of(true, 2))]
    found = fit(timings)
    assert found.latency_s > 0 and all(value > 0 for value in found.bandwidth.values())
    assert max(found.shares().values()) == 1.0
    assert found.error < 0.5


def test_impossible_timings_still_give_a_link():
    """Large messages faster than small ones: nothing is negative."""
    found = fit([Timing(kind, nbytes, 2, 1.0 / nbytes) for nbytes in MESSAGES for kind in KINDS])
    assert found.latency_s > 0 and all(0 < value < float("inf") for value in found.bandwidth.values())


def test_the_shortest_of_several_rounds_counts():
    rounds = [[Timing("all_gather", 64, 2, s), Timing("all_reduce", 64, 2, 5 - s)] for s in (3.0, 1.0, 2.0)]
    assert [t.seconds for t in measure_links.best(rounds)] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("kind", "ranks", "steps", "wire"), [("all_gather", 4, 2, 96), ("all_reduce", 4, 4, 192), ("all_to_all", 2, 1, 64)]
)
def test_steps_and_bytes_of_a_timing(kind, ranks, steps, wire):
    timing = Timing(kind, 128, ranks, 1.0)
    assert (timing.steps, timing.wire) == (steps, wire)


# --- matmul table --------------------------------------------------------------------------------------------------------------------


@given(rates_of_sizes)
def test_measured_matmul_rates_always_make_a_valid_table(rates):
    points = matmul_points(dict(zip(SIZES, rates, strict=True)), max(rates))
    written = dataclasses.replace(CPU, rates=dataclasses.replace(CPU.rates, matmul=points))
    assert parse_hardware(to_json(written), "measured") == written


@given(rates_of_sizes)
def test_a_table_that_is_in_order_stays_as_it_was_measured(rates):
    ordered = dict(zip(SIZES, sorted(rates), strict=True))
    steep = any(ordered[b] / ordered[a] > b / a for a, b in zip(SIZES, SIZES[1:], strict=False))
    points = dict(matmul_points(ordered, max(rates)))
    for size, rate in ordered.items():
        assert steep or points[size] == pytest.approx(rate / max(rates), abs=2e-4 * (1 + SIZES.index(size)))


@given(rates_of_sizes)
def test_a_table_keeps_the_mean_of_what_is_out_of_order(rates):
    falling = dict(zip(SIZES, sorted(rates, reverse=True), strict=True))
    points = matmul_points(falling, max(rates))
    assert {fraction for _, fraction in points} == {profile.share(sum(rates) / len(rates), max(rates))} or max(rates) == min(rates)


# --- the description -----------------------------------------------------------------------------------------------------------------


def test_a_description_loads_as_it_was_written():
    hardware = described([level("local", 2, 2)])
    assert parse_hardware(to_json(hardware), "mine.json") == hardware
    assert hardware.peak_flops == {"float32": 1e11, "bfloat16": 5e10, "float64": 6e10}
    assert hardware.launch_overhead_s == 3.14e-6 and hardware.memory_bytes == 8 * GIB
    assert hardware.memory_bandwidth * hardware.rates.pointwise == pytest.approx(6e9)


def test_dtypes_keep_their_own_rates():
    hardware = described()
    assert matmul_fraction(hardware, 64, torch.float32) == 0.5
    assert matmul_fraction(hardware, 64, torch.bfloat16) == 0.8
    assert hardware.rates.arithmetic(torch.bfloat16).attention["flash"].backward == 0.4
    assert hardware.rates.arithmetic(torch.float64).attention["flash"].backward == 0.5, "those of the first dtype"


def test_programs_on_cpus_run_operator_by_operator_and_wait_for_gloo():
    assert not described().rates.fused and described().rates.overlap == 0


def test_one_rank_without_a_base_plans_for_one_rank():
    hardware = described()
    assert [link.ranks_per_group for link in hardware.links] == [1]
    assert any("start the profile with torchrun, or give --base" in line for line in hardware.sources)
    assert collective_seconds(hardware, "all_gather", 1e9, AxisSpan(1)) == 0
    with pytest.raises(UserError, match="joins at most 1 ranks"):
        ranks_per_level(hardware, AxisSpan(2))


def test_one_rank_with_a_base_takes_its_links_and_peaks():
    hardware = described(base=H100)
    assert hardware.links == H100.links and hardware.rates.collectives == H100.rates.collectives
    assert hardware.peak_flops["float32"] == 6.7e13 and hardware.memory_bandwidth == H100.memory_bandwidth
    assert hardware.allocator_margin == H100.allocator_margin
    assert hardware.rates.matmul[-1][1] * 6.7e13 == pytest.approx(1e11, rel=0.05), "rates stay what was measured"
    assert any("Of h100-80gb: the allocator margin; nvlink, network." in line for line in hardware.sources)


def test_a_base_gives_only_the_links_that_reach_further():
    hardware = described([level("local", 8, 8)], H100)
    assert [(link.name, link.ranks_per_group) for link in hardware.links] == [("local", 8), ("network", 16384)]
    assert hardware.rates.collectives == pytest.approx(CPU.rates.collectives, abs=1e-3)


def test_two_measured_levels():
    hardware = described([level("local", 2, 2), level("network", 8, 4)])
    assert [(link.name, link.ranks_per_group) for link in hardware.links] == [("local", 2), ("network", 8)]


def test_the_best_of_several_rounds():
    slow = measured(bandwidth=1e10, launch_s=9e-6, matmul={"float32": {64: 9e10, 1024: 5e10}, "bfloat16": {64: 1e10, 1024: 1e10}})
    lacking = measured(attention={"float32": {}, "bfloat16": {"flash": (3e10, 1e10)}})
    found = profile.best([measured(), slow, lacking])
    assert found.matmul["float32"] == {64: 9e10, 1024: 1e11}
    assert found.bandwidth == 1.2e10 and found.launch_s == 3.14159e-6
    assert found.attention == {"float32": {}, "bfloat16": {"flash": (3e10, 2e10)}}, "a kernel counts where every round could run it"


def test_the_table_shows_every_figure():
    levels = [level("local", 2, 2)]
    text = "\n".join(profile.table(described(levels), levels))
    for expected in (
        "mine: 8.0 GiB",
        "float32",
        "64: 50 G",
        "1024: 100 G",
        "attention flash: forward 40 GFLOPS, backward 50 GFLOPS",
        "3.14 us",
    ):
        assert expected in text, text
    assert "elementwise operators one by one 6 GB/s" in text and "all_to_all 1.12 GB/s" in text and "local      100 us a step" in text
    assert "links      not measured (one rank): none" in "\n".join(profile.table(described(), []))


def test_numbers_in_words():
    assert (profile.giga(1.6e11), profile.giga(9.89e14)) == ("160 G", "989 T")
    assert (profile.share(2.0, 1.0), profile.share(0.0, 1.0), profile.share(1, 3)) == (1.0, 1e-4, 0.3333)
    assert json.dumps(profile.three_digits(123456.0)) == "123000.0"

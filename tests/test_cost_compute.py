"""Seconds of kernels: exact values at the documented rates, sense properties, and the published MFU."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqloom.cost.compute import (
    attention_seconds,
    bandwidth_seconds,
    exposed_seconds,
    host_seconds,
    matmul_fraction,
    matmul_seconds,
    pointwise_seconds,
)
from seqloom.cost.hardware import Arithmetic, Hardware, hardware_names, load_hardware
from seqloom.cost.mfu import forward_flops, mfu, step_flops
from seqloom.errors import UserError
from seqloom.ops.kernel_rates import ATTENTION_BACKWARD_RATIO

H100 = load_hardware("h100-80gb")
MACHINES = [load_hardware(name) for name in hardware_names()]
BF16 = torch.bfloat16
machines = st.sampled_from(MACHINES)
sizes = st.integers(0, 2**17)
factors = st.floats(1.0, 16.0)


def faster(hardware: Hardware, factor: float) -> Hardware:
    """The machine with `factor` times the arithmetic."""
    return dataclasses.replace(hardware, peak_flops={name: factor * peak for name, peak in hardware.peak_flops.items()})


def wider(hardware: Hardware, factor: float) -> Hardware:
    """The machine with `factor` times the memory bandwidth."""
    return dataclasses.replace(hardware, memory_bandwidth=factor * hardware.memory_bandwidth)


def test_large_matmul_runs_at_the_achieved_rate():
    assert matmul_seconds(H100, 16384, 4096, 4096, BF16) == pytest.approx(2 * 16384 * 4096 * 4096 / 700e12, rel=1e-3)


def test_thin_matmul_is_bound_by_memory():
    m, n, k = 2**20, 16, 4096
    traffic = 2 * (m * k + k * n + m * n)
    assert matmul_seconds(H100, m, n, k, BF16) == pytest.approx(traffic / (0.88 * 3.35e12), rel=1e-6)


def test_tiny_kernels_take_the_launch_overhead():
    assert matmul_seconds(H100, 8, 8, 8, BF16) == H100.launch_overhead_s
    assert attention_seconds(H100, 1.0, BF16) == H100.launch_overhead_s
    assert bandwidth_seconds(H100, 1) == H100.launch_overhead_s


def test_nothing_costs_nothing():
    assert matmul_seconds(H100, 0, 5, 5, BF16) == 0
    assert attention_seconds(H100, 0, BF16) == 0
    assert bandwidth_seconds(H100, 0) == 0
    assert host_seconds(H100, 0) == 0


def test_attention_rates_by_kernel_and_direction():
    flops = 1e15
    assert attention_seconds(H100, flops, BF16) == pytest.approx(flops / 600e12, rel=1e-3)
    assert attention_seconds(H100, flops, BF16, backward=True) == pytest.approx(flops / 515e12, rel=1e-3)
    assert attention_seconds(H100, flops, BF16, kernel="flash3") == pytest.approx(flops / 680e12, rel=1e-3)
    assert attention_seconds(H100, flops, BF16, backward=True, kernel="flash3") == pytest.approx(flops / 587e12, rel=1e-3)


def test_unknown_attention_kernel_lists_the_known():
    with pytest.raises(UserError, match="no rates for attention kernel `flash9`: it has cudnn, flash3"):
        attention_seconds(H100, 1e12, BF16, kernel="flash9")


def test_unknown_dtype():
    with pytest.raises(UserError, match="no peak_flops for int8"):
        matmul_seconds(H100, 64, 64, 64, torch.int8)


def test_matmul_fraction_follows_the_table():
    for size, fraction in H100.rates.matmul:
        assert matmul_fraction(H100, size, BF16) == pytest.approx(fraction)
    assert matmul_fraction(H100, 1, BF16) == H100.rates.matmul[0][1]
    assert matmul_fraction(H100, 10**6, BF16) == H100.rates.matmul[-1][1]
    (low, low_rate), (high, high_rate) = H100.rates.matmul[2:4]
    assert matmul_fraction(H100, (low + high) // 2, BF16) == pytest.approx((low_rate + high_rate) / 2)


def test_host_link():
    assert host_seconds(H100, 50e9) == pytest.approx(1.0)


@given(machines, sizes, sizes, sizes, st.integers(0, 2), st.integers(1, 4096))
def test_a_larger_matmul_is_never_faster(hardware, m, n, k, which, more):
    larger = [m, n, k]
    larger[which] += more
    assert matmul_seconds(hardware, *larger, torch.float32) >= matmul_seconds(hardware, m, n, k, torch.float32) * (1 - 1e-12)


@given(machines, sizes, sizes, sizes)
def test_matmul_does_not_depend_on_the_order_of_its_sizes(hardware, m, n, k):
    assert matmul_seconds(hardware, m, n, k, torch.float32) == pytest.approx(matmul_seconds(hardware, k, m, n, torch.float32))


@given(machines, sizes, sizes, sizes)
def test_splitting_a_matmul_never_gains_more_than_the_pieces(hardware, m, n, k):
    whole = matmul_seconds(hardware, 2 * m, n, k, torch.float32)
    assert 2 * matmul_seconds(hardware, m, n, k, torch.float32) >= whole * (1 - 1e-12)


@given(machines, sizes, sizes, sizes, factors)
def test_faster_machines_are_never_slower(hardware, m, n, k, factor):
    base = matmul_seconds(hardware, m, n, k, BF16)
    assert matmul_seconds(faster(hardware, factor), m, n, k, BF16) <= base
    assert matmul_seconds(wider(hardware, factor), m, n, k, BF16) <= base


@given(machines, sizes, sizes, sizes)
def test_nothing_beats_the_peak(hardware, m, n, k):
    assert matmul_seconds(hardware, m, n, k, BF16) >= 2 * m * n * k / hardware.peak(BF16)
    assert attention_seconds(hardware, m * n, BF16) >= m * n / hardware.peak(BF16)
    assert bandwidth_seconds(hardware, m * n) >= m * n / hardware.memory_bandwidth


@given(machines, st.floats(0, 1e18), st.floats(0, 1e18), st.booleans(), factors)
def test_attention_is_monotone(hardware, flops, more, backward, factor):
    base = attention_seconds(hardware, flops, BF16, backward)
    assert attention_seconds(hardware, flops + more, BF16, backward) >= base
    assert attention_seconds(faster(hardware, factor), flops, BF16, backward) <= base


@given(machines, st.integers(0, 2**45), st.integers(0, 2**45), factors)
def test_bandwidth_is_monotone(hardware, nbytes, more, factor):
    assert bandwidth_seconds(hardware, nbytes + more) >= bandwidth_seconds(hardware, nbytes)
    assert bandwidth_seconds(wider(hardware, factor), nbytes) <= bandwidth_seconds(hardware, nbytes)
    assert host_seconds(hardware, nbytes + more) >= host_seconds(hardware, nbytes)


def with_rates(hardware: Hardware, **changes) -> Hardware:
    """The machine with other achieved rates."""
    return dataclasses.replace(hardware, rates=dataclasses.replace(hardware.rates, **changes))


def test_a_dtype_with_rates_of_its_own_takes_them():
    half = Arithmetic(((64, 0.1),), {"slow": dataclasses.replace(H100.rates.attention["cudnn"], forward=0.05, backward=0.1)})
    hardware = with_rates(H100, by_dtype={"float32": half})
    size = 8192
    assert matmul_seconds(hardware, size, size, size, torch.float32) == pytest.approx(2 * size**3 / (0.1 * 67e12))
    assert attention_seconds(hardware, 1e15, torch.float32) == pytest.approx(1e15 / (0.05 * 67e12))
    assert matmul_seconds(hardware, size, size, size, BF16) == matmul_seconds(H100, size, size, size, BF16)
    with pytest.raises(UserError, match="no rates for attention kernel `cudnn`: it has slow"):
        attention_seconds(hardware, 1e15, torch.float32, kernel="cudnn")


def test_a_fused_chain_moves_its_borders_and_an_unfused_one_every_operator():
    eager = with_rates(H100, fused=False)
    assert pointwise_seconds(H100, 1e9, [1e9, 2e9, 3e9]) == bandwidth_seconds(H100, 1e9)
    assert pointwise_seconds(eager, 1e9, [1e9, 2e9, 3e9]) == pytest.approx(bandwidth_seconds(H100, 6e9))
    assert pointwise_seconds(eager, 10, [1, 1, 1]) == pytest.approx(3 * H100.launch_overhead_s)
    assert pointwise_seconds(eager, 10, []) == 0


def test_communication_hides_as_far_as_it_overlaps():
    for communication, compute in ((2.0, 3.0), (3.0, 2.0), (0.0, 1.0), (1.0, 0.0)):
        assert exposed_seconds(H100, communication, compute) == max(0.0, communication - compute)
        assert exposed_seconds(with_rates(H100, overlap=0.0), communication, compute) == communication
    assert exposed_seconds(with_rates(H100, overlap=0.5), 2.0, 3.0) == 1.0


@given(st.floats(0, 1), st.floats(0, 1e3), st.floats(0, 1e3), st.floats(0, 1e3))
def test_more_work_of_either_kind_never_takes_less_time(overlap, communication, compute, more):
    hardware = with_rates(H100, overlap=overlap)
    whole = compute + exposed_seconds(hardware, communication, compute)
    assert max(communication, compute) * (1 - 1e-9) <= whole <= (communication + compute) * (1 + 1e-9)
    assert compute + exposed_seconds(hardware, communication + more, compute) >= whole * (1 - 1e-9)
    assert compute + more + exposed_seconds(hardware, communication, compute + more) >= whole * (1 - 1e-9)


def test_published_mfu():
    """41.12 s a step of 4 micro-batches of one 131,072-token sequence on 8 H100s: 40.96% with full attention, 24% causal."""
    full = forward_flops(8e9, 32, 4096, 131072)
    causal = forward_flops(8e9, 32, 4096, 131072, causal=True)
    assert full / 1e12 == pytest.approx(11104.35, abs=0.01)
    assert step_flops(full, 4) / 1e12 == pytest.approx(133252.22, abs=0.05)
    assert mfu(full, 4, 41.12, 8, H100.peak(BF16)) == pytest.approx(0.4096, abs=5e-5)
    assert mfu(causal, 4, 41.12, 8, H100.peak(BF16)) == pytest.approx(0.24, abs=0.005)


def test_target_step_of_llama3_8b():
    """The known estimate of one 131,072-token sequence on 8 GPUs: 2.45 s at the peak, 4.35 s at attention 650/580 and matmul 700."""
    multiplied = 8.03e9 - 128256 * 4096  # the embedding is looked up, not multiplied
    causal = forward_flops(multiplied, 32, 4096, 131072, causal=True)
    assert step_flops(causal, 1) / 8 / H100.peak(BF16) == pytest.approx(2.45, abs=0.01)
    rates = dataclasses.replace(H100.rates.attention["cudnn"], forward=650 / 989, backward=580 / 989)
    hardware = dataclasses.replace(H100, rates=dataclasses.replace(H100.rates, attention={"mix": rates}))
    attention = 2 * 32 * 4096 * 131072**2 / 8
    forward = attention_seconds(hardware, attention, BF16)
    backward = attention_seconds(hardware, ATTENTION_BACKWARD_RATIO * attention, BF16, backward=True)
    layers = 3 * matmul_seconds(hardware, 131072 // 8, 4096, int(multiplied // 4096), BF16)
    assert forward + backward + layers == pytest.approx(4.35, abs=0.05)


@given(st.floats(1e6, 1e12), st.integers(1, 200), st.integers(64, 32768), st.integers(1, 2**22))
def test_causal_and_full_counts(params, layers, hidden, seq):
    full, causal = forward_flops(params, layers, hidden, seq), forward_flops(params, layers, hidden, seq, causal=True)
    linear = 2 * params * seq
    assert full - linear == pytest.approx(2 * (causal - linear), rel=1e-6, abs=linear * 1e-9)
    assert linear <= causal <= full
    assert mfu(full, 2, 10.0, 8, 1e15) == pytest.approx(2 * mfu(full, 2, 10.0, 16, 1e15))

"""Measuring itself, at small sizes: one process, several at once, and the command."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from procs import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from seqloom import cli
from seqloom.cost import measure_clock, measure_kernels, profile
from seqloom.cost.hardware import AttentionRate, load_hardware
from seqloom.cost.measure_clock import FEWEST, MOST, Clock, waited_seconds
from seqloom.cost.measure_kernels import Sizes
from seqloom.errors import UserError

TINY = Sizes(outer=64, inner=(16, 64), heads=2, positions=64, head_dim=16, tokens=32, hidden=32, ffn=64, large=2**16)
CPU = torch.device("cpu")
CLOCK = Clock(CPU, budget_s=0.002)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    """Everything is measured at sizes that take no time."""
    monkeypatch.setattr(measure_kernels, "SIZES", {"cpu": TINY})
    monkeypatch.setattr(profile, "MESSAGES", {"cpu": (2**10, 2**14)})
    monkeypatch.setattr(profile, "ROUNDS", 1)
    monkeypatch.setattr(profile, "Clock", lambda device: Clock(device, 0.0))


def shrink() -> None:
    """The sizes of this file, in a process of its own."""
    measure_kernels.SIZES, profile.MESSAGES, profile.ROUNDS = {"cpu": TINY}, {"cpu": (2**10, 2**14)}, 2
    profile.Clock = lambda device: Clock(device, 0.0)


# --- the clock -----------------------------------------------------------------------------------------------------------------------


def test_the_clock_warms_up_and_repeats_within_bounds():
    for budget, most in ((0.0, FEWEST), (1e9, MOST)):
        calls = []
        seconds = Clock(CPU, budget).seconds(lambda: calls.append(None))  # noqa: B023
        assert seconds > 0 and len(calls) == most + 2


def test_the_clock_takes_the_median(monkeypatch):
    times = iter([0.0, 5.0, 10.0, 10.1, 20.0, 20.3, 30.0, 30.2])  # a slow first call, then three of 0.1, 0.3 and 0.2 seconds
    monkeypatch.setattr(measure_clock.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(measure_clock, "waited_seconds", lambda: 0.0)
    assert Clock(CPU, 0.0).seconds(lambda: None) == pytest.approx(0.2)


def test_the_clock_leaves_out_what_other_work_took(monkeypatch):
    times, waits = iter(range(100)), iter(range(50))
    monkeypatch.setattr(measure_clock.time, "perf_counter", lambda: float(next(times)))
    monkeypatch.setattr(measure_clock, "waited_seconds", lambda: 0.25 * next(waits))
    assert Clock(CPU, 0.0).seconds(lambda: None) == pytest.approx(0.75)


def test_waiting_for_a_core_only_grows_and_may_be_unknown(monkeypatch):
    first = waited_seconds()
    assert 0 <= first <= waited_seconds()
    monkeypatch.setattr(measure_clock, "_SCHEDULE", Path("/nowhere/schedstat"))
    assert waited_seconds() == 0


def clock_of_rank(rank: int, world_size: int) -> tuple[float, int]:
    calls = []
    clock = Clock(CPU, 0.0)
    once = iter([0.1] + [1.0 + rank] * 1000)
    object.__setattr__(clock, "_once", lambda fn: (fn(), next(once))[1])
    return clock.seconds(lambda: calls.append(None)), len(calls)


def test_a_figure_is_the_mean_over_the_ranks_after_equally_many_repeats():
    found = run_ranks(clock_of_rank, 2)
    assert [seconds for seconds, _ in found] == [1.5, 1.5]
    assert found[0][1] == found[1][1]


# --- one device ----------------------------------------------------------------------------------------------------------------------


def test_every_figure_of_a_device_is_there():
    found = profile.measure_device(CLOCK, TINY, (torch.float32, torch.bfloat16), print)
    assert set(found.matmul) == set(found.attention) == {"float32", "bfloat16"}
    assert all(set(rates) == set(TINY.inner) and min(rates.values()) > 0 for rates in found.matmul.values())
    for figure in (found.float64, found.bandwidth, found.pointwise, found.launch_s, found.host, found.memory_bytes):
        assert 0 < figure < float("inf")


def test_attention_is_measured_by_kernel():
    found = measure_kernels.attention_flops(CLOCK, TINY, torch.float32, ("math", "flash"), print)
    assert list(found) == ["math", "flash"]
    assert all(forward > 0 and backward > 0 for forward, backward in found.values())


def test_kernels_that_do_not_run_here_are_left_out_and_said(monkeypatch):
    said: list[str] = []
    assert list(measure_kernels.attention_flops(CLOCK, TINY, torch.float32, ("cudnn", "flash3", "flex", "flash"), said.append)) == ["flash"]
    assert said == [
        "attention cudnn is left out: it needs a GPU, not cpu",
        "attention flash3 is left out: it needs an NVIDIA GPU, not cpu",
        "attention flex is left out: it needs a GPU, not cpu: PyTorch has no backward of FlexAttention elsewhere",
    ]
    said.clear()
    monkeypatch.setattr(measure_kernels, "plain_attention", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory\nby far")))
    assert measure_kernels.attention_flops(CLOCK, TINY, torch.float32, ("flash",), said.append) == {}
    assert said == ["attention flash is left out: it fails (out of memory)"]


def test_flex_attention_is_causal_attention(monkeypatch):
    """Its forward, which CPUs have, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    query, key, value = (torch.randn(1, 2, 128, 16) for _ in range(3))
    found, exact = (measure_kernels._causal(name, query)(query, key, value) for name in ("flex", "flash"))
    torch.testing.assert_close(found, exact)


def test_kernels_are_listed_by_speed_and_those_that_plain_attention_has_come_first():
    rates = {
        "flex": AttentionRate(0.9, 0.9),
        "flash2": AttentionRate(0.4, 0.3),
        "math": AttentionRate(0.5, 0.5),
        "cudnn": AttentionRate(0.6, 0.5),
    }
    assert list(profile.by_speed(rates)) == ["cudnn", "flash2", "flex", "math"]


def test_the_matmuls_of_a_shape_class_have_their_flops():
    """The products timed are `inner` as contracted size, as columns and as rows, all with 2 * outer^2 * inner FLOPs."""
    shapes = []

    class Recorder(Clock):
        def seconds(self, fn):
            with FlopCounterMode(display=False) as counter:
                shapes.append(tuple(fn().shape))
            assert counter.get_total_flops() == 2 * 64 * 64 * 16
            return 1.0

    rate = measure_kernels.matmul_flops(Recorder(CPU), 64, 16, torch.float32)
    assert sorted(shapes) == [(16, 64), (64, 16), (64, 64)]
    assert rate == 2 * 64 * 64 * 16


def test_inputs_are_random_and_never_zeros():
    x = measure_kernels._random(CLOCK, 64, 64)
    assert x.std() > 0.5 and (x != 0).all()


def test_memory_is_shared_by_the_ranks_of_a_machine():
    whole = measure_kernels.memory_bytes(CPU, 1)
    assert 0 < whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert measure_kernels.memory_bytes(CPU, 4) == whole // 4


# --- several ranks -------------------------------------------------------------------------------------------------------------------


def levels_of(rank: int, world_size: int, local: int) -> list[tuple]:
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    levels = profile.measure_levels(Clock(CPU, 0.0), (2**10, 2**14))
    return [(x.name, x.ranks_per_group, [(t.kind, t.nbytes, t.ranks, t.seconds) for t in x.timings]) for x in levels]


@pytest.mark.parametrize(
    ("local", "expected"), [(4, [("local", 4, 4)]), (2, [("local", 2, 2), ("network", 4, 2)]), (1, [("network", 4, 4)])]
)
def test_links_are_measured_within_machines_and_between_them(local, expected):
    found = run_ranks(levels_of, 4, local)
    assert all(levels == found[0] for levels in found[1:]), "every rank has the same timings"
    assert [(name, reach, timings[0][2]) for name, reach, timings in found[0]] == expected
    for _, _, timings in found[0]:
        assert len(timings) == 8 and all(seconds > 0 for *_, seconds in timings)


def profile_of(rank: int, world_size: int, path: str) -> list[str]:
    shrink()
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    lines: list[str] = []
    profile.profile(CPU, "two", Path(path), None, lines.append)
    return lines


def test_two_ranks_write_one_file(tmp_path):
    path = tmp_path / "two.json"
    first, second = run_ranks(profile_of, 2, str(path))
    hardware = load_hardware(path)
    assert hardware.name == "two" and [link.ranks_per_group for link in hardware.links] == [2]
    assert any("2 ranks at once" in line for line in hardware.sources)
    assert second == [] and first[-1] == f"wrote {path}: use it with --hardware {path}"


# --- the command ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run `python -m seqloom profile WORDS` in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["seqloom", "profile", *map(str, words)])
        return cli.main()

    return run


def test_the_command_writes_a_file_that_loads(command, tiny, tmp_path, capsys):
    command("--device", "cpu")
    hardware = load_hardware(tmp_path / "this-machine.json")
    assert hardware.name == "this-machine" and [link.ranks_per_group for link in hardware.links] == [1]
    printed = capsys.readouterr().out
    assert "float32" in printed and "not measured (one rank)" in printed and "wrote this-machine.json" in printed
    assert not dist.is_initialized()


def test_name_output_and_base(command, tiny, tmp_path):
    command("--device", "cpu", "--name", "desk", "--output", tmp_path / "there.json", "--base", "cpu")
    hardware = load_hardware(tmp_path / "there.json")
    assert hardware.name == "desk" and hardware.links == load_hardware("cpu").links
    assert json.loads((tmp_path / "there.json").read_text())["sources"][-1].startswith("Of cpu: ")


def test_mistakes_are_one_sentence_before_anything_is_measured(command, monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "measure_device", None)
    (tmp_path / "folder").mkdir()
    for words, expected in (
        (["--output", tmp_path / "nowhere/x.json"], "cannot be written: give --output a file name in a folder"),
        (["--output", tmp_path / "folder"], "cannot be written"),
        (["--base", "h100"], "did you mean h100-80gb"),
        (["--device", "cuda"], "there is no GPU on this machine"),
    ):
        if words[0] == "--device" and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=expected) as caught:
            command(*words)
        assert "\n" not in str(caught.value)
        assert not dist.is_initialized()

"""The rehearsal: a rank runs for real, its figures are true to what it ran, and what cannot be rehearsed is refused in one sentence."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from counted import KEEP, V, write_counted
from hypothesis import given
from hypothesis import strategies as st
from models import FAMILIES

from seqloom import cli
from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.runtime import dryrun, rehearse

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A compiled plan of two ranks for a model with rotary buffers."""
    place = tmp_path_factory.mktemp("programs")
    FAMILIES["llama"](2).save_pretrained(place / "model")
    asked = CompileRequest(
        str(place / "model"), 64, 2, 2, "tiny", hardware="cpu", precision="fp32", force="sp2", zero=3, output_folder=place
    )
    return compile_program(asked).folder


def test_the_command_writes_what_it_measured(folder, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["seqloom", "rehearse", "--name", "tiny", "--output_folder", str(folder.parent), "--steps", "2", "--device", "cpu"]
    )
    assert cli.main() == 0
    shown = capsys.readouterr().out
    assert "rank 1 on" in shown and "(cpu), planned for cpu; median of 2 steps" in shown
    titles = [line.split()[0] for line in shown.splitlines()[2:]]
    assert titles[:5] == ["step", "forward", "backward", "optimizer", "peak"]
    written = json.loads((folder / "rehearsal.json").read_text())
    assert (written["rank"], written["device"], written["steps"]) == (1, "cpu", 2)
    parts = written["time_s"]
    assert all(seconds > 0 for seconds in parts.values())
    assert written["step_s"] >= max(parts.values())
    assert written["peak_gib"] > 0
    assert math.isfinite(written["loss"])
    plan = json.loads((folder / "plan.json").read_text())
    assert written["predicted"]["peak_gib"] == plan["peak_memory_gib"]["total"]
    assert written["predicted"]["step_s"] == pytest.approx(sum(written["predicted"]["time_s"].values()))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("changes", [{}, {"zero": 1, "accumulation": 2}, {"zero": 0, "precision": "fp32", "edits": KEEP}, {"dp": 2}])
def test_memory_on_real_tensors_is_that_of_the_dry_run(tmp_path, changes, rank):
    """Two counts of the same program, one on real tensors: they differ by scalars."""
    write_counted(tmp_path, **changes)
    measured = rehearse.rehearse(tmp_path, rank, CPU, 1)
    assert measured.peak_bytes == pytest.approx(dryrun.dry_run(tmp_path, rank).peak_bytes, rel=0.01)


def test_the_loss_of_one_rank_is_that_of_guessing(tmp_path):
    """A rank's part of the mean loss of random weights: its quarter of the tokens, each near log(vocabulary)."""
    write_counted(tmp_path, precision="fp32")
    result = rehearse.rehearse(tmp_path, 2, CPU, 1)
    assert result.loss == pytest.approx(math.log(V) / 4, rel=0.1)


def test_weights_are_random_and_the_same_each_time(tmp_path):
    first, second = (rehearse.rehearse(write_counted(tmp_path), 0, CPU, 1).loss for _ in range(2))
    assert first == second
    module = torch.nn.LayerNorm(64)
    module.register_parameter("matrix", torch.nn.Parameter(torch.zeros(64, 64)))
    rehearse.fill_at_random(module, CPU)
    assert (module.matrix != 0).all()
    assert module.matrix.std().item() == pytest.approx(rehearse.SPREAD, rel=0.1)
    assert module.weight.mean().item() == pytest.approx(1.0, abs=0.02)


def test_threads_are_put_back(tmp_path):
    before = torch.get_num_threads()
    rehearse.rehearse(write_counted(tmp_path), 0, CPU, 1)
    assert torch.get_num_threads() == before
    assert not torch.distributed.is_initialized()


def test_predicted_time_leaves_communication_out(tmp_path):
    plan = dryrun.read_plan(write_counted(tmp_path))
    assert rehearse.predicted_seconds(plan) == {"forward": 1.0, "backward": 2.5, "optimizer": 0.25}


def test_a_clock_adds_up_phases(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 4.0, 6.0, 10.0])
    monkeypatch.setattr(rehearse.time, "perf_counter", lambda: next(times))
    clock = rehearse.Clock(CPU)
    for phase in ("between", "forward", "backward", "forward", "backward", "between"):
        clock.enter(phase)
    assert clock.seconds() == {"between": 1.0, "forward": 2.0 + 2.0, "backward": 1.0 + 4.0}


# --- refusals ---------------------------------------------------------------------------------------------------------


@given(peak=st.floats(0.1, 100), offloaded=st.floats(0, 100), free=st.floats(0.1, 200))
def test_what_does_not_fit_the_cpu_is_refused(peak, offloaded, free):
    """On the CPU device and host memory are one."""
    plan = {"peak_memory_gib": {"total": peak}, "host_memory_gib": offloaded}
    fits = (peak + offloaded) * GIB <= int(free * GIB)
    if fits:
        rehearse.check_fits(plan, int(free * GIB), int(free * GIB), CPU)
    else:
        with pytest.raises(UserError, match="a rank of this plan needs .* GiB free: rehearse on a device with more memory"):
            rehearse.check_fits(plan, int(free * GIB), int(free * GIB), CPU)


def test_a_gpu_has_memory_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    plan, gpu = {"peak_memory_gib": {"total": 70.0}, "host_memory_gib": 50.0}, torch.device("cuda", 0)
    rehearse.check_fits(plan, 80 * GIB, 60 * GIB, gpu)
    with pytest.raises(UserError, match="needs 70 GiB and Some GPU has 40 GiB free"):
        rehearse.check_fits(plan, 40 * GIB, 60 * GIB, gpu)
    with pytest.raises(UserError, match="keeps 50 GiB in host memory and this machine has 40 GiB free"):
        rehearse.check_fits(plan, 80 * GIB, 40 * GIB, gpu)


def test_a_plan_that_is_too_large_for_this_machine(tmp_path):
    write_counted(tmp_path, peak_memory_gib={"total": 1e6})
    with pytest.raises(UserError, match="a rank of this plan needs 1e\\+06 GiB"):
        rehearse.run(tmp_path, 0, "cpu")
    assert not (tmp_path / "rehearsal.json").exists()


def test_a_rank_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="ranks 0 to 3"):
        rehearse.run(write_counted(tmp_path), 4, "cpu")


def test_no_steps(tmp_path):
    with pytest.raises(UserError, match="--steps 0"):
        rehearse.run(write_counted(tmp_path), 0, "cpu", 0)


def test_without_a_program(tmp_path):
    with pytest.raises(UserError, match="compile it first"):
        rehearse.run(tmp_path)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: this machine has no GPU"):
        rehearse.choose_device("cuda")
    assert rehearse.choose_device(None) == rehearse.choose_device("cpu") == CPU


def test_a_loss_that_is_not_a_number_is_refused(tmp_path):
    write_counted(tmp_path, edits={"losses.sum(dtype=torch.float32)": "losses.sum(dtype=torch.float32) / 0"})
    with pytest.raises(UserError, match="cannot be timed truly"):
        rehearse.rehearse(tmp_path, 0, CPU, 1)

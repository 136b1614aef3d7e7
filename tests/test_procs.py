"""The helper that spawns ranks: results in order, failures shown, nothing left behind."""

import os
import signal
import time

import procs
import pytest
import torch
import torch.distributed as dist


def _sum(rank, world_size, offset):
    value = torch.tensor([rank + offset], dtype=torch.float64)
    dist.all_reduce(value)
    return rank, world_size, value.item()


def _tensor(rank, world_size, tensor):
    return {"sum": tensor.sum() + rank, "view": tensor[1:]}


def test_tensors_travel_both_ways():
    first, second = procs.run_ranks(_tensor, 2, torch.arange(4.0))
    assert (first["sum"].item(), second["sum"].item()) == (6.0, 7.0)
    assert torch.equal(second["view"], torch.tensor([1.0, 2.0, 3.0]))


def _fail_on_one(rank, world_size):
    if rank == 1:
        raise ValueError("the reason")
    time.sleep(60)


def _hang(rank, world_size, folder):
    with open(os.path.join(folder, str(rank)), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)


def _die(rank, world_size):
    os._exit(3)


def _abort(rank, world_size):
    os.write(2, b"the last words")
    os.kill(os.getpid(), signal.SIGABRT)


def test_results_come_by_rank():
    assert procs.run_ranks(_sum, 3, 10) == [(0, 3, 33.0), (1, 3, 33.0), (2, 3, 33.0)]


def test_first_failure_is_shown_and_others_are_ended():
    start = time.monotonic()
    with pytest.raises(procs.RankError, match="rank 1:[\\s\\S]*the reason"):
        procs.run_ranks(_fail_on_one, 2)
    assert time.monotonic() - start < 50


def test_time_limit_leaves_no_process(tmp_path):
    with pytest.raises(procs.RankError, match="in time"):
        procs.run_ranks(_hang, 2, str(tmp_path), timeout=12)
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_a_rank_that_dies_leaves_its_exit_code_and_its_last_words():
    with pytest.raises(procs.RankError, match="rank 0 died, exit code 3"):
        procs.run_ranks(_die, 1)
    with pytest.raises(procs.RankError, match=r"exit code -6:\nthe last words[\s\S]*Abort[\s\S]*in _abort"):
        procs.run_ranks(_abort, 1)

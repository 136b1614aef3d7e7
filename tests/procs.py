"""Runs one function on several gloo processes and returns what each returned.

Every test that needs ranks uses `run_ranks`. The processes meet through a file of their own, so that no two runs can meet on one
port; they end with the call, whatever happens: on an error or the time limit all of them are killed, and a process whose parent
has died ends itself.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(  # what ranks import anyway, once for all of them
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed._functional_collectives",
        "safetensors.torch",
        "datasets",
        "matplotlib.figure",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
        "seqloom.emit.pipeline",
        "seqloom.trainer.loop",
    ]
)


class RankError(AssertionError):
    """A rank failed: the message holds the traceback of the first one that did."""


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` processes with gloo ready; return the results by rank.

    `fn` is a module-level function; it, `args` and the results travel between processes, so tensors should be small and plain.
    Each process has one thread, and `RANK`, `LOCAL_RANK`, `WORLD_SIZE` set as torchrun does. Raises `RankError` with the traceback
    of the first rank that failed, or when `timeout` seconds have passed.
    """
    with tempfile.TemporaryDirectory(prefix="seqloom-ranks-") as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_child, args=(sender, fn, rank, world_size, folder, timeout, args), daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, folder, time.monotonic() + timeout)
        finally:
            _end(processes)


def _collect(pipes: list[Connection], processes: list[Any], folder: str, deadline: float) -> list[Any]:
    """Results by rank; stops at the first failure, so that ranks waiting for the failed one are not waited for."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} did not end in time")
        for pipe in ready:
            rank = open_pipes[pipe]
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(timeout=5)
                raise RankError(f"rank {rank} died, exit code {processes[rank].exitcode}:\n{_errors(folder, rank)}") from None
            if not succeeded:
                raise RankError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _errors(folder: str, rank: int) -> str:
    """The end of what a rank wrote to its standard error: what C++ says when it aborts, and the stack of a fatal signal."""
    path = _error_file(folder, rank)
    text = Path(path).read_text(errors="replace") if os.path.exists(path) else ""
    return re.sub(r"\nExtension modules: .*", "", text)[-4000:]


def _error_file(folder: str, rank: int) -> str:
    return os.path.join(folder, f"stderr-{rank}")


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.join(timeout=0.5)
        if process.is_alive():
            process.kill()
        process.join()


def _child(
    sender: Connection, fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    """One rank: report (True, result) or (False, traceback) and leave without waiting for the others."""
    with open(_error_file(folder, rank), "wb") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    faulthandler.enable()

    import torch
    import torch.distributed as dist

    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    store = os.path.join(folder, "store")
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
        report = (True, fn(rank, world_size, *args))
        dist.barrier()
    except BaseException:
        report = (False, traceback.format_exc())
    try:
        message = pickle.dumps(report)  # whole: a tensor shared by file descriptor would die with this process
    except Exception:
        message = pickle.dumps((False, f"the result cannot travel between processes:\n{traceback.format_exc()}"))
    sender.send_bytes(message)
    sender.close()
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.write(2, b"the process that started this rank is gone\n")
        os._exit(1)

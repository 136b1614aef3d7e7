"""Save while training goes on: the step waits only until its state is copied; a thread writes the copies.

Role in the pipeline: the trainer's loop gives the state to a `Saver` after a step and asks it between steps whether the save is done.
The thread's agreements travel over a process group of their own. At most one save is under way: the next one waits for it.
(CheckFreq, Mohan et al. 2021, section 4: snapshot, then persist.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from seqloom.checkpoint import group
from seqloom.checkpoint.assign import Division, Job, divide, piece
from seqloom.checkpoint.write import Beside, write_checkpoint


class Saver:
    """Saves the checkpoints of one run. Collective: all ranks make one, and call `save` and `collect` alike.

    With `background` a save returns when the state of this rank is copied to the CPU, in buffers that all saves share; without it, when
    the checkpoint is committed. `timeout` bounds every wait of the thread for another rank. `after` is called on every rank, in the
    thread that wrote, with the folder of each committed checkpoint.
    """

    def __init__(
        self, run_folder: Path, *, background: bool, timeout: timedelta, after: Callable[[Path], None] = lambda folder: None
    ) -> None:
        self._run_folder, self._after = run_folder, after
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self._group = dist.new_group(timeout=timeout, backend="gloo") if background and group.world_size() > 1 else None
        self._copies: dict[str, torch.Tensor] = {}
        self._under_way: Future[Path] | None = None

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], beside: Beside) -> None:
        """Save the state after a step. Raises `UserError` on all ranks where this save, or the one before it, fails before returning."""
        self.collect()
        doing = f"saving step {step} in {self._run_folder}"
        division = divide(doing, tensors, beside.state)
        if self._pool is None:
            self._under_way = Future()
            self._under_way.set_result(self._write(step, division, lambda job: piece(tensors[job.name], job.box), beside))
            return
        group.attempt(doing, lambda: self._copy(division, tensors))
        self._under_way = self._pool.submit(self._write, step, division, lambda job: self._copies[job.key], beside)

    @property
    def pending(self) -> bool:
        """Whether there is a save that nobody has collected."""
        return self._under_way is not None

    @property
    def writing(self) -> bool:
        """Whether a save is still being written, as this rank sees it."""
        return self._under_way is not None and not self._under_way.done()

    def collect(self) -> Path | None:
        """Wait for the save under way and return its folder, None where there is none. Raises on all ranks what made it fail."""
        under_way, self._under_way = self._under_way, None
        return None if under_way is None else under_way.result()

    def close(self) -> None:
        """Wait for what is being written. What failed is not told: `collect` first."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _copy(self, division: Division, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy this rank's pieces to the CPU, to pinned memory where they come from a GPU. The buffers of the last save are used again."""
        copies, devices = {}, set()
        for job in division.mine():
            live = piece(tensors[job.name], job.box).detach()
            copies[job.key] = self._buffer(job, live).copy_(live, non_blocking=True)
            devices.add(live.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        self._copies = copies

    def _buffer(self, job: Job, live: torch.Tensor) -> torch.Tensor:
        last = self._copies.get(job.key)
        if last is not None and (last.shape, last.dtype) == (live.shape, live.dtype):
            return last
        return torch.empty(live.shape, dtype=live.dtype, pin_memory=live.device.type == "cuda")

    def _write(self, step: int, division: Division, piece_of: Callable[[Job], torch.Tensor], beside: Beside) -> Path:
        with group.talking_over(self._group):
            folder = write_checkpoint(self._run_folder, step, division, piece_of, beside)
            self._after(folder)
        return folder

"""Bytes of tensors that are alive, by what they are for, while a program runs on fake or real tensors.

Role in the pipeline: the dry run (and a rehearsal on the CPU) runs a step inside `LiveBytes` and asks for the parts of the peak. What a
storage is for is often known only later (a result of the forward is an activation if it is still there when the forward ends), so every
birth, resize and death is written down and the peak is taken apart afterwards.

| part | what |
|---|---|
| states | parameters, buffers, optimizer state |
| gathered | FSDP2's whole parameters and the buffers of their all-gathers |
| gradients | gradients on their way into a reduction, its buffers, and the reduced ones |
| activations | what the forward left for the backward |
| working | the rest: temporaries, recomputed activations, gradients of activations |

Offloaded activations lie on the host and are counted apart.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from seqloom.runtime.counting import DEVICE
from seqloom.runtime.phases import Phase

PARTS = ("states", "gathered", "gradients", "activations", "working")
HOST = "host"
TO_HOST = "seqloom::to_host"  # the operator that offloads: its result lies in host memory
_LEFT_BY = {"forward": "activations", "optimizer": "states"}  # what outlives a phase is


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators return, once each, from their birth to their death.

    `alive` and `peak` are bytes on the device now and at most; `host_alive` and `host_peak` on the host. FSDP2 empties and refills its
    storages: inside `resizes()` they are followed. Before the first step call `hold` on what is there already.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.host_alive = self.host_peak = 0
        self._keys = WeakIdKeyDictionary()
        self._next = itertools.count()
        self._sizes: dict[int, int] = {}
        self._part: dict[int, str] = {}
        self._fresh: set[int] = set()  # alive, born in this phase, and of no known part
        self._log: list[tuple[int, int]] = []  # (key, change in bytes) on the device, in order
        self._peak_at = 0  # entries of the log up to the peak
        self._phase: Phase = "between"

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator and count the storages of its results; of a DTensor's only the local piece exists."""
        if func is DEVICE:
            return args[0].fake_device
        results = func(*args, **(kwargs or {}))
        name = func._schema.name if isinstance(func, torch._ops.OpOverload) else ""
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor):
                self._count(_storage(tensor), HOST if name == TO_HOST else None)
        if name in _COLLECTIVE_BUFFERS:
            part, tensors = _COLLECTIVE_BUFFERS[name]
            self.hold(tensors(args, kwargs or {}), part)
        return results

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors and say what they are for, from their birth on, whatever they were taken for before."""
        for tensor in tree_leaves(tensors):
            storage = _storage(tensor)
            self._count(storage)
            key = self._keys[storage]
            self._part[key] = part
            self._fresh.discard(key)

    def enter(self, phase: Phase) -> None:
        """The step goes on to `phase`: what the last one left behind is now known."""
        part = _LEFT_BY.get(self._phase)
        if part is not None:
            for key in tuple(self._fresh):
                self._name(key, part)
        self._fresh.clear()
        self._phase = phase

    def parts(self) -> dict[str, int]:
        """Bytes on the device at the peak, by part; they add up to `peak`."""
        sizes: dict[int, int] = {}
        for key, change in self._log[: self._peak_at]:
            sizes[key] = sizes.get(key, 0) + change
        found = dict.fromkeys(PARTS, 0)
        for key, size in sizes.items():
            found[self._part.get(key, "working")] += size
        return found

    @contextmanager
    def resizes(self) -> Iterator[None]:
        """Inside, a storage that is resized is counted at its new size. Only FSDP2's whole parameters come and go so."""
        plain = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = plain(storage, size)
            self._count(storage)
            self._part[self._keys[storage]] = "gathered"
            return result

        torch.UntypedStorage.resize_ = resize
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = plain

    def _count(self, storage: torch.UntypedStorage, part: str | None = None) -> None:
        key = self._keys.get(storage)
        if key is None:
            key = self._keys[storage] = next(self._next)
            weakref.finalize(storage, self._change, key, None)
            self._sizes[key] = 0
            if part is None:
                self._fresh.add(key)
            else:
                self._part[key] = part
        self._change(key, storage.nbytes())

    def _change(self, key: int, size: int | None) -> None:
        """A storage has a new size, or is gone (None)."""
        change = (size or 0) - self._sizes[key]
        if size is None:
            del self._sizes[key]
            self._fresh.discard(key)
        else:
            self._sizes[key] = size
        if self._part.get(key) == HOST:
            self.host_alive += change
            self.host_peak = max(self.host_peak, self.host_alive)
        elif change:
            self.alive += change
            self._log.append((key, change))
            if self.alive > self.peak:
                self.peak, self._peak_at = self.alive, len(self._log)

    def _name(self, key: int, part: str) -> None:
        self._part.setdefault(key, part)
        self._fresh.discard(key)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


_Buffers = Callable[[tuple, dict[str, Any]], Any]
_COLLECTIVE_BUFFERS: dict[str, tuple[str, _Buffers]] = {
    # (pieces, whole, ...) and (gradients, ..., out=packed) of FSDP2; (output, input, ...) of its reduction
    "fsdp::all_gather_copy_in": ("gathered", lambda args, _: args[:2]),
    "fsdp::chunk_cat": ("gradients", lambda args, kwargs: (args[0], kwargs["out"])),
    "c10d::_reduce_scatter_base_": ("gradients", lambda args, _: args[:2]),
}

"""Offload: what autograd keeps of a segment waits in host memory for the backward pass.

An emitted block writes `offload(self.mlp_forward, x)`. Every activation that autograd saves inside is copied to the host while the
compute goes on, and copied back ahead of its use. A call and its neighbour overlap:

- in the forward a call's activations stay on the device until the next call has run; then the compute stream waits for their copies
  and their memory is free for whatever comes next, in stream order (those of the last call simply stay: they are used first);
- in the backward, the first use of a call's activations starts the fetch of the call before it.

So at most two calls' activations are on the device. Nothing makes the host wait, and memory does not depend on how far it runs ahead.
Parameters, views of them, and storages under `MINIMUM` bytes stay; a storage saved in several views is copied once, whole.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

MINIMUM = 2**20  # bytes; a smaller copy costs more than its memory is worth


def offload(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, with what autograd saves inside it on the host until the backward pass. The results and gradients are the same.

    Without gradients it is a plain call.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    call = _Call()
    with saved_tensors_hooks(call.pack, _unpack):
        result = function(*args)
    call.end()
    return result


@torch.library.custom_op("seqloom::to_host", mutates_args=())
def to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor in host memory, pinned where the tensor is on a GPU; the copy runs on the current stream.

    An operator of its own (`torch.ops.seqloom.to_host`), so that a memory counter can tell the host's bytes from the device's.
    """
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


@to_host.register_fake
def _(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu")


class _Copy:
    """One storage of a call, as a flat tensor: on the device, on the host, and back.

    `device` is there before `leave` and after `fetch`, and always memory of the compute stream. The copies run on streams of their own;
    `left` and `arrived` are the events that end them, None where there are no streams.
    """

    def __init__(self, call: _Call, tensor: Tensor) -> None:
        self.arrived: torch.cuda.Event | None = None
        self.call, self.version = call, tensor._version
        elements = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
        self.device: Tensor | None = tensor.detach().as_strided((elements,), (1,), 0)
        self.place = tensor.device
        real_gpu = tensor.is_cuda and not isinstance(tensor, FakeTensor)
        self.compute = torch.cuda.current_stream(tensor.device) if real_gpu else None
        stream = self._side(0)
        with torch.no_grad(), torch.cuda.stream(stream):
            self.host: Tensor | None = to_host(self.device)
        self.left = stream.record_event() if stream else None

    def leave(self) -> None:
        """Free the device memory as soon as the copy to the host is done."""
        if self.host is not None:
            if self.left is not None:
                self.compute.wait_event(self.left)
            self.device = None

    def fetch(self) -> None:
        """Start to bring the storage back, unless it is on the device; the host memory is given up."""
        if self.device is None:
            with torch.cuda.stream(self.compute):
                self.device = torch.empty_like(self.host, device=self.place)
            stream = self._side(1)
            with torch.no_grad(), torch.cuda.stream(stream):
                self.device.copy_(self.host, non_blocking=True)
            self.arrived = stream.record_event() if stream else None
        self.host = None

    def wait(self) -> None:
        """Let the compute stream wait until what `fetch` brings is there."""
        if self.arrived is not None:
            self.compute.wait_event(self.arrived)

    def _side(self, direction: int) -> torch.cuda.Stream | None:
        """The stream for copies to the host (0) or back (1), behind what the compute stream has been given so far."""
        if self.compute is None:
            return None
        stream = _streams(self.place)[direction]
        stream.wait_stream(self.compute)
        return stream

    def __del__(self) -> None:
        self.wait()  # a copy that nobody came to use may still be writing to the memory that is freed here


class _Call:
    """One run of an offloaded function: its copies, which the graph owns, and the call before it."""

    latest: weakref.ref[_Call] | None = None  # the call that ended last, while its graph lives: neighbours meet only here

    def __init__(self) -> None:
        self.copies: list[weakref.ref[_Copy]] = []
        self.before: weakref.ref[_Call] | None = None
        self.running: list[_Copy] = []  # keeps the storages of this call, and so their addresses, until its end
        self.returning = False

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What the graph keeps in place of a tensor."""
        if not _worth_moving(tensor) or _of_parameter(tensor):
            return tensor.detach()  # itself would close a circle with the node that saves it
        copy = self._copy(tensor)
        return _View(copy, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def end(self) -> None:
        """Let go of the call before this one; keep this one until the next."""
        previous = _alive(_Call.latest)
        if previous is not None:
            self.before = _Call.latest
            for copy in previous.alive():
                copy.leave()
        self.copies = [weakref.ref(copy) for copy in self.running]
        self.running = []
        _Call.latest = weakref.ref(self)

    def alive(self) -> list[_Copy]:
        """The copies that the graph still needs, in the order of saving."""
        return [copy for ref in self.copies if (copy := ref()) is not None]

    def begin_backward(self) -> None:
        """Bring back this call's storages and, while they are used, those of the call before it; the last saved is needed first."""
        if self.returning:
            return
        self.returning = True
        previous = _alive(self.before)
        for copy in [*reversed(self.alive()), *reversed(previous.alive() if previous else [])]:
            copy.fetch()

    def _copy(self, tensor: Tensor) -> _Copy:
        """The copy of a tensor's storage: made now, or earlier in this call or the one before."""
        address = _address(tensor)
        previous = _alive(_Call.latest)
        for copy in [*self.running, *(previous.alive() if previous else [])]:
            if copy.device is not None and _address(copy.device) == address and copy.version == tensor._version:
                return copy
        self.running.append(_Copy(self, tensor))
        return self.running[-1]


@dataclass(frozen=True)
class _View:
    """A saved tensor as a view of its storage's copy."""

    copy: _Copy
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _unpack(packed: Tensor | _View) -> Tensor:
    """The saved tensor again, for the node that saved it."""
    if isinstance(packed, Tensor):
        return packed
    copy = packed.copy
    copy.call.begin_backward()
    copy.fetch()
    copy.wait()
    return copy.device.view(packed.dtype).as_strided(packed.shape, packed.stride, packed.offset)


def _worth_moving(tensor: Tensor) -> bool:
    """Whether a tensor is a plain one (fake ones included) over a storage of `MINIMUM` bytes or more."""
    plain = type(tensor) is Tensor or isinstance(tensor, FakeTensor)
    return plain and tensor.layout == torch.strided and tensor.untyped_storage().nbytes() >= MINIMUM


def _of_parameter(tensor: Tensor) -> bool:
    """Whether a tensor lies in a parameter's memory: the parameter, a view of it, or of the local part of a DTensor.

    The views of a parameter lead back to it through nodes of one input each. FSDP2 frees and gathers this memory by itself.
    """
    if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None:
        if (leaf := getattr(node, "variable", None)) is not None:
            return _address(leaf._local_tensor if isinstance(leaf, DTensor) else leaf) == _address(tensor)
        inputs = [edge for edge, _ in node.next_functions if edge is not None]
        node = inputs[0] if len(inputs) == 1 else None
    return False


def _address(tensor: Tensor) -> int:
    """What tells a living storage from all others."""
    return tensor.untyped_storage()._cdata


def _alive(call: weakref.ref[_Call] | None) -> _Call | None:
    return None if call is None else call()


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of a GPU for the copies to the host and back: the two directions of the link work at once."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)

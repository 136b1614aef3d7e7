"""FLOPs and bytes sent, counted from the operators that a program really runs.

Role in the pipeline: the dry run executes one step inside `WorkCounter`. The conventions are those of `seqloom.ops.flops` and
`seqloom.cost`: a multiply-add is two operations; causal attention counts half of the pairs; the backward of a fused attention kernel is
2.5 times its forward; a collective counts the bytes that this rank sends (`wire_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from seqloom.cost.communication import wire_bytes
from seqloom.cost.hardware import CollectiveKind
from seqloom.ops.kernel_rates import ATTENTION_BACKWARD_RATIO
from seqloom.runtime.phases import Phase

RECOMPUTE = "recompute"
DEVICE = torch.ops.prim.device.default  # asked of every fake tensor again and again, more often than all operators run


class WorkCounter(TorchDispatchMode):
    """Counts inside the forward and the backward of a step, which `enter` announces; what runs elsewhere (loss and norm sums) is left out.

    `flops` maps forward, backward and recompute (what `torch.utils.checkpoint` runs again) to operations; `sent` maps each kind of
    collective to bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()
        self._phase: Phase = "between"
        self._recomputing = 0

    def clear(self) -> None:
        """Count from zero."""
        self.flops: dict[str, int] = {"forward": 0, "backward": 0, RECOMPUTE: 0}
        self.sent: dict[CollectiveKind, int] = {}

    def enter(self, phase: Phase) -> None:
        """The step goes on to `phase`."""
        self._phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operator and count it. DTensor operators are counted as the local operators and collectives that they become."""
        if func is DEVICE:
            return args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if self._phase in self.flops:
            self.flops[RECOMPUTE if self._recomputing else self._phase] += operator_flops(func, args, kwargs, results)
            for kind, count in collective_bytes(func, args).items():
                self.sent[kind] = self.sent.get(kind, 0) + count
        return results

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """Inside, what `torch.utils.checkpoint` runs again is told from the backward proper."""
        counter, plain = self, torch.utils.checkpoint._recomputation_hook

        class Watched(plain):
            def __enter__(self) -> Any:
                counter._recomputing += 1
                return super().__enter__()

            def __exit__(self, *error: Any) -> Any:
                counter._recomputing -= 1
                return super().__exit__(*error)

        torch.utils.checkpoint._recomputation_hook = Watched
        try:
            yield
        finally:
            torch.utils.checkpoint._recomputation_hook = plain


def operator_flops(func: Any, args: tuple, kwargs: dict[str, Any], results: Any) -> int:
    """Operations of one call of a PyTorch operator: matrix products and fused attention; 0 for the others."""
    if not isinstance(func, torch._ops.OpOverload):
        return 0
    packet = func._overloadpacket
    if "_attention" in packet.__name__:
        return _attention_flops(func, args, kwargs)
    return flop_registry[packet](*args, **kwargs, out_val=results) if packet in flop_registry else 0


def _attention_flops(func: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> int:
    """`query` `[b, h, l, e]`, `key` `[b, k, m, e]`, `value` `[b, k, m, v]`: two products over the pairs that the mask leaves."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    if "query" not in given:
        return 0
    batch, heads, rows, width = given["query"].shape
    columns, value_width = given["key"].shape[2], given["value"].shape[3]
    pairs = rows * columns // (2 if given.get("is_causal", False) else 1)
    forward = 2 * batch * heads * pairs * (width + value_width)
    return int(ATTENTION_BACKWARD_RATIO * forward) if func._overloadpacket.__name__.endswith("backward") else forward


def collective_bytes(func: Any, args: tuple) -> dict[CollectiveKind, int]:
    """Bytes that this rank sends in one collective, FSDP2's (`c10d`) or one of the program (`_c10d_functional`), by kind; else empty.

    Raises `RuntimeError` for a collective that no plan uses: an answer without it would be wrong.
    """
    if not isinstance(func, torch._ops.OpOverload) or func.namespace not in ("c10d", "_c10d_functional"):
        return {}
    name = func._overloadpacket.__name__
    match name:
        case "wait_tensor":
            return {}
        case "all_gather_into_tensor":
            return {"all_gather": wire_bytes("all_gather", nbytes(args[0]) * args[1], args[1])}
        case "reduce_scatter_tensor":
            return {"reduce_scatter": wire_bytes("reduce_scatter", nbytes(args[0]), args[2])}
        case "all_to_all_single":
            return {"all_to_all": wire_bytes("all_to_all", nbytes(args[0]), _resolve_process_group(args[3]).size())}
        case "all_reduce":
            return {"all_reduce": wire_bytes("all_reduce", nbytes(args[0]), _resolve_process_group(args[2]).size())}
        case "alltoall_base_":  # output, input, group, rows that come from each rank, rows that go to each
            into, rank = args[4], dist.ProcessGroup.unbox(args[2]).rank()
            own = into[rank] / max(1, sum(into)) if into else 1 / dist.ProcessGroup.unbox(args[2]).size()
            return {"all_to_all": round(nbytes(args[1]) * (1 - own))}
        case "_allgather_base_":
            return {"all_gather": wire_bytes("all_gather", nbytes(args[0]), nbytes(args[0]) // nbytes(args[1]))}
        case "_reduce_scatter_base_":
            return {"reduce_scatter": wire_bytes("reduce_scatter", nbytes(args[1]), nbytes(args[1]) // nbytes(args[0]))}
        case "allreduce_":
            return {"all_reduce": wire_bytes("all_reduce", sum(map(nbytes, args[0])), dist.ProcessGroup.unbox(args[1]).size())}
    raise RuntimeError(f"the program runs a collective that is not counted: {func}")


def nbytes(tensor: Tensor) -> int:
    """Bytes of the elements of a tensor."""
    return prod(tensor.shape) * tensor.dtype.itemsize

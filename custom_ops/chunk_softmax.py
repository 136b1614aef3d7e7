"""Softmax and cross entropy of one chunk of logits, forward and backward: what the loss head does between its matrix products.

Role: `chunk_linear_cross_entropy` calls `losses_of` and `gradient_of` for each chunk. Two paths compute the same. `plain` runs operator by
operator and takes any device; it reads and writes the logits of a chunk in fp32 several times over. `compiled` is the same formulas under
`torch.compile`: one kernel reads the logits in their own precision, one writes their gradient. On a GPU both are timed once for each size
of a chunk and the faster one is taken, which the log says; elsewhere, and with deterministic algorithms, it is `plain`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from seqloom.ops.precision import sum_dtype

Path = Literal["plain", "compiled"]
_RUNS = 5  # of which the fastest counts


class _Asked:
    """The path that is asked for. Not a context variable: a backward on a GPU runs in a thread of autograd."""

    now: Path | None = None


@contextlib.contextmanager
def use_path(path: Path) -> Iterator[None]:
    """Inside, this path is taken, on any device."""
    before, _Asked.now = _Asked.now, path
    try:
        yield
    finally:
        _Asked.now = before


def losses_of(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and log-sum-exp of each row of `logits` `[rows, n]`, both `[rows]` in `sum_dtype`; a loss not `counted` is 0."""
    return _FUNCTIONS[path_of(logits)][0](logits, targets, counted)


def gradient_of(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, counted: Tensor) -> Tensor:
    """Gradient of `logits` `[rows, n]`, in their dtype, given that of the losses and the log-sum-exp, both `[rows]`.

    The memory of `logits` may be used for it.
    """
    return _FUNCTIONS[path_of(logits)][1](logits, targets, lse, grad, counted)


def path_of(logits: Tensor) -> Path:
    """The path for such logits."""
    if torch.compiler.is_compiling():
        return "plain"  # the graph around it fuses these formulas as any others
    if _Asked.now is not None:
        return _Asked.now
    if not logits.is_cuda or torch.are_deterministic_algorithms_enabled():
        return "plain"
    return _faster(logits.device, logits.dtype, *logits.shape)


@functools.cache
def _faster(device: torch.device, dtype: torch.dtype, rows: int, classes: int) -> Path:
    """The path that is faster on this device for chunks of this size."""
    log, size = logging.getLogger(__name__), f"{rows:,} x {classes:,} logits a chunk on {device.type}"
    logits = torch.randn(rows, classes, device=device, dtype=dtype)
    try:
        seconds = {path: _seconds(logits, path) for path in _FUNCTIONS}
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        log.warning("loss head, %s: path 'plain', which is slow, as torch.compile fails (%s)", size, str(error).strip().splitlines()[0])
        return "plain"
    chosen = min(seconds, key=seconds.__getitem__)
    log.info("loss head, %s: path '%s' (%s)", size, chosen, ", ".join(f"{path} {1e3 * s:.2f} ms" for path, s in seconds.items()))
    return chosen


def _seconds(logits: Tensor, path: Path) -> float:
    """Seconds of forward and backward of one chunk on a GPU."""
    forward, backward = _FUNCTIONS[path]
    targets = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    spent = []
    for _ in range(1 + _RUNS):  # the first run compiles
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        losses, lse = forward(logits, targets, targets == 0)
        backward(logits.clone(), targets, lse, losses, targets == 0)
        end.record()
        end.synchronize()
        spent.append(begin.elapsed_time(end) / 1e3)
    return min(spent[1:])


# --- plain -----------------------------------------------------------------------------------------------------------------------


def _plain_losses(logits: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.to(sum_dtype(logits.dtype))
    lse = logits.logsumexp(-1)
    own = logits.gather(1, _safe(targets, counted)).squeeze(1)
    return torch.where(counted, lse - own, 0.0), lse


def _plain_gradient(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, counted: Tensor) -> Tensor:
    """(softmax - one hot) * gradient of the loss."""
    probabilities = logits.to(lse.dtype).sub_(lse[:, None]).exp_()
    probabilities.scatter_add_(1, _safe(targets, counted), torch.full_like(lse[:, None], -1.0))
    return probabilities.mul_(torch.where(counted, grad, 0.0)[:, None]).to(logits.dtype)


def _safe(targets: Tensor, counted: Tensor) -> Tensor:
    """Targets as a column of indices; those that do not count point at class 0."""
    return torch.where(counted, targets, 0)[:, None]


# --- compiled --------------------------------------------------------------------------------------------------------------------


def _fused_gradient(logits: Tensor, targets: Tensor, lse: Tensor, grad: Tensor, counted: Tensor) -> Tensor:
    """As `_plain_gradient`, without a scatter, which no kernel takes in: the target's column is found by its number."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    probabilities = (logits.to(lse.dtype) - lse[:, None]).exp() - (columns == targets[:, None]).to(lse.dtype)
    return (probabilities * torch.where(counted, grad, 0.0)[:, None]).to(logits.dtype)


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    """`function` under `torch.compile`, which is imported when first called."""

    @functools.cache
    def compiled() -> Callable[..., object]:
        return torch.compile(function, fullgraph=True)

    return lambda *args: compiled()(*args)


_FUNCTIONS = {"plain": (_plain_losses, _plain_gradient), "compiled": (_compiled(_plain_losses), _compiled(_fused_gradient))}

"""What the ranks tell each other around a save or a load: small JSON values, and errors that reach everyone.

Role in the pipeline: `write` and `read` are collective; each step that may fail on one rank is an `attempt`. Without a process group
everything here is local. What runs beside training talks over a process group of its own (`talking_over`), so that its messages never
meet those of a step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist

from seqloom.errors import Stopped, UserError

_process_group: ContextVar[dist.ProcessGroup | None] = ContextVar("process group", default=None)


@contextlib.contextmanager
def talking_over(process_group: dist.ProcessGroup | None) -> Iterator[None]:
    """Within this, in this thread, ranks talk over a gloo group that holds all of them; None is the default group."""
    token = _process_group.set(process_group)
    try:
        yield
    finally:
        _process_group.reset(token)


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def is_distributed() -> bool:
    """Whether there is a default process group."""
    return dist.is_available() and dist.is_initialized()


def gather_json(value: Any) -> list[Any]:
    """The JSON values of all ranks, by rank, on every rank. They travel as text in byte tensors, never as objects."""
    text = json.dumps(value, separators=(",", ":")).encode()
    if world_size() == 1:
        return [json.loads(text)]
    device = _device()
    length = torch.tensor([len(text)], dtype=torch.int64, device=device)
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length, group=_process_group.get())
    sizes = [int(n) for n in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=_process_group.get())
    return [json.loads(t[:n].cpu().numpy().tobytes()) for t, n in zip(texts, sizes, strict=True)]


def attempt(doing: str, action: Callable[[], Any]) -> list[Any]:
    """Run `action` on every rank: its JSON results by rank, or an error on every rank where it failed on any.

    The rank that failed raises its own error again (a system error as `UserError`); the others raise `UserError` with the sentence of
    the first rank that failed, which says what it was `doing` unless it is a `UserError` itself. Where a rank was asked to stop
    (`Stopped`), all stop.
    """
    value, failure, sentence = None, None, None
    try:
        value = action()
    except (UserError, Stopped) as error:
        failure, sentence = error, str(error)
    except Exception as error:
        failure, sentence = error, f"{doing} failed on rank {rank()}: {type(error).__name__}: {error}"
    answers = gather_json({"error": sentence, "value": value, "stopped": isinstance(failure, Stopped)})
    if failure is not None and not isinstance(failure, OSError):
        raise failure
    stopped = [answer["error"] for answer in answers if answer["stopped"]]
    if stopped:
        raise Stopped(stopped[0])
    sentences = [answer["error"] for answer in answers if answer["error"] is not None]
    if sentences:
        raise UserError(sentences[0]) from failure
    return [answer["value"] for answer in answers]


def _device() -> torch.device:
    """Where collectives take their tensors: the CPU where gloo is among the group's backends, the GPU otherwise."""
    if "gloo" in dist.get_backend_config(_process_group.get()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())

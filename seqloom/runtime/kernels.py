"""Attention runs with the kernel that its plan was made for; which kernels run, the loss head's too, is said.

In: `plan.json`, whose `attention` has the kernel and the rates that the planner reckoned with. The choice itself is `seqloom.ops.kernels`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from seqloom.ops.kernel_rates import parse_rates
from seqloom.ops.kernels import follow_plan

LOGGERS = ("seqloom.ops.kernels", "seqloom.magi.choose", "custom_ops.chunk_softmax")


@contextmanager
def planned_kernels(plan: Mapping[str, Any], device: torch.device, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, attention follows `plan`, and on a GPU `say` is told which kernel runs; a CPU has one kernel, of which nothing is said."""
    with ExitStack() as stack:
        attention = plan.get("attention")  # plans of earlier versions do not tell
        if attention is not None:
            stack.enter_context(follow_plan(attention["kernel"], parse_rates(attention["rates"]), plan["hardware"]))
        if device.type == "cuda":
            stack.enter_context(said(say))
        yield


@contextmanager
def said(say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `say` is told what the log is told of attention kernels."""
    handler = _Handler(say)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


class _Handler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a line on."""
        self._say(("warning: " if record.levelno >= logging.WARNING else "") + record.getMessage())

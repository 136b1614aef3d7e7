"""Compiled blocks: every segment of a block is one function of `torch.compile`, the same for all blocks of a class.

Role in the pipeline: after `storage` has laid out a program's model, `compile_blocks(model, program)` puts a compiled function in place of
each method that a block's forward calls. The modes of a plan (recompute, tiles, offload, spill) act around segments, so they stay as the
program writes them and act around compiled ones; `selective`, which acts inside of one, is compiled with it. So what is kept from forward
to backward is what the plan counts, whatever the compiler fuses inside of a segment, and no mode breaks a graph.

A graph takes the parameters as inputs: 32 equal layers are compiled once. Collectives, attention and the loss head are single operators in
it. A graph break is an error, and so is a segment that would be compiled again and again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from seqloom.errors import UserError
from seqloom.runtime.program import Program

BACKEND = "inductor"
Function = Callable[..., Any]
Choice = Literal["auto", "on", "off"]


def compile_as_asked(choice: Choice, model: nn.Module, program: Program, device: torch.device) -> bool:
    """Compile the blocks if `choice` is "on", or "auto" where the plan counts on it (`FUSED`) and the device is a GPU; says whether."""
    wanted = choice == "on" or (choice == "auto" and program.FUSED and device.type == "cuda")
    if wanted:
        compile_blocks(model, program)
    return wanted


def compile_blocks(model: nn.Module, program: Program, backend: str | Function = BACKEND) -> None:
    """Compile the segments of every block of `model`, when they first run; a block whose forward calls none is one segment itself."""
    for block in model.modules():
        if isinstance(block, program.BLOCKS):
            for name in segment_names(next(kind for kind in program.BLOCKS if isinstance(block, kind))):
                setattr(block, name, Segment(block, name, backend))


def segment_names(block: type[nn.Module]) -> tuple[str, ...]:
    """The methods that the forward of a block calls, in the order of its source; `("forward",)` where it calls none."""
    called = block.forward.__code__.co_names
    methods = [name for name, value in vars(block).items() if inspect.isfunction(value) and name in called]
    return tuple(sorted(methods, key=called.index)) or ("forward",)


class Segment:
    """One segment of one block: called as the method is, it runs the compiled function."""

    def __init__(self, block: nn.Module, name: str, backend: str | Function) -> None:
        self._block, self._name, self._backend = block, name, backend
        self._method: Function = getattr(type(block), name)

    def __call__(self, *args: Any) -> Any:
        """The segment's outputs."""
        return self._run(_compiled(self._method, self._backend), args)

    def inside(self, mode: Function, *options: Any) -> Function:
        """`mode(segment, *args, *options)` as one compiled function of `args`."""
        return lambda *args: self._run(_compiled(self._method, self._backend, mode, options), args)

    def _run(self, function: Function, args: tuple[Any, ...]) -> Any:
        try:
            return function(self._block, *args)
        except torch._dynamo.exc.TorchDynamoException as error:
            kind, reason = type(self._block).__name__.removeprefix("FSDP"), str(error).strip().splitlines()[0]
            raise UserError(f"torch.compile cannot compile {kind}.{self._name} ({reason}): run with --compile_blocks off") from error


@functools.cache
def _compiled(method: Function, backend: str | Function, mode: Function | None = None, options: tuple[Any, ...] = ()) -> Function:
    """The compiled function of a segment: one for all blocks of a class, as `torch.compile` keeps its graphs by code."""
    if mode is None:
        return torch.compile(method, fullgraph=True, dynamic=False, backend=backend)

    def segment(block: nn.Module, *args: Any) -> Any:
        return mode(functools.partial(method, block), *args, *options)

    # A code of its own: graphs are counted by code, and too many of one are an error.
    segment.__code__ = segment.__code__.replace(co_name=f"{method.__name__}_{mode.__name__.strip('_')}")
    return torch.compile(segment, fullgraph=True, dynamic=False, backend=backend)

"""Compiling of blocks: when it is done, what is a segment, how a failure is told; no step makes the host wait for the device."""

from __future__ import annotations

import warnings
from math import prod
from types import SimpleNamespace
from typing import Any

import mlp_lm
import pytest
import torch
from handwritten import filled, variant
from procs import run_ranks
from test_rehearse import write_counted
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from seqloom.errors import UserError
from seqloom.ops.transfer import to_device
from seqloom.runtime import rehearse
from seqloom.runtime.compiled import Segment, compile_as_asked, compile_blocks, segment_names
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.optimizer import build_optimizer
from seqloom.runtime.selective import selective
from seqloom.runtime.step import TrainStep

CPU = torch.device("cpu")
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::unique",
}


class Block(nn.Module):
    """Two segments, one of them before the other in the forward but not in the source."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))

    def last(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def first(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def unused(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Whole(nn.Module):
    """A block that is one segment."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp()


class Broken(nn.Module):
    """A block that cannot be one graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print(x)
        torch._dynamo.graph_break()
        return x


def program(*blocks: type[nn.Module], fused: bool = False) -> Any:
    """What `compile_blocks` reads of a program."""
    return SimpleNamespace(BLOCKS=blocks, FUSED=fused)


def test_segments_are_the_methods_that_the_forward_calls():
    assert set(segment_names(Block)) == {"last", "first"}
    assert segment_names(Whole) == ("forward",)


@pytest.mark.parametrize(
    ("choice", "fused", "device", "compiled"),
    [
        ("auto", True, "cuda", True),
        ("auto", True, "cpu", False),
        ("auto", False, "cuda", False),
        ("on", False, "cpu", True),
        ("on", False, "cuda", True),
        ("off", True, "cuda", False),
    ],
)
def test_blocks_are_compiled_where_the_plan_counts_on_it(choice, fused, device, compiled):
    model = nn.Sequential(Block(), Whole())
    assert compile_as_asked(choice, model, program(Block, fused=fused), torch.device(device)) == compiled
    assert isinstance(model[0].first, Segment) == compiled
    assert not isinstance(model[1].forward, Segment)


def test_one_graph_serves_all_equal_blocks():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model, x = nn.Sequential(*[Block() for _ in range(5)], Whole()), torch.ones(3)
    expected = model(x)
    compile_blocks(model, program(Block, Whole), counter)
    assert torch.equal(model(x), expected)
    assert counter.frame_count == 3


def test_graphs_of_different_segments_do_not_add_up_to_too_many():
    """`torch.compile` counts the graphs of one code, and gives up beyond a limit."""
    torch._dynamo.reset()
    kinds = []
    for count in range(2 * torch._dynamo.config.recompile_limit):
        source = (
            f"def segment(self, x):\n    return (x * {count}).sin()\ndef forward(self, x):\n    return selective(self.segment, x, kept=())"
        )
        names = {"selective": selective}
        exec(source, names)
        kinds.append(type(f"Kind{count}", (nn.Module,), {name: names[name] for name in ("segment", "forward")}))
    model, x = nn.Sequential(*[kind() for kind in kinds]), torch.ones(3, requires_grad=True)
    expected = model(x)
    compile_blocks(model, program(*kinds), "eager")
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for kind in kinds:
        kind.forward = lambda self, x: self.segment(x)
    assert torch.equal(model(x), expected)


def test_what_cannot_be_compiled_is_told_in_a_sentence():
    model = nn.Sequential(Broken())
    compile_blocks(model, program(Broken), "eager")
    with pytest.raises(UserError, match=r"cannot compile Broken\.forward \(.+\): run with --compile_blocks off"):
        model(torch.ones(2))


def test_a_rehearsal_runs_compiled_blocks(tmp_path):
    eager, compiled = (rehearse.rehearse(write_counted(tmp_path, precision="fp32"), 1, CPU, 1, choice) for choice in ("auto", "on"))
    assert (eager.compiled, compiled.compiled) == (False, True)
    assert compiled.loss == pytest.approx(eager.loss, rel=1e-3)  # one step later


class Waits(TorchDispatchMode):
    """Counts the operators that make the host wait for a GPU: those whose result it needs to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITS:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def _steps(rank: int, world_size: int, folder: str) -> dict[str, list[str]]:
    found = {}
    for name in ("sp", "tp", "mixed", "segments"):
        changes = {"MODES": ("selective", "offload")} if name == "segments" else {}
        plan = variant(f"{folder}/{rank}/{name}", name, **changes)
        mesh = build_mesh(plan.MESH, world_size // prod(plan.MESH.values()), "cpu")
        model = filled(plan, mesh, mlp_lm.build(name in ("tp", "mixed")).state_dict())
        step = TrainStep(model, plan, mesh, build_optimizer(model, lr=1e-3), CPU, 1.0)
        step([mlp_lm.batch(0), mlp_lm.batch(1)])
        with Waits() as waits:
            step([mlp_lm.batch(2), mlp_lm.batch(3)])
        found[name] = waits.seen
    return found


def test_nothing_in_a_step_makes_the_host_wait(tmp_path):
    for found in run_ranks(_steps, 4, str(tmp_path)):
        assert found == {"sp": [], "tp": [], "mixed": [], "segments": []}


def test_what_makes_the_host_wait_is_seen():
    with Waits() as waits:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert waits.seen == ["aten::_local_scalar_dense", "aten::nonzero"]


def test_waits_on_a_gpu_are_counted_as_pytorch_tells_them(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run() -> None:
        for text in ("called a synchronizing CUDA operation", "something else", "called a synchronizing CUDA operation"):
            warnings.warn(text, UserWarning, stacklevel=1)

    assert rehearse.host_waits(run) == 2
    assert modes == ["warn", 0]


def test_copies_to_a_gpu_go_through_pinned_memory():
    asked = []
    pinned = SimpleNamespace(to=lambda device, non_blocking: asked.append((device, non_blocking)))
    to_device(SimpleNamespace(pin_memory=lambda: pinned), torch.device("cuda", 0))
    assert asked == [(torch.device("cuda", 0), True)]
    here = torch.ones(2)
    assert to_device(here, CPU) is here

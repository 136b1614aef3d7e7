"""Graphs to plan: small ones written by hand with the real annotation rules, captured tiny models, and machines of any speed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from models import FAMILIES
from torch import Tensor

from seqloom.capture import capture
from seqloom.capture.architecture import resolve_config
from seqloom.cost.hardware import GIB, Hardware, load_hardware
from seqloom.graph import BLOCK, Graph, Node, Ref, Value, verify
from seqloom.ops import register_op
from seqloom.ops.rules import bind
from seqloom.plan.regions import Regions, build_regions

DTYPE = torch.bfloat16


class Sketch:
    """Writes one graph node by node; shapes of outputs come from the annotations."""

    def __init__(self, name: str):
        self.name = name
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.inputs: list[str] = []

    def input(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = DTYPE, grad: bool = False) -> str:
        self.values[name] = Value(name, shape, dtype, "input", requires_grad=grad)
        self.inputs.append(name)
        return name

    def parameter(self, name: str, shape: tuple[int, ...]) -> str:
        self.values[name] = Value(name, shape, DTYPE, "parameter", name.replace("_", "."), True)
        return name

    def op(self, op: str, *args, module: str = "") -> str:
        refs = tuple(Ref(a) if isinstance(a, str) else a for a in args)
        bound = bind(op, refs, {}, self.values)
        name = f"{self.name.lower()}_{len(self.nodes)}"
        grad = any(self.values[a].requires_grad for a in args if isinstance(a, str))
        shape = bound.shape(bound.outputs[0])
        self.values[name] = Value(name, shape, DTYPE, requires_grad=grad)
        self.nodes.append(Node(op, refs, (), (name,), bound, module, "Module"))
        return name

    def linear(self, x: str, out: int, module: str = "") -> str:
        weight = self.parameter(f"{self.name.lower()}_w{len(self.nodes)}", (out, self.values[x].shape[-1]))
        return self.op("aten.linear.default", x, weight, module=module)

    def call(self, block: Graph, *args: str, prefix: str = "") -> str:
        name = f"{self.name.lower()}_{len(self.nodes)}"
        self.values[name] = dataclasses.replace(block.values[block.outputs[0]], name=name)
        self.nodes.append(Node(BLOCK + block.name, tuple(map(Ref, args)), (), (name,), None, prefix))
        return name

    def graph(self, output: str, *blocks: Graph) -> Graph:
        graph = Graph(self.name, self.values, tuple(self.nodes), tuple(self.inputs), (output,), {b.name: b for b in blocks})
        verify(graph)
        return graph


@functools.cache
def tiny(family: str = "llama", layers: int = 3, batch_size: int = 2, seq_len: int = 16) -> Regions:
    """Regions of a captured tiny model of a family of `tests/models.py`."""
    return build_regions(capture(FAMILIES[family](layers), batch_size=batch_size, seq_len=seq_len, dtype=DTYPE).graph)


@functools.cache
def real(name: str, seq_len: int, batch_size: int = 1) -> Regions:
    """Regions of a model of `configs/models` at its real size."""
    return build_regions(capture(resolve_config(name), batch_size=batch_size, seq_len=seq_len, dtype=DTYPE).graph)


def scaled(
    base: str = "h100-80gb", *, links: float = 1.0, latency: float = 1.0, arithmetic: float = 1.0, bandwidth: float = 1.0
) -> Hardware:
    """A known machine with faster or slower parts."""
    hardware = load_hardware(base)
    return dataclasses.replace(
        hardware,
        peak_flops={name: peak * arithmetic for name, peak in hardware.peak_flops.items()},
        memory_bandwidth=hardware.memory_bandwidth * bandwidth,
        links=tuple(
            dataclasses.replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * links, latency_s=link.latency_s * latency)
            for link in hardware.links
        ),
    )


def with_usable_bytes(hardware: Hardware, nbytes: float) -> Hardware:
    """The machine with exactly this much memory for a plan."""
    return dataclasses.replace(hardware, memory_bytes=int(nbytes), allocator_margin=0.0)


def slow_toy(speed: float = 1.0, host: float = 1.0, overlap: float = 1.0) -> Hardware:
    """A machine on which operators of a few kilobytes take seconds, so that every term of the cost counts and ties (nanoseconds) do not.

    `speed` of the links and `host` of the copies to host memory are beside the device's; products of 8 run at twice the rate of those of 2.
    """
    hardware = scaled(links=3e-10 * speed, latency=100.0, arithmetic=1e-11, bandwidth=1e-10)
    rates = dataclasses.replace(hardware.rates, matmul=((2, 0.35), (8, 0.7)), overlap=overlap)
    host_link = hardware.memory_bandwidth * 0.1 * host
    return dataclasses.replace(
        hardware, rates=rates, host_link_bandwidth=host_link, launch_overhead_s=1e-3, memory_bytes=GIB, allocator_margin=0.0
    )


def _toy_workspace(sizes: Mapping[str, Any]) -> int:
    return 8 * min(sizes["chunk"], sizes["b"] * sizes["l"]) * sizes["n"]


@register_op(
    "b l d^, n^ d^ -> b l",
    flops=lambda sizes: 2 * sizes["b"] * sizes["l"] * sizes["d"] * sizes["n"],
    saved=("x", "weight"),
    workspace=_toy_workspace,
    side=lambda sizes: min(sizes["chunk"], sizes["b"] * sizes["l"], sizes["d"], sizes["n"]),
    choices={"chunk": (2, 8)},
)
def toy_head(x: Tensor, weight: Tensor, chunk: int = 4) -> Tensor:
    """A head whose chunk is free: `[b, l, d]`, `[n, d]` -> the largest logit of each token, `[b, l]`."""
    return torch.cat([(rows @ weight.t()).amax(-1) for rows in x.flatten(0, 1).split(chunk)]).view(x.shape[:2])

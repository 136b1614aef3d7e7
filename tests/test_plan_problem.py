"""Optimality: on small random graphs the mixed-integer program finds exactly what trying every combination finds."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from plan_brute_force import BruteForce
from plan_samples import Sketch, slow_toy

from seqloom.cost.hardware import GIB
from seqloom.graph import Graph, Value
from seqloom.plan.budget import MEMORY_TOLERANCE, add_storage
from seqloom.plan.memory import Memory, add_memory
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import _decisions
from seqloom.plan.space import Axis
from seqloom.plan.storage import Storage, storages

MOST = 180  # combinations of strategies of one example, each with every number of layers per mode
GRAPHS, BATCHES = 312, 12
MESHES = [
    (Axis(2, "sum"),),
    (Axis(2, "split"),),
    (Axis(4, "sum"),),
    (Axis(4, "split"),),
    (Axis(2, "sum"), Axis(2, "split")),
    (Axis(2, "sum"), Axis(2, "sum")),
    (Axis(2, "split"), Axis(2, "split")),
    (Axis(2, "sum"), Axis(2, "sum"), Axis(2, "split")),
]


# --- random graphs and machines ------------------------------------------------------------------------------------------------------


def random_body(rng: random.Random, sketch: Sketch, x: str, others: list[str], length: int) -> str:
    """A chain with diamonds: every node reads the last value; sums and products read an earlier one of its shape too."""
    made = [x, *others]
    for _ in range(length):
        shape, module = sketch.values[x].shape, rng.choice(["a", "b", "c"])
        partners = [name for name in made if name != x and sketch.values[name].shape == shape]
        op = rng.choice(["linear", "linear", "silu", "add", "mul", "attention"])
        if op == "linear":
            x = sketch.linear(x, rng.choice([2, 4, 5, 8, 12]), module)
        elif op == "attention" and rng.random() < 0.5 and shape[-1] == 8:
            x = random_attention(sketch, x, module)
        elif op in ("silu", "attention") or not partners:
            x = sketch.op("aten.silu.default", x, module=module)
        else:
            x = sketch.op(f"aten.{op}.Tensor", x, rng.choice(partners), module=module)
        made.append(x)
    return x


def random_attention(sketch: Sketch, x: str, module: str) -> str:
    """Two heads that look at themselves, with the views around them."""
    batch, length, width = sketch.values[x].shape
    heads = sketch.op(
        "aten.transpose.int", sketch.op("aten.view.default", x, (batch, length, 2, width // 2), module=module), 1, 2, module=module
    )
    out = sketch.op("seqloom.ops.attention:attention", heads, heads, heads, 0.5, module=module)
    return sketch.op(
        "aten.reshape.default", sketch.op("aten.transpose.int", out, 1, 2, module=module), (batch, length, width), module=module
    )


def random_graph(rng: random.Random) -> Graph:
    """Embedding, one to three calls of a block or a plain chain, sometimes a tied or a chunked head, the sum as loss."""
    batch, length, width = rng.choice([1, 1, 2, 4]), rng.choice([3, 4, 6, 8]), rng.choice([3, 4, 8, 8])
    outer = Sketch("Model")
    ids = outer.input("ids", (batch, length), torch.int64)
    x = outer.op("aten.embedding.default", outer.parameter("embed", (rng.choice([7, 12]), width)), ids)
    extra = [outer.input("extra", (batch, length, width))] if rng.random() < 0.2 else []
    blocks = []
    if rng.random() < 0.85:
        block = random_block(rng, outer.values[x], [outer.values[name] for name in extra])
        blocks.append(block)
        for call in range(rng.choice([1, 2, 2, 3, 3])):
            x = outer.call(block, x, *extra, prefix=f"layers.{call}")
    else:
        x = random_body(rng, outer, x, extra, rng.choice([1, 2, 3]))
    if rng.random() < 0.2 and outer.values[x].shape[-1] == width:
        x = outer.op("aten.linear.default", x, "embed", module="head")
    elif rng.random() < 0.2:
        x = outer.op("plan_samples:toy_head", x, outer.parameter("head", (6, outer.values[x].shape[-1])), module="head")
    return outer.graph(outer.op("aten.sum.default", x, module="loss"), *blocks)


def random_block(rng: random.Random, x: Value, extra: list[Value]) -> Graph:
    sketch = Sketch("Block")
    start = sketch.input("x", x.shape, grad=True)
    others = [sketch.input(f"extra{i}", value.shape) for i, value in enumerate(extra)]
    base = start
    for name in others:  # every input is read: discovery finds no others
        base = sketch.op("aten.mul.Tensor", base, name, module="a")
    out = random_body(rng, sketch, base, others, rng.choice([1, 2, 3, 3]) - len(others))
    if sketch.values[out].shape != x.shape:
        out = sketch.linear(out, x.shape[-1], "d")
    elif out == start:
        out = sketch.op("aten.silu.default", out, module="d")
    return sketch.graph(out)


def random_hardware(rng: random.Random):
    hardware = slow_toy(rng.choice([0.03, 0.3, 1.0, 10.0]), rng.choice([0.1, 1.0, 10.0]), rng.choice([1.0, 1.0, 0.5, 0.0]))
    return dataclasses.replace(hardware, host_memory_bytes=rng.choice([0, GIB, GIB, rng.randrange(64, 2048)]))


def random_request(rng: random.Random, ranks: int) -> Request:
    return Request(
        ranks,
        rng.choice([1, 1, 2]),
        rng.choice([1, 1, 4]),
        random_hardware(rng),
        2,
        recompute=rng.choice([None, None, None, None, False, True]),
        open_constants=rng.random() < 0.8,
        time_limit_s=60.0,
        gap=0.0,
    )


def small(brute: BruteForce) -> bool:
    """Whether everything can be tried in a moment."""
    if not brute.feasible or brute.count > MOST:
        return False
    return all(brute.rows(region) <= 1000 for region in brute.regions.parts.values()) and 1 < brute.whole < 1e7


def example(seed: int) -> tuple[BruteForce, Storage, np.ndarray, random.Random]:
    """A random graph on a random machine with a random storage, small enough to try everything, and its frontier. Of every three seeds
    one gives an example in which a slower combination needs less memory than the fastest.
    """
    rng = random.Random(seed)
    while True:
        regions, axes = build_regions(random_graph(rng)), rng.choice(MESHES)
        asked = random_request(rng, int(np.prod([axis.size for axis in axes])))
        machine = Machine(asked.hardware, axes, asked.dp)
        brute = BruteForce(regions, machine, asked)
        if small(brute):
            storage = rng.choice(storages(machine, 2, asked.accumulation, None))
            frontier = brute.frontier(storage)
            if len(frontier) > 1 or seed % 3:
                return brute, storage, frontier, rng


# --- one mesh and one storage --------------------------------------------------------------------------------------------------------


def budgets_of(frontier: np.ndarray, rng: random.Random) -> list[float]:
    """Plenty, just enough for one slower combination (where there is one) and too little for any."""
    peaks = frontier[:, 1]
    found = [2.0 * peaks.max(), 0.999 * peaks.min()]
    return found + [1.0001 * rng.choice(list(peaks[1:]))] if len(peaks) > 1 else found


def best_within(frontier: np.ndarray, budget: float) -> float | None:
    """Seconds of the fastest combination that fits."""
    fitting = frontier[frontier[:, 1] <= budget * (1 - MEMORY_TOLERANCE), 0]
    return float(fitting.min()) if len(fitting) else None


def check_budget(brute: BruteForce, memory: Memory, storage: Storage, frontier: np.ndarray, budget: float) -> None:
    """The program's optimum, its value and its bytes are those of brute force."""
    best = best_within(frontier, budget)
    solution = add_storage(memory, storage).solve(relaxed=False, time_limit=60, gap=0.0)
    assert (solution is None) == (best is None)
    if solution is not None:
        seconds, nbytes = brute.of_decisions(_decisions(memory.problem, storage, solution))
        assert nbytes <= budget
        assert seconds == pytest.approx(best, rel=1e-6), "no other combination that fits is faster"
        assert solution.objective == pytest.approx(seconds, rel=1e-6), "its objective is what its choices take"


def check(seed: int) -> bool:
    """Solve one example under every budget; whether one of them excluded the fastest combination and left another."""
    brute, storage, frontier, rng = example(seed)
    problem = build_problem(brute.regions, brute.machine, brute.request)
    assert problem.feasible == brute.feasible
    budgets: Sequence[float] = budgets_of(frontier, rng) if len(frontier) else [float(GIB)]
    for budget in budgets:
        try:
            check_budget(brute, add_memory(problem, budget), storage, frontier, budget)
        except AssertionError as error:
            raise AssertionError(f"example {seed}, storage {storage}, budget {budget}, {len(frontier)} on the frontier") from error
    return len(budgets) > 2


@pytest.mark.parametrize("batch", range(BATCHES))
def test_the_program_finds_what_trying_everything_finds(batch):
    """312 graphs in all; in a third of them at least some budget excludes the fastest combination and leaves another."""
    size = GRAPHS // BATCHES
    tight = [check(seed) for seed in range(size * batch, size * (batch + 1))]
    print(f"{sum(tight)} of {len(tight)} graphs under memory that excludes the fastest combination")
    assert GRAPHS >= 300 and 3 * sum(tight) >= len(tight), "memory must bind in a third of the examples"

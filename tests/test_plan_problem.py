"""Optimality: on small random graphs the mixed-integer program finds exactly what trying every combination finds."""

from __future__ import annotations

import random

import pytest
import torch
from plan_brute_force import BruteForce
from plan_samples import Sketch, slow_toy

from seqloom.graph import Graph, Value
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.space import Axis
from seqloom.plan.storage import Storage

MOST = 2500  # combinations of one example
MESHES = [
    (Axis(2, "sum"),),
    (Axis(2, "split"),),
    (Axis(4, "sum"),),
    (Axis(4, "split"),),
    (Axis(2, "sum"), Axis(2, "split")),
    (Axis(2, "sum"), Axis(2, "sum")),
    (Axis(2, "split"), Axis(2, "split")),
]


def random_body(rng: random.Random, sketch: Sketch, x: str, others: list[str], length: int) -> str:
    """A chain with diamonds: every node reads the last value; sums and products read an earlier one of its shape too."""
    made = [x, *others]
    for _ in range(length):
        shape, module = sketch.values[x].shape, rng.choice(["a", "b", "c"])
        partners = [name for name in made if name != x and sketch.values[name].shape == shape]
        op = rng.choice(["linear", "linear", "silu", "add", "mul"])
        if op == "linear":
            x = sketch.linear(x, rng.choice([2, 4, 5, 8, 12]), module)
        elif op == "silu" or not partners:
            x = sketch.op("aten.silu.default", x, module=module)
        else:
            x = sketch.op(f"aten.{op}.Tensor", x, rng.choice(partners), module=module)
        made.append(x)
    return x


def random_graph(rng: random.Random) -> Graph:
    """Embedding, one or two calls of a block or a plain chain, sometimes a tied head, the sum as loss: 3 to 6 nodes."""
    batch, length, width = rng.choice([1, 1, 2, 4]), rng.choice([3, 4, 6, 8]), rng.choice([3, 4, 8])
    outer = Sketch("Model")
    ids = outer.input("ids", (batch, length), torch.int64)
    x = outer.op("aten.embedding.default", outer.parameter("embed", (rng.choice([7, 12]), width)), ids)
    extra = [outer.input("extra", (batch, length, width))] if rng.random() < 0.3 else []
    blocks = []
    if rng.random() < 0.7:
        block = random_block(rng, outer.values[x], [outer.values[name] for name in extra])
        blocks.append(block)
        for call in range(rng.choice([1, 2, 3])):
            x = outer.call(block, x, *extra, prefix=f"layers.{call}")
    else:
        x = random_body(rng, outer, x, extra, rng.choice([1, 2, 3]))
    if rng.random() < 0.3 and outer.values[x].shape[-1] == width:
        x = outer.op("aten.linear.default", x, "embed", module="head")
    return outer.graph(outer.op("aten.sum.default", x, module="loss"), *blocks)


def random_block(rng: random.Random, x: Value, extra: list[Value]) -> Graph:
    sketch = Sketch("Block")
    start = sketch.input("x", x.shape, grad=True)
    others = [sketch.input(f"extra{i}", value.shape) for i, value in enumerate(extra)]
    base = start
    for name in others:  # every input is read: discovery finds no others
        base = sketch.op("aten.mul.Tensor", base, name, module="a")
    out = random_body(rng, sketch, base, others, rng.choice([1, 2, 3]) - len(others))
    if sketch.values[out].shape != x.shape:
        out = sketch.linear(out, x.shape[-1], "d")
    elif out == start:
        out = sketch.op("aten.silu.default", out, module="d")
    return sketch.graph(out)


def example(seed: int) -> tuple[BruteForce, random.Random]:
    """A random graph on a random machine that is small enough to try everything."""
    rng = random.Random(seed)
    while True:
        regions = build_regions(random_graph(rng))
        machine = Machine(slow_toy(rng.choice([0.03, 0.3, 1.0, 10.0])), rng.choice(MESHES), rng.choice([1, 2]))
        storage = Storage(rng.choice([0, 1, 3]), 2, rng.choice([1, 1, 4]))
        brute = BruteForce(regions, machine, storage, rng.choice([None, None, None, False, True]))
        if 1 < brute.count <= MOST:
            return brute, rng


def optimum(brute: BruteForce, regions: Regions, budget: float) -> float | None:
    problem = build_problem(regions, brute.machine, brute.storage, budget, brute.allow_recompute)
    assert problem.feasible
    solution = problem.program.solve(relaxed=False, time_limit=60, gap=1e-7)
    return None if solution is None else solution.objective


def check(seed: int) -> None:
    """The optimum with plenty of memory, with just enough for some slower combination, and with too little for any."""
    brute, rng = example(seed)
    priced = brute.priced()
    fastest = min(priced)
    budgets = [2 * max(nbytes for _, nbytes in priced), rng.choice(priced)[1]]
    leaner = [nbytes for _, nbytes in priced if nbytes < fastest[1]]
    budgets += [rng.choice(leaner)] if leaner else []
    for budget in budgets:
        best = min(seconds for seconds, nbytes in priced if nbytes <= budget)
        assert optimum(brute, brute.regions, budget * (1 + 2e-5)) == pytest.approx(best, rel=1e-4), (seed, budget, len(priced))
    assert optimum(brute, brute.regions, 0.999 * min(nbytes for _, nbytes in priced)) is None


@pytest.mark.parametrize("batch", range(12))
def test_the_program_finds_what_trying_everything_finds(batch):
    for seed in range(10 * batch, 10 * batch + 10):
        check(seed)

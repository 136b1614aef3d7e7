"""Plans nobody wrote down: chosen by the planner for real models and machines, or drawn at random. All give the original's gradients.

A chosen plan's decisions are laid over a small model of the same structure, as `python -m seqloom verify` does. Random plans take any
strategy that the search space holds, cheap or not, so that every reshard and every mix of placements is seen; fp64, 1e-9 relative.
"""

from __future__ import annotations

import dataclasses
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from parity_cases import CONFIGS, SEQ_LEN, VOCAB, Case, Data, Job, Split, captured, job, run_cases, run_jobs

from seqloom.capture import capture
from seqloom.capture.architecture import resolve_config
from seqloom.cost.hardware import load_hardware
from seqloom.emit.program import program_source
from seqloom.emit.request import DEFAULT_LOSS
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.problem import build_problem
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import Decisions, _decisions, solve
from seqloom.plan.space import Axis
from seqloom.plan.storage import storages
from seqloom.runtime.parity import Difference
from seqloom.runtime.program import PROGRAM_FILE, load_program
from seqloom.runtime.shrink import shrink
from seqloom.runtime.verify import SHORT, write_program

pytestmark = pytest.mark.timeout(1200)
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Chosen:
    """A model and a machine of real sizes; the planner chooses, within `force` if there is one."""

    model: str
    batch: int
    seq_len: int
    ranks: int
    units: int = 1
    hardware: str = "h100-80gb"
    memory_gib: float | None = None
    force: str | None = None

    @property
    def id(self) -> str:
        memory = f"-{self.memory_gib:g}gib" if self.memory_gib else ""
        return (
            f"{self.model}-{self.batch}x{self.seq_len}-{self.ranks}ranks-{self.units}units-{self.hardware}{memory}-{self.force or 'free'}"
        )


CHOSEN = (
    Chosen("llama3_1b", 1, 8192, 2),
    Chosen("llama3_1b", 1, 8192, 4),
    Chosen("llama3_1b", 1, 8192, 2, units=2),
    Chosen("llama3_1b", 1, 8192, 2, memory_gib=16),
    Chosen("llama3_1b", 4, 1024, 4),
    Chosen("llama3_1b", 1, 256, 2, units=2),
    Chosen("llama3_1b", 1, 256, 4),
    Chosen("llama3_1b", 1, 256, 4, hardware="cpu", memory_gib=80),
    Chosen("llama3_8b", 1, 8192, 4, force="sp2,tp2"),
    Chosen("llama3_8b", 1, 8192, 4, force="sp2,tp_plain2"),
    Chosen("qwen3_0_6b", 2, 8192, 4),
    Chosen("qwen3_0_6b", 2, 8192, 4, force="dp2,tp_sp2"),
    Chosen("gpt2", 1, 1024, 4),
)
FREE = tuple(
    Case(model, split, None, None, accumulation)
    for model in CONFIGS
    for split, accumulation in (
        (Split(None, 2), 1),
        (Split(None, 2, batch=2), 2),
        (Split(None, 4, batch=2), 1),
        (Split(None, 2, units=2), 1),
    )
)
TIED = tuple(
    Case("llama_tied", split, zero, None)
    for split in (Split("tp2", 2), Split("sp2,tp2", 4), Split("dp2,tp2", 4, batch=2), Split("sp2", 2, units=2))
    for zero in (0, 1, 3)
)


@dataclass(frozen=True)
class Drawn:
    """A random plan: roles of the axes (`sum` or `split`, two ranks each), batch and seed."""

    model: str
    roles: tuple[str, ...]
    batch: int
    seed: int

    @property
    def id(self) -> str:
        return f"{self.model}-{'-'.join(self.roles)}-batch{self.batch}-{self.seed}"


MESHES = (("sum",), ("split",), ("sum", "sum"), ("sum", "split"), ("split", "split"))
DRAWN = tuple(
    Drawn(model, roles, batch=1 + seed % 2, seed=seed) for model in ("llama", "qwen3", "gpt2") for roles in MESHES for seed in range(2)
)


@cache
def _regions(model: str, batch: int, seq_len: int) -> Regions:
    return build_regions(capture(_config(model), batch_size=batch, seq_len=seq_len, dtype=torch.bfloat16).graph)


def _config(model: str):
    config = resolve_config(model)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


@cache
def choose(case: Chosen) -> Decisions:
    """The planner's decisions at real size."""
    hardware = load_hardware(case.hardware)
    hardware = hardware if case.memory_gib is None else hardware.with_memory_gib(case.memory_gib)
    return solve(_regions(case.model, case.batch, case.seq_len), Request(case.ranks, case.units, 1, hardware, 2, case.force))[0]


def chosen_program(case: Chosen, place: Path) -> Path:
    """The folder of the program in which the decisions are laid over a shrunken model."""
    folder = place / case.id
    if not folder.exists():
        folder.mkdir()
        small = shrink(_config(case.model), case.ranks)
        write_program(small, choose(case), folder, batch=case.batch, seq_len=_short(case), loss=DEFAULT_LOSS)
    return folder


def _short(case: Chosen) -> int:
    return SHORT * max(case.ranks, 4)


def chosen_job(case: Chosen, place: Path) -> Job:
    """A chosen plan's program and its data."""
    small = shrink(_config(case.model), case.ranks)
    data = Data(small.vocab_size, _short(case), case.batch, 1, case.units)
    return job(case.id, chosen_program(case, place), f"{case.model}-{case.ranks}", small, data)


def draw(case: Drawn) -> Decisions:
    """A plan of the search space: the one that is best when every variable has a random cost."""
    regions = captured(case.model, case.batch)[1]
    generator = random.Random(f"{case.model} {case.roles} {case.seed}")
    machine = Machine(load_hardware("cpu"), tuple(Axis(2, role) for role in case.roles), 1)
    hardware = dataclasses.replace(load_hardware("cpu"), host_memory_bytes=2**40)
    problem = build_problem(regions, machine, Request(0, 1, 1, hardware, 8))
    storage = generator.choice([storage for zero in range(4) for storage in storages(machine, 8, 1, zero)])
    program = problem.program
    for columns in problem.layers.values():
        for column in columns.values():
            program.upper[column] = 2.0  # of three layers: no segment does the same in all of them
    program.costs = [generator.random() if binary else 0.0 for binary in program.integer]
    solution = program.solve(relaxed=False, time_limit=30, gap=1.0)  # far from best is random too, and found at once
    assert solution is not None
    return _decisions(problem, storage, solution)


@cache
def drawn_text(case: Drawn) -> str:
    graph, regions = captured(case.model, case.batch)
    decisions = draw(case)
    plan = realize(regions, decisions, Machine(load_hardware("cpu"), decisions.axes, 1))
    return program_source(plan, graph.model_class, graph.tied, "Drawn at random.")


def drawn_job(case: Drawn, place: Path) -> Job:
    """A random plan's program and its data."""
    folder = place / case.id
    folder.mkdir()
    (folder / PROGRAM_FILE).write_text(drawn_text(case))
    return job(case.id, folder, case.model, CONFIGS[case.model](), Data(VOCAB, SEQ_LEN, case.batch, 1 + case.seed % 2, 1))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest, place: Path) -> dict[str, Difference]:
    """What the programs of all selected tests give, by case id."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    cases = [row["case"] for row in params if "case" in row]
    by_world: dict[int, list[Job]] = {}
    for case in cases:
        if isinstance(case, Chosen):
            by_world.setdefault(case.ranks * case.units, []).append(chosen_job(case, place))
        elif isinstance(case, Drawn):
            by_world.setdefault(2 ** len(case.roles), []).append(drawn_job(case, place))
    return run_cases([case for case in cases if isinstance(case, Case)]) | run_jobs(by_world)


@pytest.mark.parametrize("case", [*CHOSEN, *FREE, *TIED, *DRAWN], ids=lambda case: case.id)
def test_loss_and_every_gradient_are_the_original_models(case: Chosen | Case | Drawn, differences: dict[str, Difference]) -> None:
    difference = differences[case.id]
    assert difference.loss < TOLERANCE
    assert difference.gradient < TOLERANCE, difference.parameter


def kinds(folder: Path) -> frozenset[str]:
    """What a program splits: rows of the batch (dp), the sequence (sp), weights (tp)."""
    program = load_program(folder)
    rows, columns = program.INPUTS["labels"]
    split = any(placement.is_shard() for row in program.PLACEMENTS.values() for placement in row.values())
    return frozenset(name for name, used in (("dp", rows), ("sp", columns), ("tp", split)) if used)


@pytest.fixture(scope="module")
def choices(place: Path) -> dict[str, frozenset[str]]:
    """What the planner splits, by case id, where nothing is forced."""
    return {case.id: kinds(chosen_program(case, place)) for case in CHOSEN if case.force is None}


def test_the_planner_chooses_each_way_to_split_where_it_is_best(choices: dict[str, frozenset[str]]) -> None:
    """Long sequences, large batches and small steps have different best plans; no template would give all of them."""
    found = set(choices.values())
    assert {frozenset({"dp"}), frozenset({"sp"}), frozenset({"tp"})} <= found
    assert any(len(kind) > 1 for kind in found)


def test_little_memory_makes_the_planner_recompute() -> None:
    kinds = lambda decisions: {mode.kind for segments in decisions.modes.values() for counts in segments for mode, _ in counts}  # noqa: E731
    assert kinds(choose(Chosen("llama3_1b", 1, 8192, 2, memory_gib=16))) & {"recompute", "selective"}
    assert kinds(choose(Chosen("llama3_1b", 1, 8192, 2))) == {"keep"}


@pytest.mark.parametrize("force", ["sp2,tp2", "sp2,tp_plain2"])
def test_real_sizes_split_heads_by_both_axes(force: str) -> None:
    """At the size of a toy the planner repeats attention over `tp`; at real sizes that would be a waste."""
    decisions = choose(Chosen("llama3_8b", 1, 8192, 4, force=force))
    assert all(axis.size == 2 for axis in decisions.axes)
    assert any(len(set(split)) == 1 and split[0] for parts in decisions.splits.values() for split in parts)


def test_random_plans_use_reshards_of_every_kind() -> None:
    reshards = r"= (all_gather|all_to_all|all_reduce|reduce_scatter|shard|sum_grad)\((.*)\)"
    found = {(name, "partial_grad=True" in text) for case in DRAWN for name, text in re.findall(reshards, drawn_text(case))}
    assert {name for name, _ in found} == {"all_gather", "all_to_all", "all_reduce", "reduce_scatter", "shard", "sum_grad"}
    assert {name for name, partial in found if partial} >= {"all_gather", "shard"}


def test_random_plans_use_every_mode() -> None:
    calls = ("checkpoint(", "selective(", "checkpoint_tiles(", "offload(", "spill(", "query_start=")
    assert {call for call in calls if any(call in drawn_text(case) for case in DRAWN)} == set(calls)
    assert {re.search(r"ZERO = (\d)", drawn_text(case))[1] for case in DRAWN} == set("0123")


def test_random_plans_differ() -> None:
    texts = {drawn_text(case) for case in DRAWN}
    assert len(texts) == len(DRAWN)

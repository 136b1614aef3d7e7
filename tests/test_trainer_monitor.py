"""What watches a run: steps that stand out, slow ranks, the profile with the program's names, memory that runs out, Weights & Biases."""

import gzip
import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from procs import run_ranks
from torch import nn

from seqloom.errors import UserError
from seqloom.trainer import memory, stragglers
from seqloom.trainer.config import steps_of
from seqloom.trainer.memory import Held, MemoryRecorder, verdict
from seqloom.trainer.profile import StepProfiler, name_functions
from seqloom.trainer.spikes import LEAST, WINDOW, Note, Unusual
from seqloom.trainer.stragglers import Stragglers, slow_ranks
from seqloom.trainer.wandb_log import open_wandb

CPU = torch.device("cpu")

# --- steps that stand out -------------------------------------------------------------------------------------------------------------


def watched(steps, noise=0.001):
    """An `Unusual` that has seen a run like many."""
    unusual = Unusual()
    for step in range(steps):
        sign = 1 if step % 2 else -1
        assert unusual(3.0 + sign * noise, 1.0 + sign * noise, 0.5 + sign * noise) == []
    return unusual


def test_a_spike_is_told_with_what_was_before():
    unusual = watched(40)
    assert unusual(4.0, 1.0, 0.5) == [Note("spike", "loss 4 against 3 before")]
    assert unusual(3.0, 9.0, 0.5)[0].text.startswith("gradient norm 9 against")
    assert unusual(3.0, 1.0, 2.0) == [Note("straggler", "the step took 2 s against 0.5 s before")]
    assert len(unusual(5.0, 9.0, 2.0)) == 3


def test_the_first_steps_never_stand_out():
    unusual = Unusual()
    for step in range(LEAST):
        assert unusual(10.0**step, 10.0**step, 10.0**step) == []


def test_a_new_level_is_soon_usual():
    unusual = watched(WINDOW)
    told = [bool(unusual(6.0, 1.0, 0.5)) for _ in range(WINDOW)]
    assert told[0]
    assert not any(told[WINDOW // 2 + 2 :])


@given(st.lists(st.floats(1.0, 1.04), min_size=LEAST, max_size=80))
def test_small_changes_never_stand_out(losses):
    unusual = Unusual()
    assert not any(unusual(loss, 1.0, 1.0) for loss in losses)


def test_asking_whether_a_step_is_slow_changes_nothing():
    unusual = watched(40)
    assert unusual.slow(2.0)
    assert not unusual.slow(0.5)
    assert unusual(3.0, 1.0, 0.5) == []


# --- slow ranks -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "ranks"),
    [([1.0, 1.0], []), ([1.0, 1.6], [1]), ([1.6, 1.0], [0]), ([1.0, 1.1, 0.9, 3.0], [3]), ([5.0], []), ([1.0, 2.0, 2.0, 2.0], [])],
)
def test_slow_ranks(seconds, ranks):
    assert slow_ranks(seconds) == ranks


def _slow(rank, world_size, shared):
    """Rank 1's device is slow, or rank 0 waits for data."""
    watch = Stragglers(CPU)
    watch._probe = lambda: 2.5 if rank == 1 else 1.0
    quiet = watch(step=6, slow=False, waited=0.0, seconds=1.0)
    first = watch(step=stragglers.FIRST, slow=False, waited=0.0, seconds=1.0)
    watch._probe = lambda: 1.0
    waits = watch(step=7, slow=True, waited=0.8 if rank == 0 else 0.0, seconds=1.0)
    passing = iter([9.0 if rank else 1.0, 1.0])
    watch._probe = lambda: next(passing)
    once = watch(step=8, slow=True, waited=0.0, seconds=1.0)
    return *([note.text for note in notes] for notes in (quiet, first, waits, once)), Stragglers(CPU)._probe() > 0


def test_a_slow_rank_is_named_with_its_cause():
    answers = run_ranks(_slow, 2, None)
    assert answers[0] == answers[1]
    assert answers[0] == ([], ["rank 1 computes 2.5x slower than the others"], ["rank 0 waited 0.80 s for data"], [], True)


# --- profile ----------------------------------------------------------------------------------------------------------------------------


def made_program():
    """A module like an emitted program: a function, a block and a model of their own names."""
    module = types.ModuleType("seqloom_program_of_this_test")
    source = (
        "import torch\nfrom torch import nn\n"
        "def my_norm(x):\n    return x / x.norm()\n"
        "class Block(nn.Module):\n"
        "    def forward(self, x):\n        return self.mlp_forward(x)\n"
        "    def mlp_forward(self, x):\n        return my_norm(x @ x)\n"
        "class Whole(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = Block()\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
    )
    exec(compile(source, "program.py", "exec"), module.__dict__)
    module.MODEL, module.BLOCKS = module.Whole, (module.Block,)
    return module


def test_a_profile_has_the_programs_own_names(tmp_path):
    program = made_program()
    model, before = program.MODEL(), dict(vars(program.Block))
    profiler = StepProfiler(range(2, 4), tmp_path, program, CPU)
    said = []
    for step in range(1, 6):
        profiler.before(step)
        model(torch.ones(4, 4))
        said.append(profiler.after(step))
    assert [text is not None for text in said] == [False, False, True, False, False]
    path = tmp_path / "profile/steps-2-3.json.gz"
    assert str(path) in said[2]
    names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
    for name in ("my_norm", "Block.forward", "Block.mlp_forward", "Whole.forward"):
        assert names.count(name) == 2, name
    assert "aten::mm" in (tmp_path / "profile/steps-2-3.txt").read_text()
    assert dict(vars(program.Block)) == before, "the program is as it was"


def test_a_run_that_ends_early_leaves_its_trace(tmp_path):
    profiler = StepProfiler(range(2, 9), tmp_path, made_program(), CPU)
    profiler.before(2)
    assert "steps 2 to 3" in profiler.stop(3)
    assert profiler.stop(3) is None


def test_names_are_given_to_own_functions_only():
    class Own(nn.Linear):
        def helper(self):
            return 1

    undo = name_functions(Own, "Own.")
    assert Own.helper.__wrapped__
    assert Own(2, 2).helper() == 1
    assert not hasattr(Own.forward, "__wrapped__")
    undo()
    assert not hasattr(Own.helper, "__wrapped__")


@pytest.mark.parametrize(("text", "steps"), [(None, []), ("3", [3]), ("10:13", [10, 11, 12, 13])])
def test_steps_of_a_flag(text, steps):
    assert list(steps_of("profile", text)) == steps


# --- memory -----------------------------------------------------------------------------------------------------------------------------

PLAN = {
    "peak_memory_gib": {"total": 70.0, "states": 12.0, "gathered": 2.0, "gradients": 4.0, "activations": 40.0, "working": 12.0},
    "memory_limit_gib": 74.0,
}


def now(**changes):
    """A GPU of 79 GiB that holds what was predicted, and in which little else is left."""
    return Held(**{"states": 12.0, "gradients": 4.0, "others": 54.0, "unused": 1.0, "outside": 2.0, "total": 79.0, **changes})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"outside": 20.0}, ["20.0 GiB belong to other processes", "5.0 were left", "--memory_gib 58"]),
        ({"unused": 14.0}, ["14.0 GiB are held in pieces", "expandable_segments:True", "--memory_gib 63"]),
        ({"others": 60.0}, ["activations and workspace hold 60.0 GiB where 54.0 were predicted", "--memory_gib 68"]),
        ({"states": 18.0, "others": 50.0}, ["weights and optimizer hold 18.0 GiB where 12.0"]),
        ({"gradients": 9.0}, ["gradients hold 9.0 GiB where 4.0"]),
        ({}, ["every part was as predicted", "--memory_gib 73"]),
    ],
)
def test_the_part_that_was_wrong_is_named_with_the_cure(changes, parts):
    said = verdict(now(**changes), PLAN)
    for part in parts:
        assert part in said, said


def test_a_snapshot_needs_a_gpu(tmp_path):
    MemoryRecorder(range(0), tmp_path, 0, CPU).before(1)
    with pytest.raises(UserError, match="--memory_snapshot records the memory of a GPU"):
        MemoryRecorder(range(1, 2), tmp_path, 0, CPU)


def test_a_snapshot_of_some_steps(tmp_path, monkeypatch):
    """The calls of PyTorch that only a GPU has, in their order."""
    calls = []
    monkeypatch.setattr(memory.torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given))
    monkeypatch.setattr(memory.torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(path))
    recorder = MemoryRecorder(range(2, 4), tmp_path, 1, SimpleNamespace(type="cuda"))
    said = []
    for step in range(1, 5):
        recorder.before(step)
        said.append(recorder.after(step))
    path = tmp_path / "memory/steps-2-3-rank1.pickle"
    assert calls == [{"max_entries": memory.EVENTS}, str(path), {"enabled": None}]
    assert [text is not None for text in said] == [False, False, True, False]


# --- Weights & Biases -------------------------------------------------------------------------------------------------------------------


def test_wandb_is_asked_for_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        open_wandb("project", "name", tmp_path, {})


def test_wandb_gets_every_scalar(monkeypatch, tmp_path):
    logged, begun = [], {}
    fake = SimpleNamespace(init=lambda **given: begun.update(given), log=lambda scalars, step: logged.append((step, scalars)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = open_wandb("project", "name", tmp_path, {"lr": 1})
    log({"loss": 2.0}, 7)
    assert logged == [(7, {"loss": 2.0})]
    assert begun["project"] == "project"
    assert begun["resume"] == "allow"
    assert begun["config"] == {"lr": 1}


def test_wandb_that_cannot_begin_is_a_sentence(monkeypatch, tmp_path):
    def refuse(**_):
        raise RuntimeError("no API key\nlong text")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    with pytest.raises(UserError, match=r"cannot begin \(no API key\): run `wandb login`"):
        open_wandb("project", "name", tmp_path, {})

"""Saves that are killed: there is always a checkpoint to load, it equals one committed step, and the next save needs no cleaning.

A process kills itself at each of its steps towards the disk in turn, in the middle of writes too; ranks of a group kill themselves, each
other, or are killed from outside at random times. A nursery process with everything imported forks the processes that die, so that one
costs some milliseconds.
"""

import contextlib
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deadly import Steps, kill_at
from procs import _CONTEXT
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from seqloom.checkpoint import folders, write
from seqloom.checkpoint.background import Saver
from seqloom.checkpoint.read import find_checkpoint, load_checkpoint
from seqloom.checkpoint.slices import local_tensor
from seqloom.checkpoint.write import Beside, save_checkpoint

CONFIG = {"model_type": "llama"}
WAYS = ("synchronous", "background")
SCENES = ("first", "next", "again")
LIMIT = 120.0  # seconds until a process that should have ended counts as hanging


@contextlib.contextmanager
def _saving(way, run):
    """A function that saves tensors as a step, committed when it returns. In the background it writes while training changes them."""
    if way == "synchronous":
        yield lambda step, tensors: save_checkpoint(run, step, tensors, _state(step), model_config=CONFIG)
        return

    def save(step, tensors):
        saver.save(step, tensors, Beside(_state(step), CONFIG))
        for tensor in tensors.values():
            local_tensor(tensor).add_(1)
        saver.collect()

    with contextlib.closing(Saver(run, background=True, timeout=timedelta(seconds=LIMIT / 6))) as saver:
        yield save


def _save(way, run, step, tensors):
    with _saving(way, run) as save:
        save(step, tensors)


def _state(step):
    return {"step": step, "rng": [step] * 20}


def _full(step):
    generator = torch.Generator().manual_seed(step)
    model = {f"model.{name}": torch.randn(8, 20 + i, generator=generator) for i, name in enumerate("abc")}
    return model | {"optimizer.exp_avg.a": torch.randn(8, 20, generator=generator), "optimizer.step.a": torch.tensor(float(step))}


def _sharded(step, rank, ranks):
    """The same as this rank of a group holds it: all that has rows is split by rows."""
    if ranks == 1:
        return _full(step)
    mesh = DeviceMesh("cpu", list(range(ranks)), _init_backend=False)
    return {
        name: DTensor.from_local(full.chunk(ranks)[rank].clone(), mesh, [Shard(0)], run_check=False) if full.dim() else full
        for name, full in _full(step).items()
    }


@pytest.fixture
def place():
    """A folder in memory where there is one: who is killed leaves the same there, and flushes cost nothing."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="seqloom-kill-", dir=memory) as folder:
        yield folder


# ---- scenes: what lies in the run folder before, and what may lie there after


def _set_up(scene, run, template):
    """`first`: nothing. `next`: step 1. `again`: step 1, step 2 damaged, and what a kill left: a resumed run saves step 2 again."""
    shutil.rmtree(run, ignore_errors=True)
    if scene == "first":
        run.mkdir()
        return
    shutil.copytree(template, run)
    if scene == "next":
        shutil.rmtree(run / "step-2")
        return
    shard = run / "step-2" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    (run / ".staging-step-2-dead").mkdir()
    (run / ".staging-step-2-dead" / "shard-00000.safetensors").write_bytes(b"half")


def _check(scene, run, code):
    """What a resumed run finds: exactly a committed step, or nothing where nothing was committed; and its next save just works."""
    newest = find_checkpoint("last", run)
    if newest is None:
        assert scene == "first"
        step = 0
    else:
        step = folders.steps(run)[-1] if newest.name == f"step-{folders.steps(run)[-1]}" else 1
        assert newest == folders.step_folder(run, step)
        assert step in ((2,) if scene == "first" else (1, 2))
        _check_equal(newest, step)
    assert code != 0 or step == 2
    following = 3 if step == 2 else 2
    _save("synchronous", run, following, _full(following))
    _check_equal(find_checkpoint("last", run), following)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert (run / "latest").read_text() == f"step-{following}\n"
    return step


def _check_equal(folder, step):
    assert folder.name == f"step-{step}"
    tensors = {name: torch.full_like(full, 99) for name, full in _full(step).items()}
    assert load_checkpoint(folder, tensors) == _state(step)
    assert all(torch.equal(tensors[name], full) for name, full in _full(step).items())


# ---- the nursery


def in_nursery(function, *arguments):
    """Call a function in a process from which forking is cheap and safe; its result, or its error with the traceback."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_nurse, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        assert receiver.poll(280), "the nursery did not end in time"
        succeeded, value = receiver.recv()
    finally:
        process.kill()
        process.join()
    assert succeeded, value
    return value


def _nurse(sender, function, arguments):
    import torch._dynamo  # DTensor would import it in every process that is forked

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    write.MAX_FILE_BYTES = 1000
    try:
        sender.send((True, function(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))


def _template(folder):
    for step in (1, 2):
        _save("synchronous", folder, step, _full(step))
    return folder


def _fork(action):
    """The pid of a process that does `action` and leaves with 0, or with 1 where it raises."""
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
        os._exit(0)
    except BaseException:
        os._exit(1)


def _codes(pids):
    """Exit codes of processes; those that hang are killed, which is an error."""
    deadline, codes = time.monotonic() + LIMIT, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"processes hang after a kill: {len(set(pids) - set(codes))} of {len(pids)}")
        time.sleep(0.001)
    return [codes[pid] for pid in pids]


# ---- one process, every step


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _every_step(way, scene, folder):
    """(number of kills, steps found after each): a save is killed at step 1, 2, ... until it ends unharmed."""
    template, run = _template(Path(folder) / "template"), Path(folder) / "run"
    found = []
    for number in range(1, 1000):
        _set_up(scene, run, template)

        def save(number=number):
            Steps(folder, kill_at(number, _die)).watch()
            _save(way, run, 2, _full(2))

        code = _codes([_fork(save)])[0]
        assert code in (0, -signal.SIGKILL)
        found.append(_check(scene, run, code))
        if code == 0:
            return found
    raise AssertionError("a save has no end")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scene", SCENES)
def test_killed_at_every_step(place, way, scene):
    found = in_nursery(_every_step, way, scene, place)
    before = 0 if scene == "first" else 1
    assert len(found) > 30
    assert found == sorted(found)
    assert set(found) == {before, 2}
    assert found.count(2) > 1  # some kills come after the commit: the pointer is not what counts


# ---- a group of processes


def _start_group(way, run, store, watch):
    """Two ranks, in a process group of their own, that save step 2 together.

    `watch(rank)` is called when both are ready, and what it returns after the save.
    """

    own = os.getpgrp()

    def act(rank):
        while os.getpgrp() == own:  # whoever kills its group must be in that of the ranks
            time.sleep(0.001)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=LIMIT / 6))
        tensors = _sharded(2, rank, 2)
        with _saving(way, run) as save:
            dist.barrier()
            done = watch(rank)
            save(2, tensors)
            if done is not None:
                done()

    pids = []
    for rank in range(2):
        pids.append(_fork(lambda rank=rank: act(rank)))
        os.setpgid(pids[-1], pids[0])
    return pids


def _group_case(way, scene, run, template, store, watch, meanwhile=lambda pids: None):
    """Exit codes of both ranks and the step found after."""
    _set_up(scene, run, template)
    store.unlink(missing_ok=True)
    pids = _start_group(way, run, store, watch)
    meanwhile(pids)
    codes = _codes(pids)
    return codes, _check(scene, run, max(codes, key=abs))


def _measure(way, folder, template, run, store):
    """Steps that each rank takes in a save of both, and the seconds that it takes without counting."""
    notes = [store.parent / f"note-{rank}" for rank in range(2)]

    def count(rank):
        steps = Steps(folder, lambda number, partly: None)
        steps.watch()
        return lambda: notes[rank].write_text(str(steps.count))

    def clock(rank):
        begin = time.monotonic()
        return lambda: notes[rank].write_text(str(time.monotonic() - begin))

    store.parent.mkdir(exist_ok=True)
    found = []
    for watch in (count, clock):
        assert _group_case(way, "again", run, template, store, watch) == ([0, 0], 2)
        found.append([float(note.read_text()) for note in notes])
    return [int(steps) for steps in found[0]], max(found[1])


def _killed_ranks(way, folder, kills, outside):
    """(victim, codes, step found) of each try: at random steps by the ranks themselves, or at random times from outside.

    Tries go on until so many have killed: at random times a save may be over before.
    """
    root = Path(folder)
    template, run = _template(root / "template"), root / "run"
    beside = Path(folder + "-beside")
    counts, seconds = _measure(way, folder, template, run, beside / "store")
    chance, answers = random.Random(outside), []
    while sum(-signal.SIGKILL in codes for _, codes, _ in answers) < kills:
        assert len(answers) < 5 * kills
        victim = ("rank 0", "rank 1", "all")[len(answers) % 3]
        scene = SCENES[len(answers) // 3 % 3]
        deadly = chance.randrange(2) if victim == "all" else int(victim[-1])
        step = chance.randint(1, counts[deadly])

        def watch(rank, deadly=deadly, step=step, victim=victim):
            (beside / f"ready-{rank}").touch()
            if not outside and rank == deadly:
                kill = (lambda: os.killpg(0, signal.SIGKILL)) if victim == "all" else _die
                Steps(folder, kill_at(step, kill)).watch()

        def meanwhile(pids, deadly=deadly, victim=victim):
            if outside:
                _wait_for(*(beside / f"ready-{rank}" for rank in range(2)))
                time.sleep(chance.uniform(0, seconds))
                for pid in pids if victim == "all" else pids[deadly : deadly + 1]:
                    os.kill(pid, signal.SIGKILL)

        answers.append((victim, *_group_case(way, scene, run, template, beside / "store", watch, meanwhile)))
        for rank in range(2):
            (beside / f"ready-{rank}").unlink(missing_ok=True)
    return answers


def _wait_for(*paths):
    begin = time.monotonic()
    while not all(path.exists() for path in paths):
        assert time.monotonic() - begin < LIMIT, "the ranks do not begin"
        time.sleep(0.001)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("outside", [False, True], ids=["steps", "times"])
def test_killed_ranks(place, way, outside):
    """One rank or both die; who is left ends by itself, mostly with an error, and does not wait for ever."""
    answers = in_nursery(_killed_ranks, way, f"{place}/case", 15 if outside else 50, outside)
    for victim, codes, _ in answers:
        if victim == "all" and not outside:
            assert codes in ([-signal.SIGKILL] * 2, [0, 0])  # a scene may have fewer steps than were drawn from
        elif victim != "all" and codes[int(victim[-1])] == -signal.SIGKILL:
            assert codes[1 - int(victim[-1])] in (0, 1)
    assert {step for _, codes, step in answers if -signal.SIGKILL in codes} >= {0, 1}

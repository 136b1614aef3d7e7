"""Runs that meet trouble: numbers that are not finite, signals, killed ranks, ranks that stand still, disks that are full."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from procs import RankError, run_ranks
from tiny_job import config, flags, make_job, read_log

from seqloom.checkpoint import folders
from seqloom.checkpoint.read import open_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.errors import EXIT_STOPPED, Stopped, UserError
from seqloom.report.run_log import LOG
from seqloom.runtime import step as runtime_step
from seqloom.trainer import loop
from seqloom.trainer.signals import StopSignals
from seqloom.trainer.watch import Watch, stand_still

CPU = torch.device("cpu")
RUN = {"plan_ngpus": 2, "runtime_ngpus": 2, "max_train_steps": 6, "checkpoint_every": 2, "grad_accumulation_steps": 1}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return make_job(tmp_path_factory.mktemp("faults"))


def numbers(folder, name):
    """Loss and gradient norm of every step."""
    return [(entry["step"], entry["loss"], entry["grad_norm"], entry["lr"]) for entry in read_log(folder / "runs" / name)]


def contents(path):
    """Every tensor of a checkpoint."""
    reader, _ = open_checkpoint(path)
    try:
        return {name: reader.read(name) for name in reader}
    finally:
        reader.close()


def same(first, second):
    """Whether two checkpoints hold the same bits."""
    one, other = contents(first), contents(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def trained(rank, world_size, folder, *runs):
    for changes in runs:
        loop.train_on(config(folder, **{**RUN, **changes}), CPU)


# --- numbers that are not finite -------------------------------------------------------------------------------------------------------


def _spoil(value, victim, steps, name):
    """Spoil one gradient of one rank in some steps, as a broken device would."""
    gradients, made = runtime_step.counted_gradients, []

    def spoiled(model, program, mesh):
        found = gradients(model, program, mesh)
        made.append(None)
        if torch.distributed.get_rank() == victim and len(made) in steps:
            found[name].view(-1)[0] = value
        return found

    runtime_step.counted_gradients = spoiled


def _spoiled(rank, world_size, folder, changes, value, place):
    _spoil(value, *place)
    try:
        loop.train_on(config(folder, **{**RUN, **changes}), CPU)
    except UserError as error:
        return str(error)
    return None


BAD = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("force", "value"), [("sp2", float("nan")), ("tp_sp2", float("inf"))])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(job, force, value):
    name = f"skip-{force}-{value}"
    changes = {"name": name, "force": force, "nonfinite": "skip", "zero": 3, "checkpoint_every": 1, "max_train_steps": 4}
    assert run_ranks(_spoiled, 2, job, changes, value, (1, {3}, BAD)) == [None, None]
    assert folders.steps(job / "checkpoints" / name) == [1, 2, 4], "nothing is saved of a skipped step"
    steps = [entry["step"] for entry in read_log(job / "runs" / name)]
    assert steps == [1, 2, 4]
    lines = [json.loads(line) for line in (job / "runs" / name / LOG).read_text().splitlines()]
    (skipped,) = [line for line in lines if "skipped" in line]
    assert skipped["step"] == 3 and f"the gradient of {BAD} on rank 1" in skipped["skipped"]
    two, four = (contents(job / "checkpoints" / name / f"step-{step}") for step in (2, 4))
    counts = [key for key in two if key.startswith("optimizer.step.")]
    assert counts and all(four[key].item() == two[key].item() + 1 == 3 for key in counts), "three updates were made in four steps"
    assert all(tensor.isfinite().all() for tensor in four.values())


def test_a_run_stops_at_a_step_that_is_not_finite_and_saves_nothing_of_it(job):
    first, second = run_ranks(_spoiled, 2, job, {"name": "stops", "force": "sp2", "zero": 3}, float("nan"), (0, {4}, "model.norm.weight"))
    assert first == second
    assert re.match(r"step 4 has loss [\d.]+ and gradient norm nan, first in the gradient of model.norm.weight on rank 0; ", first)
    assert "continue from step 2" in first
    assert folders.steps(job / "checkpoints/stops") == [2]


def test_too_many_skips_stop_the_run(job):
    changes = {"name": "many", "force": "sp2", "zero": 3, "nonfinite": "skip", "max_skips": 2}
    first, second = run_ranks(_spoiled, 2, job, changes, float("nan"), (1, {3, 4, 5}, BAD))
    assert first == second and first.startswith("step 5 has loss")


# --- saving beside training ------------------------------------------------------------------------------------------------------------


def test_checkpoints_made_beside_training_are_those_made_between_steps(job):
    run_ranks(trained, 2, job, {"name": "beside", "force": "sp2"}, {"name": "between", "force": "sp2", "no_async_checkpoint": True})
    assert numbers(job, "beside") == numbers(job, "between")
    for step in (2, 4, 6):
        assert same(job / f"checkpoints/beside/step-{step}", job / f"checkpoints/between/step-{step}")


def _failing(rank, world_size, folder, changes, failing):
    """Writing fails on rank 1 at the checkpoints of some steps, as a disk would that is full. Steps wait for what is being written: they
    are shorter here than a save, which they are not where it matters.
    """
    from seqloom.checkpoint import write

    append, step = write.TensorFileWriter.append, loop._Loop.step

    def full(self, tensor):
        if rank == 1 and any(f"step-{step}-" in self._file.name for step in failing):
            raise OSError(28, "No space left on device")
        append(self, tensor)

    def after_writing(self, signals):
        while self.saver.writing:
            time.sleep(0.01)
        step(self, signals)

    write.TensorFileWriter.append, loop._Loop.step = full, after_writing
    try:
        loop.train_on(config(folder, **{**RUN, **changes}), CPU)
    except UserError as error:
        return str(error)
    return None


def test_a_save_that_fails_beside_training_surfaces_at_the_next_step(job):
    first, second = run_ranks(_failing, 2, job, {"name": "full"}, {4})
    assert first == second and "bytes" in first and "room" in first
    assert folders.steps(job / "checkpoints/full") == [2]
    assert [entry["step"] for entry in read_log(job / "runs/full")][-1] == 5
    assert damage(job / "checkpoints/full/step-2") is None


def test_a_run_may_go_on_without_a_checkpoint(job):
    assert run_ranks(_failing, 2, job, {"name": "goes-on", "on_save_error": "continue"}, {4}) == [None, None]
    assert folders.steps(job / "checkpoints/goes-on") == [2, 6]


def _no_room(rank, world_size, folder):
    from seqloom.trainer import start

    start.folders.shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
    try:
        loop.train_on(config(folder, **{**RUN, "name": "no-room"}), CPU)
    except UserError as error:
        return str(error)


def test_room_for_a_checkpoint_is_looked_for_before_the_first_step(job):
    first, second = run_ranks(_no_room, 2, job)
    assert first == second and "but only 1000 are free" in first and "checkpoint of no-room needs" in first
    assert not (job / "runs/no-room" / LOG).exists(), "no step was made"


def test_a_damaged_checkpoint_is_passed_over_and_its_step_saved_again(job):
    """The run goes on from the one before, with the numbers of a run that was never broken; the damaged one is set aside, not deleted."""
    run_ranks(trained, 2, job, {"name": "sound"}, {"name": "damaged", "max_train_steps": 4})
    shard = job / "checkpoints/damaged/step-4/shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    run_ranks(trained, 2, job, {"name": "damaged", "resume_path": "last"})
    assert numbers(job, "damaged") == numbers(job, "sound")
    assert folders.steps(job / "checkpoints/damaged") == [2, 4, 6]
    assert len(list((job / "checkpoints/damaged").glob("damaged-step-4-*"))) == 1
    assert same(job / "checkpoints/damaged/step-6", job / "checkpoints/sound/step-6")


def test_old_checkpoints_go_as_asked(job):
    run_ranks(trained, 2, job, {"name": "tidy", "checkpoint_every": 1, "keep_last": 2, "keep_every": 3})
    assert folders.steps(job / "checkpoints/tidy") == [3, 5, 6]
    assert all(damage(job / f"checkpoints/tidy/step-{step}") is None for step in (3, 5, 6))


# --- signals ---------------------------------------------------------------------------------------------------------------------------


def _signalled(rank, world_size, folder, names, delays, ranks, number):
    """Runs that get a signal at a random moment after their first step."""
    said = []
    for name, delay in zip(names, delays, strict=True):
        with StopSignals() as signals:
            timer = threading.Timer(delay, os.kill, (os.getpid(), number))
            begun = loop._Loop.step

            def step(self, asked, begun=begun, timer=timer):
                if rank in ranks and not timer.is_alive() and timer.ident is None:
                    timer.start()
                begun(self, asked)

            loop._Loop.step = step
            try:
                loop.train_on(config(folder, **{**RUN, "name": name, "max_train_steps": 10**6, "checkpoint_every": 3}), CPU, signals)
            except Stopped as stopped:
                said.append(str(stopped))
            finally:
                loop._Loop.step = begun
                timer.cancel()
    return said


@pytest.mark.parametrize(("ranks", "number"), [((0, 1), signal.SIGTERM), ((1,), signal.SIGUSR1)])
def test_a_signal_at_any_time_leaves_a_good_checkpoint(job, ranks, number):
    """Twenty in all: in steps, in data waits, while a checkpoint is being written."""
    generator = random.Random(number)
    names, delays = [f"signal-{number}-{index}" for index in range(10)], [generator.uniform(0, 0.4) for _ in range(10)]
    first, second = run_ranks(_signalled, 2, job, names, delays, ranks, number, timeout=240)
    assert first == second and len(first) == 10
    for name, said in zip(names, first, strict=True):
        step = int(re.match(rf"stopped by {signal.Signals(number).name} after step (\d+), which is saved", said).group(1))
        assert folders.steps(job / "checkpoints" / name)[-1] == step == read_log(job / "runs" / name)[-1]["step"]
        assert damage(job / "checkpoints" / name / f"step-{step}") is None
    stopped = {name: folders.steps(job / "checkpoints" / name)[-1] for name in names}
    longest = max(stopped.values())
    straight = {"name": f"straight-{number}", "checkpoint_every": 1, "max_train_steps": longest}
    run_ranks(trained, 2, job, straight, timeout=240)
    for name, step in stopped.items():
        assert same(job / f"checkpoints/{name}/step-{step}", job / f"checkpoints/straight-{number}/step-{step}")


@contextlib.contextmanager
def started(folder, **changes):
    """A run of one rank in a process of its own, which does not outlive the test."""
    code = "import sys; from seqloom.entry import run; import train; run(train.main)"
    words = flags(folder, **{**RUN, "plan_ngpus": 1, "runtime_ngpus": 1, "max_train_steps": 10**6, **changes})
    place = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process, text):
    """Read what a process prints until a line begins with a pattern."""
    for line in process.stdout:
        if re.match(text, line):
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.timeout(120)
def test_a_process_that_is_asked_to_stop_says_so_and_leaves_with_its_code(job):
    with started(job, name="process") as process:
        wait_for(process, r"step +2/")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED == 75, errors
    assert errors.splitlines()[-1].startswith("stopped by SIGTERM after step ") and "--resume_path last" in errors


@pytest.mark.timeout(120)
def test_a_second_signal_ends_at_once(job):
    with started(job, name="twice") as process:
        wait_for(process, r"step +2/")
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    newest = folders.steps(job / "checkpoints/twice")
    assert all(damage(folders.step_folder(job / "checkpoints/twice", step)) is None for step in newest)


def _while_compiling(rank, world_size, folder):
    """The signal comes to all ranks while rank 0 compiles; what each of them ends in."""
    from seqloom.emit import pipeline

    def endless(request, say):
        for _ in range(600):
            time.sleep(0.1)
        raise AssertionError("nothing stopped it")

    pipeline.ensure_program = endless
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    try:
        with StopSignals() as signals:
            loop.train_on(config(folder, **{**RUN, "name": "compiling"}), CPU, signals)
    except Stopped as stopped:
        return f"{stopped} {time.monotonic() - started < 20}"


def test_a_signal_while_compiling_ends_the_job(job):
    assert run_ranks(_while_compiling, 2, job, timeout=60) == ["stopped by SIGTERM before the first step: nothing was lost True"] * 2


# --- killed ranks ----------------------------------------------------------------------------------------------------------------------


def _until_killed(rank, world_size, folder, changes, restart, victim, last):
    """A run that goes on from its newest checkpoint as under torchrun, and in which one rank is killed after a step."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
    begun = loop._Loop.step

    def step(self, signals):
        begun(self, signals)
        if rank == victim and self.progress.step >= last:
            os.kill(os.getpid(), signal.SIGKILL)

    loop._Loop.step = step
    loop.train_on(config(folder, **{**RUN, **changes}), CPU)


@pytest.mark.timeout(300)
def test_a_run_whose_ranks_are_killed_again_and_again_is_the_unbroken_run(job):
    """Two hundred steps, a rank killed after every few; each restart goes on by itself."""
    changes = {"max_train_steps": 200, "checkpoint_every": 5, "lr": 1e-3}
    run_ranks(trained, 2, job, {**changes, "name": "unbroken", "checkpoint_every": 200}, timeout=200)
    generator, restarts, step = random.Random(0), 0, 0
    while True:
        step += generator.randint(14, 34)
        try:
            run_ranks(_until_killed, 2, job, {**changes, "name": "broken"}, restarts, restarts % 2, step, timeout=120)
            break
        except RankError as error:
            assert "exit code -9" in str(error) or "gloo" in str(error) or "closed" in str(error), error
            restarts += 1
            step = folders.steps(job / "checkpoints/broken")[-1] if folders.steps(job / "checkpoints/broken") else 0
    assert restarts >= 6
    assert numbers(job, "broken") == numbers(job, "unbroken")
    assert same(job / "checkpoints/broken/step-200", job / "checkpoints/unbroken/step-200")


@pytest.mark.parametrize("forces", [("sp2", "tp_sp2", "dp2"), ("sp2,tp2",)])
def test_a_killed_run_resumes_to_the_last_bit(job, forces):
    """2N steps against N, a kill, and N more: every number of every step, and the whole state."""
    ranks = 4 if "," in forces[0] else 2
    plan = {"plan_ngpus": ranks, "runtime_ngpus": ranks, "checkpoint_every": 2, "max_train_steps": 4, "micro_batch_size": 2}
    run_ranks(trained, ranks, job, *[{**plan, "force": force, "name": f"once-{force}"} for force in forces], timeout=120)
    for force in forces:
        with pytest.raises(RankError):
            killed = {**plan, "force": force, "name": f"killed-{force}", "no_async_checkpoint": True}
            run_ranks(_until_killed, ranks, job, killed, 0, 1, 3, timeout=120)
        assert folders.steps(job / f"checkpoints/killed-{force}") == [2]
    again = [{**plan, "force": force, "name": f"killed-{force}", "resume_path": "last"} for force in forces]
    run_ranks(trained, ranks, job, *again, timeout=120)
    for force in forces:
        assert numbers(job, f"killed-{force}") == numbers(job, f"once-{force}")
        assert same(job / f"checkpoints/killed-{force}/step-4", job / f"checkpoints/once-{force}/step-4")


@pytest.mark.timeout(240)
def test_torchrun_restarts_a_killed_run_which_goes_on_by_itself(job):
    """A rank of a real torchrun job kills itself once; the job ends well, with the losses of a run that was not killed."""
    code = (
        "import os, signal, sys; from seqloom.trainer import loop; begun = loop._Loop.step\n"
        "def step(self, signals):\n"
        "    begun(self, signals)\n"
        "    if os.environ['RANK'] + os.environ['TORCHELASTIC_RESTART_COUNT'] == '10' and self.progress.step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop._Loop.step = step\n"
        "from seqloom.entry import run; import train; run(train.main)\n"
    )
    script = job / "killed_once.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n{code}")
    run_ranks(trained, 2, job, {"name": "not-restarted"}, timeout=120)
    words = flags(job, **{**RUN, "name": "restarted"})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1", str(script), *words]
    with subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as agent:
        try:
            said, errors = agent.communicate(timeout=200)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
    assert agent.returncode == 0, errors[-3000:]
    assert "resuming from" in said
    assert numbers(job, "restarted") == numbers(job, "not-restarted")


# --- standing still --------------------------------------------------------------------------------------------------------------------


def _stands_still(rank, world_size, folder):
    begun = loop._Loop.step

    def step(self, signals):
        if rank == 1 and self.progress.step == 2:
            time.sleep(100)
        begun(self, signals)

    loop._Loop.step = step
    loop.train_on(config(folder, **{**RUN, "name": "stands-still", "timeout": 4}), CPU)


def test_a_rank_that_stands_still_is_named_with_the_collective_that_waits_for_it(job):
    started = time.monotonic()
    with pytest.raises(RankError, match="nothing has moved for 4 s") as failure:
        run_ranks(_stands_still, 2, job, timeout=90)
    said = str(failure.value)
    assert time.monotonic() - started < 60
    assert re.search(
        r"rank 0 in step 3, computing: (all_reduce|all_gather) at loop.py:\d+ \(result = self.run.train_step\(micro_batches\)\)", said
    ), said
    assert re.search(r"rank 1 in step 2, .*time.sleep\(100\)", said), said
    assert "--resume_path last" in said and "--timeout" in said


def test_ranks_at_one_place_are_told_together():
    now = time.time()
    waiting = {"step": 7, "doing": "computing", "where": "all_to_all at program.py:12 (x = f(x))", "time": now}
    told = {rank: dict(waiting) for rank in range(16)} | {3: {**waiting, "where": "packing.py:5 (read())", "time": now - 40}, 9: None}
    said = stand_still(9.0, told)
    assert "ranks 0, 1, ... 15 (14 ranks) in step 7, computing: all_to_all at program.py:12 (x = f(x))" in said
    assert "rank 3 in step 7, computing: packing.py:5 (read()), unheard of for 40 s" in said
    assert "rank 9 never said where it was" in said


def _watched(rank, world_size):
    ended = []
    with Watch(0.5, ended.append) as watch:
        for step in range(10):
            watch.beat(step, "computing")
            time.sleep(0.1)
    return ended


def test_a_watch_that_is_not_needed_says_nothing():
    assert run_ranks(_watched, 1) == [[]]

"""Which checkpoints stay: the rule, damage that neither counts nor goes, and deletions that are killed."""

import os
import shutil
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqloom.checkpoint import folders
from seqloom.checkpoint import keep as keep_module
from seqloom.checkpoint.keep import Judge, KeepRule, Kept, keep, remove, to_remove
from seqloom.checkpoint.read import find_checkpoint
from seqloom.checkpoint.verify import damage
from seqloom.checkpoint.write import save_checkpoint
from seqloom.errors import UserError

losses = st.one_of(st.none(), st.floats(0, 10), st.sampled_from([1.0, 2.0]))
checkpoints = st.dictionaries(st.integers(0, 60), losses, max_size=15).map(lambda found: [Kept(s, loss) for s, loss in found.items()])
rules = st.builds(
    KeepRule,
    last=st.one_of(st.none(), st.integers(1, 5)),
    every=st.one_of(st.none(), st.integers(1, 12)),
    best=st.integers(0, 3),
)

# ---- the rule


@given(checkpoints, rules)
@settings(max_examples=500, deadline=None)
def test_what_stays_is_what_the_rule_says(found, rule):
    removed = to_remove(found, rule)
    stays = {c.step for c in found} - set(removed)
    assert removed == sorted(set(removed))
    newest = sorted((c.step for c in found), reverse=True)
    if rule.last is None:
        assert removed == []
        return
    expected = set(newest[: rule.last])
    expected |= {step for step in newest if rule.every and step % rule.every == 0}
    ranking = sorted((c for c in found if c.loss is not None), key=lambda c: (c.loss, -c.step))
    expected |= {c.step for c in ranking[: rule.best]}
    assert stays == expected
    assert not newest or newest[0] in stays


@given(checkpoints, rules)
@settings(max_examples=200, deadline=None)
def test_applied_twice_it_removes_nothing_more(found, rule):
    removed = to_remove(found, rule)
    assert to_remove([c for c in found if c.step not in removed], rule) == []


@given(checkpoints, rules, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_applied_after_every_save_it_keeps_what_it_keeps_of_all(found, rule, chance):
    """The best of all times and the multiples never go on the way; the order of listing does not matter."""
    kept = []
    for checkpoint in sorted(found, key=lambda c: c.step):
        kept.append(checkpoint)
        chance.shuffle(kept)
        removed = to_remove(kept, rule)
        kept = [c for c in kept if c.step not in removed]
    removed = to_remove(found, rule)
    assert {c.step for c in kept} == {c.step for c in found if c.step not in removed}


@pytest.mark.parametrize("arguments", [{"last": 0}, {"last": -1}, {"every": 0}, {"best": -1}])
def test_rules_without_sense_are_refused(arguments):
    with pytest.raises(UserError, match=f"the {next(iter(arguments))} "):
        KeepRule(**arguments)


# ---- on disk


def _save(run, step, loss=None):
    state = {"step": step} | ({"evaluation": {"loss": loss}} if loss is not None else {})
    return save_checkpoint(run, step, {"model.w": torch.full((20,), float(step))}, state)


def _flip(folder):
    path = folder / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def _visible(run):
    return sorted(path.name for path in run.iterdir())


def test_a_run_keeps_what_it_should(tmp_path):
    judge, rule = Judge(), KeepRule(last=2, every=10, best=1)
    losses = {1: 3.0, 2: 1.0, 3: 2.0}
    for step in (1, 2, 3, 5, 10, 11, 12):
        judge.trust(_save(tmp_path, step, losses.get(step)))
        keep(tmp_path, rule, judge)
    assert _visible(tmp_path) == ["latest", "step-10", "step-11", "step-12", "step-2"]
    assert all(damage(folders.step_folder(tmp_path, step)) is None for step in folders.steps(tmp_path))


def test_without_a_number_everything_stays(tmp_path):
    for step in range(4):
        _save(tmp_path, step)
    assert keep(tmp_path, KeepRule(every=2, best=1)) == []
    assert folders.steps(tmp_path) == [0, 1, 2, 3]


def test_a_flipped_bit_in_one_that_would_go_keeps_it(tmp_path):
    for step in (0, 1):
        _save(tmp_path, step)
    _flip(tmp_path / "step-0")
    assert keep(tmp_path, KeepRule(last=1)) == []
    assert folders.steps(tmp_path) == [0, 1]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_damaged_ones_neither_count_nor_go(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("keep")
    found = data.draw(st.dictionaries(st.integers(0, 20), st.one_of(st.none(), st.floats(0, 5)), min_size=1, max_size=6))
    kinds = st.sampled_from(["good", "good", "flipped", "missing", "no manifest", "empty"])
    damaged = {step: kind for step in found if (kind := data.draw(kinds)) != "good"}
    rule = data.draw(rules)
    for step in found:
        folder = _save(run, step, found[step])
        _break(folder, damaged.get(step))
    (run / ".staging-step-99-dead").mkdir()
    good = [Kept(step, loss) for step, loss in found.items() if step not in damaged]
    expected = to_remove(good, rule)
    assert keep(run, rule) == [folders.step_folder(run, step) for step in expected]
    assert set(folders.steps(run)) == set(found) - set(expected)
    if good:
        newest = folders.step_folder(run, max(c.step for c in good))
        assert newest.is_dir()
        assert find_checkpoint("last", run) == newest


def _break(folder, kind):
    if kind == "flipped":
        _flip(folder)
    elif kind == "missing":
        (folder / "shard-00000.safetensors").unlink()
    elif kind == "no manifest":
        (folder / "manifest.json").unlink()
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


def test_checkpoints_are_read_once_and_again_when_they_change(tmp_path, monkeypatch):
    read = []
    damage_alone = keep_module.damage_alone
    monkeypatch.setattr(keep_module, "damage_alone", lambda folder: read.append(folder.name) or damage_alone(folder))
    judge, rule = Judge(), KeepRule(last=2)
    for step in (1, 2):
        _save(tmp_path, step)
    keep(tmp_path, rule, judge)
    assert read == []  # nothing would go, so nothing is asked
    judge.trust(_save(tmp_path, 3))
    assert keep(tmp_path, rule, judge) == [tmp_path / "step-1"]
    assert sorted(read) == ["step-1", "step-2"]
    judge.trust(_save(tmp_path, 4))
    keep(tmp_path, rule, judge)
    assert len(read) == 2
    _flip(tmp_path / "step-4")
    _save(tmp_path, 5)
    assert keep(tmp_path, rule, judge) == []
    assert sorted(read[2:]) == ["step-4", "step-5"]
    assert folders.steps(tmp_path) == [3, 4, 5]


def test_an_evaluation_that_is_no_number_does_not_count(tmp_path):
    for step, evaluation in ((1, {"loss": "low"}), (2, [1.0]), (3, {"perplexity": 2.0}), (4, {"loss": 2}), (5, None)):
        save_checkpoint(tmp_path, step, {"model.w": torch.ones(2)}, {"evaluation": evaluation})
    keep(tmp_path, KeepRule(last=1, best=3))
    assert folders.steps(tmp_path) == [4, 5]


def test_a_killed_deletion_leaves_nothing_that_looks_like_a_checkpoint(tmp_path):
    """The process kills itself at every operation of the deletion in turn."""
    _save(tmp_path, 2)
    killed = 0
    for count in range(1, 30):
        if not (tmp_path / "step-1").exists():
            _save(tmp_path, 1)
        child = os.fork()
        if child == 0:
            _kill_at(count)
            remove(tmp_path / "step-1")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert folders.steps(tmp_path) in ([2], [1, 2])
        assert folders.steps(tmp_path) == [2] or damage(tmp_path / "step-1") is None
        if code == 0:
            break
        killed += 1
    assert code == 0
    assert killed >= 4
    (tmp_path / ".staging-step-1-dead").mkdir(exist_ok=True)
    _save(tmp_path, 3)
    assert _visible(tmp_path) == ["latest", "step-2", "step-3"]


def _kill_at(count):
    """Kill this process at its `count`-th change of names on the disk."""
    calls = iter(range(1, 10**6))

    def wrap(function):
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("rename", "fsync", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))

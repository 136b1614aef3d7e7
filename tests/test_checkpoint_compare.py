"""`python -m seqloom checkpoint diff A B`: what differs between step folders, merged files and Hugging Face folders."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from seqloom import cli
from seqloom.checkpoint import compare as compare_module
from seqloom.checkpoint.compare import Difference, compare, state_differences, tensor_difference
from seqloom.checkpoint.huggingface import HFReader
from seqloom.checkpoint.merge import merge
from seqloom.checkpoint.write import save_checkpoint
from seqloom.entry import run
from seqloom.errors import UserError

CONFIG = {"model_type": "llama", "hidden_size": 4}


def _tensors():
    torch.manual_seed(0)
    model = {"model.a": torch.randn(9, 4), "model.b": torch.randn(5), "model.s": torch.tensor(2.0), "model.none": torch.zeros(0, 2)}
    return model | {"optimizer.exp_avg.a": torch.randn(9, 4)}


def _save(folder, step=1, change=None, **state):
    tensors = _tensors()
    if change is not None:
        change(tensors)
    return save_checkpoint(folder, step, tensors, {"step": step, "rng": [[1, 2], "AAA="]} | state, model_config=CONFIG)


def _diff(monkeypatch, capsys, a, b):
    """Exit code and lines of the command."""
    monkeypatch.setattr(sys, "argv", ["seqloom", "checkpoint", "diff", str(a), str(b)])
    with pytest.raises(SystemExit) as leaving:
        run(cli.main)
    streams = capsys.readouterr()
    return leaving.value.code, streams.out.splitlines() or streams.err.splitlines()


def test_equal_checkpoints(tmp_path, monkeypatch, capsys):
    a, b = _save(tmp_path / "a"), _save(tmp_path / "b")
    code, lines = _diff(monkeypatch, capsys, a, tmp_path / "b")
    assert code == 0
    assert lines == [f"A: {a}", f"B: {b}", "  5 tensors are equal", "equal"]


def test_every_kind_of_holder_equals_itself_and_the_others(tmp_path):
    step = _save(tmp_path / "run")
    merge(step, output_fname=tmp_path / "m.ckpt", hf_output=tmp_path / "hf", dtype="float32")
    places = {"step": step, "merged": tmp_path / "m.ckpt", "hf": tmp_path / "hf"}
    for a in places.values():
        for b in places.values():
            found = compare(a, b)
            assert found.equal, found.lines
            assert found.equal_tensors == (4 if tmp_path / "hf" in (a, b) else 5)
            assert (found.ignored is not None) == (tmp_path / "hf" in (a, b))


def test_what_differs_is_said(tmp_path, monkeypatch, capsys):
    def change(tensors):
        tensors["model.a"][3, 1] += 0.5
        tensors["model.a"][8, 3] += 0.25
        tensors["model.b"] = tensors["model.b"][:4]
        tensors["model.s"] = tensors["model.s"].double()
        tensors["model.new"] = torch.ones(2)
        del tensors["optimizer.exp_avg.a"]

    a, b = _save(tmp_path / "a"), _save(tmp_path / "b", 2, change, lr=0.1)
    code, lines = _diff(monkeypatch, capsys, a, b)
    assert code == 1
    changed = abs(0.5 / max(abs(float(_tensors()["model.a"][3, 1])), abs(float(_tensors()["model.a"][3, 1] + 0.5))))
    other = abs(0.25 / max(abs(float(_tensors()["model.a"][8, 3])), abs(float(_tensors()["model.a"][8, 3] + 0.25))))
    assert lines[2:] == [
        "  only in A: optimizer.exp_avg.a",
        "  only in B: model.new",
        f"  model.a: 2 of 36 elements differ, by at most 0.5 (relative {max(changed, other):.3g})",
        "  model.b: shape [5] in A, [4] in B",
        "  model.s: float32 in A, float64 in B",
        "  state step: 1 in A, 2 in B",
        "  state lr: nothing in A, 0.1 in B",
        "  1 tensors are equal",
        "different",
    ]


def test_rounded_weights_differ_in_type_and_value(tmp_path):
    step = _save(tmp_path / "run")
    merge(step, hf_output=tmp_path / "hf", dtype="bfloat16")
    found = compare(step, tmp_path / "hf")
    assert not found.equal
    assert {line.split(":")[0] for line in found.lines} == {"a", "b", "s", "none"}
    line = next(line for line in found.lines if line.startswith("s:"))
    assert line == "s: float32 in A, bfloat16 in B"
    for name in ("a", "b"):
        relative = float(next(line for line in found.lines if line.startswith(f"{name}:")).split("relative ")[1].rstrip(")"))
        assert 0 < relative <= 2**-8


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, math.nan], [1.0, math.nan], Difference()),
        ([0.0], [-0.0], Difference(1, 0.0, 0.0)),
        ([math.inf, 1.0], [math.inf, 1.0], Difference()),
        ([math.inf, 1.0], [-math.inf, 1.0], Difference(1, math.inf, math.inf)),
        ([math.nan, 2.0], [1.0, 1.0], Difference(2, math.inf, math.inf)),
        ([0.0, 4.0], [0.5, 2.0], Difference(2, 2.0, 1.0)),
    ],
)
def test_special_values(tmp_path, a, b, expected):
    assert _of_files(tmp_path, torch.tensor(a), torch.tensor(b)) == expected


def _of_files(folder, a, b):
    readers = []
    for name, tensor in (("a", a), ("b", b)):
        (folder / name).mkdir(exist_ok=True)
        save_file({"x": tensor.contiguous()}, folder / name / "model.safetensors")
        readers.append(HFReader(folder / name))
    found = tensor_difference(readers[0], "x", readers[1], "x")
    for reader in readers:
        reader.close()
    return found


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_batches_add_up_to_the_whole(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    a = torch.randn(shape)
    mask = torch.rand(shape) < 0.3
    b = torch.where(mask, a + torch.rand(shape), a)
    differing = a != b
    folder = tmp_path_factory.mktemp("batches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "ROW_BATCH_BYTES", data.draw(st.integers(1, 200)))
        found = _of_files(folder, a, b)
    assert found.elements == int(differing.sum())
    x, y = a.double()[differing], b.double()[differing]
    assert found.absolute == (float((x - y).abs().max()) if len(x) else 0.0)
    assert found.relative == (float(((x - y).abs() / torch.maximum(x.abs(), y.abs())).max()) if len(x) else 0.0)


def test_state_leaf_by_leaf():
    a = {"data": {"epoch": 1, "rows": [1, 2, 3]}, "rng": ["A" * 100], "same": [None, True], "lr": 1}
    b = {"data": {"epoch": 2, "rows": [1, 5, 3]}, "rng": ["B" * 100], "same": [None, True], "lr": 1.0, "more": {"x": 1}}
    lines = list(state_differences(a, b))
    assert lines[:2] == ["data.epoch: 1 in A, 2 in B", "data.rows[1]: 2 in A, 5 in B"]
    assert lines[2].startswith('rng[0]: "AAAA')
    assert all(len(line) < 160 for line in lines)
    assert lines[3:] == ["lr: 1 in A, 1.0 in B", 'more: nothing in A, {"x": 1} in B']
    assert list(state_differences(a, a)) == []


def test_nothing_to_compare(tmp_path, monkeypatch, capsys):
    step = _save(tmp_path / "a")
    code, lines = _diff(monkeypatch, capsys, step, tmp_path / "none")
    assert code == 2
    assert lines[0].startswith(f"error: there is no checkpoint at {tmp_path / 'none'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no step folder"):
        compare(tmp_path / "empty", step)

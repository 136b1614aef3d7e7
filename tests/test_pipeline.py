"""From a request to a program folder: what is written, when it is refused, and what a user is told."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from models import FAMILIES

from seqloom.emit.fingerprint import difference
from seqloom.emit.pipeline import compile_program, ensure_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"](2).save_pretrained(folder)
    return folder


@pytest.fixture
def request_(model, tmp_path) -> CompileRequest:
    return CompileRequest(
        model_id=str(model),
        seq_len=32,
        plan_ngpus=2,
        runtime_ngpus=2,
        name="tiny",
        precision="fp32",
        hardware="cpu",
        force="sp2",
        output_folder=tmp_path / "programs",
    )


def test_a_compile_leaves_the_files_of_the_contract(request_):
    compiled = compile_program(request_)
    assert sorted(p.name for p in compiled.folder.iterdir()) == ["fingerprint.json", "plan.json", "program.py"]
    plan = json.loads((compiled.folder / "plan.json").read_text())
    for field in ("mesh", "hardware", "seq_len", "step_time_s", "tokens_per_s_per_gpu", "mfu_causal", "mfu_full", "comm_bytes", "segments"):
        assert field in plan
    assert plan["mesh"] == {"sp": 2} and plan["seq_len"] == 32
    assert {"status", "gap", "seconds", "variables"} <= set(plan["solver"])
    assert {"capture", "plan", "emit"} == set(plan["timings"])
    assert plan["peak_memory_gib"]["total"] == pytest.approx(sum(v for k, v in plan["peak_memory_gib"].items() if k != "total"))
    row = next(row for row in plan["blocks"]["LlamaDecoderLayer"] if row.get("operator") == "q_proj")
    assert row["strategy"] == {"sp": "l"} and row["forward_s"] > 0
    assert [p.name for p in request_.output_folder.iterdir() if p.name.startswith(".")] == [".cache"]  # no staging left


def test_an_up_to_date_program_is_used_as_it_is(request_):
    said: list[str] = []
    ensure_program(request_, said.append)
    assert said == [f"no program in {request_.folder}: compiling"]
    stamp = (request_.folder / "program.py").stat().st_mtime_ns
    ensure_program(request_, said.append)
    assert len(said) == 1 and (request_.folder / "program.py").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seq_len": 64}, "seq_len was 32 and is now 64"),
        ({"force": "tp2"}, "force was sp2 and is now tp2"),
        ({"precision": "bf16"}, "precision was fp32 and is now bf16"),
        ({"loss_chunk": 8}, "loss_chunk was None and is now 8"),
        ({"zero": 1}, "zero was None and is now 1"),
    ],
)
def test_a_stale_request_names_the_field_and_the_command(request_, change, words):
    compile_program(request_)
    with pytest.raises(UserError, match=words) as caught:
        ensure_program(dataclasses.replace(request_, **change))
    assert "--run_mode compile" in str(caught.value) and "\n" not in str(caught.value)


def test_a_changed_model_config_is_named(request_, tmp_path):
    compile_program(request_)
    config = FAMILIES["llama"](2)
    config.rms_norm_eps = 1e-3
    config.save_pretrained(tmp_path / "changed")
    with pytest.raises(UserError, match="model config rms_norm_eps was 1e-06 and is now 0.001"):
        ensure_program(dataclasses.replace(request_, model_id=str(tmp_path / "changed")))


def test_a_changed_operator_source_is_named(request_, tmp_path, monkeypatch):
    source = (ROOT / "chunk_linear_cross_entropy.py").read_text()
    (tmp_path / "my_loss.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    asked = dataclasses.replace(request_, loss="my_loss:chunk_linear_cross_entropy")
    compile_program(asked)
    ensure_program(asked)
    (tmp_path / "my_loss.py").write_text(source + "\n# another version\n")
    del sys.modules["my_loss"]
    with pytest.raises(UserError, match="the source of operator my_loss:chunk_linear_cross_entropy has changed"):
        ensure_program(asked)


def test_versions_are_part_of_the_fingerprint(request_):
    compile_program(request_)
    mark = json.loads((request_.folder / "fingerprint.json").read_text())
    for package in ("torch", "seqloom"):
        newer = {**mark, "versions": {**mark["versions"], package: "99"}}
        assert difference(mark, newer) == f"the version of {package} was {mark['versions'][package]} and is now 99"
    assert difference(mark, mark) is None


def test_an_unreadable_fingerprint_is_one_sentence(request_):
    compile_program(request_)
    (request_.folder / "fingerprint.json").write_text("{")
    with pytest.raises(UserError, match="delete the folder"):
        ensure_program(request_)


def test_a_plan_that_does_not_fit_writes_nothing(request_):
    asked = dataclasses.replace(request_, memory_gib=0.0001)
    with pytest.raises(UserError, match="no plan fits: the leanest one needs .* GiB short"):
        compile_program(asked)
    assert not asked.folder.exists()


def test_a_failed_compile_leaves_the_old_program(request_):
    compile_program(request_)
    before = (request_.folder / "program.py").read_text()
    with pytest.raises(UserError):
        compile_program(dataclasses.replace(request_, memory_gib=0.0001))
    assert (request_.folder / "program.py").read_text() == before


def test_a_sequence_that_does_not_divide_is_explained(request_):
    with pytest.raises(UserError, match="sequence length"):
        compile_program(dataclasses.replace(request_, seq_len=33))


def test_a_folder_that_can_not_be_written(request_, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can not be written"):
        compile_program(dataclasses.replace(request_, output_folder=tmp_path / "file"))


def test_impossible_requests():
    with pytest.raises(UserError, match="not a multiple of plan_ngpus 4"):
        CompileRequest(model_id="x", seq_len=8, plan_ngpus=4, runtime_ngpus=6)
    with pytest.raises(UserError, match="use 0, 1, 2 or 3"):
        CompileRequest(model_id="x", seq_len=8, zero=4)
    with pytest.raises(UserError, match="seq_len must be at least 1"):
        CompileRequest(model_id="x", seq_len=0)


def test_a_malformed_annotation_is_shown_with_a_caret(request_, tmp_path, monkeypatch):
    (tmp_path / "bad_loss.py").write_text(
        "from seqloom.ops import register_op\n\n@register_op('b l d^, n^ d, b l -> b l')\n"
        "def loss(h, w, y, padding_idx, chunk_size=1):\n    return y\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as caught:
        compile_program(dataclasses.replace(request_, loss="bad_loss:loss"))
    assert "^" in str(caught.value).splitlines()[-1]


def test_weights_and_gpus_are_never_touched(request_):
    """A config alone is enough, and nothing of the size of the model is allocated: llama3_70b compiles in little memory."""
    code = (
        "import sys; from pathlib import Path\n"
        "from seqloom.emit.pipeline import compile_program, CompileRequest\n"
        f"compile_program(CompileRequest(model_id='llama3_70b', seq_len=8192, plan_ngpus=8, runtime_ngpus=64, name='big',"
        f" output_folder=Path({str(request_.output_folder)!r})))\n"
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM')) / 2**20)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 2.0

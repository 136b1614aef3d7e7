"""`python -m seqloom`: every command finds its flags, calls the room that does the work, and ends in its exit code."""

import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from seqloom import cli
from seqloom.checkpoint import save_checkpoint
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def command(monkeypatch):
    """Run `python -m seqloom WORDS` in this process; returns the exit code."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["seqloom", *map(str, words)])
        return cli.main()

    return run


@pytest.fixture
def room(monkeypatch):
    """Put a room in place of a real one; returns the calls of its function."""

    def replace(module, name, answer):
        calls = []
        fake = types.ModuleType(module)
        setattr(fake, name, lambda *args, **kwargs: calls.append((args, kwargs)) or answer)
        monkeypatch.setitem(sys.modules, module, fake)
        return calls

    return replace


@pytest.fixture(autouse=True)
def pages(room):
    """The calls that write plan.html."""
    return room("seqloom.report.plan_page", "write_plan_page", Path("plan.html"))


@pytest.fixture
def program(tmp_path):
    (tmp_path / "programs/tiny").mkdir(parents=True)
    return ["--name", "tiny", "--output_folder", tmp_path / "programs"]


@pytest.fixture
def checkpoints(tmp_path):
    for step in (3, 6):
        save_checkpoint(tmp_path / "runs/a", step, {"model.w": torch.arange(6.0).reshape(2, 3)}, {"step": step})
    return tmp_path / "runs"


# --- choosing a command -----------------------------------------------------------------------------------------------


def test_without_a_command_all_are_listed(command, capsys):
    assert command() == 2
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert command("--help") == 0
    assert capsys.readouterr().out == shown


def test_every_command_says_what_it_does():
    for name, function in {**cli.COMMANDS, **cli.CHECKPOINT_COMMANDS}.items():
        assert function.__doc__.count("\n") == 0, name
        assert function.__doc__.endswith("."), name


@pytest.mark.parametrize(
    ("word", "answer"),
    [("complie", "did you mean `python -m seqloom compile`"), ("verfy", "seqloom verify`"), ("xyzzy", "there are compile, explain")],
)
def test_an_unknown_command_names_the_nearest(command, word, answer):
    with pytest.raises(UserError, match=answer):
        command(word)


def test_an_unknown_command_under_checkpoint(command):
    with pytest.raises(
        UserError, match="`python -m seqloom checkpoint` has no command lst: did you mean `python -m seqloom checkpoint list`"
    ):
        command("checkpoint", "lst")


def test_dash_and_underscore_are_the_same(command, capsys):
    for word in ("check-op", "check_op"):
        with pytest.raises(SystemExit) as ended:
            command(word, "--help")
        assert ended.value.code == 0
        assert "python -m seqloom check-op" in capsys.readouterr().out


def test_as_a_process():
    def run(*words):
        return subprocess.run([sys.executable, "-m", "seqloom", *words], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)

    result = run("explian")
    assert result.returncode == 2
    assert result.stderr == "error: `python -m seqloom` has no command explian: did you mean `python -m seqloom explain`?\n"
    result = run("verify", "--name", "nothing here")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "there is no compiled program .seqloom/nothing here" in result.stderr
    assert "Traceback" in run("explian", "--debug").stderr


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"), [("explain", "seqloom.plan.explain"), ("verify", "seqloom.runtime.verify"), ("dryrun", "seqloom.runtime.dryrun")]
)
def test_commands_on_a_program(command, room, program, tmp_path, name, module):
    calls = room(module, "run", 1)
    assert command(name, *program) == 1
    folder = tmp_path / "programs/tiny"
    assert calls == [((folder,) if name == "explain" else (folder, None), {})]
    with pytest.raises(UserError, match="no compiled program .*absent.*seqloom compile --name absent"):
        command(name, *program, "--name", "absent")


def test_dry_run_of_one_rank(command, room, program, pages, tmp_path):
    calls = room("seqloom.runtime.dryrun", "run", 0)
    assert command("dryrun", *program, "--rank", "1") == 0
    assert calls == [((tmp_path / "programs/tiny", 1), {})]
    assert pages == [((tmp_path / "programs/tiny",), {})]


def test_compile_takes_the_flags_of_the_request(command, room, pages, capsys, tmp_path):
    plan = {
        "step_time_s": 1.5,
        "mfu_causal": 0.5,
        "peak_memory_gib": {"total": 2.0},
        "memory_limit_gib": 9.0,
        "hardware": "cpu",
        "repeated": {},
    }
    calls = room("seqloom.emit.pipeline", "compile_program", types.SimpleNamespace(folder=tmp_path / "x", plan=plan))
    command("compile", "--model_id", "llama3_8b", "--seq-len", "64", "--plan_ngpus", "2", "--runtime_ngpus", "2", "--force", "sp2")
    request = CompileRequest("llama3_8b", 64, plan_ngpus=2, runtime_ngpus=2, force="sp2", grad_accumulation_steps=4)
    assert calls == [((request,), {})]
    assert pages == [((tmp_path / "x",), {})]
    assert capsys.readouterr().out == f"wrote {tmp_path / 'x'}\npredicted: 1.5 s a step, MFU 50.0%, 2 of 9 GiB a rank, on cpu\n"


def test_compile_is_for_one_process(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        command("compile", "--model_id", "llama3_8b", "--seq_len", "64")


# --- operators --------------------------------------------------------------------------------------------------------

OPERATORS = """
from seqloom.ops import register_op

@register_op("l d -> l d")
def untrue(x, scale):
    return x / x.sum(0) * scale
"""


@pytest.fixture
def operators(tmp_path, monkeypatch):
    (tmp_path / "operators_of_test_cli.py").write_text(OPERATORS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "operators_of_test_cli"
    sys.modules.pop("operators_of_test_cli", None)


def test_check_op_tells_truth_from_lies(command, operators, capsys):
    assert command("check-op", f"{operators}:untrue", "--sizes", "l=4", "d=6", "--args", "scale=2.0") == 1
    assert "the annotation lies about l" in capsys.readouterr().out
    target = "chunk_linear_cross_entropy:chunk_linear_cross_entropy"
    assert command("check-op", target, "--args", "padding_idx=-100", "chunk_size=3", "--sizes", "l=8") == 0
    shown = capsys.readouterr().out
    assert "the annotation is true" in shown
    assert "l=8" in shown


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--sizes", "l"), "--sizes l is not NAME=VALUE"),
        (("--sizes", "l=many"), "--sizes l=many is not a whole number"),
        (("--args", "=3"), "--args =3 is not NAME=VALUE"),
    ],
)
def test_check_op_reads_its_flags(command, operators, words, part):
    with pytest.raises(UserError, match=part):
        command("check-op", f"{operators}:untrue", *words)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_verified_and_shown(command, checkpoints, capsys):
    command("checkpoint", "list", checkpoints)
    shown = capsys.readouterr().out
    assert "step-3" in shown
    assert "step-6" in shown
    command("checkpoint", "verify", checkpoints / "a/step-3")
    assert "all sizes and digests are as written" in capsys.readouterr().out
    command("checkpoint", "show", checkpoints / "a")
    shown = capsys.readouterr().out
    assert "step: 6" in shown
    assert "model.w [2, 3] float32" in shown


def test_a_damaged_checkpoint_is_an_error(command, checkpoints):
    shard = next((checkpoints / "a/step-6").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        command("checkpoint", "verify", checkpoints / "a/step-6")


def test_no_checkpoints_are_an_error(command, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        command("checkpoint", "list", tmp_path)


def test_report_of_runs(command, room, capsys, tmp_path):
    one = room("seqloom.report.run_page", "write_run_page", Path("report.html"))
    several = room("seqloom.report.compare_page", "write_compare_page", Path("both.html"))
    assert command("report", "--run", tmp_path / "a") is None
    assert command("report", "--compare", tmp_path / "a", tmp_path / "b", "--output", "both.html") is None
    assert one == [((tmp_path / "a",), {})]
    assert several == [(((tmp_path / "a", tmp_path / "b"), Path("both.html")), {})]
    assert capsys.readouterr().out == "wrote report.html\nwrote both.html\n"
    with pytest.raises(UserError, match="leave one of them out"):
        command("report", "--run", tmp_path / "a", "--compare", tmp_path / "b")


HELP = [
    *([name] for name in ("train.py", "bookcorpus.py", "create_mini_model.py", "ckpt_merger.py")),
    *(["-m", "seqloom", name] for name in cli.COMMANDS if name != "checkpoint"),
    *(["-m", "seqloom", "checkpoint", name] for name in cli.CHECKPOINT_COMMANDS),
]


@pytest.mark.parametrize("program", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(program):
    """What makes `--help` answer at once, whatever the machine."""
    found = subprocess.run(
        [sys.executable, "-X", "importtime", *program, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "datasets", "scipy", "matplotlib"}
    assert "--" in found.stdout

"""`python -m seqloom sweep`: rows are the plans that a compile would find, and every request has its row or one sentence."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
from collections.abc import Callable

import pytest
import torch
from models import FAMILIES
from plan_samples import tiny

from seqloom import cli
from seqloom.capture.cache import Cache
from seqloom.capture.warm import read_config
from seqloom.cost.hardware import Hardware, load_hardware, to_json
from seqloom.emit import replan
from seqloom.emit import sweep as sweeping
from seqloom.emit.pipeline import compile_program
from seqloom.emit.replan import best_plan, capture_regions, hybrid_mesh, plan_words
from seqloom.emit.request import CompileRequest
from seqloom.emit.sweep import WIDTH, Line, Sweep, parse_counts, run, sweep, tokens_text, write_csv
from seqloom.errors import UserError

H100 = load_hardware("h100-80gb")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"](2).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*words: str) -> int:
        asked = ("--model_id", model, "--seq_lens", "64", "--gpus", "2", "--hardware", "h100-80gb", *words)
        monkeypatch.setattr(sys, "argv", ["seqloom", "sweep", *asked])
        return cli.main()

    return call


def with_memory(hardware: Hardware, nbytes: int, name: str) -> Hardware:
    return dataclasses.replace(hardware, name=name, memory_bytes=nbytes, allocator_margin=0.0, host_memory_bytes=0)


# --- numbers of tokens and GPUs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("8K,32K,1M", (8192, 32768, 1048576)),
        ("131072", (131072,)),
        (" 4k , 2m ", (4096, 2097152)),
        ("1,8,64", (1, 8, 64)),
        ("0008K", (8192,)),
    ],
)
def test_counts(text, counts):
    assert parse_counts("--seq_lens", text) == counts


@pytest.mark.parametrize("text", ["", "8K,", "0", "0K", "-1", "8G", "8.5K", "eight", "8 K K", "8K;32K", "1e6"])
def test_what_is_no_count(text):
    with pytest.raises(UserError, match=r"^--gpus .*is not a whole number above 0, with K or M where you like, such as 8K or 131072$"):
        parse_counts("--gpus", text)


@pytest.mark.parametrize(("count", "text"), [(1, "1"), (1000, "1000"), (1024, "1K"), (131072, "128K"), (1 << 20, "1M"), (3 << 19, "1536K")])
def test_tokens_as_they_were_written(count, text):
    assert tokens_text(count) == text
    assert parse_counts("--seq_lens", text) == (count,)


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_a_row_is_what_a_compile_predicts(model, tmp_path):
    asked = Sweep(model, (64,), (2,), ("h100-80gb",), micro_batch_size=2, grad_accumulation_steps=3)
    (line,) = sweep(asked, [H100])
    request = CompileRequest(model, 64, 2, 2, "same", 2, 3, output_folder=tmp_path)
    plan = compile_program(request).plan
    assert (line.seq_len, line.gpus, line.hardware, line.reason) == (64, 2, "h100-80gb", "")
    assert line.step_time_s == pytest.approx(plan["step_time_s"], rel=replan.GAP)
    assert line.tokens_per_s_per_gpu == pytest.approx(64 * 2 * 3 / line.step_time_s / 2)
    assert line.mfu_causal == pytest.approx(plan["mfu_causal"], rel=replan.GAP)
    assert 0 < line.peak_memory_gib < plan["memory_limit_gib"] and line.seconds > 0
    assert re.fullmatch(r"(sp|dp_shard|tp) 2", line.mesh) and line.storage.startswith("ZeRO ") and line.modes == "keep all"


def test_rows_come_by_length_machine_and_number_of_gpus(model):
    asked = Sweep(model, (32, 64), (1, 2), ("h100-80gb", "h200-141gb"))
    lines = list(sweep(asked, [H100, load_hardware("h200-141gb")]))
    assert [(line.seq_len, line.hardware, line.gpus) for line in lines] == [
        (length, machine, gpus) for length in (32, 64) for machine in ("h100-80gb", "h200-141gb") for gpus in (1, 2)
    ]
    for slow, fast in zip(lines[:2] + lines[4:6], lines[2:4] + lines[6:], strict=True):
        assert fast.step_time_s <= slow.step_time_s * (1 + 1e-9)
    assert [line.mesh for line in lines if line.gpus == 1] == ["one rank"] * 4


def test_a_length_is_captured_once(model, monkeypatch):
    lengths: list[int] = []

    def count(cache, config, request):
        lengths.append(request.seq_len)
        return capture_regions(cache, config, request)

    monkeypatch.setattr(sweeping, "capture_regions", count)
    assert len(list(sweep(Sweep(model, (32, 64), (1, 2), ("h100-80gb",)), [H100, H100]))) == 8
    assert lengths == [32, 64]


def test_rows_are_written_as_they_are_found(model, monkeypatch):
    events: list[str] = []
    monkeypatch.setattr(sweeping, "best_plan", lambda *args: events.append("planned") or best_plan(*args))
    assert run(Sweep(model, (64,), (1, 2), ("h100-80gb",)), None, lambda line: events.append("written")) == 0
    assert events == ["written", "planned", "written", "planned", "written"]


# --- rows without a plan ------------------------------------------------------------------------------------------------


def only(model: str, hardware: Hardware, gpus: int = 2, seq_len: int = 64) -> Line:
    (line,) = sweep(Sweep(model, (seq_len,), (gpus,), (hardware.name,)), [hardware])
    return line


@pytest.mark.parametrize("force", ["sp7", "sp7,sp7"])
def test_sizes_that_do_not_divide(force):
    ranks = 7 ** force.count("7")
    with pytest.raises(UserError, match=f"^its sizes do not divide over {ranks} ranks$"):
        best_plan(tiny("llama", 2, 1, 64), CompileRequest("", 64, ranks, ranks, force=force), H100)


def test_a_forced_mesh_of_two_axes_that_does_not_fit():
    with pytest.raises(UserError, match="^activations do not fit"):
        best_plan(tiny("llama", 2, 2, 1024), CompileRequest("", 1024, 4, 4, force="sp2,tp2"), with_memory(H100, 1 << 20, "small"))


def test_a_row_without_a_plan(model):
    line = only(model, with_memory(H100, 1000, "small"))
    assert line.reason and dataclasses.replace(line, reason="", seconds=0.0) == Line(64, 2, "small")


def test_compute_that_is_repeated_is_told(model):
    """Nothing of 64 tokens divides by 7: every rank runs all of it."""
    assert re.fullmatch(r"keep all, \d+% repeated on tp", only(model, H100, gpus=7).modes)


def test_a_machine_that_joins_fewer(model):
    assert only(model, load_hardware("cpu"), gpus=128).reason == "cpu joins at most 64 ranks"


def test_weights_that_do_not_fit(model):
    assert re.fullmatch(r"weights and optimizer state alone take \d+\.\d of 0\.0 GiB", only(model, with_memory(H100, 1000, "small")).reason)


def test_activations_that_do_not_fit():
    """Enough for the weights, not for one sequence."""
    regions = tiny("llama", 2, 2, 1024)
    request = CompileRequest("", 1024, 2, 2, micro_batch_size=2)
    with pytest.raises(UserError, match=r"^activations do not fit: \d+\.\d of \d+\.\d GiB are taken by weights and optimizer state$"):
        best_plan(regions, request, with_memory(H100, 1 << 20, "small"))


def test_a_sentence_with_a_cure_loses_the_cure(model, monkeypatch):
    def none(*args):
        raise UserError("no plan was found; narrow the search with --force")

    monkeypatch.setattr(sweeping, "best_plan", none)
    assert only(model, H100).reason == "no plan was found"


def test_one_row_without_a_plan_does_not_end_the_table(model, tmp_path):
    shown: list[str] = []
    table = tmp_path / "table.csv"
    small = tmp_path / "small.json"
    small.write_text(to_json(with_memory(H100, 1000, "small")))
    assert run(Sweep(model, (64,), (2,), (str(small), "h100-80gb")), table, shown.append) == 0
    assert "weights and optimizer state" in shown[1] and "ZeRO" in shown[2]
    first, second = csv.DictReader(table.open(encoding="utf-8"))
    assert first["reason"] and not first["step_time_s"] and second["step_time_s"] and not second["reason"]


def test_no_plan_at_all_is_a_failure(model):
    assert run(Sweep(model, (64,), (128,), ("cpu",)), None, lambda line: None) == 1


# --- the table and the file ---------------------------------------------------------------------------------------------

LONG = Line(
    4 << 20,
    64,
    "h200-141gb",
    "sp 8 x sp2 4 x sp3 2",
    "ZeRO 2 over sp2+sp3",
    "selective 2%, recompute 25%, spill 2%, offload 52%",
    1234.5678,
)


def test_the_table_lies_under_its_titles(model):
    shown: list[str] = []
    run(Sweep(model, (64,), (2,), ("h100-80gb",)), None, shown.append)
    titles, row = shown
    for title, value in (("tokens", "64"), ("GPUs", "2"), ("step s", r"\d+\.\d{3}"), ("MFU", r"\d+\.\d%"), ("took s", r"\d+\.\d")):
        end = titles.index(title) + len(title)
        assert re.search(rf"(^| ){value}$", row[:end]), title
    assert row[titles.index("hardware") :].startswith("h100-80gb ")
    assert re.match(r"\w+ 2, ZeRO \d, keep all", row[titles.index("plan, or why") :])


def test_long_words_go_on_below_in_their_column():
    line = dataclasses.replace(LONG, tokens_per_s_per_gpu=74.0, mfu_causal=0.25, peak_memory_gib=127.1, seconds=100.0)
    first, *rest = sweeping._show(line).splitlines()
    column = first.index("sp 8")
    assert rest and max(map(len, (first, *rest))) <= WIDTH
    assert all(part[:column].isspace() and part[column] != " " for part in rest)
    assert " ".join([first[column:], *(part.strip() for part in rest)]) == f"{line.mesh}, {line.storage}, {line.modes}"


def test_the_file_holds_every_field(tmp_path):
    lines = [LONG, Line(8192, 8, "h100-80gb", reason="no, it does not fit", seconds=1.5)]
    write_csv(tmp_path / "table.csv", lines)
    rows = list(csv.DictReader((tmp_path / "table.csv").open(encoding="utf-8")))
    assert list(rows[0]) == [field.name for field in dataclasses.fields(Line)]
    assert rows[0]["modes"] == LONG.modes and float(rows[0]["step_time_s"]) == LONG.step_time_s
    assert rows[1] == {**dict.fromkeys(rows[0], ""), "seq_len": "8192", "gpus": "8", "hardware": "h100-80gb"} | {
        "reason": "no, it does not fit",
        "seconds": "1.5",
    }


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"^--csv .*absent/table.csv cannot be written \(.*\): give a file in a writable folder$"):
        write_csv(tmp_path / "absent/table.csv", [])


def test_a_file_that_cannot_be_written_is_told_before_the_search(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "best_plan", lambda *args: pytest.fail("searched first"))
    with pytest.raises(UserError, match="--csv"):
        run(Sweep(model, (64,), (2,), ("h100-80gb",)), tmp_path / "absent/table.csv", print)


# --- meshes of three axes -----------------------------------------------------------------------------------------------


def test_the_mesh_for_more_ranks_than_heads():
    regions = tiny("llama", 2, 2, 64)  # 4 query heads, 2 key/value heads
    assert hybrid_mesh(regions, 8) == "sp2,sp2,cp2"
    assert hybrid_mesh(regions, 16) == "sp2,sp2,cp4"
    assert [hybrid_mesh(regions, ranks) for ranks in (1, 2, 3, 4)] == [None] * 4


def test_plans_again_deal_rows_out_evenly_where_heads_do_not_suffice():
    """What a compile would choose (`tests/test_even_rows.py`), a sweep shows."""
    regions = tiny("llama", 2, 1, 65536)
    plan = best_plan(regions, CompileRequest("", 65536, 8, 8), H100)
    by_positions = best_plan(regions, CompileRequest("", 65536, 8, 8, attention="gather"), H100)
    assert plan["documents"] == [65536] and by_positions["documents"] == []
    assert plan["step_time_s"] < by_positions["step_time_s"]


def test_the_better_of_both_searches_is_taken(monkeypatch):
    """Attention makes the step, so splitting it evenly by heads before positions wins, and two axes alone can not."""
    regions = tiny("llama", 2, 1, 4096)
    slow = dataclasses.replace(H100, peak_flops={name: peak * 1e-4 for name, peak in H100.peak_flops.items()})
    request = CompileRequest("", 4096, 8, 8)
    monkeypatch.setattr(replan, "even_rows", lambda found, *args: found)
    both = best_plan(regions, request, slow)
    monkeypatch.setattr(replan, "hybrid_mesh", lambda *args: None)
    few = best_plan(regions, request, slow)
    assert both["step_time_s"] <= few["step_time_s"]
    assert list(both["mesh"].values()) == [2, 2, 2] and len(few["mesh"]) <= 2


def test_a_forced_mesh_is_searched_alone(monkeypatch):
    monkeypatch.setattr(replan, "hybrid_mesh", lambda *args: pytest.fail("another mesh"))
    plan = best_plan(tiny("llama", 2, 2, 64), CompileRequest("", 64, 8, 8, micro_batch_size=2, force="sp4,tp2"), H100)
    assert plan["mesh"] == {"sp": 4, "tp": 2}


def test_the_words_of_a_plan(model, tmp_path):
    request = CompileRequest(model, 64, 2, 2, force="sp2", zero=3, recompute="all", output_folder=tmp_path)
    config = read_config(model, Cache(tmp_path))
    plan = best_plan(capture_regions(Cache(tmp_path), config, request), request, H100)
    mesh, storage, modes = plan_words(plan)
    assert (mesh, storage) == ("sp 2", "ZeRO 3") and re.fullmatch(r"(selective \d+%, )?recompute \d+%", modes)
    copies = plan | {"storage": {"zero": 3, "sharded": ["sp2", "sp3"], "replicated": ["sp"]}}
    assert plan_words(copies)[1] == "ZeRO 3 over sp2+sp3"
    short = plan | {"solver": plan["solver"] | {"status": "optimal; 2 searches out of time"}}
    assert plan_words(short)[2] == f"{modes}, perhaps not the best: a search was cut short"


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command(command, tmp_path, capsys):
    assert command("--csv", str(tmp_path / "table.csv"), "--seq_lens", "64,128") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if "h100-80gb" in line] == ["64", "128"] and printed[0].endswith(
        "plan, or why there is none"
    )
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3


def test_the_command_takes_a_hardware_file(command, tmp_path, capsys):
    machine = tmp_path / "mine.json"
    machine.write_text(to_json(dataclasses.replace(H100, name="mine")))
    assert command("--hardware", f"{machine}, h100-80gb") == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:] if "ZeRO" in line] == ["mine", "h100-80gb"]


def test_the_command_fails_where_no_row_has_a_plan(command):
    assert command("--gpus", "128", "--hardware", "cpu") == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--seq_lens", "8K,many"), "--seq_lens 8K,many: `many` is not a whole number above 0"),
        (("--gpus", "0"), "--gpus 0: `0` is not a whole number above 0"),
        (("--hardware", "h1000"), "hardware `h1000` is neither a name in configs/hardware nor a file"),
        (("--hardware", "h100-80gb,"), "hardware `` is neither"),
        (("--model_id", "no-such-model"), "no-such-model"),
        (("--micro_batch_size", "0"), "micro_batch_size must be at least 1, not 0"),
    ],
)
def test_a_users_mistakes(command, words, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as told:
        command(*words)
    assert sentence in str(told.value) and "\n" not in str(told.value)


def test_numbers_of_the_table_are_json_and_finite(model):
    line = only(model, H100)
    assert json.loads(json.dumps(dataclasses.astuple(line), allow_nan=False))
    assert torch.tensor([line.step_time_s, line.mfu_causal, line.peak_memory_gib]).isfinite().all()

"""`python -m seqloom explain`: what it prints is what the plan holds, what binds is true, advice is what a plan for the change predicts."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import FAMILIES
from plan_page_samples import full_plan, plan_as_compiled, write
from plan_samples import scaled, tiny, with_usable_bytes

from seqloom import cli
from seqloom.cost.hardware import Hardware, load_hardware, to_json
from seqloom.emit import advice as advising
from seqloom.emit.advice import advise, changes
from seqloom.emit.pipeline import Compiled, compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.plan.binding import binding
from seqloom.plan.evaluate import evaluate
from seqloom.plan.explain import MOST, WIDTH, explain, run
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.request import Request
from seqloom.plan.solver import solve

H100 = load_hardware("h100-80gb")


def request_of(model: Path, folder: Path, **changed: object) -> CompileRequest:
    asked = {"plan_ngpus": 2, "runtime_ngpus": 2, "micro_batch_size": 2, "grad_accumulation_steps": 1, **changed}
    return CompileRequest(model_id=str(model), seq_len=64, name="tiny", output_folder=folder, **asked)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = FAMILIES["llama"](3)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return compile_program(request_of(model, tmp_path_factory.mktemp("programs")))


@pytest.fixture
def program(compiled: Compiled, tmp_path: Path) -> Path:
    """A copy of the compiled program that a test may change, beside the cache of the first."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in compiled.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / ".cache").symlink_to(compiled.folder.parent / ".cache")
    return folder


@pytest.fixture
def command(program: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["seqloom", "explain", "--name", "tiny", "--output_folder", str(program.parent), *words])
        return cli.main()

    return call


def full() -> dict:
    """A plan with all that there can be to say, its meshes in words as a compile writes them."""
    plan = full_plan()
    named = [" x ".join(f"{axis} {size}" for axis, size in other["mesh"].items()) for other in plan["alternatives"]]
    return plan | {"alternatives": [other | {"mesh": mesh} for other, mesh in zip(plan["alternatives"], named, strict=True)]}


def text(plan: dict) -> str:
    return "\n".join(explain(plan, {}))


# --- what is printed ----------------------------------------------------------------------------------------------------


def test_the_head_says_what_was_chosen_and_predicted(compiled):
    lines = list(explain(compiled.plan, json.loads((compiled.folder / "fingerprint.json").read_text())))
    plan = compiled.plan
    assert lines[0] == "model      LlamaForCausalLM, 3 layers, 1 micro-batch of 2 sequences of 64 tokens"
    (axis, size), *_ = plan["mesh"].items()
    assert lines[1] == f"mesh       {axis} {size}, 1 scale unit: 2 x h100-80gb"
    assert lines[2].startswith(f"storage    ZeRO {plan['storage']['zero']}")
    assert lines[3].startswith(f"predicted  {plan['step_time_s']:.4g} s a step, {plan['tokens_per_s_per_gpu']:,.0f} tokens/s/GPU, MFU ")
    assert plan["binding"]["sentence"] in " ".join(" ".join(lines).split())


@pytest.mark.parametrize("plan", [plan_as_compiled(), full()], ids=["compiled", "full"])
def test_every_line_fits_and_has_no_trailing_blanks(plan):
    lines = list(explain(plan, {}))
    assert max(map(len, lines)) <= WIDTH
    assert all(line.isascii() and line == line.rstrip() for line in lines)


def test_long_names_and_prices_fit_too():
    plan = full()
    for row in plan["blocks"]["LlamaDecoderLayer"]:
        if "operator" in row:
            row["operator"], row["strategy"] = "self_attn_query_key_value_projection_of_heads", {f"sequence{i}": "whole" for i in range(3)}
            row["runner_up"] = {"strategy": row["strategy"], "extra_s": 1234.5678, "peak_memory_gib": 987.6, "fits": False}
        else:
            row["from"], row["to"] = "S(2) S(1) S(1)", "S(1) S(1) S(1)"
    for other in plan["alternatives"]:
        other["mesh"], other["step_time_s"], other["reason"] = " x ".join(["16 data or sequence"] * 4), 12345.67, "because " * 20
    for change in plan["advice"]:
        change["change"], change["sentence"] = "twice " * 20, "some words " * 30
    assert max(map(len, explain(plan, {}))) <= WIDTH


def test_the_parts_of_time_memory_and_traffic_are_those_of_the_plan(compiled):
    shown, plan = text(compiled.plan), compiled.plan
    sections = {part.partition("\n")[0]: part.partition("\n")[2] for part in shown.split("\n\n")}
    time = [float(line[22:34]) for line in sections["Time of one step, s"].splitlines()]
    assert len(time) == sum(seconds > 0 for seconds in plan["time_s"].values())
    assert sum(time) == pytest.approx(plan["step_time_s"], abs=5e-4 * len(time))
    *parts, peak = (float(line[22:34]) for line in sections["Memory of one rank, GiB"].splitlines())
    assert peak == pytest.approx(sum(parts), abs=5e-3 * (len(parts) + 1)) == pytest.approx(plan["peak_memory_gib"]["total"], abs=5e-3)
    sent = sections["Sent by one rank in one step, GB"].splitlines()
    assert [line[2:22].strip().replace(" ", "_") for line in sent] == list(plan["comm_bytes"])
    assert sum(float(line[34:].strip("% ")) for line in sent) == pytest.approx(100, abs=0.05 * len(sent))


def test_every_operator_has_its_split_and_runner_up(compiled):
    lines = text(compiled.plan).splitlines()
    for rows in compiled.plan["blocks"].values():
        for row in (row for row in rows if "operator" in row):
            (line,) = (line for line in lines if line.startswith(f"  {row['operator']} "))
            other = row["runner_up"]
            assert " ".join(f"{letter}@{axis}" for axis, letter in row["strategy"].items()) in line
            assert f"{row['forward_s'] * 1e3:.3f}" in line and f"{row['backward_s'] * 1e3:.3f}" in line
            assert line.endswith("no other way") == (other is None)
            assert other is None or f"{other['extra_s'] * 1e3:+.3f} ms" in line


def test_a_price_of_a_second_and_one_without_room():
    plan = full()
    row = next(row for row in plan["blocks"]["LlamaDecoderLayer"] if row.get("runner_up"))
    row["runner_up"] |= {"extra_s": 3.3076, "fits": False, "peak_memory_gib": 86.94}
    assert "+3.308 s, no room (87 GiB)" in text(plan)


def test_the_modes_of_segments_in_words():
    shown = text(full())
    assert "-- attention: 32 layers kept" in shown
    assert "-- attention_input: 28 layers kept; 4 layers offloaded to the host" in shown
    words = "8 layers kept; 16 layers recomputed in 8 tiles; 8 layers recomputed but for gate_proj, up_proj"
    assert f"-- mlp: {words}" in shown
    plan = full()
    plan["segments"]["LlamaDecoderLayer"]["mlp"] |= {"keep": 31, "recompute": 0, "selective": 0, "spill": 1, "tiles": 4}
    assert "-- mlp: 31 layers kept; 1 layer replayed from the host in 4 tiles" in text(plan)


def test_meshes_come_the_quickest_first_and_not_too_many():
    plan = full()
    plan["alternatives"] = [
        {"mesh": f"mesh {i}", "zero": 3, "step_time_s": None if i == 3 else 100.0 - i, "exact": False, "reason": f"reason {i}"}
        for i in range(14)
    ]
    lines = text(plan).split("Meshes that were not chosen\n")[1].split("\n\n")[0].splitlines()
    assert [line.split("reason ")[1] for line in lines[:-1]] == [str(i) for i in range(13, 13 - MOST, -1)]
    assert lines[-1] == "  and 4 more"
    plan["alternatives"] = [plan["alternatives"][3] | {"reason": "it does not fit in memory"}]
    assert re.search(r"mesh 3 +-  it does not fit in memory", text(plan))


def test_the_chosen_mesh_and_an_empty_list_are_no_alternatives(compiled):
    plan = dict(compiled.plan)
    assert any(not other["reason"] for other in plan["alternatives"])
    assert "Meshes that were not chosen" not in text(plan | {"alternatives": [o for o in plan["alternatives"] if not o["reason"]]})


def test_one_rank_sends_nothing(model, tmp_path):
    plan = compile_program(request_of(model, tmp_path, plan_ngpus=1, runtime_ngpus=1)).plan
    shown = text(plan)
    assert "mesh       one rank, 1 scale unit: 1 x h100-80gb" in shown
    assert "Nothing is sent between ranks." in shown
    assert shown.count("no other way") == sum("operator" in row for rows in plan["blocks"].values() for row in rows)


# --- a user's mistakes --------------------------------------------------------------------------------------------------


def test_without_a_plan(tmp_path):
    with pytest.raises(UserError, match=r"there is no plan.json in .*: compile a program with that --name first"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"plan.json is damaged \(.*\): compile the program again"),
        ("[]", "plan.json is not a JSON object"),
        ("{}", "not a plan of this"),
    ],
)
def test_a_plan_that_is_not_readable(tmp_path, content, words):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(UserError, match=words):
        run(tmp_path)


def test_advice_needs_the_fingerprint(program):
    (program / "fingerprint.json").unlink()
    with pytest.raises(UserError, match="there is no compiled program in .*: compile one with that --name first"):
        advise(program, print)


def test_advice_refuses_a_fingerprint_of_another_version(program):
    known = json.loads((program / "fingerprint.json").read_text())
    write(program, "fingerprint.json", {**known, "request": {**known["request"], "pipelines": 4}})
    with pytest.raises(UserError, match="fingerprint.json was written by another version .*pipelines.*: compile the program again"):
        advise(program, print)


# --- what binds ---------------------------------------------------------------------------------------------------------


def bound(hardware: Hardware, **asked: object) -> tuple[dict[str, str], float, float | None]:
    """What binds the best plan of a tiny model on two ranks, its step, and the bound without a limit of memory."""
    regions = tiny("llama", 3, 2, 1024)
    decisions, report = solve(regions, Request(2, 1, 1, hardware, 2, force="sp2", **asked))
    plan = realize(regions, decisions, Machine(hardware, decisions.axes, 1))
    return binding(plan, evaluate(plan), report), evaluate(plan).step_s, report.unlimited_s


def test_slow_arithmetic_binds():
    found, step_s, unlimited = bound(scaled(arithmetic=1e-4, bandwidth=1e-2))
    assert found["constraint"] == "compute" and found["sentence"].startswith("Arithmetic binds: compute takes ")
    assert "attention alone" in found["sentence"] and "of 74.0 GiB stay free." in found["sentence"]
    assert unlimited == pytest.approx(step_s, rel=5e-3)


def test_slow_links_bind():
    found, step_s, unlimited = bound(scaled(links=1e-4))
    assert found["constraint"] == "communication"  # though the bound is lower: it mixes what no one way of storing has
    assert unlimited < 0.99 * step_s
    assert re.fullmatch(r"Communication binds: it takes \d+\.\d% of the step: reshards [\d.e+-]+ m?s(, .*)?\.", found["sentence"])


def test_memory_binds_where_more_of_it_would_be_faster():
    slow = dataclasses.replace(scaled(arithmetic=1e-4, bandwidth=1e-2), host_memory_bytes=0)
    _, free_s, _ = bound(slow, zero=3)
    regions = tiny("llama", 3, 2, 1024)
    decisions, _ = solve(regions, Request(2, 1, 1, slow, 2, force="sp2", zero=3))
    peak = evaluate(realize(regions, decisions, Machine(slow, decisions.axes, 1))).peak_bytes
    found, step_s, unlimited = bound(with_usable_bytes(slow, 0.7 * peak), zero=3)
    assert found["constraint"] == "memory" and "of recomputation" in found["sentence"]
    assert unlimited <= free_s * (1 + 1e-4) < step_s
    assert f"{(step_s - unlimited) / step_s:.1%} less" in found["sentence"]


# --- what would help ----------------------------------------------------------------------------------------------------


def names(request: CompileRequest, hardware: Hardware = H100) -> list[str]:
    return [change.name for change in changes(request, hardware)]


def test_changes_that_are_tried(tmp_path):
    request = request_of(tmp_path, tmp_path)
    every = ["twice the GPUs", "1.5 times the memory", "twice the link bandwidth", "--attention_kernel flash3", "half the sequence length"]
    assert names(request) == every
    assert names(request, H100.with_attention_kernel("flash3")) == [name for name in every if "flash3" not in name]
    one = dataclasses.replace(request, plan_ngpus=1, runtime_ngpus=1)
    assert names(one) == [name for name in every if "link" not in name]
    assert names(dataclasses.replace(request, seq_len=63)) == every[:-1]


def test_a_change_changes_one_thing_and_keeps_the_tokens_of_a_step(tmp_path):
    request = request_of(tmp_path, tmp_path, grad_accumulation_steps=3, runtime_ngpus=4)
    found = {change.name: change for change in changes(request, H100)}
    for change in found.values():
        asked = change.request
        assert asked.seq_len * asked.micro_batch_size * asked.grad_accumulation_steps * asked.dp == 64 * 2 * 3 * 2
    assert found["twice the GPUs"].request.plan_ngpus == 4 and found["twice the GPUs"].request.runtime_ngpus == 8
    assert found["1.5 times the memory"].hardware.memory_bytes == int(1.5 * H100.memory_bytes)
    assert found["half the sequence length"].request.seq_len == 32
    fast = found["twice the link bandwidth"].hardware.links
    assert [link.bandwidth_bytes_per_s for link in fast] == [2 * link.bandwidth_bytes_per_s for link in H100.links]
    assert next(iter(found["--attention_kernel flash3"].hardware.rates.attention)) == "flash3"


def test_advice_is_what_a_compile_for_the_change_predicts(program, model, tmp_path):
    rows = advise(program, lambda line: None)
    plan = json.loads((program / "plan.json").read_text())
    assert plan["advice"] == rows and len(rows) == 5
    gains = [row["gain"] for row in rows]
    assert gains == sorted(gains, reverse=True)
    twice = next(row for row in rows if row["change"] == "twice the GPUs")
    again = compile_program(request_of(model, tmp_path / "again", plan_ngpus=4, runtime_ngpus=4)).plan
    assert twice["step_time_s"] == pytest.approx(again["step_time_s"], rel=3e-3)
    assert twice["gain"] == pytest.approx(1 - twice["step_time_s"] / plan["step_time_s"], abs=2e-3)  # less counts as nothing
    assert twice["tokens_per_s_per_gpu"] == pytest.approx(128 / twice["step_time_s"] / 4)
    shown = text(plan).split("What would help\n")[1].splitlines()
    assert [row["change"] for row in rows] == [line[2:38].strip() for line in shown if line[2] != " "]


def test_advice_changes_nothing_else_of_the_plan(program):
    path = program / "plan.json"
    os.utime(path, (1_000_000_000, 1_000_000_000))
    before = json.loads(path.read_text())
    advise(program, lambda line: None)
    after = json.loads(path.read_text())
    assert after.pop("advice") and after == before
    assert path.stat().st_mtime == 1_000_000_000
    assert sorted(file.name for file in program.iterdir()) == ["fingerprint.json", "plan.json", "program.py"]


def test_a_change_that_cannot_be_planned_says_why(program, monkeypatch):
    def none(regions, request, hardware):
        if request.plan_ngpus == 4:
            raise UserError("its sizes do not divide over 4 ranks; change this or that")
        return {**json.loads((program / "plan.json").read_text()), "step_time_s": 1.0}

    monkeypatch.setattr(advising, "best_plan", none)
    monkeypatch.setattr(advising, "capture_regions", lambda *args: None)
    last = advise(program, lambda line: None)[-1]
    assert last["change"] == "twice the GPUs" and last["gain"] is None and last["step_time_s"] is None
    assert last["sentence"] == "No plan: its sizes do not divide over 4 ranks."
    assert re.search(r"twice the GPUs +No plan: its sizes do not", text(json.loads((program / "plan.json").read_text())))


def test_a_forced_mesh_has_no_twice_the_gpus(model, tmp_path, monkeypatch):
    folder = compile_program(request_of(model, tmp_path, force="sp2")).folder
    monkeypatch.setattr(advising, "changes", lambda request, hardware: list(changes(request, hardware))[:1])
    (row,) = advise(folder, lambda line: None)
    assert row["gain"] is None and row["sentence"] == "No plan: --force sp2 fixes the mesh."


def test_more_of_what_does_not_bind_gains_nothing(program):
    rows = {row["change"]: row for row in advise(program, lambda line: None)}
    assert rows["1.5 times the memory"]["gain"] == 0.0
    assert rows["twice the link bandwidth"]["gain"] >= 0.0


def test_advice_keeps_to_the_machine_that_was_asked_for(model, tmp_path):
    machine = tmp_path / "mine.json"
    machine.write_text(to_json(dataclasses.replace(load_hardware("cpu"), name="mine")))
    folder = compile_program(request_of(model, tmp_path, hardware=str(machine), precision="fp32")).folder
    machine.unlink()
    with pytest.raises(UserError, match="mine.json does not exist"):
        advise(folder, print)


# --- the command --------------------------------------------------------------------------------------------------------


def test_explain_without_advice(command, program, capsys):
    before = (program / "plan.json").read_bytes()
    assert command("--no-advice") == 0
    printed = capsys.readouterr()
    assert "What would help" not in printed.out and printed.err == ""
    assert (program / "plan.json").read_bytes() == before


def test_explain_with_advice_puts_it_on_the_page(command, program, capsys):
    assert command() == 0
    printed = capsys.readouterr()
    assert "What would help" in printed.out and "planning with twice the GPUs\n" in printed.err
    assert not (program / "plan.html").exists()
    (program / "plan.html").write_text("old")
    assert command() == 0
    page = (program / "plan.html").read_text()
    assert page != "old" and "twice the GPUs" in page


def test_explain_of_a_folder_without_a_plan(command, program):
    (program / "plan.json").unlink()
    with pytest.raises(UserError, match="there is no plan.json"):
        command()


def test_explain_keeps_advice_that_is_there(command, program, capsys):
    plan = json.loads((program / "plan.json").read_text())
    write(program, "plan.json", plan | {"advice": full()["advice"]})
    assert command("--no-advice") == 0
    assert "What would help" in capsys.readouterr().out


def test_the_room_of_advice_is_only_loaded_when_asked(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "seqloom.emit.advice", SimpleNamespace())
    assert command("--no-advice") == 0
    with pytest.raises(ImportError):
        command()

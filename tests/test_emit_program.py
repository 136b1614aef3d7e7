"""Emitted programs: they parse, lint, keep the original's names, stay short, and say where everything lies."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
import torch
from models import FAMILIES

from seqloom.capture import capture
from seqloom.cost.hardware import load_hardware
from seqloom.emit.program import program_source
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import solve
from seqloom.runtime.program import Program, load_program

PLANS = [(1, None), (2, "sp2"), (2, "tp_sp2"), (2, "tp_plain2"), (4, "sp2,tp2")]


def emit(config, ranks: int, force: str | None, *, recompute: bool | None = False, seq_len: int = 32, batch: int = 1) -> str:
    """The program of a config under a forced plan."""
    captured = capture(config, batch_size=batch, seq_len=seq_len, dtype=torch.float64, loss_chunk=16)
    regions = build_regions(captured.graph)
    hardware = load_hardware("cpu")
    decisions, _ = solve(regions, Request(ranks, 1, 1, hardware, 8, force, 3, recompute))
    plan = realize(regions, decisions, Machine(hardware, decisions.axes, 1))
    return program_source(plan, captured.model_class, captured.tied, "A summary.")


@pytest.fixture(scope="module")
def llama() -> str:
    return emit(FAMILIES["llama"](3), 4, "sp2,tp2")


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize(("ranks", "force"), PLANS)
def test_every_plan_of_every_family_is_a_loadable_clean_program(family, ranks, force, tmp_path):
    text = emit(FAMILIES[family](2), ranks, force)
    (tmp_path / "program.py").write_text(text)
    module = load_program(tmp_path)
    assert all(hasattr(module, name) for name in Program.__annotations__)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,E", "--ignore", "E501", str(tmp_path / "program.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert (
        text
        == subprocess.run(
            [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "140", "-"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )


def test_state_dict_keys_are_the_originals(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    config = FAMILIES["llama"](3)
    with torch.device("meta"):
        original = AutoModelForCausalLM.from_config(config)
    declared = {
        key.value: ast.literal_eval(value)
        for node in ast.walk(ast.parse(llama))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "declare"
        for key, value in zip(node.args[1].keys, node.args[1].values, strict=True)
    }
    names = {name.replace(f"model.layers.{i}.", "") for i in range(3) for name in original.state_dict() if f"layers.{i}." in name}
    names |= {name for name in original.state_dict() if "layers." not in name}
    assert set(declared) == names
    shapes = {name.split(".", 3)[-1] if "layers." in name else name: tuple(t.shape) for name, t in original.state_dict().items()}
    assert all(declared[name] == shapes[name] for name in declared)


def test_length_does_not_depend_on_depth():
    lengths = {layers: emit(FAMILIES["llama"](layers), 2, "sp2").count("\n") for layers in (2, 6)}
    assert lengths[2] == lengths[6] < 200


def test_alternating_layers_are_two_classes_in_one_loop():
    text = emit(FAMILIES["gemma2"](4), 2, "sp2")
    classes = [n.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)]
    assert classes == ["Gemma2DecoderLayer1", "Gemma2DecoderLayer2", "Gemma2ForCausalLM"]
    assert text.count("for layer in self.model.layers:") == 1


def test_lines_say_where_their_results_lie(llama):
    assert "[b, l@sp, " in llama and "@tp" in llama
    body = llama[llama.index("class LlamaDecoderLayer") :]
    missing = [line for line in body.splitlines() if "F.linear(" in line and "# [" not in line and "return" not in line]
    assert not missing


def test_an_operator_named_like_a_value_is_imported_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "from chunk_linear_cross_entropy import chunk_linear_cross_entropy as plain\nfrom seqloom.ops import register_op\n\n"
        "@register_op('b l d^, n^ d^, b l -> b l')\ndef loss(hidden, weight, labels, padding_idx, chunk_size=8):\n"
        "    return plain(hidden, weight, labels, padding_idx, chunk_size)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    captured = capture(FAMILIES["llama"](2), batch_size=1, seq_len=32, dtype=torch.float64, loss="my_losses:loss", loss_chunk=16)
    hardware = load_hardware("cpu")
    regions = build_regions(captured.graph)
    decisions, _ = solve(regions, Request(1, 1, 1, hardware, 8))
    plan = realize(regions, decisions, Machine(hardware, decisions.axes, 1))
    text = program_source(plan, captured.model_class, captured.tied, "A summary.")
    assert "from my_losses import loss as my_losses_loss" in text
    assert "losses = my_losses_loss(norm, " in text


def test_the_compiler_is_not_imported(llama):
    imported = [node.module for node in ast.walk(ast.parse(llama)) if isinstance(node, ast.ImportFrom)]
    assert not [m for m in imported if m.startswith(("seqloom.plan", "seqloom.emit", "seqloom.capture", "seqloom.cost"))]


def test_recompute_is_visible():
    text = emit(FAMILIES["llama"](2), 2, "sp2", recompute=True)
    assert "checkpoint(self.mlp_forward, hidden_states, use_reentrant=False)" in text
    assert "checkpoint(self.attention, " not in text  # attention itself is never recomputed
    assert "checkpoint(" not in emit(FAMILIES["llama"](2), 2, "sp2", recompute=False)


def test_tables_of_the_contract(llama, tmp_path):
    (tmp_path / "program.py").write_text(llama)
    module = load_program(tmp_path)
    assert module.MESH == {"sp": 2, "tp": 2} and list(module.MESH) == ["sp", "tp"]
    assert module.SUM_GRADS == ("sp",)
    assert module.INPUTS["input_ids"] in ((None, "sp"), (None, ("sp", "tp")))
    assert module.SHAPES["labels"] == (1, 32)
    assert str(module.PLACEMENTS["model.layers.*.self_attn.q_proj.weight"]["tp"]) == "S(0)"
    assert str(module.PLACEMENTS["model.layers.*.self_attn.o_proj.weight"]["tp"]) == "S(1)"
    assert "sp" in module.LOSS_PARTIAL

"""Where there are more ranks than heads, attention is split by heads and rows that are dealt out evenly, also where a row is one text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from models import FAMILIES

from seqloom.emit import choose
from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.runtime import verify

LENGTH = 65536


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> CompileRequest:
    """Eight ranks for four query heads of two key/value heads."""
    place = tmp_path_factory.mktemp("even")
    FAMILIES["llama"](2).save_pretrained(place / "model")
    return CompileRequest(str(place / "model"), LENGTH, 8, 8, "auto", output_folder=place)


def test_more_ranks_than_heads_deal_the_rows_out_evenly(asked):
    compiled = compile_program(asked)
    source = (compiled.folder / "program.py").read_text()
    assert "magi_attention(" in source and "CONTEXT = " in source
    plan = json.loads((compiled.folder / "plan.json").read_text())
    assert plan["documents"] == [LENGTH], "a row is one document"
    assert any("it splits attention by positions" in tried["reason"] for tried in plan["alternatives"])
    by_positions = compile_program(replace(asked, name="gather", attention="gather"))
    assert "magi_attention(" not in (by_positions.folder / "program.py").read_text()
    assert plan["step_time_s"] < by_positions.plan["step_time_s"]
    difference = verify.verify(compiled.folder)
    assert max(difference.loss, difference.gradient) < verify.TOLERANCE


@pytest.mark.parametrize("changes", [{"plan_ngpus": 4, "runtime_ngpus": 4}, {"force": "cp8"}])
def test_where_heads_suffice_or_the_user_has_chosen_there_is_no_second_search(asked, monkeypatch, changes):
    monkeypatch.setattr(choose, "attend_inside_documents", lambda *args: pytest.fail("searched again"))
    compiled = compile_program(replace(asked, name="other", **changes))
    assert "magi_attention(" not in (compiled.folder / "program.py").read_text()


def test_a_model_whose_attention_knows_no_documents_keeps_its_plan(asked, monkeypatch):
    def refuse(*args):
        raise UserError("attention that is not causal")

    monkeypatch.setattr(choose, "attend_inside_documents", refuse)
    compiled = compile_program(replace(asked, name="refused"))
    assert "query_start" in (compiled.folder / "program.py").read_text()

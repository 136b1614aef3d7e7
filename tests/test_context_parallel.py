"""Attention inside documents in compiled programs: what is planned and emitted, and that it computes the original model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES
from torch._dynamo.testing import CompileCounterWithBackend

from seqloom.capture import capture
from seqloom.capture.documents import attend_inside_documents
from seqloom.data.documents import restarting_positions
from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.magi.key import make_key, most_recent_key, use_key
from seqloom.magi.operator import magi_attention
from seqloom.magi.share import documents_mask, even_chunk_size, share
from seqloom.ops.check import check_op
from seqloom.ops.flops import flops
from seqloom.runtime import dryrun, rehearse
from seqloom.runtime.context import Layout
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.program import load_program
from seqloom.runtime.simulated import fake_job
from seqloom.runtime.verify import scaled_documents, verify

PACKED = (20, 5, 30, 9)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for family in ("llama", "qwen3", "gpt2"):
        FAMILIES[family](2).save_pretrained(place / family)
    return place


def compiled(models, place, family="llama", ranks=2, batch=1, **given):
    asked = CompileRequest(
        str(models / family), 64, ranks, ranks, "p", micro_batch_size=batch, hardware="cpu", precision="fp32", output_folder=place, **given
    )
    return compile_program(asked).folder


# --- plans and programs --------------------------------------------------------------------------------------------------------------


CASES = [
    ("llama", 1, 2, {}),
    ("llama", 2, 1, {"force": "cp2"}),
    ("qwen3", 2, 2, {"force": "cp2"}),
    ("gpt2", 2, 1, {"force": "cp2"}),
    ("llama", 2, 1, {"force": "sp2"}),
    ("llama", 4, 1, {"force": "cp2,sp2"}),
    ("llama", 4, 1, {"force": "sp2,cp2"}),
    ("llama", 4, 2, {"force": "dp2,cp2"}),
    ("llama", 4, 1, {"force": "cp2,tp2"}),
    ("llama", 4, 1, {"force": "cp2,tp_sp2"}),
    ("llama", 4, 1, {"force": "cp4", "recompute": "all"}),
    ("gpt2", 2, 1, {"attention": "magi", "force": "cp2"}),
]


@pytest.mark.parametrize(("family", "ranks", "batch", "given"), CASES)
def test_every_split_of_documents_computes_the_original(models, tmp_path, family, ranks, batch, given):
    """On processes, with random documents in every row: loss and gradients in fp64."""
    found = verify(compiled(models, tmp_path, family, ranks, batch, documents=PACKED, **given))
    assert found.loss < 1e-12 and found.gradient < 1e-9, found


def test_the_program_calls_it_in_one_line(models, tmp_path):
    folder = compiled(models, tmp_path, documents=PACKED, force="cp2", attention="magi")
    text = (folder / "program.py").read_text()
    (line,) = [line.strip() for line in text.splitlines() if "magi_attention(" in line]
    assert line.startswith("return magi_attention(query, key, value, scale=") and ", group=self.sp)" in line
    assert "documents=" not in line and 'CONTEXT = ((), ("sp",))' in text


def test_heads_and_sequence_together_name_both_axes(models, tmp_path):
    """Keys and values go to the ranks of one axis by heads and to those of the other by rows."""
    text = (compiled(models, tmp_path, ranks=4, documents=PACKED, force="cp2,sp2") / "program.py").read_text()
    assert "group=self.sp)" in text and "all_to_all(value, split_dim=1, concat_dim=2, group=self.sp2)" in text


def test_a_plan_may_keep_the_sequence_whole_inside_attention(models, tmp_path):
    text = (compiled(models, tmp_path, documents=PACKED, attention="heads", force="sp2") / "program.py").read_text()
    assert "CONTEXT = ((), ())" in text and "group=" not in next(line for line in text.splitlines() if "magi_attention(" in line)


@pytest.mark.parametrize(("attention", "by_sequence"), [("magi", True), ("heads", False)])
def test_attention_is_split_as_asked(models, tmp_path, attention, by_sequence):
    folder = compiled(models, tmp_path, documents=PACKED, attention=attention, force="sp2")
    (line,) = [line for line in (folder / "program.py").read_text().splitlines() if "magi_attention(" in line]
    assert ("group=self.sp)" in line) == by_sequence
    assert "documents=" not in line, "the mask is that of each micro-batch's key"
    assert json.loads((folder / "plan.json").read_text())["documents"] == list(PACKED)


def test_gathered_keys_know_no_documents(models, tmp_path):
    text = (compiled(models, tmp_path, attention="gather", force="sp2") / "program.py").read_text()
    assert "magi_attention" not in text and "all_gather(key" in text
    with pytest.raises(UserError, match="gather knows no documents"):
        compiled(models, tmp_path, attention="gather", documents=PACKED)


# --- what the planner counts with ----------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_documents():
    graph = capture(FAMILIES["llama"](2), batch_size=2, seq_len=64, dtype=torch.bfloat16).graph
    packed = attend_inside_documents(graph, PACKED)
    (before,), (after,) = ([n for b in g.blocks.values() for n in b.nodes if n.op.endswith("attention")] for g in (graph, packed))
    whole, inside = (flops(n.op, n.args, dict(n.kwargs), n.bound) for n in (before, after))
    assert inside * (64 * 64 // 2) == whole * sum(n * n // 2 for n in PACKED)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=40, deadline=None)
def test_shares_are_within_their_bounds(lengths, ranks):
    lengths[-1] += -sum(lengths) % ranks
    found = share(tuple(lengths), ranks)
    rows = sum(lengths)
    assert found.balance >= 1 - 1e-9 and 0 <= found.received <= rows - rows // ranks and 0 <= found.host <= 1 + 1e-9
    chunk = even_chunk_size(rows, ranks)
    assert rows // ranks % chunk == 0


def test_long_documents_balance_and_short_ones_stay_at_home():
    assert share((131072,), 8).balance < 1.001
    assert share((16384,) * 8, 8).received == 0
    packed = share((4096, 1024, 4096, 512, 2560, 1024, 3072), 8)
    assert packed.balance < 1.02 and packed.received < 0.45 * 7 / 8 * 16384


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(16, 256))
@settings(deadline=None)
def test_documents_scale_to_any_length(lengths, length):
    found = scaled_documents(lengths, length)
    assert sum(found) == length and min(found) >= 1


# --- laying rows out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_every_rank_takes_the_rows_of_its_key(models, tmp_path, rank):
    """The pieces of all ranks together are every token once, with its label and its position in its document."""
    program = load_program(compiled(models, tmp_path, ranks=4, batch=2, documents=PACKED, force="dp2,cp2"))
    with fake_job(rank, 4):
        layout = Layout(program, build_mesh(program.MESH, 1, "cpu"))
        tokens = torch.arange(128).view(2, 64)
        borders = torch.tensor([0, 20, 25, 55, 64, 100, 128])
        prepared = layout.prepare({"input_ids": tokens, "labels": tokens + 1, "cu_seqlens": borders})
        inputs = prepared.use()
        assert most_recent_key(prepared.key.group) == prepared.key
        assert prepared.key.total_seqlen == 64, "a rank attends within its own part of the batch"
        ids = inputs["input_ids"]
        assert sorted(ids.flatten().tolist()) == list(range(128)) and torch.equal(inputs["labels"], ids + 1)
        assert torch.equal(inputs["position_ids"].flatten(), torch.from_numpy(restarting_positions(borders.numpy()))[ids.flatten()])
        part, piece = divmod(rank, 2)
        mine = ids[part : part + 1, piece * 32 : piece * 32 + 32].flatten() - 64 * part
        assert np.array_equal(np.sort(mine), np.sort(prepared.key.dispatch.position_ids(piece)))
        assert np.array_equal(mine, prepared.key.dispatch.position_ids(piece))


@pytest.mark.parametrize("borders", [[0, 64], [0, 64, 100], [0, 50, 100, 128], [1, 64, 128], [0, 64, 64, 128], [0, 128]], ids=str)
def test_borders_that_do_not_fit_are_refused(models, tmp_path, borders):
    program = load_program(compiled(models, tmp_path, ranks=1, batch=2, documents=PACKED))
    with fake_job(0, 1), pytest.raises(UserError, match="do not fit its 2 rows of 64 tokens"):
        Layout(program, build_mesh(program.MESH, 1, "cpu")).prepare(
            {"input_ids": torch.zeros(2, 64, dtype=torch.int64), "cu_seqlens": torch.tensor(borders)}
        )


def test_a_program_without_documents_refuses_packed_rows(models, tmp_path):
    program = load_program(compiled(models, tmp_path, ranks=1))
    with fake_job(0, 1):
        layout = Layout(program, build_mesh(program.MESH, 1, "cpu"))
        ids = torch.zeros(1, 64, dtype=torch.int64)
        assert layout.prepare({"input_ids": ids, "cu_seqlens": torch.tensor([0, 64])}).key is None
        with pytest.raises(UserError, match="compile again for this data set"):
            layout.prepare({"input_ids": ids, "cu_seqlens": torch.tensor([0, 10, 64])})


# --- the operator --------------------------------------------------------------------------------------------------------------------


def test_its_annotation_is_true():
    sizes = {"b": 2, "k": 2, "g": 2, "l": 24, "e": 8}
    report = check_op("custom_ops.magi_attention:magi_attention", sizes=sizes, args={"scale": 0.3, "documents": (10, 3, 11)})
    assert report.ok and {split.name for split in report.splits} >= {"b", "k"}


def test_a_compiled_block_around_it_does_not_break():
    """`fullgraph` raises at a graph break; the next micro-batch has another mask and compiles nothing anew."""

    def block(query, key, value):
        return (magi_attention(query * 2, key, value, scale=0.3) * 2).sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled_block = torch.compile(block, fullgraph=True, backend=counter)
    query, key, value = (torch.randn(2, heads, 16, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    for borders in ([0, 5, 16, 32], [0, 16, 30, 32]):
        use_key(make_key(documents_mask(borders), None, None, None, None, current=False))
        found = torch.autograd.grad(compiled_block(query, key, value), (query, key, value))
        wanted = torch.autograd.grad(block(query, key, value), (query, key, value))
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    assert counter.frame_count == 1


def test_rows_of_another_number_than_the_keys_are_refused():
    use_key(make_key(documents_mask([0, 5, 16]), None, None, None, None, current=False))
    with pytest.raises(UserError, match="32 rows where the key made last gives this rank 16"):
        magi_attention(*(torch.randn(2, 2, 16, 8) for _ in range(3)), scale=0.3)


# --- at full size and on one device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_is_rehearsed_and_run_dry(models, tmp_path, rank):
    """With the typical row's documents; operations are those predicted, of the rank that has most to do."""
    folder = compiled(models, tmp_path, ranks=4, documents=PACKED, force="cp4", attention="magi", zero=3)
    dry = dryrun.dry_run(folder, rank)
    plan = json.loads((folder / "plan.json").read_text())
    assert sum(dry.flops.values()) <= 1.1 * sum(plan["flops_per_rank"].values())
    assert dry.sent["all_to_all"] > 0
    found = rehearse.rehearse(folder, rank, torch.device("cpu"), 2)
    assert np.isfinite(found.loss) and found.peak_bytes > 0


def test_8b_at_128k_is_planned_with_the_sequence_split(tmp_path):
    """By heads or by the sequence within a few hundredths of each other, and what is predicted is what the dry run has."""
    steps = {}
    for attention, documents in (("heads", (131072,)), ("magi", (131072,)), ("auto", (131072,))):
        asked = CompileRequest("llama3_8b", 131072, 8, 8, attention, attention=attention, documents=documents, output_folder=tmp_path)
        steps[attention] = json.loads((compile_program(asked).folder / "plan.json").read_text())["step_time_s"]
    assert steps["auto"] <= min(steps["heads"], steps["magi"]) * 1.0005
    assert steps["magi"] < 1.05 * steps["heads"]
    packed = CompileRequest("llama3_8b", 131072, 8, 8, "packed", documents=(16384,) * 8, output_folder=tmp_path)
    plan = json.loads((compile_program(packed).folder / "plan.json").read_text())
    assert plan["step_time_s"] < 0.55 * steps["auto"], "an eighth of the cells"
    assert "group=self.sp)" in (tmp_path / "packed" / "program.py").read_text(), "documents that fill a rank each stay at home"

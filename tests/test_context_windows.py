"""Sliding windows in compiled programs whose attention stays inside documents: plans, programs, parity, dry runs and training."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, original_model
from procs import run_ranks
from test_trainer_loop import WHOLE, _train, losses
from test_training_documents import make_documents
from transformers import AutoConfig, PretrainedConfig, Qwen2Config

import seqloom.runtime.offload
from seqloom.capture import Captured, capture
from seqloom.capture.documents import PLAIN, attend_inside_documents
from seqloom.cost.hardware import load_hardware
from seqloom.emit.pipeline import compile_program
from seqloom.emit.program import program_source
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.magi import key as keys
from seqloom.magi.share import documents_mask, even_chunk_size, share
from seqloom.magi.windows import cut_to_window
from seqloom.ops.flops import flops
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import solve
from seqloom.runtime import dryrun, rehearse
from seqloom.runtime.context import Layout
from seqloom.runtime.mesh import build_mesh
from seqloom.runtime.parity import compare, original_gradients, program_gradients, random_batches
from seqloom.runtime.program import PROGRAM_FILE, load_program
from seqloom.runtime.shrink import shrink
from seqloom.runtime.simulated import fake_job
from seqloom.runtime.step import MicroBatch
from seqloom.runtime.verify import verify

PACKED = (20, 5, 30, 9)
WINDOW = 5  # of tests/models.py


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for family in ("mistral", "gemma2", "gemma3"):
        config = FAMILIES[family](2)
        config.hidden_size = 64 if "gemma" in family else 32  # Gemma's embeddings are scaled by its root, kept in fp32
        config.save_pretrained(place / family)
    mixed = FAMILIES["qwen2"](2)
    mixed.use_sliding_window, mixed.sliding_window, mixed.layer_types = True, WINDOW, ["full_attention", "sliding_attention"]
    mixed.save_pretrained(place / "qwen2")
    return place


def compiled(models, place, family="mistral", ranks=2, batch=1, precision="fp32", **given):
    asked = CompileRequest(
        str(models / family),
        64,
        ranks,
        ranks,
        "p",
        micro_batch_size=batch,
        hardware="cpu",
        precision=precision,
        output_folder=place,
        **given,
    )
    return compile_program(asked).folder


# --- plans and programs --------------------------------------------------------------------------------------------------------------

STREAM = (64,)  # documents of rows that are one text
CASES = {  # by ranks: family, rows of a micro-batch, how ranks are used, documents of a typical row
    1: [("mistral", 2, ""), ("gemma2", 1, "")],
    2: [
        ("mistral", 1, "sp2"),
        ("mistral", 1, "tp2"),
        ("mistral", 1, "cp2"),
        ("gemma2", 2, "cp2"),
        ("gemma2", 1, "sp2"),
        ("gemma3", 1, "cp2"),
        ("gemma2", 1, "cp2", STREAM),
        ("qwen2", 1, "cp2"),
    ],
    4: [("mistral", 1, "sp2,tp2"), ("mistral", 1, "cp2,tp2"), ("gemma2", 1, "sp2,cp2"), ("qwen2", 1, "cp2,sp2")],
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A program, its original's weights, and micro-batches of one scale unit."""

    folder: Path
    config: PretrainedConfig
    weights: Path
    batches: list[MicroBatch]


@cache
def captured_of(models: Path, family: str, batch: int) -> tuple[PretrainedConfig, Captured]:
    config = AutoConfig.from_pretrained(models / family)
    return config, capture(config, batch_size=batch, seq_len=64, dtype=torch.float64, loss_chunk=16)


def job_of(models: Path, place: Path, family: str, batch: int, force: str, documents: tuple[int, ...] = PACKED) -> Job:
    """A program in fp64, with random documents in every row."""
    config, captured = captured_of(models, family, batch)
    parts = build_regions(attend_inside_documents(captured.graph, documents))
    weights, folder = place / family, place / f"{family}-{batch}-{force}-{len(documents)}"
    if not weights.exists():
        original_model(config).save_pretrained(weights)
    ranks = 4 if "," in force else 2 if force else 1
    request = Request(ranks, 1, 1, load_hardware("cpu"), 8, force or None, 3 if ranks > 1 else 0, None)
    decisions, _ = solve(parts, request)
    plan = realize(parts, decisions, Machine(request.hardware, decisions.axes, 1))
    folder.mkdir()
    (folder / PROGRAM_FILE).write_text(program_source(plan, captured.model_class, captured.tied, ""))
    return Job(folder, config, weights, random_batches(config, batch, 64, 1, 0, documents=documents != STREAM))


def run_jobs(rank: int, world_size: int, jobs: list[Job]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    seqloom.runtime.offload.MINIMUM = 1  # everything here is small
    found = [program_gradients(job.folder, job.config, job.weights, [job.batches]) for job in jobs]
    return found if rank == 0 else []


@pytest.mark.parametrize("ranks", CASES)
def test_every_split_of_documents_computes_the_original(models, tmp_path, ranks):
    """Loss and gradients in fp64 beside the model of transformers."""
    jobs = [job_of(models, tmp_path, *case) for case in CASES[ranks]]
    for case, one, found in zip(CASES[ranks], jobs, run_ranks(run_jobs, ranks, jobs, timeout=240)[0], strict=True):
        far = compare(*found, *original_gradients(one.config, one.weights, [one.batches]))
        assert far.loss < 1e-12 and far.gradient < 1e-9, (case, far)


def test_windows_count(models, tmp_path):
    """Without them the same program gives other losses."""
    one = job_of(models, tmp_path, "gemma2", 1, "")
    text = (one.folder / PROGRAM_FILE).read_text()
    (one.folder / PROGRAM_FILE).write_text(text.replace(", window=5", ""))
    (found,) = run_ranks(run_jobs, 1, [one])[0]
    assert compare(*found, *original_gradients(one.config, one.weights, [one.batches])).loss > 1e-6


def test_a_plan_for_rows_that_are_one_text_is_proved(models, tmp_path):
    """`--attention magi` with `--pack stream`, by `seqloom verify`."""
    folder = compiled(models, tmp_path, "gemma2", 1, attention="magi", recompute="all")
    assert "WINDOWS = (None, 5)" in (folder / "program.py").read_text()
    found = verify(folder)
    assert found.loss < 1e-12 and found.gradient < 1e-9, found


def test_the_program_says_each_window_once(models, tmp_path):
    def text(family, name):
        return (compiled(models, tmp_path / name, family, documents=PACKED, force="cp2") / "program.py").read_text()

    def calls(source):
        return [line.strip() for line in source.splitlines() if "magi_attention(" in line]

    mistral, gemma = text("mistral", "m"), text("gemma2", "g")
    assert "WINDOWS = (5,)" in mistral and "WINDOWS = (None, 5)" in gemma and 'CONTEXT = ((), ("sp",))' in gemma
    (call,) = calls(mistral)
    assert "window=5, group=self.sp)" in call
    assert sorted("window=5" in call for call in calls(gemma)) == [False, True]
    assert "documents=" not in mistral + gemma and "windows=" not in mistral + gemma


def test_attention_that_is_not_causal_is_refused(models):
    graph = capture(FAMILIES["mistral"](2), batch_size=1, seq_len=64, dtype=torch.bfloat16).graph
    (name, block), *_ = graph.blocks.items()
    kwargs = {"kwargs": (("scale", 1.0), ("causal", False))}
    nodes = [dataclasses.replace(node, **kwargs) if node.op == PLAIN else node for node in block.nodes]
    with pytest.raises(UserError, match="not causal"):
        attend_inside_documents(graph.replace(blocks={**graph.blocks, name: block.replace(nodes=tuple(nodes))}), PACKED)


def test_layers_with_and_without_a_window_split_rows_alike(tmp_path):
    """Each alone would be faster in a way of its own, and rows can be laid out in one way only."""
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
    kinds = {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}
    Qwen2Config(num_hidden_layers=2, **sizes, **kinds).save_pretrained(tmp_path / "m")
    asked = CompileRequest(str(tmp_path / "m"), 8192, 4, 4, "p", hardware="h100-80gb", documents=(8192,), output_folder=tmp_path)
    program = load_program(compile_program(asked).folder)
    assert program.CONTEXT == ((), ("sp",)) and program.WINDOWS == (None, 512)


def test_a_small_model_for_the_proof_has_all_kinds_of_layers():
    config = FAMILIES["gemma3"](12)
    config.sliding_window = 512
    small = shrink(config, 2)
    assert small.num_hidden_layers == len(small.layer_types) == 6 and set(small.layer_types) == set(config.layer_types)
    assert small.sliding_window == 7 and config.sliding_window == 512


# --- what the planner counts with ----------------------------------------------------------------------------------------------------


def test_operations_are_those_within_the_window():
    def inside(documents):
        graph = attend_inside_documents(capture(FAMILIES["mistral"](2), batch_size=2, seq_len=64, dtype=torch.bfloat16).graph, documents)
        (node,) = [n for block in graph.blocks.values() for n in block.nodes if n.op.endswith("attention")]
        assert dict(node.kwargs)["window"] == WINDOW
        return flops(node.op, node.args, dict(node.kwargs), node.bound) // (4 * 2 * 4 * 8)

    assert inside((5,) * 12 + (4,)) == 12 * (25 // 2) + 16 // 2
    assert inside((64,)) == pytest.approx(64 * 5 - 64 // 2 - 64 // 2 - 5, abs=8)


SAME = [
    ("mistral", 1, {"zero": 0, "recompute": "none"}),
    ("qwen2", 2, {"force": "sp2", "zero": 3, "attention": "heads", "recompute": "all"}),
    ("qwen2", 2, {"force": "cp2", "zero": 3, "attention": "magi"}),
]


@pytest.mark.parametrize(("family", "ranks", "given"), SAME)
def test_the_dry_run_counts_what_the_plan_predicts(models, tmp_path, family, ranks, given):
    """Operations and bytes, exactly; the last with documents that stay on their ranks."""
    folder = compiled(models, tmp_path, family, ranks, precision="bf16", documents=(32, 32), **given)
    plan = dryrun.read_plan(folder)
    result = dryrun.dry_run(folder, ranks - 1)
    assert result.flops == plan["flops_per_rank"]
    assert result.sent == {kind: count for kind, count in plan["comm_bytes"].items() if count}


def test_the_dry_run_sends_the_rows_of_the_window(models, tmp_path):
    """One text over two ranks: the second attends the last rows of the first, which sends them twice and gets their gradients once."""
    folder = compiled(models, tmp_path, precision="bf16", documents=(64,), force="cp2", attention="magi", zero=3, recompute="none")
    plan, results = dryrun.read_plan(folder), [dryrun.dry_run(folder, rank) for rank in range(2)]
    sent = [result.sent.get("all_to_all", 0) for result in results]
    row = 2 * 2 * 8  # key and value, heads, width
    assert sent == [2 * (2 + 2) * (WINDOW - 1) * row, 2 * 4 * (WINDOW - 1) * row]
    assert sum(sent) == plan["comm_bytes"]["all_to_all"]
    done = [sum(result.flops.values()) for result in results]
    assert sum(done) == pytest.approx(2 * sum(plan["flops_per_rank"].values()), rel=0.01)


def test_a_rank_is_rehearsed(models, tmp_path):
    folder = compiled(models, tmp_path, "gemma2", ranks=4, documents=PACKED, force="cp4", attention="magi", zero=3)
    found = rehearse.rehearse(folder, 3, torch.device("cpu"), 1)
    assert np.isfinite(found.loss)


# --- laying rows out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "widest"), [("mistral", WINDOW), ("gemma2", None)])
def test_rows_lie_as_the_widest_window_wants_them(models, tmp_path, family, widest, monkeypatch):
    """And everything is planned before a step asks for it."""
    program = load_program(compiled(models, tmp_path, family, documents=PACKED, force="cp2"))
    with fake_job(1, 2):
        prepared = Layout(program, build_mesh(program.MESH, 1, "cpu")).prepare({"input_ids": torch.arange(64).view(1, 64)})
        mask = documents_mask([0, 64])
        assert prepared.key.mask == mask
        chunk = even_chunk_size(64, 2)
        laid_out = keys.make_key(cut_to_window(mask, widest), None, None, None, prepared.key.group, chunk_size=chunk, current=False)
        assert prepared.key.dispatch == laid_out.dispatch
        monkeypatch.setattr(keys, "plan_exchange", None)
        for window in program.WINDOWS:
            exchange = prepared.key.within(window).exchange
            assert max(exchange.received_rows) == share((64,), 2, window, program.WINDOWS).received


def test_programs_of_before_have_no_windows(models, tmp_path):
    folder = compiled(models, tmp_path, documents=PACKED, force="cp2")
    text = (folder / "program.py").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("WINDOWS")]
    (folder / "program.py").write_text("\n".join(lines).replace(", window=5", ""))
    program = load_program(folder)
    with fake_job(0, 2):
        prepared = Layout(program, build_mesh(program.MESH, 1, "cpu")).prepare({"input_ids": torch.arange(64).view(1, 64)})
        assert "exchange" in vars(prepared.key) and sum(prepared.key.dispatch.areas) == 64 * 65 // 2


# --- training ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    FAMILIES["mistral"](2).save_pretrained(folder / "model")
    make_documents(folder / "data")
    run_ranks(_train, 1, folder, {**WHOLE, "plan_ngpus": 1, "name": "alone"}, timeout=240)
    return folder


@pytest.mark.parametrize("attention", ["magi", "heads"])
def test_two_ranks_make_the_steps_of_one(job, attention):
    run_ranks(_train, 2, job, {**WHOLE, "name": attention, "attention": attention, "force": "sp2"}, timeout=240)
    assert losses(job, attention) == pytest.approx(losses(job, "alone"), abs=1e-5)
    assert json.loads((job / "programs" / attention / "plan.json").read_text())["documents"] == [4, 9, 3]
    assert "WINDOWS = (5,)" in (job / "programs" / attention / "program.py").read_text()

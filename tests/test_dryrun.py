"""The dry run: what it counts equals what can be worked out on paper, and what the plan predicts.

The paper is for one rank of `handwritten_programs/counted` on the mesh sp 2 x tp 2, in bf16: `l` tokens of the whole sequence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from counted import BLOCK_NUMEL, KEEP, LAYERS, ROOT_NUMEL, D, E, F, V, write_counted
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.runtime import dryrun
from seqloom.runtime.live_bytes import PARTS

SELECTIVE = {
    "checkpoint(self.mlp, x, use_reentrant=False)": "selective(self.mlp, x, kept=(0,))",
    "from seqloom.runtime.mesh": "from seqloom.runtime.selective import selective\nfrom seqloom.runtime.mesh",
}
OFFLOAD = {
    "checkpoint(self.mlp, x, use_reentrant=False)": "offload(self.mlp, x)",
    "from seqloom.runtime.mesh": "from seqloom.runtime.offload import offload\nfrom seqloom.runtime.mesh",
}
BF16, FP32 = 2, 4


def linear_flops(tokens: int) -> int:
    """Forward of the split linears of one block: half of the tokens, half of the features."""
    return 2 * (tokens // 2) * (4 * D * D + 2 * D * F) // 2


def attention_flops(tokens: int) -> int:
    """Forward of causal attention over a quarter of the eight heads."""
    return 4 * 2 * (tokens * tokens // 2) * E


def head_flops(tokens: int) -> int:
    """Forward of the head over a quarter of the tokens."""
    return 2 * (tokens // 4) * D * V


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Callable[..., dryrun.DryRun]:
    """The dry run of rank 0 of a changed program, once for each change."""
    known: dict[str, dryrun.DryRun] = {}

    def run(**changes: Any) -> dryrun.DryRun:
        key = repr(changes)
        if key not in known:
            known[key] = dryrun.dry_run(write_counted(tmp_path_factory.mktemp("counted"), **changes), 0)
        return known[key]

    return run


# --- operations -------------------------------------------------------------------------------------------------------


@settings(max_examples=3, deadline=None)
@given(tokens=st.integers(2, 64).map(lambda n: 16 * n), accumulation=st.integers(1, 2))
def test_flops_are_those_on_paper(counted, tokens, accumulation):
    result = counted(tokens=tokens, accumulation=accumulation)
    forward = LAYERS * (linear_flops(tokens) + attention_flops(tokens)) + head_flops(tokens)
    backward = LAYERS * (2 * linear_flops(tokens) + int(2.5 * attention_flops(tokens))) + 3 * head_flops(tokens)
    up = 2 * (tokens // 2) * D * F // 2  # the down projection keeps its inputs only: nothing asks for its result again
    assert result.flops == {
        "forward": accumulation * forward,
        "backward": accumulation * backward,
        "recompute": accumulation * LAYERS * up,
    }


def test_what_is_kept_is_not_computed_again(counted):
    assert counted(edits=KEEP).flops["recompute"] == 0


def test_a_selective_segment_computes_the_rest_again(counted):
    """With the result of the first product kept, no product is left to do twice."""
    kept, again = counted(edits=SELECTIVE), counted()
    assert kept.flops["recompute"] == 0
    assert kept.flops["backward"] == again.flops["backward"]
    assert kept.sent["all_gather"] == again.sent["all_gather"]  # the gather in front of the product is not one


# --- bytes sent -------------------------------------------------------------------------------------------------------


def sent_by_hand(tokens: int, zero: int, accumulation: int, dp: int) -> dict[str, int]:
    """Bytes that a rank sends in a step, by kind."""
    half = (tokens // 2) * D * BF16  # a tensor of half the tokens, gathered over tp; half of it is sent
    gathers = LAYERS * 5 * half // 2  # in front of attention and MLP, behind their gradients, and the MLP's again
    scatters = LAYERS * 4 * half // 2
    exchanges = LAYERS * 2 * 4 * (half // 2) // 2  # q, k, v and the result, forward and backward; a rank of tp has half of the heads
    sent = {"all_gather": accumulation * gathers, "reduce_scatter": accumulation * scatters, "all_to_all": accumulation * exchanges}
    ranks, blocks = 2 * dp, LAYERS * BLOCK_NUMEL
    # Each rank of tp has a part of the gradients of embedding and head. Where they wait for the end of the step they add up in fp32.
    delayed = zero in (0, 1) and accumulation > 1
    sent["all_reduce"] = ROOT_NUMEL * (FP32 if delayed else BF16 * accumulation)
    if zero == 0:
        sent["all_reduce"] += 2 * FP32 * (blocks + ROOT_NUMEL) * (ranks - 1) // ranks
    else:
        once = BF16 * (blocks + ROOT_NUMEL) * (ranks - 1) // ranks
        again = BF16 * blocks * (ranks - 1) // ranks
        sent["all_gather"] += once if zero < 3 else accumulation * (once + again)
        sent["reduce_scatter"] += FP32 * (blocks + ROOT_NUMEL) * (ranks - 1) // ranks * (1 if zero == 1 else accumulation)
    return sent


@pytest.mark.parametrize(
    ("zero", "accumulation", "dp"), [(3, 1, 1), (3, 2, 1), (3, 1, 2), (2, 2, 1), (1, 1, 1), (1, 2, 1), (0, 1, 1), (0, 2, 1), (0, 1, 2)]
)
def test_bytes_sent_are_those_on_paper(counted, zero, accumulation, dp):
    assert counted(zero=zero, accumulation=accumulation, dp=dp).sent == sent_by_hand(256, zero, accumulation, dp)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_states_are_twelve_bytes_an_element(counted, zero):
    """fp32 weight and Adam's two moments of this rank's pieces, and a step count for each of the six and two parameters."""
    result = counted(zero=zero, accumulation=1, dp=1)
    pieces = (LAYERS * BLOCK_NUMEL + ROOT_NUMEL) // (1 if zero == 0 else 2)
    assert result.parts["states"] == 12 * pieces + 4 * (6 * LAYERS + 2)
    assert result.parts["states"] <= result.standing_bytes < result.parts["states"] + 16 * 1024


@pytest.mark.parametrize("changes", [{}, {"edits": KEEP}, {"edits": SELECTIVE}, {"zero": 0, "accumulation": 2, "dp": 1}])
def test_parts_add_up_to_the_peak(counted, changes):
    result = counted(**changes)
    assert sum(result.parts.values()) == result.peak_bytes
    assert set(result.parts) == set(PARTS)
    assert result.host_bytes == 0


def test_gathered_parameters_at_the_peak(counted):
    """At length the peak lies in the backward of a block: under ZeRO 3 the root's parameters and a few blocks' are whole, in bf16."""
    gathered = counted(tokens=65536).parts["gathered"]
    assert BF16 * (ROOT_NUMEL + BLOCK_NUMEL) <= gathered <= BF16 * (2 * ROOT_NUMEL + 4 * BLOCK_NUMEL)
    assert counted(tokens=65536, zero=1).parts["gathered"] == BF16 * (ROOT_NUMEL + LAYERS * BLOCK_NUMEL)


def test_activations_at_the_peak(counted):
    """Keeping the MLP keeps its gathered input and what lies before and after its activation function, not the input that lies before."""
    tokens = 65536
    half = (tokens // 2) * D * BF16
    inside = LAYERS * (half + 2 * (tokens // 2) * (F // 2) * BF16)
    block_input = LAYERS * (tokens // 4) * D * BF16
    difference = counted(tokens=tokens, edits=KEEP).parts["activations"] - counted(tokens=tokens).parts["activations"]
    assert difference == pytest.approx(inside - block_input, rel=0.01)


def test_offloaded_activations_lie_on_the_host(counted):
    """The same three tensors of each block's MLP; two calls' are on the device at a time."""
    layers, deep = 5, {"LAYERS = 2": "LAYERS = 5"}
    offloaded, kept = counted(tokens=65536, edits={**OFFLOAD, **deep}), counted(tokens=65536, edits={**KEEP, **deep})
    a_block = 3 * (65536 // 2) * D * BF16
    assert offloaded.host_bytes == layers * a_block
    assert kept.host_bytes == 0
    assert kept.peak_bytes - offloaded.peak_bytes == pytest.approx((layers - 2) * a_block, rel=0.02)
    assert offloaded.flops == kept.flops
    assert offloaded.sent == kept.sent


# --- the command ------------------------------------------------------------------------------------------------------


def predictions(result: dryrun.DryRun) -> dict[str, Any]:
    """A plan that predicts exactly this."""
    return {
        "peak_memory_gib": {"total": result.peak_bytes / dryrun.GIB, "states": result.parts["states"] / dryrun.GIB},
        "memory_limit_gib": 2.0,
        "flops_per_rank": dict(result.flops),
        "comm_bytes": dict(result.sent),
        "host_memory_gib": 0.0,
    }


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.09, False), (0.91, False), (1.12, True), (0.88, True)])
def test_a_prediction_a_tenth_off_is_wrong(counted, factor, wrong):
    plan = predictions(counted())
    plan["peak_memory_gib"]["total"] *= factor
    assert ("more than a tenth apart" in (dryrun.verdict(plan, [counted()]) or "")) == wrong


def test_the_heaviest_rank_decides(counted):
    heavier = dataclasses.replace(counted(), rank=3, peak_bytes=2 * counted().peak_bytes)
    assert dryrun.verdict(predictions(counted()), [heavier, counted()]).startswith("rank 3 peaks at")


def test_a_peak_above_the_limit_fails_with_one_sentence(counted, tmp_path, capsys):
    write_counted(tmp_path, **{**predictions(counted()), "memory_limit_gib": 1e-6})
    assert dryrun.run(tmp_path, 0) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "above the 1e-06 GiB that a plan may use here: compile again with --memory_gib" in last


def test_the_table_and_the_file(counted, tmp_path, capsys):
    write_counted(tmp_path, **predictions(counted()))
    assert dryrun.run(tmp_path) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "2 steps on fake tensors, 1 micro-batch each, of ranks 0 to 3 of a scale unit of 4"
    assert shown[1].split() == ["predicted", "rank", "0", "rank", "1", "rank", "2", "rank", "3", "ratio"]
    ratios = {" ".join(line.split()[:3]): line.split()[-1] for line in shown[2:]}
    assert ratios["peak memory KiB"] == ratios["sent by all_gather"] == "1.000"
    written = json.loads((tmp_path / "dryrun.json").read_text())
    assert [rank["rank"] for rank in written["ranks"]] == [0, 1, 2, 3]
    for rank in written["ranks"]:
        assert sum(rank["parts_gib"].values()) == pytest.approx(rank["peak_gib"])
        assert rank["flops"] == written["predicted"]["flops"]
        assert rank["comm_bytes"] == written["predicted"]["comm_bytes"]
    assert set(written["ranks"][0]) == {*written["predicted"], "rank"}
    assert written["predicted"]["parts_gib"]["gathered"] is None


def test_of_many_ranks_the_first_and_the_last(counted, tmp_path, capsys, monkeypatch):
    write_counted(tmp_path, **predictions(counted()), mesh={"sp": 3, "tp": 2})
    monkeypatch.setattr(dryrun, "dry_run", lambda folder, rank: dataclasses.replace(counted(), rank=rank))
    assert dryrun.run(tmp_path) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("of ranks 0 and 5 of a scale unit of 6; the ranks between them differ by their place alone")
    assert shown[1].split() == ["predicted", "rank", "0", "rank", "5", "ratio"]


def test_a_rank_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="ranks 0 to 7"):
        dryrun.dry_run(write_counted(tmp_path, dp=2), 8)


def test_without_a_program(tmp_path):
    with pytest.raises(UserError, match="compile it first"):
        dryrun.run(tmp_path, 0)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Four layers, wide enough that what a plan's memory model leaves out (scalars, token ids) is small."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
    LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False).save_pretrained(folder)
    return folder


PLANS = [
    {"force": "sp2", "zero": 3},
    {"force": "sp2", "zero": 1, "recompute": "all"},
    {"force": "sp2", "zero": 2, "grad_accumulation_steps": 2},
    {"force": "tp2", "zero": 0, "recompute": "all"},
    {"force": "tp_sp2", "zero": 3},
    {"force": "sp2,tp2", "zero": 3, "recompute": "none"},
    {"force": "dp2", "zero": 3, "micro_batch_size": 2},
]


@pytest.mark.parametrize("asked", PLANS, ids=lambda asked: "-".join(map(str, asked.values())))
def test_the_plan_predicts_what_the_dry_run_finds(model, tmp_path, asked):
    """Memory within a tenth; operations and bytes sent exactly."""
    ranks = 4 if "," in asked["force"] else 2
    request = CompileRequest(str(model), 8192, ranks, ranks, "plan", hardware="h100-80gb", output_folder=tmp_path, **asked)
    plan = compile_program(request).plan
    result = dryrun.dry_run(tmp_path / "plan", ranks - 1)
    assert plan["peak_memory_gib"]["total"] == pytest.approx(result.peak_bytes / dryrun.GIB, rel=0.1)
    assert plan["comm_bytes"] == result.sent
    assert plan["flops_per_rank"] == result.flops
    if "tp" not in asked["force"]:  # every operator is split over all ranks
        tokens = 8192 * asked.get("micro_batch_size", 1) * asked.get("grad_accumulation_steps", 1)
        weights = 4 * (2 * 1024 * 1024 + 2 * 1024 * 512 + 3 * 1024 * 2816) + 8192 * 1024
        attention = 4 * 4 * 1024 * 8192 // 2
        assert result.flops["forward"] * ranks == tokens * (2 * weights + attention)

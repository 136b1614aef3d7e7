"""Every way to split, times every ZeRO level, times keep or recompute, for three model families: the gradients of the original model.

Everything is fp64, so what differs is the order of additions: the bound is 1e-9 relative for the loss and for every gradient. Beside the
programs that must pass stand programs with one deliberate mistake each, which must not.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from parity_cases import SEQ_LEN, VOCAB, Case, Data, Split, captured, decide, micro_batches, run_cases, source

from seqloom.plan.modes import RECOMPUTE
from seqloom.runtime.parity import Difference, compare
from seqloom.runtime.step import IGNORED

pytestmark = pytest.mark.timeout(1200)  # the first test waits for the processes that run all programs
TOLERANCE = 1e-9
MODELS = ("llama", "qwen3", "gpt2")
SPLITS = (
    Split(None, 1, units=2),
    Split("dp2", 2, batch=2),
    Split("sp2", 2),
    Split("tp2", 2),
    Split("tp_sp2", 2),
    Split("tp_plain2", 2),
    Split("sp4", 4),
    Split("sp2,tp2", 4),
    Split("dp2,sp2", 4, batch=2),
    Split("sp2", 2, units=2),
    Split("dp2,tp2", 4, batch=2),
    Split("tp2", 2, units=2),
    Split("cp2", 2),
    Split("cp2,sp2", 4),
)
ZERO = (0, 1, 2, 3)


def matrix() -> list[Case]:
    """Every model with every split and ZeRO level. Half of the cases recompute and a third accumulates two micro-batches, so that each
    split, level and model is seen with and without.
    """
    found = []
    for model, split, zero in itertools.product(range(len(MODELS)), range(len(SPLITS)), range(len(ZERO))):
        recompute = (model + split + zero) % 2
        accumulation = 2 if (model + 2 * split + zero) % 3 == 0 else 1
        found.append(Case(MODELS[model], SPLITS[split], ZERO[zero], bool(recompute), accumulation))
    return found


CASES = matrix()


def forget_part_of_a_norm_weight(text: str) -> str:
    return text.replace('local(self.input_layernorm.weight, partial_grad=("tp",))', "local(self.input_layernorm.weight)")


def forget_part_of_a_gathered_gradient(text: str) -> str:
    return re.sub(r"(input_layernorm = all_gather\(.*), partial_grad=True\)", r"\1)", text)


def forget_to_sum_an_input_gradient(text: str) -> str:
    return re.sub(r"\n +input_layernorm = sum_grad\(.*", "", text)


def forget_to_sum_a_projection(text: str) -> str:
    return re.sub(r"\n +o_proj = all_reduce\(.*", "", text)


def sum_a_projection_twice(text: str) -> str:
    return re.sub(r"(\n +o_proj = all_reduce\(.*)", r"\1\1", text)


def forget_to_sum_weight_gradients(text: str) -> str:
    text = re.sub(r"SHARDED = \(.*?\)", 'SHARDED = ("dp",)', text)
    return re.sub(r"SUM_GRADS = \(.*?\)", "SUM_GRADS = ()", text)


def call_a_partial_loss_whole(text: str) -> str:
    return re.sub(r"LOSS_PARTIAL = \(.*?\)", "LOSS_PARTIAL = ()", text)


def count_repeated_work_twice(text: str) -> str:
    return re.sub(r"([qk]_proj = all_gather\(.*group=self\.tp)\)", r"\1, partial_grad=True)", text)


def see_the_future(text: str) -> str:
    return text.replace("causal=True", "causal=False")


def compute_norms_in_fp32(text: str) -> str:
    return text.replace(".pow(2).mean(-1, keepdim=True)", ".float().pow(2).mean(-1, keepdim=True).double()")


MISTAKES: Mapping[Callable[[str], str], Split] = {
    forget_part_of_a_norm_weight: Split("tp_sp2", 2),
    forget_part_of_a_gathered_gradient: Split("tp_sp2", 2),
    forget_to_sum_an_input_gradient: Split("tp_plain2", 2),
    forget_to_sum_a_projection: Split("tp_plain2", 2),
    sum_a_projection_twice: Split("tp_plain2", 2),
    forget_to_sum_weight_gradients: Split("sp2", 2),
    call_a_partial_loss_whole: Split("sp2", 2),
    count_repeated_work_twice: Split("sp2,tp2", 4),
    see_the_future: Split("sp2", 2),
    compute_norms_in_fp32: Split(None, 1, units=2),
}
EDITS = {mistake.__name__: mistake for mistake in MISTAKES}
WRONG = [Case("llama", split, 3, False, edit=mistake.__name__) for mistake, split in MISTAKES.items()]


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> dict[str, Difference]:
    """What the programs of all selected tests give, by case id."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return run_cases([row["case"] for row in params if "case" in row], EDITS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_loss_and_every_gradient_are_the_original_models(case: Case, differences: dict[str, Difference]) -> None:
    difference = differences[case.id]
    assert difference.loss < TOLERANCE
    assert difference.gradient < TOLERANCE, difference.parameter


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.id)
def test_a_wrong_program_is_seen(case: Case, differences: dict[str, Difference]) -> None:
    difference = differences[case.id]
    assert max(difference.loss, difference.gradient) > TOLERANCE


def test_matrix_holds_every_combination_once() -> None:
    assert len({case.id for case in CASES}) == len(CASES) == len(MODELS) * len(SPLITS) * len(ZERO)
    accumulating = [case for case in CASES if case.accumulation == 2]
    assert len(accumulating) * 3 == len(CASES)
    assert {case.split for case in accumulating} == set(SPLITS)
    for cases in (CASES, accumulating):
        assert {(case.model, case.zero, case.recompute) for case in cases} == set(itertools.product(MODELS, ZERO, (False, True)))
    assert {(case.split, case.recompute) for case in CASES} == set(itertools.product(SPLITS, (False, True)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", [split for split in SPLITS if split.force], ids=lambda split: f"{split.force}x{split.units}")
def test_a_forced_plan_splits_what_its_name_says(model: str, split: Split) -> None:
    """Otherwise a matrix of equal plans under many names would pass."""
    text = source(Case(model, split, 3, False))
    tables: dict[str, object] = {}
    exec(text, {"__name__": "program"}, tables)
    mesh, inputs, sums = tables["MESH"], tables["INPUTS"], tables["SUM_GRADS"]
    kinds = re.findall(r"[a-z_]+(?=\d)", split.force)
    assert sorted(mesh.values()) == sorted(int(size) for size in re.findall(r"\d", split.force))
    assert sums == tuple(axis for axis in mesh if not axis.startswith("tp"))
    rows, columns = inputs["labels"]
    assert (rows is not None, columns is not None) == ("dp" in kinds, "sp" in kinds or "cp" in kinds)
    assert "sp" not in kinds or "all_to_all(" in text
    assert ("query_start=" in text) == ("cp" in kinds)
    weights = [axes["tp"].is_shard() for name, axes in tables["PLACEMENTS"].items() if "proj.weight" in name or "c_" in name]
    assert any(weights) == any(kind.startswith("tp") for kind in kinds)


@pytest.mark.parametrize("model", MODELS)
def test_the_kinds_of_tensor_parallelism_differ(model: str) -> None:
    """With sequence parallel norms the residual stream is gathered and scattered; the plain kind sums it."""
    split = {force: source(Case(model, Split(force, 2), 3, False)) for force in ("tp_sp2", "tp_plain2")}
    assert "reduce_scatter(" in split["tp_sp2"] and "all_gather(" in split["tp_sp2"] and "all_reduce(" not in split["tp_sp2"]
    assert "all_reduce(" in split["tp_plain2"] and "sum_grad(" in split["tp_plain2"] and "reduce_scatter(" not in split["tp_plain2"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("zero", ZERO)
def test_zero_and_recompute_reach_the_program(model: str, zero: int) -> None:
    kept, again = (source(Case(model, Split("sp2", 2), zero, recompute)) for recompute in (False, True))
    assert f"ZERO = {zero}\n" in kept and f"ZERO = {zero}\n" in again
    assert "checkpoint(" not in kept and "checkpoint(" in again


def test_recompute_repeats_every_segment_that_can_be() -> None:
    case = Case("llama", Split("sp2", 2), 3, True)
    decisions, regions = decide(case), captured("llama", 1)[1]
    for key, segments in decisions.modes.items():
        redone = [counts == ((RECOMPUTE, regions.parts[key].count),) for counts in segments]
        assert redone == [segment.recomputable for segment in regions.parts[key].segments]


def test_data_has_a_rank_without_a_label_that_counts() -> None:
    (first, last), *_ = micro_batches(Data(VOCAB, SEQ_LEN, batch=1, accumulation=2, units=1))
    half = last["labels"].shape[1] // 2
    assert (last["labels"][:, :half] == IGNORED).all() and (last["labels"][:, half:] != IGNORED).any()
    assert (first["labels"] != IGNORED).sum() != (last["labels"] != IGNORED).sum()


def test_differences_are_relative_to_the_largest_element() -> None:
    true = {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([100.0])}
    found = compare(2.02, {"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([110.0])}, 2.0, true)
    assert found.loss == pytest.approx(0.01) and found.gradient == pytest.approx(0.25) and found.parameter == "a"
    assert compare(2.0, dict(true), 2.0, true) == Difference(0.0, 0.0, "")


@pytest.mark.parametrize(
    "gradients",
    [
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])},
        {"a": torch.tensor([1.0, float("nan")]), "b": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.tensor([1.0, float("inf")])},
    ],
    ids=["lacking", "one too many", "nan last", "nan first", "infinite"],
)
def test_no_broken_gradient_passes(gradients: dict[str, torch.Tensor]) -> None:
    assert not compare(1.0, gradients, 1.0, {"a": torch.ones(2), "b": torch.ones(2)}).gradient < TOLERANCE

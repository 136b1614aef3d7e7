"""A run follows its plan in the choice of the attention kernel, and says which kernel runs."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch

from seqloom.cost.hardware import load_hardware
from seqloom.emit.pipeline import compile_program
from seqloom.emit.request import CompileRequest
from seqloom.ops import kernels
from seqloom.ops.kernel_rates import AttentionRate
from seqloom.ops.kernels import KERNELS, Kernel, Kind, kernel_for
from seqloom.runtime.kernels import LOGGERS, planned_kernels

CUDA = torch.device("cuda", 0)
KIND = Kind(CUDA, torch.bfloat16, 128, True)
H100 = load_hardware("h100-80gb")
PLAN = {
    "hardware": "h100-80gb",
    "attention": {
        "kernel": "flash3",
        "rates": {"flash3": {"forward": 0.6876, "backward": 0.5935}, "cudnn": {"forward": 0.6067, "backward": 0.5207}},
    },
}


@pytest.fixture
def gpu(monkeypatch):
    """Present on it: cuDNN and PyTorch's flash attention."""
    found = {name: Kernel(lambda kind, name=name: None if name in ("cudnn", "flash2") else "is not here") for name in KERNELS}
    monkeypatch.setattr(kernels, "KERNELS", found)
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._decided.cache_clear()
    yield
    kernels._decided.cache_clear()


def test_a_run_says_which_kernel_runs_in_place_of_the_plans(gpu):
    said: list[str] = []
    with planned_kernels(PLAN, CUDA, said.append):
        assert kernel_for(KIND) == "cudnn"
        assert kernel_for(KIND) == "cudnn"
    assert said == [
        "warning: attention on cuda, bfloat16, head size 128, grouped heads: the plan is for kernel 'flash3', which is not here; kernel "
        "'cudnn' runs instead and takes 1.14 times as long by the rates of h100-80gb"
    ]
    assert kernel_for(KIND._replace(head_size=64)) == "cudnn" and len(said) == 1, "after the run nothing is said"
    assert not any(logging.getLogger(name).handlers for name in LOGGERS)


def test_the_plans_kernel_runs_though_the_order_has_another_first(gpu):
    said: list[str] = []
    plan = {**PLAN, "attention": {**PLAN["attention"], "kernel": "flash2"}}
    with planned_kernels(plan, CUDA, said.append):
        assert kernel_for(KIND) == "flash2"
    assert said == ["attention on cuda, bfloat16, head size 128, grouped heads: kernel 'flash2', which the plan is for"]
    assert kernel_for(KIND) == "cudnn"


def test_a_cpu_run_says_nothing_and_a_plan_of_an_earlier_version_leaves_the_choice_open(gpu):
    said: list[str] = []
    with planned_kernels(PLAN, torch.device("cpu"), said.append):
        kernel_for(KIND)
    assert not said
    with planned_kernels({"hardware": "h100-80gb"}, CUDA, said.append):
        assert kernel_for(KIND) == "cudnn"
    assert said[0].endswith("kernel 'cudnn', the first of those that are here")


@pytest.mark.parametrize(("asked", "kernel"), [(None, "cudnn"), ("flash3", "flash3")])
def test_a_plan_tells_its_kernel_and_its_rates(asked, kernel, tmp_path):
    request = CompileRequest(
        model_id="llama3_1b", seq_len=4096, plan_ngpus=1, runtime_ngpus=1, attention_kernel=asked, output_folder=tmp_path
    )
    plan = json.loads((compile_program(request).folder / "plan.json").read_text(encoding="utf-8"))
    rates = {name: dataclasses.asdict(rate) for name, rate in H100.rates.attention.items()}
    assert plan["attention"] == {"kernel": kernel, "rates": rates}
    with planned_kernels(plan, torch.device("cpu"), print):
        assert kernels._Wished.now.planned == kernel
        assert dict(kernels._Wished.now.rates)["cudnn"] == AttentionRate(**rates["cudnn"])

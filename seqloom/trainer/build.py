"""From a `TrainConfig` to everything a run works with: program, data, model, optimizer, each on its rank.

Rank 0 alone looks at what all share (folders, the data's ids, the program, which it compiles where there is none) while the others
wait; its mistake is everyone's. The model is then filled from weights or a seed; `seqloom.trainer.loop` resumes and steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from seqloom.capture.architecture import resolve_config
from seqloom.checkpoint import group
from seqloom.data.loader import Loader, PackedDataset, open_dataset
from seqloom.emit.request import CompileRequest
from seqloom.errors import UserError
from seqloom.runtime.compiled import compile_as_asked
from seqloom.runtime.context import Layout
from seqloom.runtime.materialize import materialize
from seqloom.runtime.mesh import DP, build_mesh
from seqloom.runtime.optimizer import AnyOptimizer, build_optimizer
from seqloom.runtime.program import Program, load_program
from seqloom.runtime.step import TrainStep
from seqloom.trainer.ahead import Ahead
from seqloom.trainer.config import TrainConfig
from seqloom.trainer.evaluate import Evaluator, open_evaluation
from seqloom.trainer.signals import StopSignals
from seqloom.trainer.start import check_folders, check_world_size, choose_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Run:
    """Everything a run works with. `weights` is the folder they came from, None for random ones; `plan` is the program's plan.json;
    `compiled` says whether the blocks are compiled with torch.compile.
    """

    config: TrainConfig
    program_folder: Path
    program: Program
    plan: dict[str, Any]
    mesh: DeviceMesh
    device: torch.device
    hf_config: PretrainedConfig
    weights: Path | None
    dataset: PackedDataset
    loader: Loader
    ahead: Ahead
    model: nn.Module
    compiled: bool
    optimizer: AnyOptimizer
    train_step: TrainStep
    evaluator: Evaluator | None
    total_steps: int

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step over all scale units."""
        return self.loader.batch_size_global


def build(config: TrainConfig, device: torch.device, say: Callable[[str], None], signals: StopSignals) -> Run:
    """Build the run on every rank; `say` prints on rank 0. Raises `UserError` on all ranks for whatever of it is a user's mistake, and
    `Stopped` where a signal comes while rank 0 compiles.
    """
    if config.compile.dataset_path is None:
        raise UserError("training needs data: give --dataset_path a folder made by bookcorpus.py")
    request = config.compile.request()
    check_world_size(dist.get_world_size(), request.runtime_ngpus)
    hf_config = resolve_config(request.model_id)
    weights = choose_weights(request.model_id, config.init)
    dataset = open_dataset(config.compile.dataset_path)
    held_out = open_evaluation(config, dataset)
    prepared = group.attempt(
        "preparing the run", lambda: _prepare(config, request, [dataset, held_out], hf_config.vocab_size, say, signals)
    )
    program_folder = Path(prepared[0])
    program = load_program(program_folder)
    mesh = build_mesh(program.MESH, request.dp, device.type)
    compute = DTYPES[request.precision]
    model = materialize(program, mesh, hf_config, weights=weights, seed=config.seed, device=device, compute_dtype=compute)
    compiled = compile_as_asked(config.compile_blocks, model, program, device)
    settings = config.optimizer
    optimizer = build_optimizer(
        model,
        settings.lr,
        settings.betas,
        settings.weight_decay,
        name=settings.optimizer,
        momentum=settings.momentum,
        dtype=compute,
    )
    loader = _loader(request, dataset, config.seed, mesh.get_local_rank(DP))
    return Run(
        config=config,
        program_folder=program_folder,
        program=program,
        plan=json.loads((program_folder / PLAN_FILE).read_text(encoding="utf-8")),
        mesh=mesh,
        device=device,
        hf_config=hf_config,
        weights=weights,
        dataset=dataset,
        loader=loader,
        ahead=Ahead(loader, Layout(program, mesh)),
        model=model,
        compiled=compiled,
        optimizer=optimizer,
        train_step=TrainStep(model, program, mesh, optimizer, device, settings.max_grad_norm or None),
        evaluator=held_out and Evaluator(model, program, mesh, device, held_out, request.micro_batch_size, config.evaluation.eval_rows),
        total_steps=config.total_steps(dataset.rows, loader.batch_size_global),
    )


def _loader(request: CompileRequest, dataset: PackedDataset, seed: int, dp_rank: int) -> Loader:
    """The data of one scale unit."""
    rows = request.dp * request.grad_accumulation_steps * request.micro_batch_size
    return Loader(dataset, seed, rows, dp_rank, request.dp, request.micro_batch_size, request.grad_accumulation_steps)


def _prepare(
    config: TrainConfig,
    request: CompileRequest,
    datasets: Sequence[PackedDataset | None],
    vocab_size: int,
    say: Callable[[str], None],
    signals: StopSignals,
) -> str | None:
    """What rank 0 does for all: check folders and data, compile where there is no program. Returns the program's folder there."""
    if dist.get_rank() != 0:
        return None
    from seqloom.emit.pipeline import ensure_program
    from seqloom.report.plan_page import PAGE, write_plan_page

    check_folders(config)
    for dataset in filter(None, datasets):
        dataset.check_vocab(vocab_size)
    with signals.interruptible():
        folder = ensure_program(request, say)
        if not (folder / PAGE).is_file():
            write_plan_page(folder)
    return str(folder)

"""Evaluation while training: the mean loss of rows that the model does not learn from, under the emitted program.

Role in the pipeline: the loop asks an `Evaluator` every so many steps, on all ranks. The rows are read once, in their order, shared among
the scale units and, as in a step, cut over the ranks of each. Nothing of the run changes: not the weights, not the place in the data, not a
random generator. What FSDP2 gathered is given back, so that the next save finds the shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from seqloom.data.documents import CU_SEQLENS
from seqloom.data.loader import PackedDataset, open_dataset
from seqloom.data.metadata import VALIDATION_FOLDER
from seqloom.errors import UserError
from seqloom.runtime.context import Layout, Prepared
from seqloom.runtime.mesh import DP
from seqloom.runtime.program import Program
from seqloom.runtime.step import IGNORED, MicroBatch, count_tokens, local_inputs, prepare, reduce_loss_and_norm
from seqloom.trainer.config import TrainConfig


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation after a step found: mean loss in nats per token that counts, over so many tokens of so many rows, in seconds."""

    step: int
    loss: float
    tokens: int
    rows: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 709 else math.inf


def open_evaluation(config: TrainConfig, training: PackedDataset) -> PackedDataset | None:
    """The data set to evaluate on, None where there is none or none is wanted.

    Raises `UserError` where --eval_path, --eval_every or --keep_best wants one that is not there, or it was made otherwise than the
    training data.
    """
    asked, beside = config.evaluation, training.path / VALIDATION_FOLDER
    if config.eval_every == 0:
        if config.output.keep_best:
            raise UserError("--keep_best needs evaluations, which --eval_every 0 forbids: leave one of them out")
        return None
    if asked.eval_path is None and not beside.is_dir():
        for flag, wanted in (
            ("--eval_every", asked.eval_every),
            ("--eval_rows", asked.eval_rows),
            ("--keep_best", config.output.keep_best),
        ):
            if wanted:
                raise UserError(
                    f"{flag} needs text to evaluate on: make the data with bookcorpus.py --validation 0.01, or give --eval_path"
                )
        return None
    found = open_dataset(asked.eval_path or beside, training.seq_len)
    mine, other = training.metadata, found.metadata
    if (mine.pack, mine.tokenizer_digest) != (other.pack, other.tokenizer_digest):
        what = f"packed as {other.pack}" if mine.pack != other.pack else "made with another tokenizer"
        raise UserError(f"the data set {found.path} is {what}, unlike {training.path}: make both with the same --pack and tokenizer")
    return found


class Evaluator:
    """Evaluates a model on the first `rows` rows of a data set (all where None), `micro_batch_size` rows of a scale unit at a time."""

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        mesh: DeviceMesh,
        device: torch.device,
        dataset: PackedDataset,
        micro_batch_size: int,
        rows: int | None = None,
    ) -> None:
        self.model, self.program, self.mesh, self.device = model, program, mesh, device
        self.dataset, self.micro_batch_size = dataset, micro_batch_size
        self.rows = min(dataset.rows, rows or dataset.rows)
        self._layout = Layout(program, mesh)

    def __call__(self, step: int, may_go_on: Callable[[], bool]) -> Evaluation | None:
        """Evaluate after a step. Before each micro-batch `may_go_on` is asked, alike on all ranks; None where it says no. Collective."""
        began = time.perf_counter()
        loss, tokens = 0.0, 0
        try:
            for prepared in self._micro_batches():
                if not may_go_on():
                    return None
                part, counted = total_loss(self.model, self.program, self.mesh, prepared, self.device)
                loss, tokens = loss + part.item(), tokens + int(counted)
        finally:
            release_gathered(self.model)
        return Evaluation(step, loss / max(tokens, 1), tokens, self.rows, time.perf_counter() - began)

    def _micro_batches(self) -> Iterator[Prepared]:
        """This scale unit's micro-batches, each read and laid out while the one before it is computed."""
        units, own = self.mesh[DP].size(), self.mesh.get_local_rank(DP)
        together = units * self.micro_batch_size
        starts = [start + own * self.micro_batch_size for start in range(0, self.rows, together)]
        with ThreadPoolExecutor(1, thread_name_prefix="evaluation data") as pool:
            coming = pool.submit(self._prepare, starts[0])
            for start in [*starts[1:], None]:
                prepared = coming.result()
                if start is not None:
                    coming = pool.submit(self._prepare, start)
                yield prepared

    def _prepare(self, start: int) -> Prepared:
        """Rows from `start` on; behind the last one come copies of the first row whose labels do not count."""
        numbers = np.arange(start, start + self.micro_batch_size)
        rows = np.where(numbers < self.rows, numbers, 0)
        input_ids, labels = (torch.from_numpy(array) for array in self.dataset.read(rows))
        labels[torch.from_numpy(numbers >= self.rows)] = IGNORED
        borders = torch.from_numpy(self.dataset.read_cu_seqlens(rows))
        return self._layout.prepare({"input_ids": input_ids, "labels": labels, CU_SEQLENS: borders})


@torch.no_grad()
def total_loss(
    model: nn.Module, program: Program, mesh: DeviceMesh, micro_batch: MicroBatch | Prepared, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Summed loss of the tokens that count in the micro-batches of all scale units, in fp64, and their number. Collective."""
    (prepared,) = prepare(program, mesh, [micro_batch])
    inputs = local_inputs(program, mesh, prepared.use(), device)
    tokens = count_tokens([prepared.inputs], mesh, device)
    loss, _ = reduce_loss_and_norm(model, program, mesh, model(**inputs))
    return loss, tokens


def release_gathered(model: nn.Module) -> None:
    """Give back what a forward without a backward left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def loss_of(model: nn.Module, program: Program, mesh: DeviceMesh, micro_batch: MicroBatch, device: torch.device) -> float:
    """Mean loss per counted token of one micro-batch `[b, l]`, which every scale unit runs. Collective."""
    loss, tokens = total_loss(model, program, mesh, micro_batch, device)
    return loss.item() / max(int(tokens), 1)

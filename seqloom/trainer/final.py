"""The last word of a run: the loss of fixed rows under the trained program, for others to compare with.

`final.json` holds the mean loss per token of the data's first rows and the loss of a few single tokens. A merged checkpoint loaded in
transformers must give the same numbers (examples/check_merged.py): a token's loss is its negative log probability, so it pins logits.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seqloom.data.documents import CU_SEQLENS
from seqloom.runtime.step import IGNORED, MicroBatch
from seqloom.trainer.build import Run
from seqloom.trainer.evaluate import loss_of

FINAL_FILE = "final.json"
NUM_TOKENS = 4


def write_final(run: Run, step: int) -> dict[str, Any]:
    """Evaluate and, on rank 0, write `final.json`; returns what is in it. Collective."""
    rows = np.arange(run.config.compile.micro_batch_size) % run.dataset.rows
    input_ids, labels = (torch.from_numpy(array.astype(np.int64)) for array in run.dataset.read(rows))
    batch = {"input_ids": input_ids, "labels": labels, CU_SEQLENS: torch.from_numpy(run.dataset.read_cu_seqlens(rows))}
    counted = (labels[0] != IGNORED).nonzero().flatten()
    places = counted[torch.linspace(0, len(counted) - 1, NUM_TOKENS).long()].unique().tolist()
    final = {
        "step": step,
        "rows": rows.tolist(),
        "loss": _loss(run, batch),
        "token_losses": {str(place): _loss(run, {**batch, "labels": _only(labels, place)}) for place in places},
    }
    if dist.get_rank() == 0:
        (run.config.log_folder / FINAL_FILE).write_text(json.dumps(final, indent=2) + "\n", encoding="utf-8")
    return final


def _loss(run: Run, micro_batch: MicroBatch) -> float:
    return loss_of(run.model, run.program, run.mesh, micro_batch, run.device)


def _only(labels: Tensor, place: int) -> Tensor:
    """Labels `[b, l]` of which a single one counts, in the first row."""
    one = torch.full_like(labels, IGNORED)
    one[0, place] = labels[0, place]
    return one

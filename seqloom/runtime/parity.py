"""Parity: a program's loss and gradients beside those of the original model, run whole.

In: a program folder and weights. `program_gradients` runs on the ranks of a mesh, `original_gradients` in one process; `compare` says how
far they are apart. Everything is fp64 with no float32 inside (`Float64Mode`), so that what is left is the order of additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from seqloom.capture.float64 import Float64Mode
from seqloom.data.documents import CU_SEQLENS, restarting_positions
from seqloom.runtime.materialize import materialize
from seqloom.runtime.mesh import DP, build_mesh
from seqloom.runtime.program import load_program
from seqloom.runtime.step import IGNORED, MicroBatch, accumulate_gradients

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Relative differences: of the loss, and the largest over parameters of |g - g0| / |g0| in the maximum norm, with its parameter."""

    loss: float
    gradient: float
    parameter: str


def random_batches(config: PretrainedConfig, batch: int, seq_len: int, count: int, seed: int, documents: bool = False) -> list[MicroBatch]:
    """`count` micro-batches of random tokens `[batch, seq_len]`, some labels ignored; with `documents` of random documents."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(0, config.vocab_size, (batch, seq_len + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORED
        batches.append({"input_ids": tokens[:, :-1].contiguous(), "labels": labels})
        if documents:
            batches[-1] |= random_documents(batch, seq_len, generator)
    return batches


def random_documents(rows: int, length: int, generator: torch.Generator) -> MicroBatch:
    """`cu_seqlens` and `position_ids` of rows that each hold a few documents of random lengths."""
    borders = [torch.zeros(1, dtype=torch.int64)]
    for row in range(rows):
        inside = torch.randperm(length - 1, generator=generator)[: min(3, length - 1)] + 1
        borders.append(row * length + torch.cat([inside.sort().values, torch.tensor([length])]))
    joined = torch.cat(borders)
    return {CU_SEQLENS: joined, "position_ids": torch.from_numpy(restarting_positions(joined.numpy())).view(rows, length)}


def program_gradients(
    folder: Path, config: PretrainedConfig, weights: Path, units: Sequence[Sequence[MicroBatch]], dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients of one step of a program, on every rank of the job. `units[i]` are the micro-batches of scale unit i."""
    program = load_program(folder)
    mesh = build_mesh(program.MESH, len(units), "cpu")
    device = torch.device("cpu")
    model = materialize(program, mesh, config, weights=weights, seed=0, device=device, param_dtype=dtype, compute_dtype=dtype)
    loss, _ = accumulate_gradients(model, program, mesh, units[mesh.get_local_rank(DP)], device)
    copies = [axis for axis in program.MESH if axis not in program.LOSS_PARTIAL]
    if any(mesh.get_local_rank(axis) for axis in copies):
        loss = torch.zeros_like(loss)
    dist.all_reduce(loss)
    gradients = {}
    for name, param in model.named_parameters():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        gradients[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).detach()
    return float(loss), gradients


def original_gradients(
    config: PretrainedConfig, weights: Path, units: Sequence[Sequence[MicroBatch]], dtype: torch.dtype = torch.float64
) -> tuple[float, dict[str, Tensor]]:
    """The same of the original Hugging Face model, run whole."""
    from transformers import AutoModelForCausalLM

    attention = "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else "eager"  # PyTorch's own has no soft cap
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, attn_implementation=attention).train()
    batches = [batch for unit in units for batch in unit]
    tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        rows = batch["input_ids"].shape
        places = batch.get("position_ids", torch.arange(rows[1]).expand(rows))
        with Float64Mode() if dtype == torch.float64 else torch.enable_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=places, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum") / tokens
            loss.backward()
        total += float(loss.detach())
    return total, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def compare(loss: float, gradients: Gradients, true_loss: float, true_gradients: Gradients) -> Difference:
    """How far a program is from the original. A gradient that one of them lacks counts as infinitely far."""
    missing = {*gradients} ^ {*true_gradients}
    if missing:
        return Difference(abs(loss - true_loss) / abs(true_loss), float("inf"), sorted(missing)[0])
    worst, name = 0.0, ""
    for key, true in true_gradients.items():
        far = float((gradients[key] - true).abs().max() / true.abs().max().clamp(min=1e-300))
        if far > worst or not far < float("inf"):
            worst, name = far, key
    return Difference(abs(loss - true_loss) / abs(true_loss), worst, name)

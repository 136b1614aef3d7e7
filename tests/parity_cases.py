"""What the parity tests share: small models, ways to split them, and many programs run by one set of processes.

A `Case` names one program. `run_cases` writes the programs of many cases, computes what the original models give for the same
micro-batches, and starts the processes once per world size; they run one program after the other. The answer is a `Difference` for each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from models import original_model
from procs import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

import seqloom.runtime.offload
from seqloom.capture import Captured, capture
from seqloom.cost.hardware import load_hardware
from seqloom.emit.program import program_source
from seqloom.plan.plan import realize
from seqloom.plan.price import Machine
from seqloom.plan.regions import Regions, build_regions
from seqloom.plan.request import Request
from seqloom.plan.solver import Decisions, solve
from seqloom.runtime.parity import Difference, compare, original_gradients, program_gradients, random_batches
from seqloom.runtime.program import PROGRAM_FILE
from seqloom.runtime.step import IGNORED, MicroBatch

SEQ_LEN = 48
LOSS_CHUNK = 5  # no rank's share of the tokens (48, 24 or 12, or twice that) is a multiple of it
LOSS = "loss"  # name of the loss among the gradients of a reference
VOCAB = 98  # splits over two ranks; four ranks store it unevenly
_HEADS = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
_WIDTHS = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

CONFIGS: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_WIDTHS, **_HEADS, **_TOKENS, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**_WIDTHS, **_HEADS, **_TOKENS, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_WIDTHS, **_HEADS, **_TOKENS, head_dim=16, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=64, n_layer=3, n_head=8, **_NO_DROPOUT, **_TOKENS),
}


@dataclass(frozen=True)
class Split:
    """How ranks are used: `force` over the ranks of one scale unit, repeated for `units`; rows of one micro-batch."""

    force: str | None
    ranks: int
    units: int = 1
    batch: int = 1

    @property
    def world_size(self) -> int:
        return self.ranks * self.units


@dataclass(frozen=True)
class Case:
    """One program: a model, a split and what is asked for beside it. `edit` names a deliberate mistake made in its text."""

    model: str
    split: Split
    zero: int | None
    recompute: bool | None
    accumulation: int = 1
    edit: str = ""

    @property
    def id(self) -> str:
        split = self.split
        parts = [self.model, split.force or f"free{split.ranks}", f"{split.units}units" if split.units > 1 else ""]
        parts += [f"batch{split.batch}" if split.batch > 1 else "", f"accumulate{self.accumulation}" if self.accumulation > 1 else ""]
        parts += ["" if self.zero is None else f"zero{self.zero}", {None: "", False: "keep", True: "recompute"}[self.recompute], self.edit]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Data:
    """The micro-batches of one step by their sizes; every process makes them anew."""

    vocab: int
    seq_len: int
    batch: int
    accumulation: int
    units: int


@dataclass(frozen=True)
class Job:
    """A program to run beside a reference: `reference` holds the loss and gradients of the original model on the same micro-batches."""

    id: str
    folder: Path
    config: PretrainedConfig
    weights: Path
    reference: Path
    data: Data


def run_cases(cases: Iterable[Case], edits: Mapping[str, Callable[[str], str]] | None = None) -> dict[str, Difference]:
    """Differences by case id. `edits` are the mistakes that cases name."""
    by_world: dict[int, list[Job]] = {}
    with tempfile.TemporaryDirectory(prefix="seqloom-parity-") as place:
        for case in cases:
            by_world.setdefault(case.split.world_size, []).append(_job(case, Path(place), edits or {}))
        return run_jobs(by_world)


def run_jobs(by_world: Mapping[int, Sequence[Job]]) -> dict[str, Difference]:
    """Differences by job id; one set of processes for each number of ranks."""
    found: dict[str, Difference] = {}
    for world_size, jobs in by_world.items():
        found |= run_ranks(run_all, world_size, list(jobs), timeout=60 + 10 * len(jobs))[0]
    return found


def run_all(rank: int, world_size: int, jobs: Sequence[Job]) -> dict[str, Difference]:
    """The body of one process: every job in turn; rank 0 compares."""
    found = {}
    seqloom.runtime.offload.MINIMUM = 1  # everything here is small
    for job in jobs:
        try:
            loss, gradients = program_gradients(job.folder, job.config, job.weights, micro_batches(job.data))
        except Exception as error:
            error.add_note(f"in the program of {job.id}")
            raise
        if rank == 0:
            found[job.id] = compare(loss, gradients, *read_reference(job.reference))
    return found


def _job(case: Case, place: Path, edits: Mapping[str, Callable[[str], str]]) -> Job:
    folder = place / case.id
    folder.mkdir()
    text = source(case)
    if case.edit:
        changed = edits[case.edit](text)
        assert changed != text, f"{case.edit} changes nothing in the program of {case.id}:\n{text}"
        text = changed
    (folder / PROGRAM_FILE).write_text(text)
    data = Data(VOCAB, SEQ_LEN, case.split.batch, case.accumulation, case.split.units)
    return job(case.id, folder, case.model, CONFIGS[case.model](), data)


def job(name: str, folder: Path, model: str, config: PretrainedConfig, data: Data) -> Job:
    """The job of a program in `folder`. Weights and reference lie beside it and are made once for each `model` (and data)."""
    weights = folder.parent / f"weights-{model}"
    if not weights.exists():
        original_model(config).save_pretrained(weights)
    reference = folder.parent / f"reference-{model}-{data.batch}-{data.seq_len}-{data.accumulation}-{data.units}.safetensors"
    if not reference.exists():
        loss, gradients = original_gradients(config, weights, micro_batches(data))
        tensors = {name: gradient.contiguous() for name, gradient in gradients.items()}
        save_file({LOSS: torch.tensor(loss, dtype=torch.float64), **tensors}, reference)
    return Job(name, folder, config, weights, reference, data)


def read_reference(path: Path) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the original model."""
    tensors = load_file(path)
    return float(tensors.pop(LOSS)), tensors


def micro_batches(data: Data) -> list[list[MicroBatch]]:
    """Tokens of one step, by scale unit. No two micro-batches have as many labels that count; one rank's may have none.

    Where there is more than one micro-batch, the first half of the last one's labels counts for nothing: a rank that holds that half
    has no loss at all.
    """
    config = PretrainedConfig(vocab_size=data.vocab)
    found = [random_batches(config, data.batch, data.seq_len, data.accumulation, seed) for seed in range(data.units)]
    flat = [micro_batch for unit in found for micro_batch in unit]
    for index, micro_batch in enumerate(flat):
        micro_batch["labels"][:, -3 * index - 1 :] = IGNORED
    if len(flat) > 1:
        flat[-1]["labels"][:, : data.seq_len // 2] = IGNORED
    counts = [int((micro_batch["labels"] != IGNORED).sum()) for micro_batch in flat]
    assert len(set(counts)) == len(counts), counts
    return found


@cache
def captured(model: str, batch: int, dtype: torch.dtype = torch.float64) -> tuple[Captured, Regions]:
    """A model's graph and its regions, captured once."""
    graph = capture(CONFIGS[model](), batch_size=batch, seq_len=SEQ_LEN, dtype=dtype, loss_chunk=LOSS_CHUNK)
    return graph, build_regions(graph.graph)


def decide(case: Case, dtype: torch.dtype = torch.float64) -> Decisions:
    """The planner's answer for a case."""
    split = case.split
    regions = captured(case.model, split.batch, dtype)[1]
    hardware = load_hardware("cpu")
    request = Request(split.ranks, split.units, case.accumulation, hardware, dtype.itemsize, split.force, case.zero, case.recompute)
    return solve(regions, request)[0]


@cache
def source(case: Case, dtype: torch.dtype = torch.float64) -> str:
    """The text of a case's program, computing in `dtype`."""
    graph, regions = captured(case.model, case.split.batch, dtype)
    decisions = decide(case, dtype)
    plan = realize(regions, decisions, Machine(load_hardware("cpu"), decisions.axes, decisions.dp))
    return program_source(plan, graph.model_class, graph.tied, "Written for a test.")

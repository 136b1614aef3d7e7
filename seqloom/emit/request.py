"""What a compilation is asked for: everything that decides the emitted program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seqloom.errors import UserError

DEFAULT_LOSS = "chunk_linear_cross_entropy:chunk_linear_cross_entropy"


@dataclass(frozen=True)
class CompileRequest:
    """One compilation. The same request, packages and operator sources give a byte-identical program."""

    model_id: str
    """hub id, local folder, or name in configs/models; only its config is read"""
    seq_len: int
    """tokens of one sequence"""
    plan_ngpus: int = 1
    """ranks of one scale unit"""
    runtime_ngpus: int = 1
    """all ranks; a multiple of plan_ngpus"""
    name: str = "default"
    """folder of the program under output_folder"""
    micro_batch_size: int = 1
    """sequences of one micro-batch of one scale unit"""
    grad_accumulation_steps: int = 1
    """micro-batches a step"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """compute dtype; masters and optimizer are fp32"""
    hardware: str = "h100-80gb"
    """name in configs/hardware, or a file"""
    memory_gib: float | None = None
    """memory of one device in GiB, in place of the hardware's"""
    force: str | None = None
    """constrain the search: dp2, sp2, cp2 (attention split by positions), tp2, tp_sp2 (sequence parallel norms), tp_plain2, or sp2,tp2"""
    zero: int | None = None
    """ZeRO level 0 to 3; the planner chooses when not given"""
    recompute: Literal["auto", "none", "all"] = "auto"
    """recompute segments: as the planner chooses, never, always"""
    offload: Literal["auto", "none"] = "auto"
    """offload activations to host memory: as the planner chooses, never"""
    loss: str = DEFAULT_LOSS
    """registered operator of the loss head, module:function"""
    loss_chunk: int | None = None
    """tokens of one chunk of the loss head; the planner chooses when not given"""
    attention_kernel: str | None = None
    """attention kernel to plan for and run with, one that the hardware has rates of; its first when not given"""
    attention: Literal["auto", "heads", "magi", "gather"] = "auto"
    """how attention may be split: by heads, by the sequence (magi, or keys and values gathered), or as the planner chooses"""
    documents: tuple[int, ...] = ()
    """lengths of the documents of a typical row, within which attention stays; () for rows that are one sequence"""
    output_folder: Path = Path(".seqloom")
    """where programs are written"""

    def __post_init__(self) -> None:
        if self.plan_ngpus < 1 or self.runtime_ngpus < 1 or self.runtime_ngpus % self.plan_ngpus:
            raise UserError(
                f"runtime_ngpus {self.runtime_ngpus} is not a multiple of plan_ngpus {self.plan_ngpus}: the plan is repeated over scale "
                f"units, so use --runtime_ngpus {max(1, self.plan_ngpus)} or a multiple of it"
            )
        if self.zero not in (None, 0, 1, 2, 3):
            raise UserError(f"zero {self.zero} is not a ZeRO level: use 0, 1, 2 or 3")
        for field in ("seq_len", "micro_batch_size", "grad_accumulation_steps", "loss_chunk"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.attention == "gather" and self.documents:
            raise UserError(
                "--attention gather knows no documents: use --attention auto, heads or magi, or pack the text with --pack stream"
            )

    @property
    def inside_documents(self) -> bool:
        """Whether attention is the operator that knows documents, which alone can split the sequence without gathering it."""
        return bool(self.documents) or self.attention == "magi"

    @property
    def folder(self) -> Path:
        """Where this program is written."""
        return Path(self.output_folder) / self.name

    @property
    def dp(self) -> int:
        """Number of scale units."""
        return self.runtime_ngpus // self.plan_ngpus

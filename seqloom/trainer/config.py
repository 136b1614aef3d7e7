"""Every setting of a run in one tree of frozen dataclasses: the flags of `train.py` and of `python -m seqloom compile`.

In: the command line. Out: a `TrainConfig`, or its part `CompileConfig`, which becomes the compiler's `CompileRequest`. The docstrings of
the fields are the text of `--help`; `-` and `_` are the same in flags. This module imports neither PyTorch nor transformers, so that
`--help` answers at once. What needs the machine or files to judge is checked in `seqloom.trainer.start`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from seqloom.data.metadata import read_metadata
from seqloom.emit.request import DEFAULT_LOSS, CompileRequest
from seqloom.errors import UserError
from seqloom.trainer import other_names, settings_file
from seqloom.trainer.schedule import ScheduleName

LAST = "last"
OptimizerName = Literal["adamw", "adam", "nadam", "radam", "adamax", "rmsprop", "sgd", "muon"]
T = TypeVar("T")


@dataclass(frozen=True)
class CompileConfig:
    """What decides the emitted program."""

    model_id: str
    """The model: a local folder, a name in configs/models, or a hub id. Compiling reads only its config."""
    dataset_path: Path | None = None
    """Data set made by bookcorpus.py."""
    seq_len: int | None = None
    """Tokens of one sequence; the data set's when not given."""
    plan_ngpus: int = 1
    """Ranks of one scale unit: what the plan splits the model over."""
    runtime_ngpus: int = 1
    """All ranks, a multiple of plan_ngpus: scale units share the batch."""
    name: str = "default"
    """Name of the program and of the run."""
    micro_batch_size: int = 1
    """Sequences of one micro-batch of one scale unit."""
    grad_accumulation_steps: int = 4
    """Micro-batches of one step."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the computation; masters, reductions and optimizer are fp32."""
    hardware: str = "h100-80gb"
    """The machine planned for: a name in configs/hardware, or a file."""
    memory_gib: Annotated[float | None, tyro.conf.arg(aliases=["--gpu_mem_constraint"])] = None
    """Memory of one device in GiB, in place of the hardware's."""
    force: str | None = None
    """Constrain the search, e.g. dp2, sp2, cp2, tp2, tp_sp2, tp_plain2, or several: sp2,tp2."""
    zero: Literal[0, 1, 2, 3] | None = None
    """ZeRO level; the planner chooses when not given."""
    recompute: Literal["auto", "none", "all"] = "auto"
    """Recompute segments: as the planner chooses, never, always."""
    offload: Literal["auto", "none"] = "auto"
    """Offload activations to host memory: as the planner chooses, never."""
    loss: str = DEFAULT_LOSS
    """Registered operator of the loss head, module:function."""
    loss_chunk: int | None = None
    """Tokens of one chunk of the loss head; the planner chooses when not given."""
    attention_kernel: str | None = None
    """Attention kernel to plan for and to run with where it is installed (flash3); the hardware's first when not given."""
    attention: Literal["auto", "heads", "magi", "gather"] = "auto"
    """How attention may be split: by heads, by the sequence (magi; gather), or as the planner chooses."""
    output_folder: Path = Path(".seqloom")
    """Where programs are written, each in a folder of its name."""

    def request(self) -> CompileRequest:
        """The compilation asked for. Raises `UserError` where the sequence length is unknown or contradicts the data set."""
        given = {name: getattr(self, name) for name in (f.name for f in fields(CompileRequest)) if name not in ("seq_len", "documents")}
        return CompileRequest(seq_len=self._sequence_length(), documents=self._documents(), **given)

    def _documents(self) -> tuple[int, ...]:
        """Lengths of the documents of a typical row of the data set; () where a row is one sequence."""
        if self.dataset_path is None:
            return ()
        metadata = read_metadata(self.dataset_path.expanduser())
        return tuple(metadata.typical_row) if metadata.pack == "documents" else ()

    def _sequence_length(self) -> int:
        if self.dataset_path is None and self.seq_len is None:
            raise UserError("compiling needs the sequence length: give --dataset_path, or --seq_len to compile without a data set")
        if self.dataset_path is None:
            return self.seq_len
        rows = read_metadata(self.dataset_path.expanduser()).sequence_length
        if self.seq_len not in (None, rows):
            raise UserError(
                f"the rows of {self.dataset_path} have {rows} tokens, but --seq_len is {self.seq_len}: "
                f"leave --seq_len out, or pack the text again with --sequence_length {self.seq_len}"
            )
        return rows


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    optimizer: OptimizerName = "adamw"
    """Which optimizer of PyTorch; muon: matrices of the blocks are orthogonalized, all else goes to AdamW, with one learning rate."""
    lr: float = 2e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments; the first is the momentum of sgd, the second the decay of rmsprop."""
    momentum: float = 0.95
    """Momentum of muon."""
    weight_decay: float = 0.0
    """Decay of matrices, decoupled for adamw, nadam, radam and muon; norms and biases do not decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them as they are."""
    lr_schedule: ScheduleName = "constant"
    """What follows the warm-up: a constant rate, a fall along a line or a cosine, or a stable rate that falls in the end (wsd)."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly to its peak."""
    decay_steps: int | None = None
    """With --lr_schedule wsd: the last steps, in which the rate falls along a line; a fifth of all when not given."""
    min_lr_ratio: float = 0.0
    """Where the rate falls to, as a share of its peak."""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"--lr is {self.lr}: the learning rate must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas are {self.betas[0]} {self.betas[1]}: both must be at least 0 and below 1")
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum is {self.momentum}: it must be at least 0 and below 1")
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} is {getattr(self, name)}: it cannot be negative")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"--min_lr_ratio is {self.min_lr_ratio}: give a share of the peak, from 0 to 1")
        if self.decay_steps is not None and self.lr_schedule != "wsd":
            raise UserError(f"--decay_steps belongs to --lr_schedule wsd, not {self.lr_schedule}: leave it out")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise UserError(f"--decay_steps is {self.decay_steps}: give at least 1")


@dataclass(frozen=True)
class OutputConfig:
    """Where a run's files go, and from where it continues."""

    checkpoint_dir: Path = Path("checkpoints")
    """Checkpoints go to a folder of the run's name in it."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always saved at the end."""
    resume_path: str | None = None
    """Continue from here: `last` (this run's newest good checkpoint), a step folder, a run folder, or a merged file."""
    async_checkpoint: bool = True
    """Write checkpoints while training goes on; a step then waits only for the copy of its state to host memory."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written: stop the run, or go on and try again at the next one."""
    keep_last: int | None = None
    """Keep only the newest checkpoints, this many; all when not given."""
    keep_every: int | None = None
    """With --keep_last, also keep every checkpoint whose step is a multiple of this."""
    keep_best: int = 0
    """With --keep_last, also keep the checkpoints with the least loss in evaluation, this many."""
    verify_checkpoint: bool = True
    """Check the digests of a checkpoint before it is loaded."""
    log_dir: Path = Path("runs")
    """Logs go to a folder of the run's name in it: log.jsonl, TensorBoard, loss.png."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise UserError(f"--checkpoint_every is {self.checkpoint_every}: give the number of steps between checkpoints, at least 1")
        for name in ("keep_last", "keep_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: it must be at least 1")
        if self.keep_best < 0:
            raise UserError(f"--keep_best is {self.keep_best}: it cannot be negative")
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) and self.keep_last is None:
                raise UserError(f"--{name} says what to keep beside the newest: give --keep_last too, or leave it out to keep all")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation while training, on text that the model does not learn from."""

    eval_path: Path | None = None
    """Data set to evaluate on; the folder `validation` of the training data where there is one (bookcorpus.py --validation)."""
    eval_every: int | None = None
    """Steps between evaluations; with every checkpoint when not given. 0 for none."""
    eval_rows: int | None = None
    """Evaluate on the first so many rows; all when not given."""

    def __post_init__(self) -> None:
        if self.eval_every is not None and self.eval_every < 0:
            raise UserError(f"--eval_every is {self.eval_every}: give the steps between evaluations, or 0 for none")
        if self.eval_rows is not None and self.eval_rows < 1:
            raise UserError(f"--eval_rows is {self.eval_rows}: give at least 1")


@dataclass(frozen=True)
class FaultConfig:
    """What a run does when something goes wrong."""

    nonfinite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite changes no weights; then stop the run, or skip the step and go on."""
    max_skips: int = 10
    """With --nonfinite skip: stop where more steps than this in a row are not finite."""
    timeout: float = 600.0
    """Seconds in which every rank must get on; where one does not, the run ends and says which rank is where."""

    def __post_init__(self) -> None:
        if self.max_skips < 0:
            raise UserError(f"--max_skips is {self.max_skips}: it cannot be negative")
        if not self.timeout > 0:
            raise UserError(f"--timeout is {self.timeout}: give the seconds in which every rank must get on, more than 0")


@dataclass(frozen=True)
class MonitorConfig:
    """What a run shows of itself beside its log, its report and TensorBoard."""

    wandb: str | None = None
    """Also log to Weights & Biases, in the project of this name."""
    profile: str | None = None
    """Steps to trace with PyTorch's profiler, first:last (10:13); the trace goes to the log folder."""
    memory_snapshot: str | None = None
    """Steps of which every allocation on the GPU is recorded, first:last; for pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        for name in ("profile", "memory_snapshot"):
            steps_of(name, getattr(self, name))


def steps_of(flag: str, text: str | None) -> range:
    """The steps that `first:last` or a single number names, none for None. Raises `UserError` for anything else."""
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--{flag} is {text}: give the first and the last step, such as 10:13")
    return range(int(first), int(last) + 1)


@dataclass(frozen=True)
class TrainConfig:
    """Compile a model into a program for several ranks, and train it."""

    compile: tyro.conf.OmitArgPrefixes[CompileConfig]
    config: Path | None = None
    """Settings in a file: YAML, TOML or JSON that maps names of flags to values; flags win over it."""
    run_mode: Literal["compile", "run"] = "run"
    """`compile` writes the program and ends; `run` compiles first when there is no program, then trains."""
    num_epochs: int = 2
    """Times that every row is used."""
    max_train_steps: int | None = None
    """Steps in all, in place of num_epochs."""
    init: Literal["random", "weights"] | None = None
    """Where the weights come from; those of the model where it has some, random where it has none."""
    seed: int = 0
    """Seed of random weights and of the order of the data."""
    deterministic: bool = False
    """Use deterministic algorithms only, also where they are slower."""
    compile_blocks: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks with torch.compile: where the plan counts on it and the device is a GPU, always, never."""
    optimizer: tyro.conf.OmitArgPrefixes[OptimizerConfig] = field(default_factory=OptimizerConfig)
    output: tyro.conf.OmitArgPrefixes[OutputConfig] = field(default_factory=OutputConfig)
    evaluation: tyro.conf.OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)
    faults: tyro.conf.OmitArgPrefixes[FaultConfig] = field(default_factory=FaultConfig)
    monitor: tyro.conf.OmitArgPrefixes[MonitorConfig] = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise UserError(f"--num_epochs is {self.num_epochs}: it must be at least 1")
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise UserError(f"--max_train_steps is {self.max_train_steps}: it must be at least 1")

    @property
    def eval_every(self) -> int:
        """Steps between evaluations, 0 for none."""
        asked = self.evaluation.eval_every
        return self.output.checkpoint_every if asked is None else asked

    @property
    def run_folder(self) -> Path:
        """Where the checkpoints of this run are."""
        return self.output.checkpoint_dir / self.compile.name

    @property
    def log_folder(self) -> Path:
        """Where the logs of this run are."""
        return self.output.log_dir / self.compile.name

    def total_steps(self, rows: int, rows_per_step: int) -> int:
        """Steps in all: `max_train_steps`, or as many as the epochs of a data set of `rows` rows fill, at least one."""
        return self.max_train_steps or max(1, self.num_epochs * rows // rows_per_step)


def parse(cls: type[T], prog: str, args: Sequence[str] | None = None) -> T:
    """Read a config from the command line (or `args`); help and mistakes end the process, told by the first rank of each machine only.

    For a `TrainConfig` a file of settings is read first. Raises `UserError` for mistakes in it and for contradictions.
    """
    spoken = os.environ.get("LOCAL_RANK", "0") == "0"
    words = list(sys.argv[1:] if args is None else args)
    from_file = _from_file(cls, prog, words) if cls is TrainConfig else []
    return tyro.cli(cls, prog=prog, args=[*from_file, *words], use_underscores=True, console_outputs=spoken)


def _from_file(cls: type, prog: str, words: Sequence[str]) -> list[str]:
    """The words that a file of settings stands for."""
    other_names.refuse(words)
    path = settings_file.named(words)
    if path is None:
        return []
    settings = settings_file.read_settings(path, cls)

    def parses(given: list[str]) -> bool:
        needed = [] if given[0] == "--model_id" else ["--model_id", "any"]
        with contextlib.suppress(UserError):  # a value that is refused by its class is told with the flags
            try:
                tyro.cli(cls, prog=prog, args=[*needed, *given], use_underscores=True, console_outputs=False)
            except SystemExit:
                return False
        return True

    settings_file.blame(settings, path, parses)
    return [word for given in settings.values() for word in given]

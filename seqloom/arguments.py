"""The flags of the commands beside training, a dataclass for each.

Role in the pipeline: `seqloom/cli.py` parses a command line into one of these. Docstrings are what `--help` prints.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from seqloom.errors import UserError

PROG = "python -m seqloom"


@dataclass(frozen=True)
class ProgramArguments:
    """Which compiled program."""

    name: str = "default"
    """Name given when it was compiled."""
    output_folder: Path = Path(".seqloom")
    """Where programs were written."""

    @property
    def folder(self) -> Path:
        """The program's folder. Raises `UserError` where there is none."""
        folder = self.output_folder / self.name
        if not folder.is_dir():
            raise UserError(f"there is no compiled program {folder}: compile one with `{PROG} compile --name {self.name} ...`")
        return folder


@dataclass(frozen=True)
class ExplainArguments:
    """Show what a plan chose, what the runners-up would cost, what binds, and what would help most."""

    program: tyro.conf.OmitArgPrefixes[ProgramArguments] = field(default_factory=ProgramArguments)
    advice: bool = True
    """Plan anew for more GPUs, memory and bandwidth and a shorter sequence, to say what would help (takes several searches)."""


@dataclass(frozen=True)
class SweepArguments:
    """Find the best plan for every sequence length on every machine."""

    model_id: str
    """The model: a local folder, a name in configs/models, or a hub id."""
    seq_lens: str = "8K,32K,128K,512K,1M,4M"
    """Tokens of a sequence, several with commas; K is 1024, M is 1024 K."""
    gpus: str = "8,16,64"
    """Numbers of GPUs."""
    hardware: str = "h100-80gb,h200-141gb"
    """Machines: names in configs/hardware, or files."""
    micro_batch_size: int = 1
    """Sequences of one micro-batch."""
    grad_accumulation_steps: int = 1
    """Micro-batches of one step."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Type of the computation."""
    csv: Path | None = None
    """Also write the table to this file."""


@dataclass(frozen=True)
class MagiArguments:
    """Lay an attention mask over ranks: balance, rows that travel, predicted times, and a picture of it; no GPU."""

    mask: str
    """causal, full, packed:FILE (lengths of documents), window:LEFT, window:LEFT:RIGHT, global:SIZE:LEFT or blocks:SIZE."""
    ranks: int
    """Ranks that the sequence is split over."""
    seq_len: str | None = None
    """Tokens of the sequence; K is 1024, M is 1024 K. That of the file with packed:FILE."""
    chunk_size: int | None = None
    """Rows of a chunk; about an eighth of a rank's share when not given."""
    hardware: str = "h100-80gb"
    """The machine that prices compute and communication: a name in configs/hardware, or a file."""
    heads: int = 32
    """Query heads."""
    kv_heads: int = 8
    """Key/value heads."""
    head_dim: int = 128
    """Elements of a head."""
    uneven: bool = False
    """Ranks may differ by one chunk, instead of padding."""
    degree: int = 1
    """Stages of the exchange."""
    picture: Path | None = None
    """Also write a picture of the mask, coloured by rank, to this PNG file."""


@dataclass(frozen=True)
class DryRunArguments:
    """Run the program of each rank on fake tensors at full size: shapes, peak memory, FLOPs; no GPU."""

    program: tyro.conf.OmitArgPrefixes[ProgramArguments] = field(default_factory=ProgramArguments)
    rank: int | None = None
    """This rank only; when not given the ranks of one scale unit, of more than four the first and the last."""


@dataclass(frozen=True)
class RehearseArguments:
    """Run one rank of a program on one real device with simulated collectives: true speed and memory."""

    program: tyro.conf.OmitArgPrefixes[ProgramArguments] = field(default_factory=ProgramArguments)
    rank: int | None = None
    """Which rank; the last of a scale unit when not given."""
    device: Literal["cuda", "cpu"] | None = None
    """Where; the GPU when not given, the CPU where there is none."""
    steps: int = 5
    """Steps to time, after the warm-up."""
    compile_blocks: Literal["auto", "on", "off"] = "auto"
    """Compile the blocks with torch.compile: where the plan counts on it and the device is a GPU, always, never."""


@dataclass(frozen=True)
class VerifyArguments:
    """Prove a plan: its program for a small model of the same structure, run on CPU processes in fp64, against the original model."""

    program: tyro.conf.OmitArgPrefixes[ProgramArguments] = field(default_factory=ProgramArguments)
    ranks_per_axis: int | None = None
    """Lay the plan over a mesh with this many ranks on every axis, where its own has more ranks than this machine can run."""


@dataclass(frozen=True)
class ReportArguments:
    """Write plan.html: the plan as a page, with what dry run, rehearsal and training measured beside it."""

    program: tyro.conf.OmitArgPrefixes[ProgramArguments] = field(default_factory=ProgramArguments)
    log_dir: Path | None = None
    """Where training logged; the folder `runs` beside the folder of programs when not given."""
    run: Path | None = None
    """Write report.html of this run's log folder (runs/NAME) anew, instead of a plan's page."""
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN ...")] = ()
    """Log folders of two or more runs to lay over each other on one page, instead of a plan's page."""
    output: Path = Path("compare.html")
    """File of the page that compares runs."""


@dataclass(frozen=True)
class GenerateArguments:
    """Let a merged model continue a prompt: a look at what was learned."""

    model: Path
    """Hugging Face folder, such as `ckpt_merger.py --hf_output` writes."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 100
    """Tokens to write."""
    temperature: float = 0.8
    """How freely tokens are drawn; 0 takes the likeliest each time."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 for all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that make up this probability."""
    seed: int = 0
    """Seed of the draws."""
    chat: bool = False
    """The prompt is a message: put it into the tokenizer's chat template."""


@dataclass(frozen=True)
class CheckOpArguments:
    """Run an operator whole and in pieces, forward and backward, and show where its annotation lies."""

    target: tyro.conf.Positional[str]
    """Registered function, module:function."""
    sizes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=SIZE ...")] = ()
    """Sizes of dimensions by name."""
    args: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Values of parameters that the annotation does not describe, as JSON."""
    dtypes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=DTYPE ...")] = ()
    """Types of inputs that are not floating-point, such as labels=int64."""
    seed: int = 0
    """Seed of the random inputs."""


@dataclass(frozen=True)
class ProfileArguments:
    """Measure this machine and write a hardware file for --hardware. Start it with torchrun to measure the links between ranks too."""

    device: Literal["cpu", "cuda"] | None = None
    """What to measure; the GPU where there is one."""
    output: Path | None = None
    """File to write; the name with .json when not given."""
    name: str = "this-machine"
    """Name of the description."""
    base: str | None = None
    """A name in configs/hardware or a file that gives what is not measured here: data-sheet peaks, the margin, links that reach further."""


@dataclass(frozen=True)
class FolderArguments:
    """Look at checkpoints."""

    path: tyro.conf.Positional[Path] = Path("checkpoints")
    """A step folder, a run folder, the folder of runs, or a merged file."""


@dataclass(frozen=True)
class DiffArguments:
    """Compare two checkpoints: tensors bit by bit and training state. Exit code 0 when they are equal, 1 when they differ."""

    first: tyro.conf.Positional[Path]
    """A step folder, a run folder (its newest step), a merged file, or a Hugging Face folder."""
    second: tyro.conf.Positional[Path]
    """What to compare it with; any of the same."""

"""Merge a sharded checkpoint: into one file to resume from under any plan, or into a Hugging Face folder.

python ckpt_merger.py --ckpt_dir ./checkpoints --output_fname ./merged.ckpt
python ckpt_merger.py --ckpt_dir ./checkpoints/llama3_mini --hf_output ./merged_hf --dtype bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seqloom.entry import run


@dataclass(frozen=True)
class MergerConfig:
    """What to merge and where to. At least one output is needed."""

    ckpt_dir: Path
    """A step folder, a run folder (its newest good step is taken), the folder that holds a single run, or a folder with one folder per
    machine that hold the files of one step together."""
    output_fname: Path | None = None
    """One safetensors file with model, optimizer and training state, for --resume_path."""
    hf_output: Path | None = None
    """A Hugging Face folder: weights, config, generation config and the tokenizer if the run knew it."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the Hugging Face weights; the model config's when not given."""
    max_shard_gb: float = 5.0
    """Largest file of the Hugging Face folder, in GB (10^9 bytes)."""
    verify: bool = True
    """Check the digests of all files before merging."""


def main() -> None:
    """Parse the flags, merge, and say what was written."""
    import tyro

    config = tyro.cli(MergerConfig, description=__doc__)
    from seqloom.checkpoint.merge import merge

    report = merge(
        config.ckpt_dir,
        output_fname=config.output_fname,
        hf_output=config.hf_output,
        dtype=config.dtype,
        max_shard_bytes=int(config.max_shard_gb * 10**9),
        verify=config.verify,
    )
    print(f"merged {report.source}")
    if config.output_fname is not None:
        print(f"  {config.output_fname}: model, optimizer and training state, for --resume_path")
    if config.hf_output is not None:
        print(f"  {config.hf_output}: Hugging Face folder, weights in {report.dtype} (from {report.dtype_reason})")


if __name__ == "__main__":
    run(main)

"""Compile a model into a distributed program, and train it.

In one process, on any machine:  python train.py --run_mode compile --model_id llama3_8b --seq_len 131072 --plan_ngpus 8 --runtime_ngpus 8
Then, where the GPUs are:        torchrun --nproc_per_node=8 train.py --model_id meta-llama/Meta-Llama-3-8B-Instruct \
                                     --dataset_path ./bookcorpus_llama3_128K --plan_ngpus=8 --runtime_ngpus=8
On two CPU cores:                torchrun --nproc_per_node=2 train.py --model_id ./llama3_mini --dataset_path ./stdlib_1K \
                                     --plan_ngpus 2 --runtime_ngpus 2 --hardware cpu --precision fp32 --name demo
"""

from __future__ import annotations

from seqloom.entry import run
from seqloom.trainer.config import TrainConfig, parse


def main() -> None:
    """Parse the flags; compile in one plain process, or train on every rank."""
    config = parse(TrainConfig, "train.py")
    if config.run_mode == "compile":
        from seqloom.trainer.compile import compile_only

        compile_only(config.compile)
    else:
        from seqloom.trainer.loop import train

        train(config)


if __name__ == "__main__":
    run(main)

"""The Trainer of transformers with magi attention: every batch is one sequence of packed documents, split over ranks.

1 CPU process:    python examples/trainer_magi.py
2 CPU processes:  torchrun --nproc_per_node=2 examples/trainer_magi.py --cp 2 --check
4 CPU processes:  torchrun --nproc_per_node=4 examples/trainer_magi.py --cp 2 --check      # two sequences at a time, two ranks each
8 GPUs:           torchrun --nproc_per_node=8 examples/trainer_magi.py --cp 4 --documents 32 --longest 8192 --hidden_size 2048 --layers 16

`MagiTrainer` gives the ranks that share a sequence the same batch, and lets each take its own rows of it. The rest is the Trainer's: it
counts the labels of all batches (`num_items_in_batch`, for which it must know how many ranks have the same one), the model divides its part
of the sum by that, and as the Trainer multiplies every part by the number of ranks, gradients averaged over all ranks are those of the
mean over all tokens. So the model may be held as the Trainer can: by FSDP2 on GPUs, by DDP on CPU, where Accelerate has neither FSDP nor a
mesh. Accelerate's own context parallelism is not used: it would attend by its own ring. `--check` (on CPU) trains in one plain process too.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import tyro
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import custom_ops.magi_hugging_face  # noqa: F401 - registers the attention implementation "magi"
from custom_ops.magi_attention import dispatch, magi_attn_varlen_key
from seqloom.entry import run
from seqloom.errors import UserError

IGNORED = -100  # the label of a position that does not count


@dataclass(frozen=True)
class Arguments:
    """Train a Llama on random packed documents with the Trainer of transformers."""

    cp: int = 1
    """Ranks that share one sequence; the others are data parallel."""
    steps: int = 10
    documents: int = 8
    """Documents of a step, packed into one sequence for every `cp` ranks."""
    longest: int = 256
    """Most tokens of a document."""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    vocab_size: int = 512
    check: bool = False
    """On CPU: train in one process too, with PyTorch's attention, and fail where a loss or a gradient norm differs by more than 1e-5."""
    plain: bool = False
    """Use the Trainer as it is, with PyTorch's attention, as `--check` does in one process."""


class MagiTrainer(Trainer):
    """A Trainer whose batches are split over `cp` ranks by magi attention."""

    def __init__(self, cp: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cp, self.sequences = cp, self.args.world_size // cp
        mesh = (self.sequences, cp)
        self.group = init_device_mesh(self.args.device.type, mesh, mesh_dim_names=("dp", "cp"))["cp"] if cp > 1 else None

    def get_cp_size(self) -> int:
        """Ranks that have the same batch: by so many the Trainer divides the labels that it counts on all ranks."""
        return self.cp

    def get_train_dataloader(self) -> DataLoader:
        """The batches of this rank's sequence."""
        sampler = DistributedSampler(self.train_dataset, self.sequences, self.args.process_index // self.cp, shuffle=False)
        return DataLoader(self.train_dataset, self.args.per_device_train_batch_size, sampler=sampler, collate_fn=self.data_collator)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None) -> Tensor:
        """The Trainer's step on this rank's rows, with labels shifted before they are taken apart."""
        borders = inputs["cu_seq_lens_q"].tolist()
        key = magi_attn_varlen_key(borders, borders, causal=True, cp_group_or_mesh=self.group)
        ids, positions, labels = inputs["input_ids"][0], inputs["position_ids"][0], inputs["labels"][0]
        following = dispatch(labels.roll(-1), key, IGNORED)[None]  # the collator marks every first token, so none crosses to the next
        rows = {"input_ids": dispatch(ids, key)[None], "position_ids": dispatch(positions, key)[None]}
        return super().training_step(model, {**rows, "labels": following, "shift_labels": following}, num_items_in_batch)


def main() -> None:
    """Train, and compare if asked."""
    args = tyro.cli(Arguments, description=__doc__, use_underscores=True)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks % args.cp or args.documents * args.cp % ranks:
        raise UserError(f"{ranks} ranks, {args.cp} a sequence, cannot share {args.documents} documents evenly: change --documents or --cp")
    figures = train(args, ranks)
    if args.check and leave_job():
        apart = (figures - train(replace(args, cp=1, plain=True), 1)).abs().max().item()
        print(f"largest difference from one process: {apart:.1e}")
        if not apart <= 1e-5:
            raise UserError(f"losses or gradient norms differ from those of one process by {apart:.1e}: the split is wrong")


def train(args: Arguments, ranks: int) -> Tensor:
    """Loss and gradient norm of every step, `[steps, 2]`, the same on all ranks."""
    on_gpu = torch.cuda.is_available() and not args.check
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    held = {"use_cpu": not on_gpu, "fsdp": on_gpu and ranks > 1, "ddp_find_unused_parameters": False, "bf16": on_gpu}
    steps = {"max_steps": args.steps, "learning_rate": 1e-3, "max_grad_norm": 0.4, "train_sampling_strategy": "sequential"}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(folder, per_device_train_batch_size=args.documents * args.cp // ranks, **steps, **held, **quiet)
        kind = Trainer if args.plain else partial(MagiTrainer, args.cp)
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        trainer = kind(llama(args), settings, data_collator=collator, train_dataset=documents(args))
        trainer.train()
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry])


def llama(args: Arguments) -> nn.Module:
    """A Llama in fp32 with the same random weights on every rank."""
    sizes = {"vocab_size": args.vocab_size, "hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size}
    heads = {"num_attention_heads": args.heads, "num_key_value_heads": args.heads // 2, "num_hidden_layers": args.layers}
    config = LlamaConfig(**sizes, **heads, use_cache=False)
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa" if args.plain else "magi", dtype=torch.float32)


def documents(args: Arguments) -> Dataset:
    """Random documents of random lengths, as many as all steps take."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, args.longest + 1, (args.steps * args.documents,), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": torch.randint(args.vocab_size, (n,), generator=generator).tolist()} for n in lengths])


def leave_job() -> bool:
    """Make the first rank a process that nobody but itself knows of, so that it can train alone; False on the others."""
    first = int(os.environ.get("RANK", "0")) == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    return first


if __name__ == "__main__":
    run(main)

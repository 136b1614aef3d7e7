"""A hand-written FSDP2 loop in which a Hugging Face Llama attends over packed documents, each sequence split over ranks.

2 CPU processes:  torchrun --nproc_per_node=2 examples/fsdp2_magi.py --cp 2 --check
8 GPUs:           torchrun --nproc_per_node=8 examples/fsdp2_magi.py --cp 4 --seq_len 65536 --hidden_size 2048 --layers 16

The mesh is dp x cp: the ranks of `cp` hold one sequence, every place of `dp` its own, and FSDP2 shards the weights over all of them.
`--check` then trains the unsplit model, with PyTorch's own attention, and compares losses and gradient norms (fp32, also on GPUs).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

import custom_ops.magi_hugging_face  # noqa: F401 - registers the attention implementation "magi"
from custom_ops.magi_attention import dispatch, magi_attn_varlen_key
from seqloom.entry import run
from seqloom.errors import UserError

IGNORED = -100  # the label of a position that does not count


@dataclass(frozen=True)
class Arguments:
    """Train a Llama on random packed documents with FSDP2 and magi attention."""

    cp: int = 2
    """Ranks that share one sequence; the others are data parallel."""
    steps: int = 10
    seq_len: int = 1024
    """Tokens of a sequence of packed documents."""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    vocab_size: int = 512
    lr: float = 1e-3
    max_grad_norm: float = 0.4
    check: bool = False
    """Train the unsplit model too; fail where a loss or a gradient norm is further than 1e-5 from its."""


def main() -> None:
    """Train, and compare if asked."""
    args = tyro.cli(Arguments, description=__doc__, use_underscores=True)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_world_size() % args.cp:
        raise UserError(f"{dist.get_world_size()} ranks cannot be shared out to sequences over {args.cp} each: change --cp")
    mesh = init_device_mesh(device.type, (dist.get_world_size() // args.cp, args.cp), mesh_dim_names=("dp", "cp"))
    figures = train(args, mesh, device)
    if args.check:
        apart = (figures - train_unsplit(args, mesh["dp"].size(), device)).abs().max().item()
        if dist.get_rank() == 0:
            print(f"largest difference from the unsplit model: {apart:.1e}")
        if not apart <= 1e-5:
            raise UserError(f"losses or gradient norms differ from the unsplit model's by {apart:.1e}: the split is wrong")
    dist.destroy_process_group()


def train(args: Arguments, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Loss and gradient norm of every step, `[steps, 2]`, the same on all ranks."""
    model = sharded(llama(args, "magi").to(device), mesh, torch.float32 if args.check or device.type == "cpu" else torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    figures = []
    for step in range(args.steps):
        cu_seqlens, *rows = sequence(args, step, mesh.get_local_rank("dp"))
        key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, causal=True, cp_group_or_mesh=mesh["cp"])
        ids, labels, positions = (dispatch(x.to(device), key, pad) for x, pad in zip(rows, (0, IGNORED, 0), strict=True))
        counted = (labels != IGNORED).sum()
        dist.all_reduce(counted)  # tokens that count, on all ranks
        logits = model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / counted
        loss.backward()  # FSDP2 sums over dp and cp, and the parts of the loss add up to the mean over all tokens
        norm = clip_grad_norm_(model.parameters(), args.max_grad_norm).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        figures.append([mean.item(), norm.item()])
        if dist.get_rank() == 0:
            print(f"step {step + 1:>3}  loss {figures[-1][0]:.6f}  gradient norm {norm:.4f}  {int(counted)} tokens")
    return torch.tensor(figures)


def train_unsplit(args: Arguments, sequences: int, device: torch.device) -> Tensor:
    """The same figures from one whole model on every rank; transformers itself sees from the positions where documents begin."""
    model = llama(args, "sdpa").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    figures = []
    for step in range(args.steps):
        total, counted = torch.zeros((), device=device), 0
        for index in range(sequences):
            ids, labels, positions = (x.to(device) for x in sequence(args, step, index)[1:])
            logits = model(ids[None], position_ids=positions[None], use_cache=False).logits[0]
            total = total + F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            counted += int((labels != IGNORED).sum())
        (total / counted).backward()
        norm = clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        figures.append([total.item() / counted, norm.item()])
    return torch.tensor(figures)


def llama(args: Arguments, attention: str) -> nn.Module:
    """A Llama in fp32 with the same random weights on every rank."""
    sizes = {"vocab_size": args.vocab_size, "hidden_size": args.hidden_size, "intermediate_size": 3 * args.hidden_size}
    heads = {"num_attention_heads": args.heads, "num_key_value_heads": args.heads // 2, "num_hidden_layers": args.layers}
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**sizes, **heads), attn_implementation=attention, dtype=torch.float32)


def sharded(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Module:
    """Each layer and the rest a group of FSDP2 over all ranks, gradients summed."""
    options = {"mesh": mesh._flatten("dp_cp"), "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)}
    for module in (*model.model.layers, model):
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return model


def sequence(args: Arguments, step: int, index: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Documents of random lengths as one sequence: where they begin and end, ids, labels (the next id of the document), positions in it."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    borders = torch.randperm(args.seq_len - 1, generator=generator)[: args.seq_len // 128].sort().values + 1
    cu_seqlens = [0, *borders.tolist(), args.seq_len]
    starts, ends = torch.tensor(cu_seqlens[:-1]), torch.tensor(cu_seqlens[1:])
    ids = torch.randint(args.vocab_size, (args.seq_len,), generator=generator)
    labels = ids.roll(-1).index_fill(0, ends - 1, IGNORED)
    return cu_seqlens, ids, labels, torch.arange(args.seq_len) - starts.repeat_interleave(ends - starts)


if __name__ == "__main__":
    run(main)

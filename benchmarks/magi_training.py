"""Training on packed documents with magi attention over 1, 2, 4 and 8 processes, beside one process with a dense block mask.

    python benchmarks/magi_training.py            # 100 steps of each, fp32 on CPU, and how far the loss curves are apart
    python benchmarks/magi_training.py --write    # and kept in benchmarks/results/magi_training.json and docs/images/magi-loss.png

A small Llama of transformers learns the bytes of the Python standard library's sources; documents are packed into one sequence a step and
attend within themselves. The dense run builds the mask cell by cell and uses PyTorch's attention; the others dispatch ids, labels and
positions with the key of the step, and sum their gradients. Started by itself, one torchrun for each number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "magi_training.json"
PICTURE = ROOT / "docs" / "images" / "magi-loss.png"
STEPS, ROWS, RANKS, VOCAB = 100, 512, (1, 2, 4, 8), 256
LIMIT = 1e-5  # how far two curves may be apart, in nats


def main() -> None:
    """Run every number of processes and compare; with `--losses` be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT} and {PICTURE}")
    parser.add_argument("--losses", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.losses is not None:
        train(args.losses)
        return
    curves = {"dense": started(0), **{str(ranks): started(ranks) for ranks in RANKS}}
    apart = {name: max(abs(a - b) for a, b in zip(curve, curves["dense"], strict=True)) for name, curve in curves.items()}
    for name, off in apart.items():
        print(f"{name:>6}  loss {curves[name][0]:.4f} -> {curves[name][-1]:.4f}  at most {off:.1e} from dense")
    if args.write:
        content = {"steps": STEPS, "rows": ROWS, "torch": torch.__version__, "apart": apart, "curves": curves}
        RESULT.write_text(json.dumps(content) + "\n", encoding="utf-8")
        plot(curves)
    sys.exit(0 if max(apart.values()) <= LIMIT else 1)


def started(ranks: int) -> list[float]:
    """The losses of a run on so many processes; 0 is the dense one."""
    with tempfile.TemporaryDirectory(prefix="seqloom-magi-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DENSE": str(int(ranks == 0))}
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={max(ranks, 1)}",
            "--standalone",
            __file__,
            "--losses",
            folder,
        ]
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        return json.loads(Path(folder, "losses.json").read_text(encoding="utf-8"))


def batch(step: int) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Cumulative lengths of the documents of a step, their bytes, the bytes that follow (-100 at ends), positions in each document."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    generator = torch.Generator().manual_seed(step)
    lengths: list[int] = []
    while sum(lengths) < ROWS:
        lengths.append(min(int(torch.randint(1, 200, (), generator=generator)), ROWS - sum(lengths)))
    ids, labels = [], []
    for length in lengths:
        text = files[int(torch.randint(len(files), (), generator=generator))].read_bytes()
        start = int(torch.randint(max(1, len(text) - length), (), generator=generator))
        document = list(text[start : start + length].ljust(length))
        ids += document
        labels += [*document[1:], -100]
    positions = [position for length in lengths for position in range(length)]
    return [0, *accumulate(lengths)], torch.tensor(ids), torch.tensor(labels), torch.tensor(positions)


def model(implementation: str) -> nn.Module:
    """Two layers, four query heads on two key/value heads; the same weights in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.float32)


def train(folder: Path) -> None:
    """One process of a run; rank 0 writes the losses."""
    dist.init_process_group("gloo")
    dense = os.environ["DENSE"] == "1"
    if not dense:
        import custom_ops.magi_hugging_face  # noqa: F401 - registers
    llama = model("sdpa" if dense else "magi")
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        total, count = dense_loss(llama, step) if dense else magi_loss(llama, step)
        optimizer.zero_grad()
        (total / count).backward()
        total = total.detach().double()
        for tensor in (total, *(parameter.grad for parameter in llama.parameters())):
            dist.all_reduce(tensor)
        optimizer.step()
        losses.append(float(total / count))
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    dist.destroy_process_group()


def dense_loss(llama: nn.Module, step: int) -> tuple[Tensor, int]:
    """Sum of the losses of all tokens, with a mask of every cell; and how many count."""
    cu, ids, labels, positions = batch(step)
    document = torch.cat([torch.full((end - start,), index) for index, (start, end) in enumerate(pairwise(cu))])
    rows = torch.arange(len(ids))
    mask = (document[:, None] == document[None]) & (rows[:, None] >= rows[None])
    logits = llama(ids[None], position_ids=positions[None], attention_mask=mask[None, None]).logits[0]
    return F.cross_entropy(logits, labels, reduction="sum"), int((labels >= 0).sum())


def magi_loss(llama: nn.Module, step: int) -> tuple[Tensor, int]:
    """This rank's part of the same sum, and how many tokens count on all ranks."""
    from custom_ops.magi_attention import dispatch, get_position_ids, magi_attn_varlen_key

    cu, ids, labels, positions = batch(step)
    key = magi_attn_varlen_key(cu, cu, 4, 2, 16, causal=True, cp_group_or_mesh=dist.group.WORLD)
    own = torch.where(get_position_ids(key) < len(ids), dispatch(labels, key), -100)
    logits = llama(dispatch(ids, key)[None], position_ids=dispatch(positions, key)[None]).logits[0]
    return F.cross_entropy(logits, own, reduction="sum"), int((labels >= 0).sum())


def plot(curves: dict[str, list[float]]) -> None:
    """All curves in one picture, and their distances from the dense one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), dpi=120)
    for name, curve in curves.items():
        label = "one process, dense mask" if name == "dense" else f"magi, {name} processes"
        above.plot(curve, label=label, linewidth=3 if name == "dense" else 1, alpha=0.5 if name == "dense" else 1)
        if name != "dense":
            below.semilogy([max(abs(a - b), 1e-9) for a, b in zip(curve, curves["dense"], strict=True)], label=label)
    above.set(ylabel="loss, nats a byte", title="Packed documents of the standard library, fp32")
    below.set(xlabel="step", ylabel="distance from dense")
    below.axhline(LIMIT, color="gray", linestyle=":")
    above.legend()
    figure.savefig(PICTURE, bbox_inches="tight")


if __name__ == "__main__":
    main()

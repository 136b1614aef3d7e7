"""Load a merged model in transformers and compare it with what the trainer said at the end.

python examples/check_merged.py --merged ./merged_hf --dataset_path ./stdlib_1K --final ./runs/demo/final.json

`final.json` holds the loss of the data's first rows and of a few single tokens, computed by the emitted program on all ranks. A token's
loss is its negative log probability, so equal numbers mean equal logits there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from seqloom.entry import run
from seqloom.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Arguments:
    """Check a merged model against the trainer's `final.json`."""

    merged: Path
    """Hugging Face folder written by ckpt_merger.py."""
    dataset_path: Path
    """Data set of the training."""
    final: Path
    """`final.json` of the training."""
    tolerance: float = 1e-3
    """Largest difference of a loss, in nats."""


def main() -> None:
    """Load, compare."""
    args = tyro.cli(Arguments, description=Arguments.__doc__, use_underscores=True)
    model = load(args.merged)
    difference = compare(model, args.dataset_path, json.loads(args.final.read_text()))
    if difference > args.tolerance:
        raise UserError(f"{args.merged} gives losses that differ from {args.final} by {difference:.2e}: it is not the trained model")


def load(folder: Path) -> PreTrainedModel:
    """The model in fp32. Raises `UserError` where a key is missing, unexpected or of another shape."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise UserError(f"{folder} has {kind.replace('_', ' ')}: {', '.join(map(str, sorted(report[kind])))}; merge it again")
    print(f"{folder}: no missing and no unexpected key, {model.num_parameters():,} parameters")
    return model.eval()


def compare(model: PreTrainedModel, dataset_path: Path, final: dict[str, Any]) -> float:
    """The largest difference between the model's losses and the trainer's, printed one by one."""
    losses = token_losses(model, dataset_path, final["rows"])
    pairs = {"first rows": (losses[~losses.isnan()].mean().item(), final["loss"])}
    for place, loss in final["token_losses"].items():
        pairs[f"token {place}"] = (losses[0, int(place)].item(), loss)
    for name, (ours, theirs) in pairs.items():
        print(f"  {name:<10}  transformers {ours:.6f}  trainer {theirs:.6f}  difference {abs(ours - theirs):.1e}")
    return max(abs(ours - theirs) for ours, theirs in pairs.values())


def token_losses(model: PreTrainedModel, dataset_path: Path, rows: list[int]) -> Tensor:
    """Loss of every token of some rows `[b, l]`, NaN where the label does not count."""
    import numpy as np
    import torch

    from seqloom.data.documents import restarting_positions
    from seqloom.data.loader import open_dataset

    dataset = open_dataset(dataset_path)
    input_ids, labels = (torch.from_numpy(array.astype(np.int64)) for array in dataset.read(np.array(rows)))
    # Positions that start anew tell transformers where a document ends, as long as it keeps no cache.
    position_ids = torch.from_numpy(restarting_positions(dataset.read_cu_seqlens(np.array(rows)))).view_as(input_ids)
    with torch.no_grad():
        log_probabilities = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits.float().log_softmax(-1)
    counts = labels >= 0
    found = -log_probabilities.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return found.masked_fill(~counts, float("nan"))


if __name__ == "__main__":
    run(main)

"""The loops that seqloom is compared with: FSDP2 by hand, and the Trainer of transformers with FSDP2.

Role: a benchmark calls one of them on every rank of a job of data parallel processes. In: a `Recipe` and the rows of every step. Out: a
`Timed` for every step; the steps of several systems can take turns in one process. Both train the same Hugging Face folder in fp32 with
PyTorch's attention (which takes documents from positions that start again), cross-entropy over all logits, clipping, and fused AdamW; each
layer is a group of FSDP2.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from seqloom.cost.measure_clock import waited_seconds
from seqloom.trainer.schedule import learning_rate

IGNORED = -100
Lap = tuple[float, float, float]  # seconds, seconds waited, seconds worked
Rows = dict[str, Tensor]  # input_ids, labels (of the next token) and position_ids, each [rows, tokens]


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; the rate of a step is that of seqloom's trainer."""

    folder: Path
    steps: int
    lr: float = 1e-3
    schedule: Literal["constant", "linear"] = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0, as a share of the peak."""
        return learning_rate(step + 1, peak=1.0, schedule=self.schedule, warmup_steps=self.warmup_steps, total_steps=self.steps)

    def model(self) -> nn.Module:
        """The folder's model with its weights."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="sdpa", use_cache=False)


@dataclass(frozen=True)
class Timed:
    """A step: its loss, its seconds on this rank, those of them in which the rank waited for a core that other work had, and the seconds
    that processors worked for this process, all its threads together.
    """

    loss: float
    seconds: float
    waited: float
    worked: float


class Stopwatch:
    """Seconds, seconds waited and seconds worked, from one `lap` to the next."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> Lap:
        """What has passed since the last lap."""
        before, self._last = self._last, self._now()
        return tuple(now - then for now, then in zip(self._last, before, strict=True))

    def _now(self) -> Lap:
        return time.perf_counter(), waited_seconds(), time.process_time()


def fsdp2_steps(recipe: Recipe, rows_of_step: Callable[[int], Rows]) -> Iterator[Timed]:
    """The loop by hand, a step each time it is asked. `rows_of_step(step)` gives the rows of all ranks; each takes its share."""
    model = recipe.model()
    for module in (*model.model.layers, model):
        fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, recipe.rate)
    for step in range(recipe.steps):
        watch = Stopwatch()
        rows = {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in rows_of_step(step).items()}
        counted = (rows["labels"] != IGNORED).sum()
        dist.all_reduce(counted)
        logits = model(input_ids=rows["input_ids"], position_ids=rows["position_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), rows["labels"].flatten(), ignore_index=IGNORED, reduction="sum") / counted
        (loss * dist.get_world_size()).backward()  # FSDP2 takes the mean over the ranks
        clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        del logits, loss
        yield Timed(total.item(), *watch.lap())


def train_trainer(recipe: Recipe, rows: Rows, between: Callable[[], object] = lambda: None) -> list[Timed]:
    """The Trainer; `rows` are those of all steps, in order. After every step it calls `between`, whose time is not its own."""
    ranks = dist.get_world_size()
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    adam = {"optim": "adamw_torch_fused", "learning_rate": recipe.lr, "adam_beta1": recipe.betas[0], "adam_beta2": recipe.betas[1]}
    order = {"train_sampling_strategy": "sequential", "remove_unused_columns": False, "dataloader_drop_last": True}
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            per_device_train_batch_size=len(rows["labels"]) // recipe.steps // ranks,
            max_steps=recipe.steps,
            max_grad_norm=recipe.max_grad_norm,
            weight_decay=0.0,
            use_cpu=True,
            fsdp=True,
            **adam,
            **order,
            **quiet,
        )
        _let_accelerate_shard_on_cpu()
        clock = _Clock(between)
        trainer = _Scheduled(recipe, recipe.model(), settings, train_dataset=_Samples(rows), callbacks=[clock])
        trainer.train()
    if not isinstance(trainer.model_wrapped, FSDPModule):
        raise RuntimeError("this release of Accelerate did not shard the model: look at how a job on CPU is made one of FSDP")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [Timed(loss, *lap) for loss, lap in zip(losses, clock.laps, strict=True)]


class _Scheduled(Trainer):
    """A Trainer with the recipe's learning rates: its own linear schedule begins with a rate of 0."""

    def __init__(self, recipe: Recipe, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recipe = recipe

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, self._recipe.rate)
        return self.lr_scheduler


class _Clock(TrainerCallback):
    """The laps of the steps, from the end of one to the end of the next, less what is done between them."""

    def __init__(self, between: Callable[[], object]) -> None:
        self.laps: list[Lap] = []
        self._between = between

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._watch = Stopwatch()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.laps.append(self._watch.lap())
        self._between()
        self._watch.lap()


class _Samples(torch.utils.data.Dataset):
    """Rows one by one; labels that are already those of the next token go by the name that keeps the model from shifting them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = {**rows, "shift_labels": rows["labels"]}

    def __len__(self) -> int:
        return len(self._rows["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: x[index] for name, x in self._rows.items()}


def _let_accelerate_shard_on_cpu() -> None:
    """Accelerate leaves FSDP out where processes compute on CPU, though PyTorch has it: call this job one of devices."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def random_rows(vocab_size: int, count: int, length: int, seed: int) -> Rows:
    """Rows of random tokens, one text each."""
    tokens = torch.randint(vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(length).expand(count, length).contiguous()
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(), "position_ids": positions}


def joined(steps: Sequence[Rows]) -> Rows:
    """The rows of several steps, one after the other."""
    return {name: torch.cat([rows[name] for rows in steps]) for name in steps[0]}

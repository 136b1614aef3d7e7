"""Training steps of the same Llama on one device: seqloom's program, the model of transformers, torchtitan's.

Role: `head_to_head.py` calls one of them in a process of its own. In: a task (the folder of the model's config, the length, the device,
how to compile). Out: a step, called with the rows of one sequence, that gives its loss on the device. All clip the gradient norm to 1 and
update with fused AdamW.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from workbench import brief, compile_plan

Rows = Mapping[str, Tensor]  # input_ids and labels (of the next token), each [1, tokens]
Step = Callable[[Rows], Tensor]
BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def seqloom(task: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The compiled program of one rank in the project's own step: fp32 masters, computed in the precision that is asked for."""
    from seqloom.capture.architecture import resolve_config
    from seqloom.runtime.compiled import compile_as_asked
    from seqloom.runtime.materialize import materialize
    from seqloom.runtime.mesh import build_mesh, init_distributed
    from seqloom.runtime.optimizer import build_optimizer
    from seqloom.runtime.program import load_program
    from seqloom.runtime.step import TrainStep

    folder = Path(task["folder"])
    plan = compile_plan(folder, "program", **task["compile"])
    device = init_distributed(task["device"])
    program = load_program(folder / "program")
    mesh = build_mesh(program.MESH, 1, device.type)
    config, weights = resolve_config(task["compile"]["model_id"]), task.get("weights")
    dtype = DTYPES[task["compile"]["precision"]]
    model = materialize(program, mesh, config, weights=weights and Path(weights), seed=0, device=device, compute_dtype=dtype)
    compiled = compile_as_asked("auto", model, program, device)
    step = TrainStep(model, program, mesh, build_optimizer(model, task["lr"], BETAS), device, MAX_GRAD_NORM)
    return lambda rows: step([rows]).loss, {"plan": brief(plan), "blocks_compiled": compiled}


def huggingface(task: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The model of transformers with gradient checkpointing and its own loss, all of it in the precision that is asked for."""
    model = _pretrained(task, DTYPES[task["compile"]["precision"]])
    return _plain_step(model, task), {"parameters": _count(model)}


def huggingface_fp32(task: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The same with fp32 weights under autocast, as the Trainer has it with `bf16=True`: masters as precise as seqloom's."""
    model = _pretrained(task, torch.float32)
    inside = torch.autocast(task["device"], DTYPES[task["compile"]["precision"]], enabled=task["compile"]["precision"] != "fp32")
    return _plain_step(model, task, inside), {"parameters": _count(model)}


def huggingface_masters(task: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """The same computed wholly in bf16 from fp32 masters: what seqloom and FSDP2 do, written out."""
    model = _pretrained(task, torch.float32)
    masters = [nn.Parameter(param.detach().clone()) for param in model.parameters()]
    model.to(DTYPES[task["compile"]["precision"]])
    optimizer = _adamw(masters, task)

    def step(rows: Rows) -> Tensor:
        loss = _own_loss(model, rows)
        loss.backward()
        for master, param in zip(masters, model.parameters(), strict=True):
            master.grad, param.grad = param.grad.float(), None
        clip_grad_norm_(masters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), masters)
        return loss.detach()

    return step, {"parameters": _count(model)}


def torchtitan(task: Mapping[str, Any]) -> tuple[Step, dict[str, Any]]:
    """torchtitan's Llama as its trainer sets it up for one GPU: FSDP2 over fp32 masters, each block checkpointed and compiled.

    Written for its releases 0.2. They have no tied embeddings: the head is a second matrix.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from seqloom.runtime.mesh import init_distributed

    if importlib.util.find_spec("datasets") is None:  # its package imports it, its model does not need it
        sys.modules.update({name: MagicMock() for name in ("datasets", "datasets.distributed")})
    from torchtitan.models.llama3 import Transformer, TransformerModelArgs

    device, fields = init_distributed(task["device"]), task["config"]
    hidden = fields["hidden_size"]
    sizes = {"dim": hidden, "n_layers": fields["num_hidden_layers"], "n_heads": fields["num_attention_heads"]}
    sizes |= {"n_kv_heads": fields["num_key_value_heads"], "vocab_size": fields["vocab_size"], "max_seq_len": task["length"]}
    # its feed-forward size is 2/3 of 4 x dim, times this factor, rounded up
    factor = {"ffn_dim_multiplier": fields["intermediate_size"] / (8 * hidden / 3) * 0.999, "multiple_of": 16}
    with torch.device(device), torch.no_grad():
        model = Transformer(TransformerModelArgs(**sizes, **factor))
        model.init_weights()
    mesh = init_device_mesh(device.type, (1,))
    policy = MixedPrecisionPolicy(DTYPES[task["compile"]["precision"]], reduce_dtype=torch.float32)
    for name, block in model.layers.named_children():
        block = checkpoint_wrapper(block, preserve_rng_state=False)
        if device.type == "cuda":
            block.compile(fullgraph=True)
        model.layers.register_module(name, block)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = _adamw(model.parameters(), task)
    loss_of = torch.compile(_cross_entropy) if device.type == "cuda" else _cross_entropy

    def step(rows: Rows) -> Tensor:
        loss = loss_of(model(rows["input_ids"].to(device)), rows["labels"].to(device))
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, {"parameters": _count(model)}


CONTENDERS: Mapping[str, Callable[[Mapping[str, Any]], tuple[Step, dict[str, Any]]]] = {
    "seqloom": seqloom,
    "seqloom_lean": seqloom,
    "huggingface": huggingface,
    "torchtitan": torchtitan,
    "huggingface_fp32": huggingface_fp32,
    "huggingface_masters": huggingface_masters,
}


def random_tokens(vocab_size: int, length: int, seed: int) -> Rows:
    """One row of random tokens."""
    tokens = torch.randint(vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def chain_of_tokens(vocab_size: int, length: int, seed: int) -> Rows:
    """One row of a text that can be learned: each of 1,024 tokens is followed by one of eight, the same eight in all rows."""
    states = min(1024, vocab_size)
    successors = torch.randint(states, (states, 8), generator=torch.Generator().manual_seed(0)).tolist()
    choices = torch.randint(8, (length + 1,), generator=torch.Generator().manual_seed(1 + seed)).tolist()
    tokens = [seed % states]
    for choice in choices[:-1]:
        tokens.append(successors[tokens[-1]][choice])
    row = torch.tensor(tokens)[None]
    return {"input_ids": row[:, :-1].contiguous(), "labels": row[:, 1:].contiguous()}


def write_weights(config_folder: str, folder: Path) -> None:
    """The model with random fp32 weights of seed 0, for all contenders to start from."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_folder), dtype=torch.float32).save_pretrained(folder)


def config_folder(model_id: str, folder: Path) -> str:
    """The folder of the config of a name in configs/models, which all contenders read."""
    from seqloom.capture.architecture import resolve_config

    resolve_config(model_id).save_pretrained(folder)
    return str(folder)


def _pretrained(task: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"dtype": dtype, "attn_implementation": task.get("attention", "sdpa")}
    if task.get("weights"):
        model = AutoModelForCausalLM.from_pretrained(task["weights"], **options)
    else:
        torch.manual_seed(0)
        with torch.device(task["device"]):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(task["compile"]["model_id"]), **options)
    model.to(task["device"]).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _plain_step(model: nn.Module, task: Mapping[str, Any], inside: Any = None) -> Step:
    optimizer = _adamw(model.parameters(), task)

    def step(rows: Rows) -> Tensor:
        if inside is None:
            loss = _own_loss(model, rows)
        else:
            with inside:
                loss = _own_loss(model, rows)
        loss.backward()
        clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _own_loss(model: nn.Module, rows: Rows) -> Tensor:
    """The model's loss; labels that are already those of the next token go by the name that keeps it from shifting them."""
    rows = {name: x.to(model.device, non_blocking=True) for name, x in rows.items()}
    return model(**rows, shift_labels=rows["labels"]).loss


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _adamw(params: Iterable[nn.Parameter], task: Mapping[str, Any]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=task["lr"], betas=BETAS, weight_decay=0.0, fused=True)


def _count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def config_fields(folder: str) -> dict[str, Any]:
    """The fields of a `config.json`."""
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))

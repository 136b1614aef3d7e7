"""A transformers model whose attention is `magi`: packed documents over 1 to 4 ranks give the loss and gradients of each document alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from procs import run_ranks
from torch import Tensor, nn

from custom_ops.magi_attention import dispatch, get_position_ids, magi_attn_varlen_key
from seqloom.errors import UserError

CU = (0, 13, 14, 50, 96)
VOCAB = 61


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},  # the first layer sees everything
}


def model(family: str, implementation: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model(family, **sizes, num_attention_heads=4, num_key_value_heads=2, **FAMILIES[family])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float64)


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and position ids that start again in every document."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(VOCAB, (CU[-1],), generator=generator) for _ in range(2))
    return ids, labels, torch.cat([torch.arange(end - start) for start, end in zip(CU, CU[1:], strict=False)])


def alone(family: str) -> dict[str, Tensor]:
    """Every document by itself, with PyTorch's attention (eager rounds the softmax to fp32)."""
    whole = model(family, "sdpa")
    ids, labels, _ = data()
    loss = torch.zeros((), dtype=torch.float64)
    for start, end in zip(CU, CU[1:], strict=False):
        loss = loss + F.cross_entropy(whole(ids[None, start:end]).logits[0], labels[start:end], reduction="sum")
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in whole.named_parameters()}}


def packed(rank: int, world_size: int, family: str) -> dict[str, Tensor]:
    """All documents in one sequence over the ranks."""
    import custom_ops.magi_hugging_face  # noqa: F401 - registers

    split = model(family, "Magi_Attention" if world_size == 2 else "magi")
    group = dist.group.WORLD if world_size > 1 else None
    key = magi_attn_varlen_key(CU, CU, 4, 2, 8, chunk_size=8, causal=True, cp_group_or_mesh=group)
    ids, labels, positions = (dispatch(x, key) for x in data())
    labels = torch.where(get_position_ids(key) < CU[-1], labels, -100)
    loss = F.cross_entropy(split(ids[None], position_ids=positions[None]).logits[0], labels, reduction="sum", ignore_index=-100)
    loss.backward()
    found = {"loss": loss.detach(), **{name: parameter.grad for name, parameter in split.named_parameters()}}
    for x in found.values():
        dist.all_reduce(x)
    return found


@pytest.mark.parametrize(("family", "ranks"), [("llama", 1), ("llama", 2), ("llama", 4), ("mistral", 1), ("mistral", 2), ("qwen3", 2)])
def test_packed_documents_give_what_each_gives_alone(family: str, ranks: int) -> None:
    wanted, found = alone(family), run_ranks(packed, ranks, family)[0]
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x, rtol=1e-10, atol=1e-12)


def test_what_the_key_does_not_know_is_refused() -> None:
    from custom_ops.magi_hugging_face import magi_attention_forward as attend

    q, layer = torch.zeros(1, 2, 4, 8), nn.Identity()
    with pytest.raises(UserError, match="takes one sequence and got 2"):
        attend(layer, *[torch.zeros(2, 2, 4, 8)] * 3, None)
    with pytest.raises(UserError, match="no dropout"):
        attend(layer, q, q, q, None, dropout=0.1)
    with pytest.raises(UserError, match="leave attention_mask out"):
        attend(layer, q, q, q, torch.zeros(4, 4))

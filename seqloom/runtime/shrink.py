"""A small model of the same structure: the config on which a plan is proved.

Widths, vocabulary, depth and sliding windows shrink; the numbers of heads stay, because plans split them. Sizes are multiples of the ranks,
so that every split of the plan still divides. Every kind of layer that the model has is among the few that are left. A plan of more ranks
than a machine can run is proved on a mesh of the same axes with fewer ranks.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from math import lcm, prod
from typing import TYPE_CHECKING

from seqloom.errors import UserError
from seqloom.plan.solver import Decisions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEAD_DIM = 8
LAYERS = 4
WINDOW = 7  # rows: shorter than most documents of the rows that a plan is proved on


def shrink(config: PretrainedConfig, ranks: int) -> PretrainedConfig:
    """A copy of `config` with few layers and narrow widths that divide by `ranks`; numbers of heads as they are."""
    small = copy.deepcopy(config)
    kinds = list(getattr(config, "layer_types", None) or [])
    heads = config.num_attention_heads
    unit = lcm(ranks, heads)
    narrow = {
        "hidden_size": HEAD_DIM * unit if getattr(config, "head_dim", None) is None else 8 * lcm(ranks, 8),
        "intermediate_size": 16 * ranks,
        "n_inner": 16 * ranks,
        "num_hidden_layers": min(max([LAYERS, *(kinds.index(kind) + 1 for kind in kinds)]), config.num_hidden_layers),
        "vocab_size": 32 * ranks + 64,
        "max_position_embeddings": 4096,
    }
    for name, value in narrow.items():
        if hasattr(small, name):
            setattr(small, name, value)
    if getattr(config, "head_dim", None) is not None:
        small.head_dim = HEAD_DIM
    if kinds:
        small.layer_types = kinds[: small.num_hidden_layers]
    if isinstance(getattr(config, "sliding_window", None), int):
        small.sliding_window = min(config.sliding_window, WINDOW)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)
    return small


def narrow(config: PretrainedConfig, decisions: Decisions, ranks: int) -> tuple[PretrainedConfig, Decisions]:
    """The decisions over a mesh with `ranks` ranks on every axis, and a config for it: where axes split the query heads of a key/value
    head, which needs key/value heads that other axes have split down to one, there are so few of these.

    Raises `UserError` for fewer than two ranks.
    """
    if ranks < 2:
        raise UserError(f"--ranks_per_axis {ranks} leaves nothing of the plan's splits to prove: give 2 or more")
    axes = tuple(replace(axis, size=ranks) for axis in decisions.axes)
    grouped = [splits for clusters in decisions.splits.values() for splits in clusters if "g" in splits]
    if grouped:
        config, groups = copy.deepcopy(config), config.num_attention_heads // config.num_key_value_heads
        config.num_key_value_heads = max(prod(ranks for split in splits if split == "k") for splits in grouped)
        config.num_attention_heads = groups * config.num_key_value_heads
    return config, replace(decisions, axes=axes)

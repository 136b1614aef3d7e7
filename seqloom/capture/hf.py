"""The Hugging Face side of capture: a causal language model on the meta device whose attention is one operator of ours.

In: a `PretrainedConfig`. Out: an `nn.Module` without weights. Nothing global stays changed: the attention function is registered with
transformers only inside `attention_operator()`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seqloom.errors import UserError
from seqloom.graph import Graph

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "seqloom"
ATTENTION_OP = "seqloom.ops.attention:attention"


def build_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config` on meta, in training mode, with parameters of `dtype`.

    Raises `UserError` where transformers knows no causal language model for the config, or cannot build it.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    try:
        with torch.device("meta"), attention_operator():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    except KeyError as error:
        if ATTENTION not in error.args:
            raise
        raise UserError(
            f"{config.model_type} has attention code of its own and accepts no other, so capture cannot tell where its attention is; "
            "use a model built on transformers' attention interface."
        ) from error
    except (ValueError, ImportError) as error:
        reason = _first_line(error)
        raise UserError(f"transformers cannot build a causal language model from this config ({reason}); check model_type.") from error
    return model.train()


@contextlib.contextmanager
def attention_operator() -> Iterator[None]:
    """Make `attn_implementation="seqloom"` known to transformers.

    No mask function goes with it: transformers builds no mask for an attention implementation that has none, so the l x l mask of the
    stock implementations (17 GB at 128K tokens) never enters the trace. Causality and the window travel as arguments instead.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attention_forward
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[ATTENTION]


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls: query `[b, h, l, e]`, key and value `[b, g, l, e]`; returns `[b, l, h, e]`."""
    from seqloom.ops.attention import attention

    _refuse_unsupported(module, attention_mask, kwargs)
    scale = kwargs.get("scaling")
    causal = kwargs.get("is_causal")
    options = {"window": kwargs.get("sliding_window"), "softcap": kwargs.get("softcap")}
    out = attention(
        query,
        key,
        value,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        **{name: option for name, option in options.items() if option is not None},
    )
    return out.transpose(1, 2), None


def _refuse_unsupported(module: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    """A `UserError` for what `seqloom.ops.attention` cannot express."""
    name = type(module).__name__
    if kwargs.get("dropout"):
        raise _dropout_error(kwargs["dropout"], name, getattr(module, "config", None))
    if attention_mask is not None:
        raise UserError(f"{name} passes an attention mask of its own, which seqloom cannot split; use a model with causal attention.")
    for extra in ("s_aux", "position_bias", "head_mask"):
        if kwargs.get(extra) is not None:
            raise UserError(f"{name} passes {extra} to its attention, which seqloom has no operator for; use a model without it.")


def refuse_dropout(graph: Graph, config: PretrainedConfig) -> None:
    """Raise `UserError` where a dropout is on in the (simplified) graph."""
    for node in graph.nodes:
        if "dropout" in node.op:
            raise _dropout_error(node.args[1], node.module or graph.name, config)


def check_attention(graph: Graph, config: PretrainedConfig) -> None:
    """Raise `UserError` where the graph may attend to other positions than the model does.

    The trace has no masks (see `attention_operator`): a model that does not call our operator, or that says in its mask alone what a
    position sees, would come out wrong without a word.
    """
    attention = [dict(node.kwargs) for node in graph.nodes if node.op == ATTENTION_OP]
    if not attention:
        raise UserError(f"{graph.name} does not take its attention from transformers' attention interface; use a model that does.")
    kinds = getattr(config, "layer_types", None) or []
    if "chunked_attention" in kinds:
        raise UserError(f"{graph.name} has layers of chunked attention, which seqloom has no operator for; use full or sliding attention.")
    windows = sum(kwargs.get("window") is not None for kwargs in attention)
    if "sliding_attention" in kinds and not windows:
        raise UserError(f"{graph.name} applies its sliding window by a mask only, which capture cannot see; set sliding_window to None.")


def _dropout_error(probability: Any, where: str, config: PretrainedConfig | None) -> UserError:
    """The error for a dropout that is on, naming the fields of the config that may have turned it on."""
    entries = config.to_dict() if config is not None else {}
    named = {name: value for name, value in entries.items() if "dropout" in name or name.endswith("pdrop")}
    # These two belong to classification heads, which a causal language model does not have.
    fields = [name for name, value in named.items() if value and not name.startswith(("classifier", "summary"))]
    fix = f"set {', '.join(fields)} to 0 in the model's config" if fields else "set it to 0"
    return UserError(f"dropout with p={probability} in {where} would give other numbers under every way to split the model; {fix}.")


def tied_keys(model: nn.Module) -> dict[str, str]:
    """Alias -> canonical key of every parameter that has several state-dict keys; the canonical key is the first in state-dict order."""
    first: dict[int, str] = {}
    tied = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        canonical = first.setdefault(id(tensor), key)
        if canonical != key:
            tied[key] = canonical
    return tied


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

"""`magi` and `Magi_Attention` as attention implementations of transformers.

Import this module, make a key for every batch, dispatch ids, labels and position ids with it, and any model built with
`attn_implementation="magi"` attends over the ranks of the key's group:

    key = magi_attn_varlen_key(cu_seqlens, cu_seqlens, causal=True, cp_group_or_mesh=group)
    logits = model(dispatch(ids, key)[None], position_ids=dispatch(positions, key)[None]).logits

The key is the one made last, or the `magi_key` that the model is called with. It alone says who attends whom, cut to the window of layers
that have a sliding one; the model's own mask is not built.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from custom_ops.magi_attention import calc_attn
from seqloom.errors import UserError
from seqloom.magi.key import DistAttnRuntimeKey, latest_key

NAMES = ("magi", "Magi_Attention")


def magi_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    magi_key: DistAttnRuntimeKey | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query `[1, heads, rows, dim]`, key and value with fewer heads -> `[1, rows, heads, dim]`.

    `s_aux` are learned sinks, one a head. Raises `UserError` for more than one sequence, dropout, and a mask of the model's own.
    """
    name = type(module).__name__
    if query.shape[0] != 1:
        raise UserError(f"{name}: magi attention takes one sequence and got {query.shape[0]}: squash the batch into one")
    if dropout:
        raise UserError(f"{name}: magi attention has no dropout, but {dropout} was asked for: set attention_dropout to 0")
    if attention_mask is not None:
        raise UserError(f"{name}: magi attention takes its mask from the key, but the model was given one: leave attention_mask out")
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    own_key = (magi_key or latest_key()).within(sliding_window)
    out, _meta = calc_attn(*rows, own_key, sink=s_aux, softmax_scale=scaling, softcap=softcap or 0.0)
    return out.unsqueeze(0), None


for _name in NAMES:
    ALL_ATTENTION_FUNCTIONS.register(_name, magi_attention_forward)

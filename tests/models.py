"""Tiny configs of many model families, and the original model's loss and gradients in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from seqloom.capture.float64 import Float64Mode

VOCAB = 96
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _family(cls: Callable[..., PretrainedConfig], **changes: Any) -> Callable[[int], PretrainedConfig]:
    return lambda layers: cls(**{**_SIZES, "num_hidden_layers": layers, **changes})


def _gpt2(layers: int) -> PretrainedConfig:
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_head=4, n_layer=layers, **tokens, **off)


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, Callable[[int], PretrainedConfig]] = {
    "llama": _family(LlamaConfig, tie_word_embeddings=False),
    "llama_tied": _family(LlamaConfig, tie_word_embeddings=True),
    "llama_biased": _family(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama_rope_scaled": _family(LlamaConfig, rope_parameters=_LLAMA3_ROPE),
    "qwen2": _family(Qwen2Config),
    "qwen3": _family(Qwen3Config, head_dim=16),
    "gpt2": _gpt2,
    "mistral": _family(MistralConfig, sliding_window=5),
    "gemma2": _family(Gemma2Config, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "gemma3": _family(Gemma3TextConfig, head_dim=8, sliding_window=5, query_pre_attn_scalar=8),
    "olmo2": _family(Olmo2Config),
    "phi3": _family(Phi3Config, resid_pdrop=0.0, embd_pdrop=0.0),
    "granite": _family(GraniteConfig, logits_scaling=2.0),
    "smollm3": _family(SmolLM3Config),
    "starcoder2": _family(Starcoder2Config, residual_dropout=0.0, embedding_dropout=0.0),
    "cohere": _family(CohereConfig),
    "gpt_neox": _family(GPTNeoXConfig, hidden_dropout=0.0, attention_dropout=0.0),
}


def batch(batch_size: int, seq_len: int, seed: int = 0) -> dict[str, Tensor]:
    """Random `input_ids`, `labels` (some ignored) and `position_ids` `[b, l]`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch_size, seq_len + 1), generator=generator)
    labels = ids[:, 1:].masked_fill(torch.rand(batch_size, seq_len, generator=generator) < 0.2, -100)
    positions = torch.arange(seq_len).expand(batch_size, seq_len)
    return {"input_ids": ids[:, :-1].contiguous(), "position_ids": positions.contiguous(), "labels": labels}


def original_model(config: PretrainedConfig, seed: int = 0) -> torch.nn.Module:
    """The Hugging Face model in float64, every parameter random (so that no scale of 1 or bias of 0 hides a mistake)."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager", dtype=torch.float64).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model.train()


def original_loss(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Sum of the per-token losses in float64."""
    with Float64Mode():
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), ignore_index=-100, reduction="sum")


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by key, aliases included."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}

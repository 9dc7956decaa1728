"""Tiny random models of several families, and the dense reference that splices are compared with."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen3Config

import redknot_hf  # noqa: F401  # registers "redknot"

SHAPE = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)


def config_of(family: str):
    if family == "llama":
        return LlamaConfig(**SHAPE)
    if family == "qwen3":
        return Qwen3Config(**SHAPE)
    if family == "mistral-sliding":
        return MistralConfig(**SHAPE, sliding_window=24)
    if family == "gemma3":
        return Gemma3TextConfig(
            **SHAPE,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=16,
        )
    raise ValueError(family)


FAMILIES = ["llama", "qwen3", "mistral-sliding", "gemma3"]
_made: dict[str, torch.nn.Module] = {}


def tiny(family: str):
    """A model with weights large enough that attention is far from uniform; fp32, the same every time."""
    if family not in _made:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config_of(family), attn_implementation="redknot").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.normal_(0, 0.12 if "embed" not in name and "lm_head" not in name else 0.6)
        _made[family] = model.float()
    return _made[family]
